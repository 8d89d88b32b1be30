"""One call of `rtlynx::lora` as a value, and the comparison with float64."""

from dataclasses import dataclass

import torch
from cases import FEW, LIMIT, LIMIT_OF_FEW, poisoned
from torch import Tensor

from rtlynx.math.fp8 import quantize_tokens
from rtlynx.math.tiles import lowrank_bytes, unpack_lowrank
from rtlynx.ops.lora import lora


@dataclass(frozen=True)
class LoraCase:
    """Layers of `widths` outputs that read X (rows, k), `ranks` of each one's LoRAs."""

    rows: int
    k: int
    ranks: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    scaled: bool = False
    packs: bool = True


CASES = [
    LoraCase(1, 16, ((1,),), (8,)),
    LoraCase(77, 144, ((5,), (31, 2)), (100, 257), scaled=True),
    LoraCase(129, 1008, ((16,), (33, 40), (8,)), (64, 65, 72)),
    LoraCase(300, 3072, ((16,), (16,), (16,)), (0, 0, 0), scaled=True, packs=False),
    LoraCase(512, 12288, ((16,),), (3072,), scaled=True),
    LoraCase(1, 3072, ((64, 64, 7), (1,)), (96, 8)),
    LoraCase(4099, 256, ((16,), (16,), (16,), (16,)), (520, 256, 256, 1024)),
    LoraCase(4096, 3072, ((16,), (16,), (16,)), (3072, 3072, 3072)),
    LoraCase(4608, 15360, ((4,),), (3072,), scaled=True),
    LoraCase(130, 64, tuple((3,) for _ in range(8)), (40,) * 8, scaled=True),
    LoraCase(130, 64, ((3,) * 17,), (40,)),  # more than one launch takes
    LoraCase(130, 72, ((3,),), (40,)),  # K that the kernel does not take
]


def check(case: LoraCase) -> None:
    """Run the operator on `case` and compare; AssertionError where it is not right."""
    generator = torch.Generator("cuda").manual_seed(case.rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    x = quantize_tokens(normal(case.rows, case.k).bfloat16())
    ranks = [rank for layer in case.ranks for rank in layer]
    owners = [i for i, layer in enumerate(case.ranks) for _ in layer]
    lowrank_as = [(normal(rank, case.k) * case.k**-0.5).bfloat16() for rank in ranks]
    lowrank_bs = [normal(case.widths[i], rank).bfloat16() for i, rank in zip(owners, ranks, strict=True)]
    weight_scales = [normal(n).abs() * 1e-3 + 1e-4 for n in case.widths]
    scalings = normal(len(ranks)) if case.scaled else None
    packing = (lowrank_bs, weight_scales) if case.packs else ([], [])
    with poisoned():
        t, tiles = lora(x.values, x.scale, lowrank_as, *packing, [len(one) for one in case.ranks], scalings)
    assert t.shape == (case.rows, sum(-(-sum(layer) // 8) * 8 for layer in case.ranks))
    column = begin = 0
    for i in range(len(case.ranks)):
        mine = [index for index, owner in enumerate(owners) if owner == i]
        parts = [x.values.double() @ lowrank_as[index].double().T for index in mine]
        if scalings is not None:
            parts = [part * scalings[index].double() for part, index in zip(parts, mine, strict=True)]
        expected = torch.cat(parts, dim=1) if case.packs else torch.cat(parts, dim=1) * x.scale.double()
        column = compare_t(t, column, expected)
        if case.packs:
            b = torch.cat([lowrank_bs[index] for index in mine], dim=1)
            end = begin + lowrank_bytes(*b.shape)
            compare_b(tiles[begin:end], b, weight_scales[i])
            begin = end
    assert tiles.numel() == begin


def compare_t(t: Tensor, column: int, expected: Tensor) -> int:
    """T of a layer from `column` on; returns the next layer's first column."""
    rank = expected.shape[1]
    found, end = t[:, column : column + rank], column + -(-rank // 8) * 8
    limit = LIMIT if found.numel() > FEW else LIMIT_OF_FEW
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < limit, f"T from column {column}: relative error {error:.2e}"
    assert not bool(t[:, column + rank : end].any()), "columns between layers are zeros"
    return end


def compare_b(tiles: Tensor, b: Tensor, weight_scale: Tensor) -> None:
    expected = (b.float() / weight_scale.unsqueeze(-1)).bfloat16()
    n, rank = b.shape
    whole = unpack_lowrank(tiles, -(-n // 64) * 64, -(-rank // 32) * 32)
    assert torch.equal(whole[:n, :rank], expected)
    assert not bool(whole[n:].any() | whole[:, rank:].any()), "beyond B are zeros"
