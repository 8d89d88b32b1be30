"""Models whose attention in eight bits is fed by one kernel, on the card."""

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

from rtlynx import Recipe, fp8_attention, sparsify
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


@pytest.fixture
def launches(monkeypatch):
    """Grids of the kernel's launches."""
    seen, launch = [], kernel.launch
    monkeypatch.setattr(
        kernel, "launch", lambda packing, *rest: seen.append(packing.grid) or launch(packing, *rest)
    )
    return seen


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
    for attn in attentions(model):
        attn.norm_q.register_forward_hook(lambda *_: None)  # which only PyTorch hears
    in_several = output(model, call)
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
