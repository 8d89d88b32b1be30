"""The kernels on a Hopper card against `rtlynx.math.selection` bit for bit and against float64."""

import itertools
import random
import time
from dataclasses import replace

import pytest
import torch
from cases import (
    BIASES,
    DATA,
    LAYOUTS,
    LIMIT,
    Case,
    arguments,
    check,
    check_compressed,
    expect,
    in_compute_order,
    make_input,
    make_layers,
    poisoned,
)

from rtlynx import Pattern
from rtlynx.math.tiles import compute_order
from rtlynx.ops import sparse_linear as ops
from rtlynx.timing.shapes import SHAPES

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="the kernels need a Hopper card (compute capability 9.0)"),
]

ROWS = (1, 7, 64, 127, 129, 1000, 4099)
OUTPUTS = (8, 64, 200, 3080)
INPUTS = (64, 192, 3072, 15360)
RANKS = (0, 5, 16, 64, 128, 256, 320)
GROUPINGS = {
    "adjacent": lambda k: {"grouping": "adjacent"},
    "strided": lambda k: {"grouping": "strided"},
    "parts": lambda k: {"grouping": "strided", "parts": (k // 8 * 4, k - k // 8 * 4)},
    "uneven": lambda k: {"grouping": "strided", "parts": (4, 20, k - 24)},
}
SPECIAL = [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x3F80, 0xBF80, 0x7F80, 0xFF80, 0x7F81, 0xFFC0, 0x7FFF]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def grid():
    """Every listed number of rows, outputs and inputs; what else there is is drawn for each."""
    for index, (rows, n, k) in enumerate(itertools.product(ROWS, OUTPUTS, INPUTS)):
        draw = random.Random(index)
        bias, layout, rank = draw.choice(list(BIASES)), draw.choice(LAYOUTS), draw.choice(RANKS)
        grouping = GROUPINGS[draw.choice(list(GROUPINGS))](k)
        data, norm = draw.choice(("normal", "heavy")), draw.random() < 0.7
        yield Case(rows, k, n, rank, norm=norm, bias=bias, data=data, layout=layout, seed=index, **grouping)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("case", list(grid()), ids=lambda case: f"{case.rows}x{case.n}x{case.k}")
def test_every_size(case, fp8):
    check(replace(case, fp8=fp8))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("data", ["normal", "heavy"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_layers_of_real_models(shape, data, fp8):
    check(Case(shape.m, shape.k, shape.n, 64, bias="bf16", data=data, fp8=fp8))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("k", [192, 3072])
def test_every_rank(rank, norm, k, fp8):
    check(Case(333, k, 200, rank, norm=norm, bias="f32", fp8=fp8))


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("k", [192, 264, 1000, 60])
def test_every_layout_in_every_grouping(layout, grouping, k, fp8):
    check(Case(150, k, 136, 16, layout=layout, bias="bf16", fp8=fp8, **GROUPINGS[grouping](k)))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("n", [1, 5, 13, 250, 1025])
def test_outputs_that_no_tile_divides(n, bias, fp8):
    check(Case(300, 256, n, 5, bias=bias, fp8=fp8))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_kind_of_data(data, grouping, fp8):
    check(Case(500, 1024, 264, 64, data=data, fp8=fp8, **GROUPINGS[grouping](1024)))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("ranks", [(5, 64), (16, 16, 16), (32, 5, 320, 64), (0, 0)])
@pytest.mark.parametrize("n", [64, 1160, 9216])
def test_layers_that_share_an_input_with_factors_of_their_own(ranks, n, fp8):
    check(Case(300, 512, n, ranks, bias="bf16", fp8=fp8))
    check(Case(300, 512, n, ranks, norm=False, fp8=fp8, **GROUPINGS["strided"](512)))


@pytest.mark.parametrize("grouping", ["adjacent", "strided", "parts"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("k", [4160, 16384, 16448])
def test_whole_rows_of_every_length(k, norm, grouping):
    """Without a factor an fp8 CTA takes whole rows: how many, with which threads, depends on the length."""
    check(Case(131, k, 8, norm=norm, data="heavy", fp8=True, **GROUPINGS[grouping](k)))


# ------------------------------------------------------------------------------- selection and scale


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_selection_of_every_four_special_values(grouping, fp8):
    groups = torch.tensor(list(itertools.product(SPECIAL, repeat=4)), dtype=torch.int32)
    bits = groups.to(torch.int16).flatten().cuda()
    k = 192
    x = torch.nn.functional.pad(bits, (0, -len(bits) % k)).view(-1, k).view(torch.bfloat16)
    if grouping != "adjacent":  # the same groups, where this grouping looks for them
        pattern = Pattern(2, 4, **GROUPINGS[grouping](k))
        order = compute_order(torch.arange(k).expand(1, k), pattern)[0].cuda()
        x = torch.empty_like(x.view(torch.int16)).index_copy_(1, order, x.view(torch.int16)).view(x.dtype)
    case = Case(len(x), k, 8, data="bits", fp8=fp8, **GROUPINGS[grouping](k))
    expected = expect(x, case.pattern)
    compressed = ops.compress(x, None, *arguments(case), case.format)
    check_compressed(case, x, expected, None, compressed)
    of_broken = compressed[1][expected.broken]
    assert bool((of_broken.isnan() if fp8 else of_broken == 1).all())


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("k", INPUTS)
@pytest.mark.parametrize("exponent", [-38, -30, -19, -10, 0, 10, 19, 30, 38])
def test_scale_at_every_magnitude(exponent, k, fp8):
    x = make_input(Case(100, k, 8, seed=k)).float() * 10.0**exponent
    x = x.bfloat16()
    x[7], x[9] = 0.0, -0.0
    x[11, k // 2] = float("inf")
    x[13, -1] = float("nan")
    x[15, 1:] = 0.0
    case = Case(100, k, 8, data="bits", fp8=fp8)
    expected = expect(x, case.pattern)
    compressed = ops.compress(x, None, *arguments(case), case.format)
    check_compressed(case, x, expected, None, compressed)
    assert compressed[1][[7, 9]].tolist() == [1.0] * 2
    if fp8:
        assert bool(compressed[1][[11, 13]].isnan().all())
    else:
        assert compressed[1][[11, 13, 15]].tolist() == [1.0] * 3


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_scale_of_rows_of_subnormals(fp8):
    bits = torch.randint(-0x80, 0x80, (100, 256), device="cuda").to(torch.int16)
    x = torch.where(bits < 0, bits - 0x7F80, bits).to(torch.int16).view(torch.bfloat16)
    assert float(x.double().abs().max()) < 2**-126
    case = Case(100, 256, 8, data="bits", fp8=fp8)
    check_compressed(
        case, x, expect(x, case.pattern), None, ops.compress(x, None, *arguments(case), case.format)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_output_is_never_finite_where_the_input_was_not_and_no_other_row_is_touched(bad, rank, fp8):
    case = Case(300, 512, 264, rank, bias="f32", fp8=fp8)
    x, (layer,) = make_input(case), make_layers(case)
    operands = (
        layer.weight,
        layer.bias,
        layer.lowrank_a,
        layer.lowrank_b,
        *arguments(case),
        layer.weight_scale,
    )
    clean = ops.linear(x, *operands)
    rows = [0, 63, 64, 130, 299]
    for number, row in enumerate(rows):
        x[row, 101 * number] = bad
    y = ops.linear(x, *operands)
    assert not bool(torch.isfinite(y[rows]).any())
    others = [row for row in range(300) if row not in rows]
    assert torch.equal(y[others], clean[others])


# -------------------------------------------------------------------------------------- how it runs


def a_layer(case):
    (layer,) = make_layers(case)
    operands = (in_compute_order(layer.weight, case.pattern), layer.bias, layer.lowrank_a, layer.lowrank_b)
    return lambda x: ops.linear(x, *operands, *arguments(case), layer.weight_scale)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_reruns_are_bit_identical(fp8):
    case = Case(4096, 3072, 3072, 64, bias="bf16", fp8=fp8)
    x, call = make_input(case), a_layer(case)
    first = call(x)
    for _ in range(50):
        assert torch.equal(call(x), first)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("k", [64, 128, 256, 384])
def test_many_tiles_with_fewer_stages_than_the_ring(k, fp8):
    """Warpgroups may be several tiles apart here: a signal that is lost between them would wait for ever."""
    case = Case(68_000, k, 1024, bias="bf16", fp8=fp8)
    x, call = make_input(case), a_layer(case)
    first = call(x)
    for _ in range(100):
        y = call(x)
    done = torch.cuda.Event()
    done.record()
    start = time.monotonic()
    while not done.query():
        if time.monotonic() - start > 30:
            pytest.exit(f"the GEMM hangs at K = {k}, fp8 {fp8}", returncode=1)  # nor would later tests end
    assert torch.equal(y, first)
    check(case)


def test_two_streams_at_once():
    cases = [
        Case(1000, 3072, 3080, 64, seed=1),
        Case(777, 1024, 4096, 16, seed=2, **GROUPINGS["strided"](1024)),
        Case(900, 3072, 3072, 64, seed=3, fp8=True),
    ]
    work = [(make_input(case), a_layer(case), torch.cuda.Stream()) for case in cases]
    alone = [call(x) for x, call, _ in work]
    torch.cuda.synchronize()
    outputs = [[] for _ in cases]
    for _ in range(100):
        for (x, call, stream), out in zip(work, outputs, strict=True):
            with torch.cuda.stream(stream):
                out.append(call(x))
    torch.cuda.synchronize()
    for out, expected in zip(outputs, alone, strict=True):
        assert all(torch.equal(y, expected) for y in out)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("grouping", ["adjacent", "strided"])
def test_a_captured_graph_replays_a_thousand_times(grouping, fp8):
    case = Case(500, 1024, 1160, 64, bias="f32", fp8=fp8, **GROUPINGS[grouping](1024))
    call, x = a_layer(case), make_input(case)
    call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    for replay in range(1000):
        if replay % 100 == 0:
            x.copy_(torch.randn_like(x))
            expected = call(x)
            y.fill_(float("nan"))
        graph.replay()
        if replay % 100 in (0, 99):
            assert torch.equal(y, expected)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_nothing_waits_for_the_card(fp8):
    case = Case(500, 1024, 1160, 64, bias="f32", fp8=fp8)
    call, x = a_layer(case), make_input(case)
    call(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(x)
        ops.linear(
            x[:129], torch.empty(13, 1024, device="cuda").bfloat16(), None, None, None, "adjacent", [], True
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_tensors_of_a_device_that_is_not_current():
    case = Case(300, 512, 264, 64, bias="f32")
    (layer,), x = make_layers(case), make_input(case)
    expected = a_layer(case)(x)
    there = [t.to("cuda:1") for t in (x, layer.weight, layer.bias, layer.lowrank_a, layer.lowrank_b)]
    y = ops.linear(*there, *arguments(case))
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y.cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0


def test_no_rows_and_no_kernel():
    case = Case(1, 512, 264, 64, bias="f32")
    x = make_input(case)[:0]
    assert a_layer(case)(x).shape == (0, 264)
    assert a_layer(case)(x.view(2, 0, 512)).shape == (2, 0, 264)


@pytest.mark.parametrize("rank", [0, 33])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_opcheck(norm, rank, fp8):
    case = Case(70, 192, 72, rank, norm=norm, bias="bf16", fp8=fp8)
    (layer,), x = make_layers(case), make_input(case)
    packed_a, scale, lowrank = ops.compress(x, layer.lowrank_a, *arguments(case), case.format)
    # (test_schema compares arguments before and after by arithmetic that PyTorch lacks for float8.)
    without_schema = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    checks = {"test_utils": without_schema} if fp8 else {}
    torch.library.opcheck(ops.compress, (x, layer.lowrank_a, *arguments(case), case.format))
    torch.library.opcheck(
        ops.gemm,
        (
            packed_a,
            scale if norm or fp8 else None,
            lowrank if rank else None,
            layer.weight,
            layer.lowrank_b,
            layer.bias,
            70,
            layer.weight_scale,
        ),
        **checks,
    )
    operands = (
        x,
        layer.weight,
        layer.bias,
        layer.lowrank_a,
        layer.lowrank_b,
        *arguments(case),
        layer.weight_scale,
    )
    torch.library.opcheck(ops.linear, operands, **checks)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_the_cpu_computes_the_same(fp8):
    case = Case(300, 512, 264, 64, bias="f32", fp8=fp8, **GROUPINGS["uneven"](512))
    (layer,), x = make_layers(case), make_input(case)
    operands = (x, in_compute_order(layer.weight, case.pattern), layer.bias, layer.lowrank_a, layer.lowrank_b)
    scale = layer.weight_scale
    with poisoned():
        y = ops.linear(*operands, *arguments(case), scale)
    there = (t.cpu() for t in operands)
    expected = ops.linear(*there, *arguments(case), None if scale is None else scale.cpu())
    assert float((y.cpu().double() - expected.double()).norm() / expected.double().norm()) < LIMIT
