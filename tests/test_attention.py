"""Attention in eight bits: its definition, the operator, and models that it is put into; no card needed."""

import copy
import math
import pickle

import pytest
import torch
from helpers import (
    IN_FP8_ATTENTION,
    MODELS,
    flux_call,
    output,
    relative_error,
    tiny_flux,
    tiny_qwen,
    tiny_wan,
)

import rtlynx
from rtlynx import Recipe, densify, fp8_attention, sparsify
from rtlynx.cuda import cudnn_attention
from rtlynx.math.attention import attention_fp8 as defined
from rtlynx.math.attention import exponent_below, quantize_values
from rtlynx.math.fp8 import E4M3, E4M3_MAX
from rtlynx.models import attention as models_attention
from rtlynx.models.attention_backend import Fp8Attention
from rtlynx.ops.attention import attention, attention_fp8


def drawn(batch=2, s_q=33, s_kv=50, heads=3, width=64, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, heads, width, generator=gen).to(dtype) for tokens in (s_q, s_kv, s_kv)]


def in_float64(q, k, v, scale):
    s = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v.double())


# ---------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize(("s_q", "s_kv"), [(33, 50), (1, 1), (1, 64), (7, 1)])
def test_it_is_attention_but_for_the_rounding_of_weights_and_output(s_q, s_kv):
    q, k, v = (one.to(E4M3) for one in drawn(s_q=s_q, s_kv=s_kv))
    y = defined(q, k, v, 0.125)
    exact = in_float64(q.float(), k.float(), v.float(), 0.125)
    assert y.shape == q.shape
    assert y.dtype is E4M3
    assert relative_error(y.float(), exact) < (0.05 if s_kv > 1 else 1e-6)


def test_large_outputs_saturate_and_a_nan_stays_one():
    q, k, v = drawn()
    v[:] = E4M3_MAX  # all outputs are the largest number, or a little above it by rounding
    v[0, 3, 1, 5] = torch.nan
    y = defined(*(one.to(E4M3) for one in (q, k, v)), 0.125).float()
    assert bool(y[0, :, 1, 5].isnan().all())
    y[0, :, 1, 5] = E4M3_MAX
    assert bool((y >= 416).all())
    assert bool((y <= E4M3_MAX).all())


@pytest.mark.parametrize("bound", [1e-30, 0.1, 1.7, 1.8, 11.3, 400.0, 421.0, 422.0, 1e6])
def test_an_exponent_is_the_largest_of_its_steps_that_fits(bound):
    exponent = exponent_below(bound)
    assert exponent % 8 == 0
    assert bound * 1.0625 * 2.0**exponent <= E4M3_MAX < bound * 1.0625 * 2.0 ** (exponent + 8)


def test_no_bound_no_exponent():
    assert exponent_below(0.0) == 0
    for bound in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="finite and at least 0"):
            exponent_below(bound)


def test_values_are_centred_and_use_the_middle_of_e4m3():
    v = drawn(s_kv=200)[2] * torch.tensor([1e-8, 1.0, 1e8])[:, None] + 3.0
    values, scale, mean = quantize_values(v)
    assert torch.allclose(mean, v.mean(1, keepdim=True), rtol=1e-4)
    back = values.float() * scale + mean
    assert relative_error(back[:, :, 1] - 3, v[:, :, 1] - 3) < 0.03
    assert relative_error(back[:, :, 2], v[:, :, 2]) < 0.03
    assert 5 <= float(values.float().abs().amax()) <= 16


def test_of_many_tokens_a_part_tells_mean_and_scale():
    v = drawn(1, 1, 4096, 1, 16)[2]
    v[0, 1] = 1e6  # a token that is none of the 11th: far beyond 64 times the others
    values, scale, mean = quantize_values(v)
    assert torch.equal(mean, v[:, ::11].mean(1, keepdim=True))
    assert bool((scale < 1).all())
    assert bool((values[0, 1].float() == E4M3_MAX).all())
    v[0, 1] = 60 * v[:, ::11].abs().amax((0, 1))  # not beyond
    values, scale, mean = quantize_values(v)
    assert relative_error(values.float() * scale + mean, v) < 0.04


def test_a_head_of_zeros_stays_one():
    v = torch.zeros(1, 5, 2, 16)
    values, scale, mean = quantize_values(v)
    assert torch.equal(values.float() * scale + mean, v)


# ------------------------------------------------------------------------------------------ the operator


def test_the_operator_is_one():
    q, k, v = (one.to(E4M3) for one in drawn())
    # (test_schema compares arguments before and after by arithmetic that PyTorch lacks for float8.)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(attention_fp8, (q, k, v, 0.125), test_utils=checks)


@pytest.mark.parametrize("exponents", [(0, 0), (8, -8), (-8, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_around_it_are_the_units_of_its_inputs(exponents, dtype):
    q, k, v = drawn(dtype=dtype)
    q, k = q * 2.0 ** -exponents[0], k * 2.0 ** -exponents[1]
    v = v + 3
    scale = 0.125 * 2.0 ** sum(exponents)
    y = attention(q, k, v, scale=scale, q_exponent=exponents[0], k_exponent=exponents[1])
    exact = in_float64(q, k, v, scale)
    assert y.dtype is dtype
    assert relative_error(y - 3, exact - 3) < 0.1
    plain = attention(*drawn(dtype=dtype)[:2], v, scale=0.125, q_exponent=0, k_exponent=0)
    assert torch.equal(y, plain)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": lambda q: q.float()}, TypeError, "q is float8_e4m3fn, got torch.float32"),
        ({"k": lambda k: k[0]}, ValueError, r"k is \(B, S, H, D\), got shape \(50, 3, 64\)"),
        ({"v": lambda v: v[:, 1:]}, ValueError, "with q's B, H and D"),
        ({"q": lambda q: q[:1]}, ValueError, "with q's B, H and D"),
        ({"k": lambda k: k[:, :0], "v": lambda v: v[:, :0]}, ValueError, "no key"),
        ({"v": lambda v: v.to("meta")}, ValueError, "v is on cpu like q, got meta"),
    ],
)
def test_it_refuses_what_does_not_fit(change, error, message):
    given = dict(zip("qkv", (one.to(E4M3) for one in drawn()), strict=True))
    given |= {name: of(given[name]) for name, of in change.items()}
    with pytest.raises(error, match=message):
        attention_fp8(*given.values(), 1.0)


def test_it_has_no_gradient():
    q, k, v = drawn()
    with pytest.raises(RuntimeError, match="no gradient"):
        attention(q.requires_grad_(), k, v, scale=1.0, q_exponent=0, k_exponent=0)


def test_tensors_are_handed_over_as_the_kernel_reads_them():
    x = torch.zeros(2, 7, 3, 64, dtype=torch.uint8)
    laid_out, strides = cudnn_attention._laid_out, cudnn_attention._strides
    assert laid_out(x) is x
    slices = x.view(2, 7, 192).repeat(1, 1, 2).unflatten(-1, (6, 64))[:, :, 1:4]
    assert laid_out(slices) is slices
    assert strides(slices) == (7 * 384, 384, 64, 1)
    for other in (x[..., ::2], x[..., 1:49], x.transpose(2, 3), x[:, :, :1].expand(-1, -1, 3, -1)):
        copied = laid_out(other)
        assert copied.is_contiguous()
        assert torch.equal(copied, other)
    one = torch.empty_strided((1, 7, 1, 64), (5, 64, 3, 1), dtype=torch.uint8)
    assert laid_out(one) is one
    assert strides(one) == (448, 64, 64, 1)


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(cudnn_attention, "missing_reason", lambda: "it is not installed: pip install it")
    with pytest.raises(ImportError, match="pip install it"):
        cudnn_attention._cudnn()


@pytest.mark.parametrize("width", [8, 72, 272])
def test_head_dimensions_that_the_kernel_does_not_take_are_refused(width):
    q, k, v = (one.to(E4M3) for one in drawn(width=width))
    with pytest.raises(ValueError, match=f"up to 256 that are multiples of 16, got {width}"):
        cudnn_attention.launch(q, k, v, 1.0)


# --------------------------------------------------------------------------------------------- in models


def call_of(name, seed=0):
    call = MODELS[name][1](seed)
    return {**call, "encoder_hidden_states_mask": None} if name == "qwen" else call


def backends(model):
    return [
        module.processor._attention_backend
        for module in model.modules()
        if hasattr(getattr(module, "processor", None), "_attention_backend")
    ]


def test_attentions_that_are_not_dispatched_are_refused():
    # Its processor calls PyTorch's attention.
    with pytest.raises(ValueError, match="SD3Transformer2DModel has no attention that diffusers dispatches"):
        fp8_attention(MODELS["sd3"][0]())


@pytest.mark.parametrize("recipe", [None, Recipe.dense_fp8(), Recipe.immediate(text_stream="sparse")])
@pytest.mark.parametrize("name", IN_FP8_ATTENTION)
def test_a_model_gets_it_and_loses_it_again(name, recipe):
    model, call = MODELS[name][0](), call_of(name)
    if recipe is not None:
        sparsify(model, recipe)
    plain, state = output(model, call), {key: one.clone() for key, one in model.state_dict().items()}
    assert fp8_attention(model) is model
    assert all(isinstance(one, Fp8Attention) for one in backends(model))
    y = output(model, call)
    assert 0 < relative_error(y, plain) < 0.1
    assert state.keys() == model.state_dict().keys()
    assert torch.equal(output(fp8_attention(model), call), y)  # once more is the same
    assert torch.equal(output(copy.deepcopy(model), call), y)
    fp8_attention(model, enabled=False)
    assert not any(isinstance(one, Fp8Attention) for one in backends(model))
    assert torch.equal(output(model, call), plain)
    assert fp8_attention(model, enabled=False) is model  # nothing to take out


def test_every_attention_of_every_block_computes_in_eight_bits(monkeypatch):
    seen = []
    real = torch.ops.rtlynx.attention_fp8.default
    monkeypatch.setattr(
        "rtlynx.ops.attention.attention_fp8", lambda q, *rest: seen.append(q.shape) or real(q, *rest)
    )
    for name in IN_FP8_ATTENTION:
        model = fp8_attention(MODELS[name][0]())
        output(model, call_of(name))
        assert len(seen) == len(backends(model)), name
        seen.clear()


def test_sparsify_and_densify_leave_it_where_it_is():
    model, call = tiny_flux(), flux_call()
    y = output(fp8_attention(model), call)
    sparsify(model, Recipe.immediate(grouping="adjacent"))
    assert len([one for one in backends(model) if isinstance(one, Fp8Attention)]) == 2
    densify(model)
    assert torch.equal(output(model, call), y)


def test_what_is_saved_knows_nothing_of_it(place):
    model, call = sparsify(tiny_flux(), Recipe.immediate()), flux_call()
    rtlynx.save(model, place / "without")
    y = output(fp8_attention(model), call)
    rtlynx.save(model, place / "with")
    files = [sorted(path.name for path in (place / one).iterdir()) for one in ("with", "without")]
    assert files[0] == files[1]
    loaded = tiny_flux()
    rtlynx.load(loaded, place / "with")
    assert not any(isinstance(one, Fp8Attention) for one in backends(loaded))
    assert torch.equal(output(fp8_attention(loaded), call), y)
    assert torch.equal(output(pickle.loads(pickle.dumps(loaded)), call), y)


def test_blocks_of_a_kind_compile_once_in_one_graph():
    model, call = sparsify(tiny_flux(num_layers=0, num_single_layers=3), Recipe.dense_fp8()), flux_call()
    graphs = []
    plain = model, "eager"  # (which graphs there are does not depend on it)
    for one, backend in (plain, (fp8_attention(copy.deepcopy(model)), "aot_eager")):
        expected = output(one, call)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        one.compile_repeated_blocks(fullgraph=True, backend=backend)
        assert relative_error(output(one, call), expected) < 1e-3
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[0] == graphs[1] <= 2  # (single blocks read slices first, then whole tensors)


def test_compiled_it_is_the_same_also_for_other_lengths():
    """(Compiled to code it is tested on cards, whose code that is.)"""

    def call(q, k, v):
        return attention(q, k, v, scale=0.125, q_exponent=0, k_exponent=0)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager_decomp_partition")
    for tokens in (50, 64, 2100):
        given = drawn(1, 8, tokens, 1)
        assert relative_error(compiled(*given), call(*given)) < 1e-3
    torch._dynamo.reset()


def test_a_backend_that_is_set_later_takes_its_place():
    model, call = tiny_flux(), flux_call()
    plain = output(model, call)
    fp8_attention(model)
    model.set_attention_backend("_native_math")
    try:
        y = output(model, call)
        fp8_attention(model, enabled=False)
        assert {one.value for one in backends(model)} == {"_native_math"}
    finally:
        model.reset_attention_backend()
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert relative_error(y, plain) < 1e-5


def test_attentions_that_share_a_processor_get_what_fits_both():
    model = tiny_flux()
    with torch.no_grad():
        model.transformer_blocks[0].attn.norm_added_q.weight.fill_(100.0)
    model.set_attn_processor(type(model.transformer_blocks[0].attn.processor)())
    shared = model.transformer_blocks[0].attn.processor
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor = shared
    fp8_attention(model)
    assert shared._attention_backend.q_exponent == -8
    assert shared._attention_backend.k_exponent == 0


@pytest.mark.parametrize("weight", [1e-3, 1.0, 100.0])
def test_queries_and_keys_fit_whatever_their_norms_give(weight):
    model, call = tiny_flux(), flux_call()
    with torch.no_grad():
        for attn in (model.transformer_blocks[0].attn, model.single_transformer_blocks[0].attn):
            attn.norm_q.weight.fill_(weight)
            attn.norm_k.weight.fill_(1 / weight)
    plain = output(model, call)
    assert 0 < relative_error(output(fp8_attention(model), call), plain) < 0.05


# --------------------------------------------------------------------------------------- what is refused


def test_masks_are_refused():
    model = fp8_attention(tiny_qwen())
    with pytest.raises(ValueError, match="takes no mask"):
        output(model, MODELS["qwen"][1]())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"is_causal": True}, "neither causal"),
        ({"dropout_p": 0.1}, "nor has it dropout"),
        ({"parallel_config": object()}, "takes no context parallelism"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Fp8Attention(0, 0, None)(*drawn(), **given)


def refused(model, error, message):
    before = backends(model)
    with pytest.raises(error, match=message):
        fp8_attention(model)
    assert backends(model) == before


def test_models_that_it_cannot_serve_are_refused_whole():
    refused(tiny_flux(attention_head_dim=24, axes_dims_rope=(8, 8, 8)), ValueError, r"\.attn: .* got 24")
    model = tiny_flux()
    model.single_transformer_blocks[0].attn.norm_k = None
    refused(model, ValueError, "without norms, as in single_transformer_blocks.0.attn")
    model = tiny_qwen()
    model.transformer_blocks[0].attn.norm_added_q = None
    refused(model, ValueError, "without norms, as in transformer_blocks.0.attn")
    model = tiny_flux()
    model.transformer_blocks[0].attn.norm_q = torch.nn.Identity()
    refused(model, ValueError, "no bound of what Identity gives, in transformer_blocks.0.attn")
    model = tiny_flux()

    class Own(type(model.transformer_blocks[0].attn.processor)):
        pass

    model.transformer_blocks[0].attn.set_processor(Own())
    refused(model, ValueError, "transformer_blocks.0.attn, whose processor is Own")
    model = tiny_flux()
    model.transformer_blocks[0].attn.processor._parallel_config = object()
    refused(model, ValueError, "context parallelism, which transformer_blocks.0.attn is set to")
    refused(tiny_wan().to("meta"), ValueError, "load them first")
    refused(torch.nn.Sequential(torch.nn.Linear(4, 4)), ValueError, "no attention that diffusers dispatches")
    with pytest.raises(TypeError, match="expected a torch module"):
        fp8_attention(3)


def test_where_there_is_a_card_the_package_and_the_card_are_looked_at(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(models_attention, "missing_reason", lambda: "pip install 'rtlynx[attention]'")
    refused(tiny_flux(), ImportError, r"rtlynx\[attention\]")
    assert fp8_attention(tiny_flux(), enabled=False)
    monkeypatch.setattr(models_attention, "missing_reason", lambda: None)
    model = tiny_flux()
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(torch.nn.Parameter, "get_device", lambda self: 0)
    monkeypatch.setattr(models_attention, "card_unsupported_reason", lambda index: "it is an A100")
    refused(model, RuntimeError, "Hopper cards, and this model is on another: it is an A100")


# ---------------------------------------------------------------------------- what is used of diffusers


def test_diffusers_processors_call_what_is_replaced():
    """Fails where diffusers changes how its processors hand over queries, keys and values."""
    import inspect

    from diffusers.models import attention_dispatch
    from diffusers.models.transformers import (
        transformer_flux,
        transformer_flux2,
        transformer_qwenimage,
        transformer_wan,
        transformer_z_image,
    )

    modules = (
        transformer_flux,
        transformer_flux2,
        transformer_qwenimage,
        transformer_wan,
        transformer_z_image,
    )
    found = {
        name: getattr(module, name)
        for name in models_attention.PROCESSORS
        for module in modules
        if hasattr(module, name)
    }
    assert found.keys() == set(models_attention.PROCESSORS)
    for kind in found.values():
        assert kind._attention_backend is None
        assert kind.__call__.__globals__["dispatch_attention_fn"] is attention_dispatch.dispatch_attention_fn
        assert "dispatch_attention_fn" in kind.__call__.__code__.co_names
        made = models_attention._dispatching(kind)
        assert made.__name__ == kind.__name__
        parameters, expected = (
            [(one.name, one.kind, one.default) for one in inspect.signature(of.__call__).parameters.values()]
            for of in (made, kind)
        )
        assert parameters == expected
    given = inspect.signature(attention_dispatch.dispatch_attention_fn).parameters
    assert list(given)[:4] == ["query", "key", "value", "attn_mask"]
    taken = inspect.signature(Fp8Attention.__call__).parameters
    assert set(taken) - {"self"} <= set(given)


def test_a_processor_that_does_not_call_it_is_named():
    class Other:
        def __call__(self, x):
            return x

    with pytest.raises(RuntimeError, match="Other of this diffusers does not call dispatch_attention_fn"):
        models_attention._dispatching(Other)
