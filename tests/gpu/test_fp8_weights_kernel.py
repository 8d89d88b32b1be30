"""`rtlynx::linear_fp8_weights` on a Hopper card, against float64."""

import math

import pytest
import torch
from cases import FEW, poisoned
from helpers import MODELS, in_dtype, output, relative_error

import rtlynx.nn.modulation
from rtlynx import Recipe, sparsify
from rtlynx.math.fp8 import quantize_weight
from rtlynx.models import sparse_layers
from rtlynx.nn.modulation import ModulationLinear
from rtlynx.ops.fp8_weights import linear_fp8_weights, linear_fp8_weights_reference

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="the kernels need a Hopper card (compute capability 9.0)"),
]
SIZES = [(256, 15360), (3072, 18432), (6144, 257), (16, 1), (40, 33), (1000, 70), (4104, 96), (20000, 40)]
BIASES = (None, torch.bfloat16, torch.float32)
# Rounding to bfloat16 alone is 1.7e-3; one output may be rounded by 2^-9.
LIMITS = {torch.bfloat16: 2.5e-3, torch.float32: 5e-6}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def operands(rows, k, n, dtype, bias, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, device="cuda", generator=generator)

    weight = quantize_weight(normal(n, k) * normal(n, 1).exp())
    # Between 1/50 and 8: SiLU has something to round.
    x = (normal(rows, k) * normal(rows, 1).exp()).to(dtype)
    return x, weight, None if bias is None else normal(n).to(bias)


def expected(x, weight, bias, silu):
    """In float64; f(X) rounded to the dtype of X, as modules in front of a layer round it."""
    wide = x.double()
    if silu:
        wide = (wide / (1 + (-wide).exp())).to(x.dtype).double()
    y = wide @ (weight.values.double() * weight.scale.double().unsqueeze(-1)).T
    return y if bias is None else y + bias.double()


def error(y, exact):
    """Largest of all rows, relative."""
    return float(((y.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_every_size(k, n, dtype):
    for rows in (1, 2, 3, 4, 7, 8, 9, 17):
        bias, silu = BIASES[(rows + k) % 3], rows % 2 == 0
        x, weight, bias = operands(rows, k, n, dtype, bias, seed=rows)
        with poisoned():
            y = linear_fp8_weights(x, *weight, bias, silu)
        assert y.shape == (rows, n)
        assert y.dtype is dtype
        # A SiLU that rounds to the other neighbour of bfloat16 here and there adds to the error.
        limit = LIMITS[dtype] * (1 if n > FEW else 4) * (2 if silu else 1)
        assert error(y, expected(x, weight, bias, silu)) < limit, (rows, bias is None, silu)


def test_every_e4m3_value():
    """One hot rows of X pick single weights: their product is exact."""
    codes = torch.arange(256, device="cuda", dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # without NaN
    values = torch.zeros(8, 256, device="cuda", dtype=torch.uint8)
    values[:, : len(codes)] = codes
    values = values.roll(3, 0).view(torch.float8_e4m3fn)
    scale = torch.ones(8, device="cuda")
    for dtype in (torch.bfloat16, torch.float32):
        y = linear_fp8_weights(torch.eye(256, device="cuda", dtype=dtype), values, scale)
        assert torch.equal(y, values.to(dtype).T)


@pytest.mark.parametrize("begin", [8, 1])
def test_inputs_that_are_part_of_others(begin):
    x, weight, bias = operands(4, 256, 96, torch.bfloat16, torch.bfloat16)
    wide = torch.full((4, begin + 256 + 9), math.nan, device="cuda", dtype=x.dtype)
    wide[:, begin : begin + 256] = x
    part = wide[:, begin : begin + 256]
    assert torch.equal(linear_fp8_weights(part, *weight, bias), linear_fp8_weights(x, *weight, bias))


def test_a_row_that_is_not_finite_ruins_itself_alone():
    x, weight, bias = operands(8, 3072, 96, torch.bfloat16, None)
    whole = linear_fp8_weights(x, *weight, bias)
    x[5, 77] = math.nan
    y = linear_fp8_weights(x, *weight, bias)
    assert y.isnan().all(-1).nonzero().flatten().tolist() == [5]
    keep = torch.arange(8, device="cuda") != 5
    assert torch.equal(y[keep], whole[keep])


def test_operands_that_the_kernel_before_wrote():
    """Programmatic dependent launch: nothing may be read before it is written."""
    sets = [operands(1, 3072, 9216, torch.bfloat16, torch.float32, seed=seed) for seed in range(2)]
    wanted = [expected(*one, True) for one in sets]
    x, weight, bias = operands(1, 3072, 9216, torch.bfloat16, torch.float32, seed=9)
    codes = weight.values.view(torch.uint8)
    for turn in range(20):
        new_x, new, new_bias = sets[turn % 2]
        bias.copy_(new_bias)
        weight.scale.copy_(new.scale)
        x.copy_(new_x)
        codes.copy_(new.values.view(torch.uint8))
        assert error(linear_fp8_weights(x, *weight, bias, True), wanted[turn % 2]) < 5e-3


def test_a_graph_replays_for_new_inputs():
    x, weight, bias = operands(2, 3072, 9216, torch.bfloat16, torch.bfloat16)
    linear_fp8_weights(x, *weight, bias, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_fp8_weights(x, *weight, bias, True)
    for seed in range(3):
        x.copy_(operands(2, 3072, 16, torch.bfloat16, None, seed=seed)[0])
        y.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, linear_fp8_weights(x.clone(), *weight, bias, True))


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "z-image"])
def test_whole_models(name, monkeypatch):
    """Against the same model where plain PyTorch computes its modulation; the kernel takes SiLU along."""
    build, call = MODELS[name]
    alone = Recipe.immediate(formats={"*": "dense"}, modulation="fp8")
    model = sparsify(build().to("cuda", torch.bfloat16), alone)
    arguments = in_dtype(call(), torch.bfloat16, "cuda")
    served = []

    def counted(*given):
        served.append(given[4])
        return linear_fp8_weights(*given)

    monkeypatch.setattr(rtlynx.nn.modulation, "linear_fp8_weights", counted)
    y = output(model, arguments)
    layers = [one for one in sparse_layers(model).values() if isinstance(one, ModulationLinear)]
    assert len(served) == len(layers)
    assert any(served) == (name in ("flux", "qwen"))
    monkeypatch.setattr(rtlynx.nn.modulation, "linear_fp8_weights", linear_fp8_weights_reference)
    assert relative_error(y, output(model, arguments)) < 0.02
