"""Products by a 2:4-sparse weight on a Hopper card, against float64, and layers over them."""

import math

import pytest
import torch
from cases import poisoned
from torch import nn
from weight_sparse_cases import (
    WeightSparseCase,
    check,
    check_together,
    compare,
    lists_of,
    make,
    product,
    two_of_four,
)

from rtlynx import Pattern, SparseLinear
from rtlynx.cuda import tuning
from rtlynx.cuda.sm90 import gemm
from rtlynx.math.formats import FP8_DENSE, FP8_SPARSE, FP8_WEIGHT_SPARSE
from rtlynx.math.fp8 import Quantized, quantize_tokens
from rtlynx.nn.prepared import QuantizedInput
from rtlynx.nn.prologue import activated, read
from rtlynx.ops.weight_sparse import gemm_weight_sparse

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="the kernels need a Hopper card (compute capability 9.0)"),
]
SHAPES = [
    (1, 64, 64),
    (1, 3072, 3072),
    (3, 16, 8),
    (7, 144, 100),  # N no multiple of 8
    (65, 192, 72),
    (129, 1008, 264),
    (193, 1040, 257),
    (1000, 3088, 1000),
    (513, 4096, 3072),
    (4099, 256, 520),
]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
@pytest.mark.parametrize("config", tuning.CANDIDATES[FP8_SPARSE], ids=lambda config: config.name)
def test_every_shape(config, rows, k, n):
    with tuning.forced(config):
        check(WeightSparseCase(rows, k, n, ("none", "bf16", "f32")[(rows + n) % 3], seed=rows))


@pytest.mark.parametrize("rank", [1, 16, 45, 128])
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
def test_every_shape_with_a_low_rank_part(rows, k, n, rank):
    check(WeightSparseCase(rows, k, n, ("none", "bf16", "f32")[(rows + n) % 3], rows, rank))


@pytest.mark.parametrize("rank", [0, 16, 100])
@pytest.mark.parametrize("rows", [512, 1024, 4096, 4607])
def test_products_that_are_split_along_k(rows, rank):
    check(WeightSparseCase(rows, 12288, 3072, rank=rank))


# N of layers that read one X; the last is free.
WIDTHS = [(8, 8), (256, 264, 8, 100), (3072, 3072, 3072), (520, 72, 1001)]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize(("rows", "k"), [(1, 64), (7, 144), (193, 1040), (1023, 3072), (4099, 256)])
@pytest.mark.parametrize("config", tuning.CANDIDATES[FP8_SPARSE], ids=lambda config: config.name)
def test_layers_together(config, rows, k, widths):
    with tuning.forced(config):
        check_together([WeightSparseCase(rows, k, n, seed=rows) for n in widths])


@pytest.mark.parametrize("bias", ["none", "bf16", "f32"])
@pytest.mark.parametrize("ranks", [(16, 16, 16), (5, 0, 45), (0, 128, 0)], ids=str)
@pytest.mark.parametrize("rows", [1, 77, 1023])
def test_layers_together_with_low_rank_parts_and_biases_of_some(rows, ranks, bias):
    check_together(
        [
            WeightSparseCase(rows, 1040, n, one, rows, rank)
            for n, one, rank in zip((3072, 264, 500), (bias, "none", bias), ranks, strict=True)
        ]
    )


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("rows", [512, 1023, 4607])
def test_layers_together_that_are_split_along_k(rows, rank):
    check_together([WeightSparseCase(rows, 12288, n, seed=rows, rank=rank) for n in (1024, 520, 1528)])


def test_a_token_that_is_not_finite_ruins_itself_alone():
    x, weight, bias = make(WeightSparseCase(130, 512, 192))
    dense = x.dequantize()
    dense[77, 5] = math.nan
    ruined = quantize_tokens(dense)
    y = gemm_weight_sparse(*ruined, *lists_of(weight, bias))
    assert y.isnan().all(-1).nonzero().flatten().tolist() == [77]
    keep = torch.arange(130, device="cuda") != 77
    compare(y[keep], product(Quantized(ruined.values[keep], ruined.scale[keep]), weight, bias))


def layer_of(n=512, k=1024, *, format=FP8_WEIGHT_SPARSE, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    linear = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    linear.weight.copy_(two_of_four(n, k, generator))
    layer = SparseLinear.from_linear(linear, pattern=Pattern(1, 1), norm="none")
    layer.quantize()
    layer.format = format
    layer.prepare()
    return layer


def test_layers_that_read_one_quantised_input():
    gelu, x = nn.GELU(approximate="tanh"), torch.randn(2, 300, 1024, device="cuda").bfloat16()
    layers = [layer_of(512), layer_of(264, seed=1)]
    given = read(activated(gelu, x), *layers)
    assert isinstance(given, QuantizedInput)
    for layer in layers:
        with poisoned():
            y = layer(given)
        of = layer.fp8_parameters()
        assert of.packed is not None
        expected = product(
            Quantized(given.quantized.values.flatten(0, 1), given.quantized.scale.flatten(0, 1)),
            Quantized(layer.weight, of.scale),
            of.bias,
        )
        compare(y.flatten(0, 1), expected)


@pytest.mark.parametrize("shape", [(33, 1024), (2, 300, 1024), (4099, 1024)], ids=str)
def test_a_block_multiplies_together_in_one_launch(monkeypatch, shape):
    """Beside a dense layer; of X that lies in a wider matrix, call after call, and compiled."""
    launches, start = [], gemm.start_gemm
    monkeypatch.setattr(gemm, "start_gemm", lambda *args: launches.append(1) or start(*args))
    gelu, dense = nn.GELU(approximate="tanh"), layer_of(256, format=FP8_DENSE, seed=5)
    layers = [layer_of(n, seed=i) for i, n in enumerate((3072, 264, 520))]

    def block(x):
        given = read(activated(gelu, x), layers[0], dense, *layers[1:])
        return dense(given), [layer(given) for layer in layers]

    for _ in range(3):
        x = torch.randn(*shape[:-1], 2048, device="cuda").bfloat16()[..., 512:1536]
        launches.clear()
        with poisoned():
            beside, outputs = block(x)
        assert len(launches) == 1
        given = read(activated(gelu, x), *layers).quantized
        flat = Quantized(*(one.flatten(0, -2) for one in given))
        for layer, y in zip(layers, outputs, strict=True):
            assert torch.equal(y, layer(read(activated(gelu, x), layer)))
            of = Quantized(layer.weight, layer.weight_scale)
            compare(y.flatten(0, -2), product(flat, of, layer.bias))
        assert torch.equal(beside, dense(read(activated(gelu, x), dense)))
    launches.clear()
    _, compiled = torch.compile(block, fullgraph=True)(x)
    assert len(launches) == 1
    assert all(map(torch.equal, compiled, outputs))


def test_a_graph_replays_for_new_inputs():
    layer = layer_of(3072, 12288)
    x = torch.randn(520, 12288, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        y.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layer(x.clone()))


def test_compiled_whole():
    layer, x = layer_of(), torch.randn(2, 130, 1024, device="cuda").bfloat16()
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True)
    difference = (compiled(x).float() - expected.float()).norm() / expected.float().norm()
    assert float(difference) < 3e-3


def test_a_layer_holds_its_weight_packed_alone():
    layer, x = layer_of(), torch.randn(64, 1024, device="cuda").bfloat16()
    other = layer_of(seed=5)
    layer(x)
    layer.load_state_dict(other.state_dict())
    expected, weight = layer(x), layer.weight
    assert torch.equal(expected, other(x))
    assert layer.held_weight.untyped_storage().nbytes() == 512 * 1024 * 5 // 8
    assert layer.kept_copies() == []
    layer.cpu()
    assert layer.held_weight.shape == (512, 1024)
    assert torch.equal(layer.weight.view(torch.uint8), weight.cpu().view(torch.uint8))
    assert torch.equal(layer.cuda()(x), expected)
    assert layer.holds_tiles


def test_a_weight_that_a_hook_brought_is_packed_for_calls():
    layer, x = layer_of(), torch.randn(64, 1024, device="cuda").bfloat16()
    expected = layer(x)
    layer.held_weight.data = layer.weight.data
    assert torch.equal(layer(x), expected)
    assert not layer.holds_tiles
    layer.held_weight.data = layer.held_weight.data.cpu()
    layer.held_weight.data = layer.held_weight.data.cuda()
    assert torch.equal(layer(x), expected)
