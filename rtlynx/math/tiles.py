"""The packed block format that the compress kernel writes and the GEMM reads, in plain PyTorch on any device.

X (M, K) after selection 2 of 4 is cut into blocks of 64 rows and 64 columns in *compute order*: group after
group, 4 entries each (`compute_order` puts a weight into that order). Block (mt, kb) lies at byte
`(mt * ceil(K / 64) + kb) * BLOCK_BYTES`:

- 64 rows of 32 kept values, 64 bytes each, as 4 chunks of 16 bytes; chunk j of row r lies in place
  `j ^ ((r >> 1) & 3)`: the 64-byte swizzle of shared memory, applied beforehand.
- 512 bytes of indices: one 32-bit word for each lane of the 4 warps of a warpgroup, as the tensor cores take
  them. Lane 4g + 2 step + h of warp w holds groups 8 step + 4h ... + 3 of rows 16w + g (low 16 bits) and
  16w + g + 8 (high 16 bits), lowest nibble first. A nibble is `i0 | i1 << 2` with i0 < i1.

In fp8 a block has 64 rows and 128 columns, 5,120 bytes: 64 kept e4m3 values a row in the same chunks, then
two words for each lane. Word `step` of lane 4g + 2b + i of warp w holds the eight groups of row 16w + g + 8i
from column 64 step + 32 b on.

What is beyond M or K is value +0 with nibble 4; in fp8 a token that is not finite has no value but NaN.
T (M, r) of the low-rank branch is cut into blocks of 64 rows and 32 columns in the same swizzle, zeros
beyond r.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rtlynx.math.fp8 import E4M3, quantize_tokens
from rtlynx.math.selection import Pattern, pack, to_groups

BLOCK_ROWS = 64
VALUE_BYTES = BLOCK_ROWS * 64  # of a block, whatever a value is


class Format(NamedTuple):
    """What blocks hold: values of `dtype`, kept from `block_k` columns of X."""

    dtype: torch.dtype
    block_k: int

    @property
    def index_bytes(self) -> int:
        """Of a block: 4 bits for every fourth column."""
        return BLOCK_ROWS * self.block_k // 8

    @property
    def block_bytes(self) -> int:
        return VALUE_BYTES + self.index_bytes


BF16, FP8 = Format(torch.bfloat16, 64), Format(E4M3, 128)
# How the groups of a block's columns split: (step, h, byte, nibble of the byte), in fp8 b instead of h. And
# the order of indices in memory, of axes (row block, warp, half or i, g, column block) and those.
_COLUMNS = {BF16: (2, 2, 2, 2), FP8: (2, 2, 4, 2)}
_ORDER = {BF16: (0, 4, 1, 3, 5, 6, 2, 7, 8), FP8: (0, 4, 1, 3, 6, 2, 5, 7, 8)}
LOWRANK_COLUMNS = 32
LOWRANK_BYTES = BLOCK_ROWS * LOWRANK_COLUMNS * 2

_FILLER = 0x4  # indices 0 and 1: legal, for groups that are not there
_LEGAL = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)


def format_of(fp8: bool) -> Format:
    return FP8 if fp8 else BF16


def packed_a_bytes(rows: int, k: int, held: Format = BF16) -> int:
    """Size of the blocks of X (rows, k)."""
    return -(-rows // BLOCK_ROWS) * -(-k // held.block_k) * held.block_bytes


def lowrank_bytes(rows: int, rank: int) -> int:
    """Size of the blocks of T (rows, rank)."""
    return -(-rows // BLOCK_ROWS) * -(-rank // LOWRANK_COLUMNS) * LOWRANK_BYTES


def compute_order(weight: Tensor, pattern: Pattern) -> Tensor:
    """`weight` (N, K) with its columns in the order of the blocks; the tensor itself for adjacent groups."""
    if pattern.grouping == "adjacent":
        return weight
    return to_groups(weight, pattern).flatten(-2)


def pack_a(x: Tensor, pattern: Pattern) -> Tensor:
    """Select 2 of 4 entries of `x` (M, K) bf16 and lay them out in blocks: uint8 (packed_a_bytes(M, K),).

    Raises
    ------
    ValueError
        If the pattern is not 2:4, K does not split into its groups, or `x` is no bf16 matrix.
    """
    kept, nibbles = _select(x, pattern)
    return _packed(kept.view(torch.uint8), nibbles, BF16)


def pack_a_fp8(x: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Select 2 of 4 entries of `x` (M, K) bf16 and quantise them: blocks and the scale t (M,) of each row.

    Raises
    ------
    ValueError
        As `pack_a`.
    """
    kept, nibbles = _select(x, pattern)
    quantized = quantize_tokens(pad(kept, (0, -kept.shape[1] % 64)))
    return _packed(quantized.values.view(torch.uint8), nibbles, FP8), quantized.scale.squeeze(-1)


def _select(x: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Kept values (M, K / 2) and index nibbles (M, K / 4) in compute order."""
    if x.dtype != torch.bfloat16 or x.ndim != 2:
        raise ValueError(f"blocks hold a bfloat16 matrix, got {x.dtype} of shape {tuple(x.shape)}")
    if (pattern.n, pattern.m) != (2, 4):
        raise ValueError(f"blocks hold 2 of 4 entries, got a pattern {pattern.n}:{pattern.m}")
    values, indices, _ = pack(x, pattern.grouping, pattern.parts)
    nibbles = torch.stack((indices & 0xF, indices >> 4), dim=-1).flatten(-2)[:, : x.shape[1] // 4]
    return values, nibbles


def _packed(kept: Tensor, nibbles: Tensor, held: Format) -> Tensor:
    """Blocks of kept values, as bytes, and their nibbles."""
    below, beyond = -kept.shape[0] % BLOCK_ROWS, -nibbles.shape[1] % (held.block_k // 4)
    values = _swizzled(pad(kept, (0, -kept.shape[1] % 64, 0, below)))
    split = pad(nibbles, (0, beyond, 0, below), value=_FILLER).unflatten(1, (-1, *_COLUMNS[held]))
    split = split.unflatten(0, (-1, 4, 2, 8)).permute(_ORDER[held])
    words = (split[..., 0] | split[..., 1] << 4).reshape(*values.shape[:2], held.index_bytes)
    return torch.cat((values, words), dim=-1).flatten()


def unpack_a(blocks: Tensor, rows: int, k: int, held: Format = BF16) -> Tensor:
    """Inverse of packing: X~ (rows, k) of `held.dtype`, zeros where entries were dropped, in compute order.

    Raises
    ------
    ValueError
        If the size is not that of (rows, k), or an index pair is one that the tensor cores leave undefined.
    """
    _check_size("blocks", blocks, packed_a_bytes(rows, k, held), f"X of shape ({rows}, {k})")
    row_blocks, column_blocks = -(-rows // BLOCK_ROWS), -(-k // held.block_k)
    split = blocks.view(row_blocks, column_blocks, held.block_bytes)
    element = held.dtype.itemsize
    values = _unswizzled(split[..., :VALUE_BYTES]).view(torch.int16 if element == 2 else torch.uint8)
    order = _ORDER[held]
    sizes = (row_blocks, 4, 2, 8, column_blocks, *_COLUMNS[held][:3])  # of the axes before they were permuted
    words = split[..., VALUE_BYTES:].reshape([sizes[axis] for axis in order[:-1]])
    back = [order.index(axis) for axis in range(9)]
    nibbles = torch.stack((words & 0xF, words >> 4), dim=-1).permute(back)
    nibbles = nibbles.reshape(row_blocks * BLOCK_ROWS, column_blocks * held.block_k // 4)
    if not bool(torch.isin(nibbles, nibbles.new_tensor(_LEGAL)).all()):
        raise ValueError("blocks hold an illegal index pair (the two indices must differ and be in order)")
    dense = values.new_zeros((*nibbles.shape, 4))
    position = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
    dense.scatter_(-1, position, values.unflatten(-1, (-1, 2)))
    return dense.flatten(-2)[:rows, :k].contiguous().view(held.dtype)


def pack_lowrank(t: Tensor) -> Tensor:
    """Lay T (M, r) bf16 out in blocks: uint8 (lowrank_bytes(M, r),)."""
    below, beyond = -t.shape[0] % BLOCK_ROWS, -t.shape[1] % LOWRANK_COLUMNS
    return _swizzled(pad(t.contiguous(), (0, beyond, 0, below)).view(torch.uint8)).flatten()


def unpack_lowrank(blocks: Tensor, rows: int, rank: int) -> Tensor:
    """Inverse of `pack_lowrank`: T (rows, rank) bf16.

    Raises
    ------
    ValueError
        If the size is not that of (rows, rank).
    """
    _check_size("low-rank blocks", blocks, lowrank_bytes(rows, rank), f"T of shape ({rows}, {rank})")
    split = blocks.view(-(-rows // BLOCK_ROWS), -(-rank // LOWRANK_COLUMNS), LOWRANK_BYTES)
    return _unswizzled(split)[:rows, : 2 * rank].contiguous().view(torch.bfloat16)


def _check_size(what: str, blocks: Tensor, expected: int, of: str) -> None:
    if blocks.dtype != torch.uint8 or blocks.shape != (expected,):
        raise ValueError(
            f"{what} of {of} are {expected} bytes, got {blocks.dtype} of shape {tuple(blocks.shape)}"
        )


def _chunk_places(device: torch.device) -> Tensor:
    """(64, 4): the place of each chunk in its row, and also the chunk in each place (its own inverse)."""
    row = torch.arange(BLOCK_ROWS, device=device).unsqueeze(1)
    return torch.arange(4, device=device) ^ (row >> 1 & 3)


def _swizzled(matrix: Tensor) -> Tensor:
    """Bytes (64 a, 64 b) as (a, b, 4096): blocks of 64 rows of 4 chunks, each in its place."""
    split = matrix.contiguous().view(-1, BLOCK_ROWS, matrix.shape[1] // 64, 4, 16).transpose(1, 2)
    places = _chunk_places(matrix.device).view(1, 1, BLOCK_ROWS, 4, 1).expand(split.shape)
    return split.gather(3, places).flatten(2)


def _unswizzled(blocks: Tensor) -> Tensor:
    """Inverse of `_swizzled`: (a, b, 4096) bytes as (64 a, 64 b)."""
    split = blocks.contiguous().unflatten(-1, (BLOCK_ROWS, 4, 16))
    places = _chunk_places(blocks.device).view(1, 1, BLOCK_ROWS, 4, 1).expand(split.shape)
    rows = split.gather(3, places).transpose(1, 2)
    return rows.reshape(blocks.shape[0] * BLOCK_ROWS, blocks.shape[1] * 64)
