"""Blocks of Wan: fused, with a timestep for each token, with a picture, and beside adapters and caches."""

import copy
from dataclasses import replace

import pytest
import torch
from compose_helpers import adapter, formulas
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from fusion_helpers import count_calls, serve, unfused
from helpers import (
    in_dtype,
    output,
    relative_error,
    tiny_wan,
    tiny_wan_of_picture,
    wan_call,
    wan_picture_call,
    watched,
)
from video_pipelines import VIDEO_PIPELINES, wan

from rtlynx import Budget, CalibrationOptions, Recipe, calibrate, densify, load, save, schedule, sparsify
from rtlynx.models import sparse_layers
from rtlynx.nn.prologue import Modulation, adaln_float32, affine_layernorm
from rtlynx.ops import sparse_linear as ops
from rtlynx.ops.prologues import COMPRESS, QUANTIZE

TOKENS = 64
FP8 = Recipe.immediate(precision="fp8")


def bfloat16(model, call):
    return model.bfloat16(), in_dtype(call, torch.bfloat16)


def by_token(**changes):
    """A call as in Wan 2.2 5B from a picture: the tokens of the first frame are at timestep 0."""
    call = wan_call(**changes)
    timestep = call["timestep"][:, None].repeat(1, TOKENS)
    timestep[:, : TOKENS // 2] = 0
    return {**call, "timestep": timestep}


@pytest.fixture
def calls(monkeypatch):
    serve(monkeypatch)
    return count_calls(monkeypatch)


# ------------------------------------------------------------------------------------------ fused blocks


@torch.no_grad()
def test_each_input_of_a_block_is_compressed_once_and_multiplied_once(calls):
    model, call = bfloat16(tiny_wan(num_layers=2), wan_call())
    output(sparsify(model), call)
    # A block: self-attention's q, k and v; cross-attention's q; both layers of the MLP.
    assert calls["adaln_compress"] == 2 * 3
    assert calls["gelu_compress"] == 2
    assert calls["gemm_joint"] == 2 * 4
    assert calls["linear"] == 2 * 2  # attentions out
    assert calls["compress"] == calls["gemm"] == 0


@torch.no_grad()
def test_each_input_of_dense_fp8_layers_is_quantised_once(calls):
    model, call = bfloat16(tiny_wan_of_picture(), wan_picture_call())
    output(sparsify(model, Recipe.dense_fp8()), call)
    assert calls == {"adaln_quantize": 3, "gelu_quantize": 1}


@torch.no_grad()
@pytest.mark.parametrize("recipe", [Recipe.immediate(), FP8, Recipe.dense_fp8()])
@pytest.mark.parametrize(
    ("build", "make"),
    [(tiny_wan, by_token), (tiny_wan_of_picture, wan_picture_call), (tiny_wan, lambda: wan_call(batch=2))],
)
def test_a_fused_block_is_as_near_to_float32(build, make, recipe, calls):
    model, call = bfloat16(build(), make())
    sparsify(model, recipe)
    exact = output(copy.deepcopy(model).float(), in_dtype(call, torch.float32))
    expected = output(unfused(model), call)
    calls.clear()
    y = output(model, call)
    assert any(name.endswith(("_compress", "_quantize")) for name in calls)
    assert relative_error(y, exact) < 1.4 * relative_error(expected, exact)


@torch.no_grad()
def test_as_from_pretrained_loads_it_with_norms_and_modulation_in_float32(calls, tmp_path):
    tiny_wan().save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    call = in_dtype(wan_call(), torch.bfloat16)
    block = model.blocks[0]
    assert block.scale_shift_table.dtype == block.norm2.weight.dtype == torch.float32
    assert block.attn1.to_q.weight.dtype == torch.bfloat16
    sparsify(model, FP8)
    exact = output(copy.deepcopy(model).float(), in_dtype(call, torch.float32))
    expected = output(unfused(model), call)
    calls.clear()
    y = output(model, call)
    assert (calls["adaln_compress"], calls["gelu_compress"]) == (3, 1)
    assert relative_error(y, exact) < 1.4 * relative_error(expected, exact)


@torch.no_grad()
def test_a_timestep_of_each_token_is_fused(calls):
    model, call = bfloat16(tiny_wan(), by_token(batch=2))
    output(sparsify(model), call)
    assert calls["adaln_of_tokens_compress"] == 2
    assert calls["adaln_compress"] == 1  # norm and weights before cross-attention
    assert calls["gelu_compress"] == 1
    expected = output(model, call)
    assert not torch.equal(output(unfused(model), call), expected)  # (rounded once more)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(output(model, call), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("build", "make"), [(tiny_wan, by_token), (tiny_wan, wan_call), (tiny_wan_of_picture, wan_picture_call)]
)
def test_where_nothing_is_dropped_a_block_is_the_dense_one_bit_for_bit(build, make, dtype):
    model, call = build().to(dtype), in_dtype(make(), dtype)
    expected = output(model, call)
    sparsify(model, Recipe.immediate(n=4, m=4, text_stream="sparse"))
    assert torch.equal(output(model, call), expected)
    assert torch.equal(output(unfused(model), call), expected)


@torch.no_grad()
@pytest.mark.parametrize(("weights", "limit"), [(None, 1.01), ((0.25, 1.75), 1.01), ((0.1, 0.3), 1.04)])
def test_the_kernels_norm_is_as_near_to_its_formula_as_the_models(weights, limit):
    """Modulation and weights in float32, as `from_pretrained` keeps them, which kernels read in bfloat16."""
    block, gen = tiny_wan().blocks[0], torch.Generator().manual_seed(2)
    x = (3 + torch.randn(2, 40, 128, generator=gen)).bfloat16()
    shift, scale = 0.5 * torch.randn(2, 2, 1, 128, generator=gen)
    norm = block.norm1 if weights is None else block.norm2
    exact = (x.double() - x.double().mean(-1, keepdim=True)) / (
        x.double().var(-1, correction=0, keepdim=True) + 1e-6
    ).sqrt()
    if weights is not None:
        norm.weight.uniform_(*weights, generator=gen)
        prologue = affine_layernorm(norm, x)
        exact = exact * norm.weight.double() + norm.bias.double()
    else:
        prologue = adaln_float32(norm, x, Modulation(shift), Modulation(scale))
        exact = exact * (1 + scale.double()) + shift.double()
    assert relative_error(prologue.dense(), exact) < 2**-8
    values, t = QUANTIZE["adaln"](*prologue.arguments)
    from_model, t_model = QUANTIZE["identity"](prologue.dense())
    errors = [relative_error(v.float() * s, exact) for v, s in ((values, t), (from_model, t_model))]
    assert errors[0] < limit * errors[1]


@torch.no_grad()
def test_a_block_without_a_norm_before_cross_attention(calls):
    model, call = bfloat16(tiny_wan(cross_attn_norm=False), wan_call())
    sparsify(model)
    expected = output(unfused(model), call)
    calls.clear()
    assert relative_error(output(model, call), expected) < 2e-2
    assert calls["adaln_compress"] == 2


@torch.no_grad()
@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("attention", ["attn1", "attn2"])
def test_a_replaced_processor_of_attention_gets_tensors(attention):
    model, call = bfloat16(tiny_wan(), wan_call())
    expected = output(unfused(sparsify(model)), call)
    seen = []

    class Watching(WanAttnProcessor):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            seen.append(hidden_states * 2)
            return super().__call__(attn, hidden_states, *args, **kwargs)

    model.get_submodule(f"blocks.0.{attention}").set_processor(Watching())
    assert relative_error(output(model, call), expected) < 2e-2
    assert [one.shape for one in seen] == [(1, TOKENS, 128)]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 32_760), (4, 75_600)])
def test_long_videos_fit_what_operators_take(batch, tokens):
    """Rows and columns are counted in 32 bits, entries are not: 480p, and four of 720p, of Wan 2.2 14B."""
    hidden = torch.empty(batch, tokens, 13_824, dtype=torch.bfloat16, device="meta")
    values, t = QUANTIZE["gelu"](hidden)
    assert (values.shape, t.shape) == (hidden.shape, (batch, tokens, 1))
    packed = COMPRESS["gelu"](hidden, None, "adjacent", [], True, "fp8-sparse", "magnitude")[0]
    # Tiles of 64 rows; two of four values in a byte each, and four bits for which two they are.
    assert packed.numel() == -(-batch * tokens // 64) * 64 * 13_824 * 5 // 8
    weight = torch.empty(5120, 13_824, dtype=torch.float8_e4m3fn, device="meta")
    scales = [torch.empty(count, device="meta") for count in (batch * tokens, 5120)]
    y = ops.gemm(packed, scales[0], None, weight, None, None, batch * tokens, scales[1])
    assert y.shape == (batch * tokens, 5120)


# --------------------------------------------------------------------------------------- with the others


def test_rotated_values_of_prompt_and_picture_are_undone_by_the_layer_that_reads_their_sum(tmp_path):
    recipe = Recipe(rank=None, ridge=0.1, rotate_values=True, permute_hidden=True, dense_steps=1)
    model, data = tiny_wan_of_picture(), [wan_picture_call(seed, timestep=0.5) for seed in range(2)]
    first = wan_picture_call(timestep=1.0)
    with schedule([1.0, 0.5]):
        expected = [output(model, call) for call in (first, data[0])]
        report = calibrate(model, calls=data, recipe=recipe, progress=False)
        assert not report.unrotated
        assert not report.unpermuted
        drawn = [output(model, call) for call in (first, data[0])]
        save(model, tmp_path)
        again = load(tiny_wan_of_picture(), tmp_path)
        assert all(
            torch.equal(output(again, call), y) for call, y in zip((first, data[0]), drawn, strict=True)
        )
        errors = [relative_error(y, dense) for y, dense in zip(drawn, expected, strict=True)]
        assert errors[0] < 1e-5 < 1e-3 < errors[1]
        assert torch.equal(output(densify(model), first), expected[0])


def test_a_lora_beside_a_fused_block_reads_the_dense_input():
    model = sparsify(tiny_wan())
    plain = formulas(model)
    state, deltas = adapter(model, list(sparse_layers(model)))
    model.load_lora_adapter(state, adapter_name="style")
    with watched(model, deltas) as seen:
        output(model, wan_call())
    for name, ((x, y),) in seen.items():
        assert relative_error(y, plain[name](x) + x @ deltas[name].T) < 2e-6, name


def test_a_first_block_cache_skips_and_draws_what_it_does_layer_by_layer():
    model = sparsify(tiny_wan(num_layers=3))
    drawn, ran = [], []
    for one in (model, unfused(model)):
        one.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        one.blocks[-1].attn1.to_q.register_forward_hook(lambda *_: ran.append(1))
        for timestep in (900.0, 880.0):
            with one.cache_context("cond"):
                drawn.append(output(one, wan_call(timestep=timestep)))
    assert len(ran) == 2  # the last block in the first step of either
    assert torch.equal(torch.stack(drawn[:2]), torch.stack(drawn[2:]))
    assert not torch.equal(drawn[0], drawn[1])


def test_both_transformers_of_wan_2_2_are_calibrated_to_a_budget_and_draw_fused(calls, tmp_path):
    case = VIDEO_PIPELINES["WanPipeline"]
    of = replace(case, models={**case.models, "transformer_2": wan()}, arguments={"boundary_ratio": 0.5})
    settings = {**case.settings, "num_inference_steps": 4}
    given = case.inputs()

    def built():
        pipeline = of.build("WanPipeline").to(torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw(pipeline):
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            return pipeline(**given, **settings, output_type="latent", generator=generator).frames

    pipeline = built()
    recipe = Recipe.recommended(ridge=0.1, budget=Budget(speedup_share=0.8))
    options = CalibrationOptions(steps_per_prompt=4, pipeline_kwargs=settings)
    report = calibrate(pipeline, [case.inputs() for _ in range(3)], recipe, options, progress=False)
    for one in (report, report.others["transformer_2"]):
        assert one.choice.speedup_share >= 0.8
    save(pipeline, tmp_path)
    calls.clear()
    drawn = draw(pipeline)
    passes = 4 * 2  # steps and guidance, of a block each
    assert calls["adaln_compress"] + calls["adaln_quantize"] == 3 * passes
    assert calls["gelu_compress"] + calls["gelu_quantize"] == passes
    assert torch.equal(draw(load(built(), tmp_path)), drawn)
    assert not torch.equal(draw(built()), drawn)
