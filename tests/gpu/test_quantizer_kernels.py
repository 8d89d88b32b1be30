"""The quantiser on a Hopper card: a matrix bit for bit, prologues as in compression, and products."""

import itertools
import math

import cases
import prologue_cases
import pytest
import torch
from cases import poisoned
from prologue_cases import (
    BY_TOKEN,
    MODULATED,
    MODULATIONS,
    along_tokens,
    misaligned,
    randomize_,
    with_changes,
)
from quantizer_cases import MATRIX, NAMES, QuantizerCase, check, compare, make_inputs, operator

from rtlynx import Pattern, SparseLinear
from rtlynx.cuda.sm90.quantize import MAX_COLUMNS
from rtlynx.nn.prepared import QuantizedInput
from rtlynx.nn.prologue import activated, read
from rtlynx.ops import dispatch as choice
from rtlynx.ops import fp8_linear as fp8
from rtlynx.ops.prologues import QUANTIZE, quantize

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="the kernels need a Hopper card (compute capability 9.0)"),
]

ROWS = (1, 2, 7, 129, 1000, 4099)
WIDTHS = (16, 24, 72, 256, 1000, 3072, 3840, 4096, 4104, 10240, 12288, 15360, MAX_COLUMNS)
CHAINS = NAMES[1:]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("rows", "k"), list(itertools.product(ROWS, WIDTHS)))
@pytest.mark.parametrize("name", NAMES)
def test_every_size(name, rows, k):
    index = ROWS.index(rows) + WIDTHS.index(k)
    batch = 2 if rows % 2 == 0 and name != MATRIX else 1
    layout = "plain" if name == MATRIX or batch == 1 else "sliced"
    data = cases.DATA if name == MATRIX else prologue_cases.DATA
    case = QuantizerCase(name, rows, k, batch, data[index % len(data)], layout, seed=index)
    check(case, served=True)


@pytest.mark.parametrize("data", cases.DATA)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("k", [384, 5120])
def test_every_matrix(k, layout, data):
    """Zeros, ties, tokens from 1e-30 to 1e30, any bits; rows anywhere, at odd addresses too."""
    check(QuantizerCase(MATRIX, 153, k, data=data, layout=layout))


@pytest.mark.parametrize("k", [4, 60, 1004, MAX_COLUMNS + 8])
def test_widths_that_the_kernel_does_not_read(k):
    check(QuantizerCase(MATRIX, 70, k))
    for name in CHAINS if k > 4 else ():
        check(QuantizerCase(name, 70, k), served=False)


@pytest.mark.parametrize("layout", prologue_cases.LAYOUTS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CHAINS)
def test_every_layout(name, batch, shared, layout):
    """(Of 147 rows in batches of 49, a block holds two of different batches.)"""
    for k in (384, 5120):
        case = QuantizerCase(name, 147, k, batch, layout=layout, shared=shared)
        check(case, served=layout != "odd")


@pytest.mark.parametrize("data", prologue_cases.DATA)
@pytest.mark.parametrize("k", [1024, 6144])
@pytest.mark.parametrize("name", CHAINS)
def test_every_kind_of_data(name, k, data):
    check(QuantizerCase(name, 500, k, 2, data=data), served=True)


@pytest.mark.parametrize("name", CHAINS)
def test_tokens_alone_without_a_batch(name):
    for rows in (129, 8):
        inputs = make_inputs(QuantizerCase(name, rows, 512))
        flat = [one[0] if along_tokens(one) else one for one in inputs]
        compare(name, flat, served=True)


# ----------------------------------------------------------------------------------- awkward inputs


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [16, 3072, 12288])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_are_not_finite_ruin_themselves_alone(name, k, bad):
    inputs = list(make_inputs(QuantizerCase(name, 9, k)))
    values, scale = operator(name)(*inputs)
    x = inputs[0].view(9, -1)
    for row in (0, 5, 8):
        x[row, row * x.shape[1] // 9] = bad
    with poisoned():
        ruined, ruined_scale = operator(name)(*inputs)
    # (gelu(inf) is inf, silu(-inf) and gelu(-inf) are NaN.)
    broken = torch.isnan(ruined_scale).view(9)
    assert broken.nonzero().flatten().tolist() == [0, 5, 8]
    assert bool(ruined.view(torch.uint8).view(9, k)[broken].eq(0x7F).all())
    same = ruined.view(torch.uint8) == values.view(torch.uint8)
    assert bool(same.view(9, k)[~broken].all())
    assert torch.equal(ruined_scale.view(9)[~broken], scale.view(9)[~broken])


@pytest.mark.parametrize("k", [16, 3072, 12288])
def test_rows_of_zeros_of_both_signs(k):
    x = make_inputs(QuantizerCase(MATRIX, 6, k))[0]
    x[1], x[2], x[5, 1:] = 0.0, -0.0, 0.0
    compare(MATRIX, [x])
    values, scale = quantize(x)
    assert scale[1:3].flatten().tolist() == [1.0, 1.0]
    assert not bool(values[1:3].float().any())


@pytest.mark.parametrize("exponent", [*range(-133, 127, 13), 126])
@pytest.mark.parametrize("k", [256, 8192])
def test_every_magnitude(k, exponent):
    x = torch.randn(65, k, device="cuda", dtype=torch.float64) * 2.0**exponent
    compare(MATRIX, [x.bfloat16()])


def changed(name, **change):
    """Inputs of a case, some of them changed."""
    return with_changes(make_inputs(QuantizerCase(name, 147, 384, batch=3)), **change)


@pytest.mark.parametrize(("change", "served"), [*MODULATIONS, ({"x": misaligned}, False)])
@pytest.mark.parametrize("name", MODULATED)
def test_modulations_of_every_shape(name, change, served):
    compare(name, changed(name, **change), served)


@pytest.mark.parametrize("table", [1, 4])
def test_choices_of_any_number_and_layout(table):
    x, shift, scale, _, eps = make_inputs(QuantizerCase(BY_TOKEN, 147, 384, batch=3))
    wild = torch.randint(-9, 9, (3, 98), device="cuda", dtype=torch.int32)
    for given in (wild[:, :49], wild[:, ::2], wild[:1, 1:50].expand(3, -1)):
        result = operator(BY_TOKEN)(x, shift[:table], scale[:table], given, eps)
        compare(BY_TOKEN, (x, shift[:table], scale[:table], given.clamp(0, table - 1), eps), served=True)
        expected = operator(BY_TOKEN)(x, shift[:table], scale[:table], given.clamp(0, table - 1), eps)
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(result, expected, strict=True)
        )


# -------------------------------------------------------------------------------------- how it runs


@pytest.mark.parametrize("k", [3072, 12288])
@pytest.mark.parametrize("name", NAMES)
def test_reruns_are_bit_identical(name, k):
    inputs = make_inputs(QuantizerCase(name, 1000, k))
    first = operator(name)(*inputs)
    for _ in range(20):
        with poisoned():
            again = operator(name)(*inputs)
        assert all(
            torch.equal(one.view(torch.uint8), other.view(torch.uint8))
            for one, other in zip(again, first, strict=True)
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_graph_replays(name):
    inputs = list(make_inputs(QuantizerCase(name, 500, 1024)))
    operator(name)(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(name)(*inputs)
        again = operator(name)(*inputs)  # begins before the one above has ended
    for _ in range(5):
        randomize_(inputs)
        expected = operator(name)(*inputs)
        for replay in range(20):
            if replay == 0:
                for out in (*captured, *again):
                    out.view(torch.uint8).fill_(1)
            graph.replay()
        for results in (captured, again):
            for one, other in zip(results, expected, strict=True):
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_card(name):
    inputs = make_inputs(QuantizerCase(name, 500, 1024))
    odd = make_inputs(QuantizerCase(name, 500, 1024, layout="odd"))
    operator(name)(*inputs)
    operator(name)(*odd)
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator(name)(*inputs)
        operator(name)(*odd)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CHAINS)
def test_no_rows_and_no_kernel(name):
    inputs = [one[:, :0] if along_tokens(one) else one for one in changed(name)]
    assert [out.shape for out in operator(name)(*inputs)] == [(3, 0, 384), (3, 0, 1)]


@pytest.mark.parametrize("layout", ["plain", "odd"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, layout):
    torch.library.opcheck(operator(name), make_inputs(QuantizerCase(name, 70, 192, layout=layout)))


@pytest.mark.parametrize("name", NAMES)
def test_the_cpu_computes_the_same(name):
    inputs = make_inputs(QuantizerCase(name, 300, 512, data="heavy"))
    here = operator(name)(*(one.cpu() if isinstance(one, torch.Tensor) else one for one in inputs))
    there = operator(name)(*inputs)
    # The two round some entries of a chain differently.
    same = (there[0].cpu().view(torch.uint8) == here[0].view(torch.uint8)).double().mean()
    assert float(same) == 1 if name == MATRIX else float(same) > 0.98
    torch.testing.assert_close(there[1].cpu(), here[1], rtol=0 if name == MATRIX else 2**-7, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_a_device_that_is_not_current(name):
    inputs = make_inputs(QuantizerCase(name, 300, 512))
    expected = operator(name)(*inputs)
    moved = (one.to("cuda:1") if isinstance(one, torch.Tensor) else one for one in inputs)
    for one, other in zip(operator(name)(*moved), expected, strict=True):
        assert one.device == torch.device("cuda:1")
        assert torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8))


# --------------------------------------------------------------------------------------- in a layer


def dense_fp8(bias=True):
    torch.manual_seed(0)
    plain = torch.nn.Linear(512, 272, bias=bias, device="cuda").bfloat16()
    layer = SparseLinear.from_linear(plain, pattern=Pattern(1, 1), norm="none")
    layer.quantize()
    return layer


@pytest.mark.parametrize("rows", [1, 77, 512])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_read_a_quantised_chain(bias, rows):
    layers = dense_fp8(bias), dense_fp8(bias)
    x = torch.randn(2, rows, 512, device="cuda", dtype=torch.bfloat16)
    gelu = torch.nn.GELU(approximate="tanh")
    prepared = read(activated(gelu, x), *layers)
    assert isinstance(prepared, QuantizedInput)
    quantized = fp8.CompressedFp8(*QUANTIZE["gelu"](x))
    for layer in layers:
        y, expected = layer(prepared), fp8.linear_fp8(x, quantized, layer.fp8_parameters())
        assert (y.shape, y.dtype) == ((2, rows, 272), torch.bfloat16)
        assert float((y - expected).double().norm()) < 8e-3 * float(expected.double().norm())


def test_a_layer_called_by_itself_quantises_in_one_kernel(monkeypatch):
    layer, x = dense_fp8(), torch.randn(3, 50, 512, device="cuda", dtype=torch.bfloat16)
    called = []
    monkeypatch.setattr(fp8, "quantize", lambda x, of=quantize: called.append(1) or of(x))
    y = layer(x)
    assert called
    monkeypatch.setattr(fp8, "quantizer_supports", lambda k, x: False)
    assert torch.equal(layer(x.clone()), y)
    assert choice.quantizer_supports(512, x)
    assert not choice.quantizer_supports(512, x.half())
