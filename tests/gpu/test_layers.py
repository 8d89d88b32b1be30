"""`SparseLinear` on a Hopper card: served by the kernels, shared, captured, compiled."""

import warnings

import pytest
import torch
from torch import nn

from rtlynx import Pattern, SparseLinear
from rtlynx.nn.call import calling
from rtlynx.nn.input_cache import SharedInput
from rtlynx.ops import dispatch as choice
from rtlynx.ops import fp8_linear as fp8
from rtlynx.ops.dispatch import kernels_support

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="the kernels need a Hopper card (compute capability 9.0)"),
]
K, N, ROWS = 512, 264, 300
LIMIT = 5e-3  # of one bfloat16 path against another
PATTERNS = {
    "adjacent": Pattern(),
    "strided": Pattern(grouping="strided"),
    "parts": Pattern(grouping="strided", parts=(128, 384)),
}


@pytest.fixture(autouse=True)
def _quiet():
    """No gradients, and every refusal of the kernels is an error."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "rtlynx runs", RuntimeWarning)
        choice._said.clear()
        yield


def sparse(name="adjacent", rank=16, seed=0, single=False, n=N, precision="bf16"):
    torch.manual_seed(seed)
    layer = SparseLinear.from_linear(nn.Linear(K, n, device="cuda").bfloat16(), pattern=PATTERNS[name])
    if rank:
        layer.set_lowrank(torch.randn(rank, K) / 30, torch.randn(n, rank) / 20)
    layer.shared_input = SharedInput(single=single)
    if precision == "fp8":
        layer.quantize()
    return layer.requires_grad_(False)


def tokens(*shape, seed=1):
    return torch.randn(*(shape or (ROWS, K)), generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


def plainly(call, *args):
    """What plain PyTorch gives, without a kernel."""
    choice._said.discard("not in this test")
    before = choice._cards.copy()
    choice._cards.update(dict.fromkeys(range(torch.cuda.device_count()), "not in this test"))
    try:
        with pytest.warns(RuntimeWarning, match="not in this test"):
            return call(*args)
    finally:
        choice._cards.clear()
        choice._cards.update(before)


def difference(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_kernels_and_plain_pytorch_agree(name, rank, single, precision):
    layer, x = sparse(name, rank, single=single, precision=precision), tokens(2, ROWS, K)
    assert kernels_support(
        x, layer.pattern, layer.norm, layer.weight, layer.bias, layer.lowrank_a, layer.lowrank_b
    )
    assert difference(layer(x), plainly(layer, x)) < LIMIT


@pytest.mark.parametrize("k", [K, 15360])
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_dense_fp8_runs_on_pytorchs_product(rank, bias, k):
    torch.manual_seed(0)
    plain = nn.Linear(k, 272, bias=bias, device="cuda").bfloat16()
    layer = SparseLinear.from_linear(plain, pattern=Pattern(1, 1), norm="none")
    if rank:
        layer.set_lowrank(torch.randn(rank, k) / 30, torch.randn(272, rank) / 20)
    layer.quantize()
    layer.requires_grad_(False)
    x = tokens(2, ROWS, k)
    of = fp8.Fp8Parameters(layer.weight, layer.weight_scale, layer.bias, layer.lowrank_a, layer.lowrank_b)
    assert choice.scaled_mm_supports(x, of)
    expected = fp8.linear_fp8(x, fp8.compress_fp8(x, layer.pattern, layer.norm), of)
    assert difference(layer(x), expected) < LIMIT
    assert bool(torch.isfinite(layer(torch.zeros_like(x))).all())


def test_dense_text_rows_beside_rows_whole_in_fp8():
    torch.manual_seed(0)
    plain = nn.Linear(K, 272, device="cuda").bfloat16()
    layer = SparseLinear.from_linear(plain, pattern=Pattern(1, 1), norm="none")
    layer.quantize(keep_dense=True)
    layer.requires_grad_(False)
    x = tokens(ROWS, K)
    whole = layer(x)
    layer.text_rows_dense = True
    for start, stop in ((0, 19), (77, ROWS), (3, 5)):
        with calling(text_rows=(start, stop)):
            y = layer(x)
        assert difference(y[start:stop], plain(x)[start:stop]) < LIMIT
        rest = [row for row in range(ROWS) if not start <= row < stop]
        assert difference(y[rest], whole[rest]) < LIMIT


def test_few_tokens():
    layer, x = sparse(), tokens()
    assert layer(x[:0]).shape == (0, N)
    for rows in (1, 2):
        assert difference(layer(x[:rows]), layer(x)[:rows]) < LIMIT


def test_gradients_run_in_plain_pytorch():
    layer, x = sparse(), tokens().requires_grad_()
    with torch.enable_grad(), pytest.warns(RuntimeWarning, match="gradients"):
        layer(x).sum().backward()
    assert bool(x.grad.any())


def test_dense_text_rows():
    layer, x = sparse("strided"), tokens(2, ROWS, K)
    whole, dense = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    layer.text_rows_dense = True
    for start, stop in ((0, 64), (200, ROWS), (70, 90)):
        with calling(text_rows=(start, stop)):
            y = layer(x)
        assert difference(y[:, start:stop], dense[:, start:stop]) < LIMIT
        rest = [row for row in range(ROWS) if not start <= row < stop]
        assert difference(y[:, rest], whole[:, rest]) < LIMIT


def test_changes_of_a_strided_weight_are_noticed():
    layer, x = sparse("strided"), tokens()
    layer(x)
    layer.weight.mul_(-2)
    assert difference(layer(x), plainly(layer, x)) < LIMIT
    layer.weight = nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)
    assert difference(layer(x), plainly(layer, x)) < LIMIT
    layer.cpu()
    layer.cuda()
    assert difference(layer(x), plainly(layer, x)) < LIMIT


def readers():
    layers = [sparse(seed=0), sparse(seed=1), sparse("strided", seed=2)]
    layers[1].lowrank_a = nn.Parameter(layers[0].lowrank_a.clone(), requires_grad=False)
    shared = SharedInput()
    for layer in layers:
        layer.shared_input = shared
    return nn.ModuleList(layers)


def together(layers, x):
    return torch.cat([layer(x) for layer in layers], dim=-1)


@pytest.mark.parametrize("warm", [False, True])
def test_a_captured_graph_sees_each_replays_input(warm):
    layers, x = readers(), tokens()
    together(layers, tokens(seed=5))  # compiles
    if warm:
        together(layers, x)  # now x is remembered, at this version
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = together(layers, x)
    again = torch.cuda.CUDAGraph()
    with torch.cuda.graph(again):
        z = together(layers, x)
    assert difference(together(layers, x), plainly(together, layers, x)) < LIMIT
    for seed in range(5):
        x.copy_(tokens(seed=seed + 10))
        y.zero_()
        z.zero_()
        graph.replay()
        again.replay()
        assert torch.equal(y, together(layers, x.clone()))
        assert torch.equal(z, y)


def test_a_graph_captured_before_the_weight_was_ever_in_order():
    layer, x = sparse("strided"), tokens()
    sparse("strided", seed=3)(x)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    outside = layer(x)
    graph.replay()
    assert torch.equal(y, outside)
    assert difference(y, plainly(layer, x)) < LIMIT


def test_one_input_in_two_streams():
    layers, x = readers(), tokens()
    expected = together(layers, x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    outputs = []
    for turn in range(100):
        with torch.cuda.stream(streams[turn % 2]):
            outputs.append(together(layers, x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in outputs)


def test_compiles_into_one_graph():
    layers = readers()

    def block(x):
        return together(layers, torch.nn.functional.gelu(x) * 2)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for rows in (ROWS, 333, 70):
        x = tokens(2, rows, K)
        assert difference(compiled(x), block(x)) < LIMIT


def test_autocast_and_inference_mode():
    layer, x = sparse(), tokens()
    expected = layer(x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(layer(x.float()), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x * 1), expected)
