"""SD3: what it has beside other models: a second attention, and a last block whose text ends."""

import pytest
import torch
from checkpoint_helpers import make
from diffusers.models.attention_processor import JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from fusion_helpers import unfused
from helpers import in_dtype, output, relative_error, sd3_call, tiny_sd3

from rtlynx import Recipe, sparsify
from rtlynx.models import make_plan, sparse_layers

BLOCK, LAST = "transformer_blocks.0", "transformer_blocks.1"
CLOSE = 2e-2  # of the same products of inputs that were rounded to bfloat16 once less


def model_and_call(dtype=torch.bfloat16, **changes):
    return tiny_sd3(**changes).to(dtype), in_dtype(sd3_call(), dtype)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_each_input_is_prepared_once_and_multiplied_once(calls):
    model, call = model_and_call()
    output(sparsify(model), call)
    # Of the image: q, k, v of three attentions, MLP up and down of two blocks; attentions out alone.
    assert calls == {"adaln_compress": 5, "gelu_compress": 2, "gemm_joint": 7, "linear": 3}
    calls.clear()
    model, call = model_and_call()
    output(sparsify(model, Recipe.dense_fp8()), call)
    # Text, too: q, k, v of both blocks and the first one's MLP.
    assert calls == {"adaln_quantize": 8, "gelu_quantize": 3}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("changes", [{}, {"dual_attention_layers": (), "qk_norm": None}])
def test_a_fused_model_that_drops_nothing_is_the_dense_model_bit_for_bit(dtype, changes):
    model, call = model_and_call(dtype, **changes)
    expected = output(model, call)
    sparsify(model, Recipe.immediate(n=4, m=4, text_stream="sparse"))
    assert all("forward" in vars(model.get_submodule(block)) for block in (BLOCK, LAST))
    assert torch.equal(output(model, call), expected)
    assert torch.equal(output(unfused(model), call), expected)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_a_batch_has_a_modulation_for_each():
    model, call = sparsify(tiny_sd3().bfloat16()), in_dtype(sd3_call(batch=2), torch.bfloat16)
    call["timestep"] = torch.tensor([900.0, 200.0])
    y = output(model, call)
    assert relative_error(y, output(unfused(model), call)) < CLOSE
    assert relative_error(y[1:], output(model, {name: one[1:] for name, one in call.items()})) < CLOSE


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_an_mlp_in_chunks_is_diffusers_own(calls):
    model, call = model_and_call()
    sparsify(model)
    expected = output(model, call)
    calls.clear()
    for block in model.transformer_blocks:  # (of diffusers 0.42 the model's own method finds no block)
        block.set_chunk_feed_forward(4, dim=1)
    assert relative_error(output(model, call), expected) < CLOSE
    assert not any(name.endswith("_compress") for name in calls)


@torch.no_grad()
@pytest.mark.usefixtures("_served")
def test_an_ip_adapter_reads_the_fused_input(calls):
    model, call = model_and_call()
    without = output(sparsify(model), call)
    torch.manual_seed(0)
    adapter = SD3IPAdapterJointAttnProcessor2_0(128, 64, 32, timesteps_emb_dim=48).bfloat16()
    model.get_submodule(BLOCK).attn.set_processor(adapter)
    adapter.to_v_ip.weight.mul_(8)
    picture = {"ip_hidden_states": torch.randn(1, 5, 64), "temb": torch.randn(1, 48)}
    call["joint_attention_kwargs"] = in_dtype(picture, torch.bfloat16)
    expected = output(unfused(model), call)
    calls.clear()
    y = output(model, call)
    assert calls["adaln_compress"] == 5
    assert relative_error(y, expected) < CLOSE
    assert relative_error(y, without) > CLOSE


@torch.no_grad()
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize("attention", ["attn", "attn2"])
def test_a_replaced_processor_gets_tensors(attention):
    model, call = model_and_call()
    sparsify(model)
    expected = output(unfused(model), call)
    seen = []

    class Watching(JointAttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            seen.append(hidden_states * 2)
            return super().__call__(attn, hidden_states, *args, **kwargs)

    model.get_submodule(f"{BLOCK}.{attention}").set_processor(Watching())
    assert relative_error(output(model, call), expected) < CLOSE
    assert len(seen) == 1


def test_values_of_both_attentions_are_rotated_and_the_last_text_is_read_by_the_image_alone():
    plan = make_plan(tiny_sd3(), Recipe.immediate(rotate_values=True, text_stream="sparse"))
    readers = {one.name: one.readers for one in plan.rotated}
    assert readers == {
        f"{BLOCK}.attn": (f"{BLOCK}.attn.to_out.0", f"{BLOCK}.attn.to_add_out"),
        f"{BLOCK}.attn2": (f"{BLOCK}.attn2.to_out.0",),
        f"{LAST}.attn": (f"{LAST}.attn.to_out.0",),
    }
    assert not plan.unrotated


@torch.no_grad()
def test_rotated_values_take_no_ip_adapter():
    """It mixes values of its own with those of the image, which are in another basis then."""
    adapter = SD3IPAdapterJointAttnProcessor2_0(128, 64, 32, timesteps_emb_dim=48)
    recipe, before = Recipe.immediate(rotate_values=True), tiny_sd3()
    before.get_submodule(BLOCK).attn.set_processor(adapter)
    assert f"{BLOCK}.attn" in make_plan(before, recipe).unrotated
    after = make(recipe, tiny_sd3, sd3_call)
    after.get_submodule(BLOCK).attn.set_processor(adapter)
    with pytest.raises(RuntimeError, match="processor"):
        output(after, sd3_call())


def test_every_layer_of_the_text_may_be_sparse():
    layers = sparse_layers(sparsify(tiny_sd3(), Recipe.immediate(text_stream="sparse")))
    assert len([name for name in layers if "add_" in name or "context" in name]) == 9
