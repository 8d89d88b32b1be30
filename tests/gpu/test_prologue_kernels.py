"""Prologues on a Hopper card: the dense tensor against float64, what is made of it bit for bit."""

import itertools

import pytest
import torch
from cases import poisoned
from prologue_cases import (
    BY_TOKEN,
    DATA,
    LAYOUTS,
    MODULATED,
    MODULATIONS,
    NAMES,
    PrologueCase,
    along_tokens,
    check,
    compare,
    make_inputs,
    make_tail,
    misaligned,
    randomize_,
    with_changes,
)

from rtlynx.ops.prologues import COMPRESS

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="the kernels need a Hopper card (compute capability 9.0)"),
]

ROWS = (1, 7, 129, 1000, 4099)
WIDTHS = {
    "adaln": 3072,
    "rms_adaln": 4096,
    "adaln_by_token": 3072,
    "adaln_of_tokens": 3072,
    "rms_adaln_of_tokens": 4096,
    "rmsnorm_by_token": 3840,
    "rmsnorm": 3840,
    "gelu": 12288,
    "silu_gate": 10240,
    "concat_silu_gate": 12288,
    "concat_gelu": 15360,
}
PARTS = {"concat_gelu": (3072, 12288), "concat_silu_gate": (3072, 9216)}
RANKS = (0, 5, 64, 130)
GROUPINGS = ("adjacent", "strided")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def operator(name):
    return COMPRESS[name]


def grouped(name, grouping, **case):
    """A case of the prologue's real width, strided groups in its real parts."""
    parts = PARTS.get(name, ()) if grouping == "strided" else ()
    return PrologueCase(name, k=WIDTHS[name], grouping=grouping, parts=parts, **case)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("rows", "rank"), list(itertools.product(ROWS, RANKS)))
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", NAMES)
def test_every_size_at_real_widths(name, grouping, rows, rank, fp8):
    index = ROWS.index(rows) + RANKS.index(rank)
    batch = 2 if rows % 2 == 0 else 1
    case = grouped(
        name,
        grouping,
        rows=rows,
        rank=rank,
        batch=batch,
        norm=index % 3 > 0,
        data=DATA[index % 2],
        layout="sliced" if batch == 2 else "plain",
        fp8=fp8,
        seed=index,
    )
    check(case, served=True)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", NAMES)
def test_every_rank_with_and_without_norm(name, grouping, rank, norm, fp8):
    case = PrologueCase(name, 258, 512, batch=2, rank=rank, grouping=grouping, norm=norm, fp8=fp8)
    check(case, served=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout(name, batch, shared, layout):
    for rank in (0, 16):
        case = PrologueCase(name, 150, 384, batch, rank, layout=layout, shared=shared)
        check(case, served=layout != "odd")


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_data(name, rank, data, fp8):
    check(PrologueCase(name, 500, 1024, 2, rank, "strided", data=data, fp8=fp8), served=True)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("k", [16, 24, 40, 64, 72, 200, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_widths_that_no_tile_divides(name, k, fp8):
    for rank in (0, 40):
        check(PrologueCase(name, 70, k, rank=rank, fp8=fp8), served=True)
        if k % 32 == 0:
            check(PrologueCase(name, 70, k, rank=rank, grouping="strided", fp8=fp8), served=True)


@pytest.mark.parametrize("k", [5120, 16384])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", NAMES)
def test_whole_rows_of_every_length(name, grouping, k):
    """Without a factor an fp8 CTA takes whole rows: how many, with which threads, depends on the length."""
    check(PrologueCase(name, 70, k, batch=2, grouping=grouping, fp8=True), served=True)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_alone_without_a_batch(name):
    for inputs in (make_inputs(PrologueCase(name, 129, 512)), make_inputs(PrologueCase(name, 7, 512))):
        flat = [one[0] if along_tokens(one) else one for one in inputs]
        compare(name, flat, (None, "strided", [128, 384], True, "bf16-sparse"), served=True)


# ----------------------------------------------------------------------------------- awkward inputs


def changed(name, **change):
    """Inputs of a case, some of them changed."""
    return with_changes(make_inputs(PrologueCase(name, 150, 384, batch=3)), **change)


@pytest.mark.parametrize("k", [60, 12, 20, 1004])
@pytest.mark.parametrize("name", NAMES)
def test_widths_that_no_vector_divides_are_left_to_pytorch(name, k):
    for grouping in GROUPINGS:
        check(PrologueCase(name, 70, k, rank=16, grouping=grouping), served=False)


@pytest.mark.parametrize("parts", [(16, 368), (24, 40, 320), (4,) * 3 + (372,)])
@pytest.mark.parametrize("name", NAMES)
def test_parts_that_no_vector_divides_are_left_to_pytorch(name, parts):
    check(PrologueCase(name, 70, 384, rank=16, grouping="strided", parts=parts), served=False)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_the_kernel_cannot_read_are_left_to_pytorch(name):
    tail = (None, "adjacent", [], True, "bf16-sparse")
    compare(name, changed(name, x=misaligned), tail, served=False)
    compare(name, changed(name, x=lambda x: x.mT.contiguous().mT), tail, served=False)
    if name in ("silu_gate", "concat_gelu", "concat_silu_gate"):
        compare(name, changed(name, first=misaligned), tail, served=False)
    if name not in (*MODULATED, *BY_TOKEN):
        inputs = [one.view(3, 10, 5, -1).transpose(1, 2) for one in changed(name)]
        compare(name, inputs, tail, served=False)
        compare(name, [one.contiguous() for one in inputs], tail, served=True)


def test_a_first_part_of_a_concatenation_that_ends_within_a_vector():
    case = PrologueCase("concat_gelu", 70, 384)
    a, b = make_inputs(case)
    compare("concat_gelu", (a[..., :68], torch.cat([b, b], -1)[..., :60]), make_tail(case), served=False)


@pytest.mark.parametrize(("change", "served"), MODULATIONS)
@pytest.mark.parametrize("name", MODULATED)
def test_modulations_of_every_shape(name, change, served):
    for rank in (0, 16):
        tail = make_tail(PrologueCase(name, 150, 384, rank=rank))
        compare(name, changed(name, **change), tail, served)


@pytest.mark.parametrize("first", [lambda p: p[0], lambda p: p[:1], lambda p: p.contiguous()])
def test_shifts_and_scales_that_lie_differently(first):
    compare("adaln", changed("adaln", first=first), (None, "adjacent", [], True, "bf16-sparse"), served=True)


def test_modulations_of_tokens_further_apart_than_32_bits_count():
    rows, k = 70_000, 64
    wide = torch.empty(rows, 32_768, dtype=torch.bfloat16, device="cuda")  # 2.3e9 entries
    x, shift, scale, common_shift, common_scale, eps = make_inputs(PrologueCase("adaln_of_tokens", rows, k))
    own = [wide[:, i * k : (i + 1) * k].copy_(one[0]) for i, one in enumerate((shift, scale))]
    tail = (None, "adjacent", [], True, "fp8-sparse")
    compare("adaln_of_tokens", (x[0], *own, common_shift, common_scale, eps), tail, served=True)


@pytest.mark.parametrize("name", NAMES)
def test_factors_at_any_address(name):
    inputs = changed(name)
    lowrank_a = make_tail(PrologueCase(name, 150, 384, rank=16))[0]
    for factor in (
        misaligned(lowrank_a),
        lowrank_a.T.contiguous().T,
        torch.cat([lowrank_a, lowrank_a], 1)[:, :384],
    ):
        compare(name, inputs, (factor, "adjacent", [], True, "bf16-sparse"), served=True)


# -------------------------------------------------------------------------------------- how it runs


@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize("name", NAMES)
def test_reruns_are_bit_identical(name, rank):
    case = grouped(name, "adjacent", rows=1000, rank=rank)
    inputs, tail = make_inputs(case), make_tail(case)
    first = operator(name)(*inputs, *tail)
    for _ in range(20):
        with poisoned():
            again = operator(name)(*inputs, *tail)
        assert all(torch.equal(one, other) for one, other in zip(again, first, strict=True))


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_graph_replays(name, grouping):
    case = PrologueCase(name, 500, 1024, batch=2, rank=64, grouping=grouping)
    inputs, tail = list(make_inputs(case)), make_tail(case)
    operator(name)(*inputs, *tail)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(name)(*inputs, *tail)
    for _ in range(5):
        randomize_(inputs)
        expected = operator(name)(*inputs, *tail)
        for replay in range(20):
            if replay == 0:
                for out in captured:
                    out.fill_(1)
            graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_card(name):
    case = PrologueCase(name, 500, 1024, batch=2, rank=64)
    inputs, tail = make_inputs(case), make_tail(case)
    odd = make_inputs(PrologueCase(name, 500, 1024, batch=2, layout="odd"))
    operator(name)(*inputs, *tail)
    operator(name)(*odd, *tail)
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator(name)(*inputs, *tail)
        operator(name)(*odd, *tail)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_and_no_kernel(name):
    case = PrologueCase(name, 150, 384, batch=3, rank=16)
    inputs = [one[:, :0] if along_tokens(one) else one for one in make_inputs(case)]
    assert [out.shape for out in operator(name)(*inputs, *make_tail(case))] == [(0,), (0,), (0,)]


@pytest.mark.parametrize("layout", ["plain", "odd"])
@pytest.mark.parametrize("rank", [0, 33])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, rank, layout):
    case = PrologueCase(name, 70, 192, batch=2, rank=rank, layout=layout)
    torch.library.opcheck(operator(name), (*make_inputs(case), *make_tail(case)))


@pytest.mark.parametrize("name", NAMES)
def test_the_cpu_computes_the_same(name):
    case = PrologueCase(name, 300, 512, batch=2, rank=64, data="heavy")
    inputs, tail = make_inputs(case), make_tail(case)
    here = operator(name)(*(one.cpu() if isinstance(one, torch.Tensor) else one for one in (*inputs, *tail)))
    there = operator(name)(*inputs, *tail)
    # The two round some entries differently.
    same = [float((one.cpu() == other).double().mean()) for one, other in zip(there, here, strict=True)]
    assert same[0] > 0.98
    torch.testing.assert_close(there[1].cpu(), here[1], rtol=1e-3, atol=0)
    assert same[2] > 0.9


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_a_device_that_is_not_current(name):
    case = PrologueCase(name, 300, 512, batch=2, rank=64)
    inputs, tail = make_inputs(case), make_tail(case)
    expected = operator(name)(*inputs, *tail)
    moved = (one.to("cuda:1") if isinstance(one, torch.Tensor) else one for one in (*inputs, *tail))
    for one, other in zip(operator(name)(*moved), expected, strict=True):
        assert one.device == torch.device("cuda:1")
        assert torch.equal(one.cpu(), other.cpu())
