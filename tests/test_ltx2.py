"""LTX-2: what it has beside other models: two streams that read each other, timesteps by token, variants."""

import copy

import pytest
import torch
from fusion_helpers import count_calls, serve, unfused
from helpers import (
    IMAGE_TOKENS,
    hunyuan_video15_call,
    in_dtype,
    ltx2_call,
    ltx_call,
    output,
    relative_error,
    tiny_hunyuan_video15,
    tiny_ltx,
    tiny_ltx2,
)
from torch import nn

from rtlynx import Recipe, sparsify
from rtlynx.models import make_plan, sparse_layers

BLOCK = "transformer_blocks.0"
CLOSE = 2e-2  # of the same products of inputs that were rounded to bfloat16 once less
# LTX-2.3 and 2.5: gates of heads, modulation around prompts, values without attention on demand.
LATER = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "perturbed_attn": True,
    "ff_bias": False,
}
KEEPS_ALL = Recipe.immediate(n=4, m=4, text_stream="sparse")


def with_sigma(call):
    return {**call, "sigma": call["timestep"]}


def by_token():
    """As beside a given picture: the tokens of the first frame are at timestep 0."""
    call = ltx2_call()
    timestep = torch.full((1, IMAGE_TOKENS), 0.5)
    timestep[:, : IMAGE_TOKENS // 2] = 0
    return {**call, "timestep": timestep, "audio_timestep": call["timestep"]}


CASES = {
    "batch": ({}, lambda: ltx2_call(batch=2)),
    "each modality alone": ({}, lambda: {**ltx2_call(), "isolate_modalities": True}),
    "a timestep for each token": ({}, by_token),
    "norms with weights": ({"norm_elementwise_affine": True}, ltx2_call),
    "another activation": ({"activation_fn": "gelu"}, ltx2_call),
    "2.3": (LATER, lambda: with_sigma(ltx2_call())),
    "2.3, values alone": (
        LATER,
        lambda: {**with_sigma(ltx2_call()), "spatio_temporal_guidance_blocks": [0]},
    ),
    "2.5": ({**LATER, "use_prompt_adaln_single": False}, lambda: with_sigma(ltx2_call())),
}


@pytest.fixture
def calls(monkeypatch):
    serve(monkeypatch)
    return count_calls(monkeypatch)


def of(counts):
    """Without the products of layers alone."""
    return {name: count for name, count in counts.items() if name.endswith(("_compress", "_quantize"))}


@torch.no_grad()
def test_each_input_is_prepared_once(calls):
    call = in_dtype(ltx2_call(), torch.bfloat16)
    output(sparsify(tiny_ltx2().bfloat16()), call)
    # Of video alone: q, k, v; the query of audio, keys and values for audio; MLP up. The query of the prompt.
    assert of(calls) == {"rms_adaln_compress": 4, "rmsnorm_compress": 1, "gelu_compress": 1}
    assert calls["linear"] == 3  # attentions out
    calls.clear()
    output(sparsify(tiny_ltx2().bfloat16(), Recipe.dense_fp8()), call)
    assert of(calls) == {"rms_adaln_quantize": 8, "rmsnorm_quantize": 2, "gelu_quantize": 2}


@torch.no_grad()
def test_each_input_of_the_others_is_prepared_once(calls):
    output(sparsify(tiny_ltx().bfloat16()), in_dtype(ltx_call(), torch.bfloat16))
    assert of(calls) == {"rms_adaln_compress": 2, "gelu_compress": 1}
    calls.clear()
    call = in_dtype(hunyuan_video15_call(), torch.bfloat16)
    output(sparsify(tiny_hunyuan_video15().bfloat16(), Recipe.dense_fp8()), call)
    assert of(calls) == {"adaln_quantize": 4, "gelu_quantize": 2}


@torch.no_grad()
def test_a_timestep_of_each_token_is_fused(calls):
    call = in_dtype(by_token(), torch.bfloat16)
    model = sparsify(tiny_ltx2().bfloat16())
    expected = output(model, call)
    # The exchange with sound included; the text stream and sound are dense.
    assert of(calls) == {"rms_adaln_of_tokens_compress": 4, "rmsnorm_compress": 1, "gelu_compress": 1}
    assert not torch.equal(output(unfused(model), call), expected)  # (rounded once more)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(output(model, call), expected)
    calls.clear()
    timestep = in_dtype({"timestep": by_token()["timestep"]}, torch.bfloat16)
    model, call = tiny_ltx().bfloat16(), {**in_dtype(ltx_call(), torch.bfloat16), **timestep}
    exact = output(copy.deepcopy(model).float(), in_dtype(call, torch.float32))
    y = output(sparsify(model, Recipe.dense_fp8()), call)
    assert of(calls) == {"rms_adaln_of_tokens_quantize": 2, "gelu_quantize": 1}
    assert relative_error(y, exact) < 1.4 * relative_error(output(unfused(model), call), exact)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_a_fused_block_that_drops_nothing_is_the_dense_block_bit_for_bit(name, dtype):
    changes, make = CASES[name]
    model, call = tiny_ltx2(**changes).to(dtype), in_dtype(make(), dtype)
    expected = output(model, call)
    sparsify(model, KEEPS_ALL)
    assert len(sparse_layers(model)) == 6 * 4 + 2 * 2
    assert "forward" in vars(model.get_submodule(BLOCK))
    assert torch.equal(output(model, call), expected)


@torch.no_grad()
@pytest.mark.parametrize("recipe", [Recipe.immediate(precision="fp8"), Recipe.dense_fp8()])
@pytest.mark.parametrize("name", CASES)
def test_fused_it_is_as_near_to_float32(name, recipe, calls):
    changes, make = CASES[name]
    model, call = tiny_ltx2(**changes).bfloat16(), in_dtype(make(), torch.bfloat16)
    sparsify(model, recipe)
    exact = output(copy.deepcopy(model).float(), in_dtype(call, torch.float32))
    expected = output(unfused(model), call)
    calls.clear()
    assert relative_error(output(model, call), exact) < 1.4 * relative_error(expected, exact)
    assert any(one.startswith(("gelu", "rms")) for one in calls)


@torch.no_grad()
def test_called_by_position_a_block_is_that_of_diffusers():
    model = sparsify(tiny_ltx2())
    seen = {}
    handle = model.get_submodule(BLOCK).register_forward_pre_hook(
        lambda _block, _args, call: seen.update(call), with_kwargs=True
    )
    output(model, ltx2_call())
    handle.remove()
    block, (first, *others) = model.get_submodule(BLOCK), seen.items()
    for one, other in zip(block(first[1], **dict(others)), block(**seen), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("part", ["attn1", "audio_to_video_attn", "ff", "ff.net.2"])
def test_whoever_hooks_a_part_sees_tensors(part, calls):
    model, call = sparsify(tiny_ltx2().bfloat16()), in_dtype(ltx2_call(), torch.bfloat16)
    expected, seen = output(unfused(model), call), []
    model.get_submodule(f"{BLOCK}.{part}").register_forward_pre_hook(lambda _module, args: seen.extend(args))
    assert relative_error(output(model, call), expected) < 2 * CLOSE
    assert seen
    assert all(isinstance(one, torch.Tensor) for one in seen)


@torch.no_grad()
def test_a_fused_block_is_one_graph(calls):
    model, call = sparsify(tiny_ltx2().bfloat16()), in_dtype(ltx2_call(), torch.bfloat16)
    expected = output(model, call)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert relative_error(output(model, call), expected) < CLOSE


def test_sound_is_a_stream_of_its_own():
    model = tiny_ltx2(**LATER)
    gates = [name for name, one in model.named_modules() if name.endswith("to_gate_logits")]
    assert len(gates) == 6
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in gates)
    formats = {
        layer.candidate.stream: layer.format.name
        for layer in make_plan(model, Recipe.immediate(precision="fp8")).layers
    }
    assert formats == {"image": "fp8-sparse", "audio": "fp8-dense", "text": "fp8-dense"}
    sparse = make_plan(model, Recipe.immediate(text_stream="sparse"))
    assert len(sparse.sparse) == len(sparse.layers) == 6 * 4 + 2 * 2
    assert not set(gates) & {layer.name for layer in sparse.layers}
