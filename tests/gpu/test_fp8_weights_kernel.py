"""`rtlynx::linear_fp8_weights` on a Hopper card, against float64."""

import math

import pytest
import torch
from fp8_weights_cases import Fp8WeightsCase, check, error, exact, make
from helpers import MODELS, in_dtype, output, relative_error

import rtlynx.nn.modulation
from rtlynx import Recipe, sparsify
from rtlynx.models import sparse_layers
from rtlynx.nn.modulation import ModulationLinear
from rtlynx.ops.fp8_weights import linear_fp8_weights, linear_fp8_weights_reference

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="the kernels need a Hopper card (compute capability 9.0)"),
]
SIZES = [(256, 15360), (3072, 18432), (6144, 257), (16, 1), (40, 33), (1000, 70), (4104, 96), (20000, 40)]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("float32", [False, True], ids=["bf16", "f32"])
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_every_size(k, n, float32):
    for rows in (1, 2, 3, 4, 7, 8, 9, 17):
        bias, silu = ("none", "bf16", "f32")[(rows + k) % 3], rows % 2 == 0
        check(Fp8WeightsCase(rows, k, n, float32, bias, silu, seed=rows))


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
    x, weight, bias = make(Fp8WeightsCase(4, 256, 96))
    wide = torch.full((4, begin + 256 + 9), math.nan, device="cuda", dtype=x.dtype)
    wide[:, begin : begin + 256] = x
    part = wide[:, begin : begin + 256]
    assert torch.equal(linear_fp8_weights(part, *weight, bias), linear_fp8_weights(x, *weight, bias))


def test_a_row_that_is_not_finite_ruins_itself_alone():
    x, weight, bias = make(Fp8WeightsCase(8, 3072, 96, bias="none"))
    whole = linear_fp8_weights(x, *weight, bias)
    x[5, 77] = math.nan
    y = linear_fp8_weights(x, *weight, bias)
    assert y.isnan().all(-1).nonzero().flatten().tolist() == [5]
    keep = torch.arange(8, device="cuda") != 5
    assert torch.equal(y[keep], whole[keep])


def test_operands_that_the_kernel_before_wrote():
    """Programmatic dependent launch: nothing may be read before it is written."""
    sets = [make(Fp8WeightsCase(1, 3072, 9216, bias="f32", seed=seed)) for seed in range(2)]
    wanted = [exact(*one, True) for one in sets]
    x, weight, bias = make(Fp8WeightsCase(1, 3072, 9216, bias="f32", seed=9))
    codes = weight.values.view(torch.uint8)
    for turn in range(20):
        new_x, new, new_bias = sets[turn % 2]
        bias.copy_(new_bias)
        weight.scale.copy_(new.scale)
        x.copy_(new_x)
        codes.copy_(new.values.view(torch.uint8))
        assert error(linear_fp8_weights(x, *weight, bias, True), wanted[turn % 2]) < 5e-3


def test_a_graph_replays_for_new_inputs():
    x, weight, bias = make(Fp8WeightsCase(2, 3072, 9216))
    linear_fp8_weights(x, *weight, bias, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_fp8_weights(x, *weight, bias, True)
    for seed in range(3):
        x.copy_(make(Fp8WeightsCase(2, 3072, 16, bias="none", seed=seed))[0])
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
