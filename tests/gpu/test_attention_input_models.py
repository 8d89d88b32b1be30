"""Models whose attention, in eight bits or in bf16, is fed by one kernel, on the card."""

import copy

import pytest
import torch
from helpers import (
    flux2_call,
    flux_call,
    in_dtype,
    output,
    qwen_call,
    relative_error,
    tiny_flux,
    tiny_flux2,
    tiny_qwen,
    tiny_z_image,
    z_image_call,
)

import rtlynx
from rtlynx import Recipe, fp8_attention, schedule, sparsify
from rtlynx.cuda.sm90 import attention_inputs as kernel

pytest.importorskip("cudnn")
pytestmark = pytest.mark.gpu

WIDE = {"attention_head_dim": 64, "num_attention_heads": 2}
MODELS = {  # tiny, with heads that the kernel takes
    "flux": (lambda: tiny_flux(**WIDE, axes_dims_rope=(16, 24, 24)), flux_call),
    "flux2": (lambda: tiny_flux2(**WIDE, axes_dims_rope=(16, 16, 16, 16)), flux2_call),
    "qwen": (
        lambda: tiny_qwen(**WIDE, axes_dims_rope=(16, 24, 24)),
        lambda: {**qwen_call(), "encoder_hidden_states_mask": None},
    ),
    "z-image": (lambda: tiny_z_image(dim=256), z_image_call),
}


def attentions(model):
    return [
        module
        for module in model.modules()
        if hasattr(getattr(module, "processor", None), "_attention_backend")
    ]


def without(model):
    for attn in attentions(model):
        attn.norm_q.register_forward_hook(lambda *_: None)  # which only PyTorch hears
    return model


def grids(monkeypatch, name):
    """Of the launches by this function of the kernel's module, from now on."""
    seen, launch = [], getattr(kernel, name)
    monkeypatch.setattr(
        kernel, name, lambda packing, *rest: seen.append(packing.grid) or launch(packing, *rest)
    )
    return seen


@pytest.fixture
def launches(monkeypatch):
    """Grids of the kernel's launches."""
    return grids(monkeypatch, "launch")


@pytest.mark.parametrize("recipe", [None, Recipe.dense_fp8()])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_near_with_it(name, recipe, launches):
    make, call = MODELS[name]
    model, call = make().bfloat16().cuda(), in_dtype(call(), torch.bfloat16, "cuda")
    if recipe is not None:
        sparsify(model, recipe)
    plain = output(model, call)
    fp8_attention(model)
    y = output(model, call)
    assert len(launches) == len(attentions(model))
    in_several = output(without(model), call)
    assert len(launches) == len(attentions(model))
    assert relative_error(y, in_several) < 0.03
    assert relative_error(y, plain) < 1.1 * relative_error(in_several, plain) + 0.005


@pytest.mark.parametrize(("name", "mode"), [("flux", "reduce-overhead"), ("qwen", None), ("z-image", None)])
def test_compiled_blocks_give_the_same(name, mode):
    make, make_call = MODELS[name]
    model = fp8_attention(sparsify(make().bfloat16().cuda(), Recipe.dense_fp8()))
    call = in_dtype(make_call(), torch.bfloat16, "cuda")
    y = output(model, call)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, **({"mode": mode} if mode else {}))
    for _ in range(3):
        assert relative_error(output(model, call), y) < 0.05


# -------------------------------------------------------------------------------- attention in bf16


@pytest.fixture
def in_bf16(monkeypatch):
    """Grids of the kernel's launches with bf16 outputs."""
    return grids(monkeypatch, "launch_bf16")


SCHEDULED = Recipe.immediate(precision="fp8", dense_sigmas=((0, 0.5),), dense_precision="fp8")


def at(sigma, model, call):
    """The output of a call at this noise level."""
    t = float(call["t" if "t" in call else "timestep"].flatten()[0])
    with schedule([t, 2 * t + 1], [sigma, 0.0]):
        return output(model, call).clone()


@pytest.mark.parametrize("name", MODELS)
def test_a_dense_step_is_as_with_pytorchs_norms(name, launches, in_bf16):
    make, call = MODELS[name]
    model, call = make().bfloat16().cuda(), in_dtype(call(), torch.bfloat16, "cuda")
    fp8_attention(sparsify(model, SCHEDULED))
    y = at(0.1, model, call)
    assert len(in_bf16) == len(attentions(model))
    assert not launches
    assert relative_error(y, at(0.1, without(model), call)) < 0.02
    assert len(in_bf16) == len(attentions(model))


@pytest.mark.parametrize("name", ["flux2", "qwen", "z-image"])
def test_fused_blocks_have_it_without_fp8_attention(name, in_bf16):
    make, call = MODELS[name]
    model, call = make().bfloat16().cuda(), in_dtype(call(), torch.bfloat16, "cuda")
    sparsify(model, Recipe.dense_fp8())
    y = output(model, call)
    assert in_bf16
    count = len(in_bf16)
    assert relative_error(y, output(without(model), call)) < 0.02
    assert len(in_bf16) == count


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["flux", "qwen", "z-image"])
def test_both_kinds_of_steps_compiled_and_in_cuda_graphs(name, graphs):
    make, call = MODELS[name]
    model, call = make().bfloat16().cuda(), in_dtype(call(), torch.bfloat16, "cuda")
    fp8_attention(sparsify(model, SCHEDULED))
    expected = {sigma: at(sigma, model, call) for sigma in (0.9, 0.1)}
    torch._dynamo.reset()
    twin = rtlynx.compile(copy.deepcopy(model), cuda_graphs=graphs)
    for sigma in (0.9, 0.1, 0.9, 0.1, 0.1, 0.9):  # a graph is captured at the second call
        # Compiled code rounds elsewhere, so other activations of a sparse step are dropped.
        assert relative_error(at(sigma, twin, call), expected[sigma]) < (0.1 if sigma == 0.9 else 0.05)
    torch._dynamo.reset()
