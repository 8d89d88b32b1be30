"""Inputs and outputs of more than 2^31 and 2^32 bytes on a Hopper card: some of their rows against float64.

A video of 1280 x 720 pixels and 81 frames has 75,600 tokens in Wan, whose MLPs are 13,824 wide: offsets in
what they read and write do not fit 32 bits. Compared are the first rows, the last, and those around where
offsets pass these limits; everything is searched for what was never written.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import (
    Case,
    arguments,
    check_compressed,
    check_output,
    expect,
    make_input,
    make_layers,
    multiply,
    poisoned,
    product,
)
from prologue_cases import PrologueCase, along_tokens, assert_same_bits, check_result, make_tail
from quantizer_cases import MATRIX, NAMES, QuantizerCase, check_quantized, make_inputs
from torch import Tensor
from weight_sparse_cases import WeightSparseCase, compare, exact, lists_of, lowrank_of, make

from rtlynx.cuda.sm90.compress import CompressOptions
from rtlynx.cuda.sm90.prologues import PROLOGUES
from rtlynx.math.formats import FORMATS, TILE_ROWS
from rtlynx.math.fp8 import E4M3, Quantized
from rtlynx.ops import sparse_linear as ops
from rtlynx.ops.prologues import COMPRESS, QUANTIZE, launch_compress, launch_quantize, quantize
from rtlynx.ops.weight_sparse import gemm_weight_sparse

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="the kernels need a Hopper card (compute capability 9.0)"),
]

LIMITS = (2**31, 2**32)
VIDEO, MORE = 75_600, 160_000  # rows; of MORE a matrix 13,824 wide has more than 2^32 bytes in bf16
WIDTH, HIDDEN = 5120, 13_824
LAYERS = [(rows, *sizes) for rows in (VIDEO, MORE) for sizes in ((WIDTH, HIDDEN), (HIDDEN, WIDTH))]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
    torch.cuda.empty_cache()  # of tens of gigabytes


def pieces(rows: int, *tensors: Tensor) -> list[slice]:
    """Rows to compare, as many as a tile has at a time; `tensors` are matrices and tiles of so many rows."""
    steps = [one.stride(-2) * one.itemsize if one.ndim > 1 else one.nbytes // rows for one in tensors]
    around = [limit // step + more for limit in LIMITS for step in steps if step for more in (-1, 0, 1)]
    tiles = sorted({row // TILE_ROWS for row in (0, rows - 1, *around) if row < rows})
    return [slice(tile * TILE_ROWS, min((tile + 1) * TILE_ROWS, rows)) for tile in tiles]


def tiles_of(packed: Tensor, rows: int, piece: slice) -> Tensor:
    """The bytes of a piece, of tiles of all rows."""
    if not packed.numel():
        return packed
    return packed.view(-(-rows // TILE_ROWS), -1)[piece.start // TILE_ROWS]


def assert_written(*tensors: Tensor) -> None:
    """Nothing is as `poisoned` leaves it: NaN, or in tiles ones that they cannot hold."""
    for one in tensors:
        if one.dtype is torch.uint8:
            left = one.view(torch.int16) == -1
        elif one.dtype is E4M3:
            left = one.view(torch.uint8) & 0x7F == 0x7F
        else:
            left = one.isnan()
        assert not bool(left.any()), f"{int(left.sum())} entries of {tuple(one.shape)} were not written"


def of_many_tokens(name: str) -> tuple[Any, ...]:
    """Inputs (1, MORE, HIDDEN) of a prologue or of the plain kernels."""
    inputs = make_inputs(QuantizerCase(name, MORE, HIDDEN))
    return tuple(one.unsqueeze(0) for one in inputs) if name == MATRIX else inputs


def matrices(inputs: Sequence[Any]) -> list[Tensor]:
    return [one for one in inputs if along_tokens(one) and one.is_floating_point()]


def rows_of(inputs: Sequence[Any], piece: slice) -> list[Any]:
    return [one[:, piece] if along_tokens(one) else one for one in inputs]


@pytest.mark.parametrize(
    ("fp8", "rank", "grouping"),
    [(False, 0, "adjacent"), (False, 64, "strided"), (True, 0, "strided"), (True, 64, "adjacent")],
)
@pytest.mark.parametrize("name", NAMES)
def test_compression(name, fp8, rank, grouping):
    tail = make_tail(PrologueCase(name, MORE, HIDDEN, rank=rank, grouping=grouping, fp8=fp8))
    lowrank_a, _, parts, norm, format = tail
    options = CompressOptions(grouping, tuple(parts), norm, FORMATS[format])
    inputs = of_many_tokens(name)
    with poisoned():
        result = COMPRESS.get(name, ops.compress)(*inputs, *tail)
        dense = inputs[0][0]
        if name != MATRIX:
            dense = torch.empty(MORE, HIDDEN, dtype=torch.bfloat16, device="cuda")
            in_test_mode = launch_compress(PROLOGUES[name], inputs, lowrank_a, options, dense)
            assert_same_bits(in_test_mode, result)
    assert_written(dense, *result)
    packed_a, scale, lowrank = result
    for piece in pieces(MORE, *matrices(inputs), dense, packed_a, lowrank):
        x = dense[piece]
        if name != MATRIX:
            check_result(name, rows_of(inputs, piece), x)
        case = Case(len(x), HIDDEN, 8, rank, grouping, norm=norm, fp8=fp8)
        tiles = (tiles_of(one, MORE, piece) for one in (packed_a, lowrank))
        of_piece = next(tiles), scale[piece], next(tiles)
        check_compressed(case, x, expect(x, case.pattern, fp8), lowrank_a, of_piece)


@pytest.mark.parametrize("name", NAMES)
def test_quantization(name):
    inputs = of_many_tokens(name)
    with poisoned():
        values, scale = QUANTIZE[name](*inputs)
        dense = inputs[0][0]
        if name != MATRIX:
            dense = torch.empty(MORE, HIDDEN, dtype=torch.bfloat16, device="cuda")
            in_test_mode = launch_quantize(PROLOGUES[name], inputs, values.shape, dense)
            assert_same_bits(in_test_mode, (values, scale))
    assert_written(dense, values, scale)
    for piece in pieces(MORE, *matrices(inputs), dense, values):
        if name != MATRIX:
            check_result(name, rows_of(inputs, piece), dense[piece])
        check_quantized(dense[None, piece], values[:, piece], scale[:, piece])


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("rows", "k", "n"), LAYERS)
def test_products_of_sparse_activations(rows, k, n, fp8):
    case = Case(rows, k, n, 64, bias="bf16", fp8=fp8)
    x, layers = make_input(case), make_layers(case)
    with poisoned():
        compressed = ops.compress(x, layers[0].lowrank_a, *arguments(case), case.format)
        y = multiply(case, compressed, layers, [0])
    assert_written(y)
    for piece in pieces(rows, x, compressed[0], y):
        expected = expect(x[piece], case.pattern, fp8)
        check_output(case, y[piece], *product(x[piece], layers[0], expected, case.norm))


@pytest.mark.parametrize(("rows", "k", "n"), LAYERS)
def test_products_by_sparse_weights(rows, k, n):
    case = WeightSparseCase(rows, k, n, rank=16)
    _, weight, bias = make(replace(case, rows=1))
    x = Quantized(*quantize(make_input(Case(rows, k, n))))
    t, b = lowrank_of(case, weight.scale)
    with poisoned():
        y = gemm_weight_sparse(*x, *lists_of(weight, bias, (t, b)))
    assert_written(y)
    for piece in pieces(rows, x.values, y):
        some = Quantized(x.values[piece], x.scale[piece])
        compare(y[piece], exact(some, weight, bias, (t[piece], b)))
