"""Models with fused blocks on the card: the same numbers as layer by layer, compiled and captured."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

from helpers import (
    flux_call,
    output,
    qwen_call,
    relative_error,
    tiny_flux,
    tiny_qwen,
    tiny_z_image,
    z_image_call,
)

from rtlynx import Recipe, sparsify
from rtlynx.kernels import ops
from rtlynx.models import sparse_layers, state_of
from rtlynx.models.fusion import unfuse_blocks

pytestmark = pytest.mark.gpu
MODELS = {
    "flux": (tiny_flux, flux_call),
    "qwen": (tiny_qwen, qwen_call),
    "z-image": (tiny_z_image, z_image_call),
}


def on_card(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.cuda().to(dtype) if value.is_floating_point() else value.cuda()
    if isinstance(value, dict):
        return {name: on_card(one, dtype) for name, one in value.items()}
    return type(value)(on_card(one, dtype) for one in value) if isinstance(value, list | tuple) else value


def sparse_model(name, precision, rank=16):
    make, call = MODELS[name]
    model = sparsify(make().bfloat16().cuda(), Recipe.immediate(precision=precision))
    downs = {}
    for layer in sparse_layers(model).values():
        down = torch.randn(rank, layer.in_features, device="cuda") * layer.in_features**-0.5
        up = 0.1 * torch.randn(layer.out_features, rank, device="cuda")
        layer.set_lowrank(downs.setdefault(layer.shared_input, down).bfloat16(), up.bfloat16())
    return model, call()


@pytest.fixture
def _no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.usefixtures("_no_tf32")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("name", MODELS)
def test_fused_it_is_as_near_to_the_model_in_float32_as_unfused(name, precision, monkeypatch):
    model, call = sparse_model(name, precision)
    exact = output(copy.deepcopy(model).float(), on_card(call, torch.float32))
    call = on_card(call, torch.bfloat16)
    plain = copy.deepcopy(model)
    unfuse_blocks(plain, state_of(plain).plan.architecture)
    expected = output(plain, call)
    joint = []
    monkeypatch.setattr(ops, "gemm_joint", lambda *args, of=ops.gemm_joint: joint.append(1) or of(*args))
    y = output(model, call)
    assert joint
    assert bool(torch.isfinite(y).all())
    assert relative_error(y, exact) < 1.4 * relative_error(expected, exact)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_it_gives_the_same(name, precision):
    model, call = sparse_model(name, precision)
    call = on_card(call, torch.bfloat16)
    expected = output(model, call)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True)
    # (Inductor rounds chains that are left to PyTorch at other places.)
    assert relative_error(output(model, call), expected) < 3e-2


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_captured_step_replays(precision):
    model, call = sparse_model("flux", precision)
    call = on_card(call, torch.bfloat16)
    output(model, call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = output(model, call)
    for seed in (3, 4):
        fresh = on_card(flux_call(seed), torch.bfloat16)
        for name, value in fresh.items():
            call[name].copy_(value)
        graph.replay()
        assert torch.equal(y, output(model, fresh))
