"""The operators for LoRAs beside fp8 layers that keep all of their input, on the CPU."""

import pytest
import torch
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from rtlynx.cuda.sm90.lora import LoraShape, plan_lora, takes
from rtlynx.math.fp8 import quantize_tokens, quantize_weight
from rtlynx.math.tiles import pack_weight, unpack_lowrank
from rtlynx.ops.lora import lora, scaled_mm_lora
from rtlynx.ops.weight_sparse import gemm_weight_sparse

K = 48


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(ranks, widths, seed=0):
    """A^T and B of LoRAs of layers with these ranks, one after the other."""
    pairs = [(rank, n) for layer, n in zip(ranks, widths, strict=True) for rank in layer]
    return (
        [normal(rank, K, seed=seed + i).bfloat16() for i, (rank, _) in enumerate(pairs)],
        [normal(n, rank, seed=seed + 50 + i).bfloat16() for i, (rank, n) in enumerate(pairs)],
    )


@settings(deadline=None, max_examples=30)
@given(
    ranks=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=3),
    rows=st.integers(1, 70),
    scaled=st.booleans(),
    packs=st.booleans(),
)
def test_it_makes_what_a_product_needs_for_each_layer(ranks, rows, scaled, packs):
    """Together, T B^T c t is what the LoRAs add to the layer's output."""
    widths = [24 + 40 * i for i in range(len(ranks))]
    x = quantize_tokens(normal(rows, K))
    lowrank_as, lowrank_bs = factors(ranks, widths)
    c = [normal(n, seed=9).abs() + 0.01 for n in widths]
    scalings = normal(len(lowrank_as), seed=8) if scaled else None
    packing = (lowrank_bs, c) if packs else ([], [])
    t, tiles = lora(x.values, x.scale, lowrank_as, *packing, [len(one) for one in ranks], scalings)
    of = LoraShape(rows, K, tuple(map(tuple, ranks)), tuple(widths), packs)
    assert t.shape == (rows, of.first_columns[-1])
    assert tiles.numel() == sum(of.tile_bytes)
    pieces, index = list(tiles.split(of.tile_bytes)), 0
    for layer, first, tile, n, scale in zip(ranks, of.first_columns, pieces, widths, c, strict=False):
        added = torch.zeros(rows, n, dtype=torch.float64)
        for _ in layer:
            one = x.dequantize().double() @ lowrank_as[index].double().T @ lowrank_bs[index].double().T
            added += one if scalings is None else one * scalings[index].double()
            index += 1
        mine, rank = t[:, first : first + sum(layer)].double(), sum(layer)
        if packs:
            y = mine @ unpack_lowrank(tile, n, rank).double().T * scale.double() * x.scale.double()
        else:
            y = mine @ torch.cat(lowrank_bs[index - len(layer) : index], dim=1).double().T
        assert relative_error(y, added) < 1e-2


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 9000),
    k=st.integers(1, 900),
    ranks=st.lists(st.lists(st.integers(1, 130), min_size=1, max_size=3), min_size=1, max_size=4),
)
def test_every_row_column_and_tile_has_a_cta(rows, k, ranks):
    of = LoraShape(rows, 16 * k, tuple(map(tuple, ranks)), (3072,) * len(ranks), True)
    assert takes(of)
    plan = plan_lora(of, 132)
    x, y, _ = plan.grid
    assert plan.lowrank_ctas // plan.cluster * 128 >= rows
    assert x % plan.cluster == plan.lowrank_ctas % plan.cluster == 0
    assert x - plan.lowrank_ctas >= 48 * len(ranks)
    assert y * plan.columns >= of.first_columns[-1]
    assert all(first % 8 == 0 for first in of.first_columns)


@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_product_with_a_lora_is_the_formula(bias):
    x, w = quantize_tokens(normal(2, 9, K)), quantize_weight(normal(32, K, seed=1))
    t, b = normal(18, 5, seed=2).bfloat16(), normal(32, 5, seed=3).bfloat16()
    c = normal(32, seed=4).bfloat16() if bias else None
    y = scaled_mm_lora(x.values, x.scale, w.values, w.scale, c, t, b, True)
    expected = x.dequantize().double() @ w.dequantize().double().T + (t.double() @ b.double().T).view(
        2, 9, 32
    )
    assert y.shape == (2, 9, 32)
    assert relative_error(y, expected if c is None else expected + c.double()) < 6e-3


@pytest.mark.parametrize("rank", [1, 16, 40])
def test_the_product_by_sparse_weights_takes_them(rank):
    weight = normal(40, K, seed=1).unflatten(1, (-1, 4))
    weight[..., ::2] = 0
    x, w = quantize_tokens(normal(21, K)), quantize_weight(weight.flatten(1))
    a, b = normal(rank, K, seed=2).bfloat16(), normal(40, rank, seed=3).bfloat16()
    t, tiles = lora(x.values, x.scale, [a], [b], [w.scale], [1])
    y = gemm_weight_sparse(x.values, x.scale, [pack_weight(w.values)], [w.scale], [], [t[:, :rank]], [tiles])
    dense = x.dequantize().double()
    expected = dense @ w.dequantize().double().T + dense @ a.double().T @ b.double().T
    assert relative_error(y, expected) < 6e-3


def test_what_does_not_fit_together_is_refused():
    x = quantize_tokens(normal(9, K))
    (a,), (b,) = factors([[4]], [16])
    c = torch.ones(16)
    for counts in ([2], [], [0, 1]):
        with pytest.raises(ValueError, match="counts says how many of 1 LoRAs"):
            lora(x.values, x.scale, [a], [b], [c], counts)
    with pytest.raises(ValueError, match="one a LoRA"):
        lora(x.values, x.scale, [a], [b], [], [1])
    weight = torch.zeros(16, K).to(x.values.dtype)
    t, tiles = lora(x.values, x.scale, [a], [b], [c], [1])
    for lowrank, packed, said in (
        (t[:, :4], None, "come together"),
        (t[:8, :4], tiles, r"lowranks\[0\] is \(9, r\)"),
        (t[:, :4], tiles[:64], r"packed_bs\[0\] of"),
    ):
        with pytest.raises(ValueError, match=said):
            gemm_weight_sparse(*x, [pack_weight(weight)], [c], [], [lowrank], [packed])
