"""The packed block format that the compress kernel writes and the GEMM reads, in plain PyTorch on any device.

X (M, K) after selection 2 of 4 is cut into blocks of 64 rows and 64 columns in *compute order*: group after
group, 4 entries each (`compute_order` puts a weight into that order). Block (mt, kb) lies at byte
`(mt * ceil(K / 64) + kb) * BLOCK_BYTES`:

- 64 rows of 32 kept values, 64 bytes each, as 4 chunks of 16 bytes; chunk j of row r lies in place
  `j ^ ((r >> 1) & 3)`: the 64-byte swizzle of shared memory, applied beforehand.
- 512 bytes of indices: one 32-bit word for each lane of the 4 warps of a warpgroup, as the tensor cores take
  them. Lane 4g + 2 step + h of warp w holds groups 8 step + 4h ... + 3 of rows 16w + g (low 16 bits) and
  16w + g + 8 (high 16 bits), lowest nibble first. A nibble is `i0 | i1 << 2` with i0 < i1.

What is beyond M or K is value +0 with nibble 4. T (M, r) of the low-rank branch is cut into blocks of 64 rows
and 32 columns in the same swizzle, zeros beyond r.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rtlynx.pattern import Pattern, pack, to_groups

BLOCK_ROWS = 64
BLOCK_K = 64  # columns of X; half of them are kept
VALUE_BYTES = BLOCK_ROWS * BLOCK_K  # 2 bytes for every second column
INDEX_BYTES = BLOCK_ROWS * BLOCK_K // 8  # 4 bits for every fourth column
BLOCK_BYTES = VALUE_BYTES + INDEX_BYTES
LOWRANK_COLUMNS = 32
LOWRANK_BYTES = BLOCK_ROWS * LOWRANK_COLUMNS * 2

_FILLER = 0x4  # indices 0 and 1: legal, for groups that are not there
_LEGAL = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)


def blocks_bytes(rows: int, k: int) -> int:
    """Size of the blocks of X (rows, k)."""
    return -(-rows // BLOCK_ROWS) * -(-k // BLOCK_K) * BLOCK_BYTES


def lowrank_bytes(rows: int, rank: int) -> int:
    """Size of the blocks of T (rows, rank)."""
    return -(-rows // BLOCK_ROWS) * -(-rank // LOWRANK_COLUMNS) * LOWRANK_BYTES


def compute_order(weight: Tensor, pattern: Pattern) -> Tensor:
    """`weight` (N, K) with its columns in the order of the blocks; the tensor itself for adjacent groups."""
    if pattern.grouping == "adjacent":
        return weight
    return to_groups(weight, pattern).flatten(-2)


def pack_blocks(x: Tensor, pattern: Pattern) -> Tensor:
    """Select 2 of 4 entries of `x` (M, K) bf16 and lay them out in blocks: uint8 (blocks_bytes(M, K),).

    Raises
    ------
    ValueError
        If the pattern is not 2:4, K does not split into its groups, or `x` is no bf16 matrix.
    """
    if x.dtype != torch.bfloat16 or x.ndim != 2:
        raise ValueError(f"blocks hold a bfloat16 matrix, got {x.dtype} of shape {tuple(x.shape)}")
    if (pattern.n, pattern.m) != (2, 4):
        raise ValueError(f"blocks hold 2 of 4 entries, got a pattern {pattern.n}:{pattern.m}")
    rows, k = x.shape
    values, indices, _ = pack(x, pattern.grouping, pattern.parts)
    nibbles = torch.stack((indices & 0xF, indices >> 4), dim=-1).flatten(-2)[:, : k // 4]
    below, beyond = -rows % BLOCK_ROWS, -k % BLOCK_K
    kept = _swizzled(pad(values.view(torch.int16), (0, beyond // 2, 0, below)))
    # Axes: row block, warp, half of its 16 rows, g | column block, step, h, byte, nibble of the byte.
    split = pad(nibbles, (0, beyond // 4, 0, below), value=_FILLER).unflatten(1, (-1, 2, 2, 2, 2))
    split = split.unflatten(0, (-1, 4, 2, 8)).permute(0, 4, 1, 3, 5, 6, 2, 7, 8)
    words = (split[..., 0] | split[..., 1] << 4).reshape(*kept.shape[:2], INDEX_BYTES)
    return torch.cat((kept, words), dim=-1).flatten()


def unpack_blocks(blocks: Tensor, rows: int, k: int) -> Tensor:
    """Inverse of `pack_blocks`: X~ (rows, k) bf16 with zeros where entries were dropped, in compute order.

    Raises
    ------
    ValueError
        If the size is not that of (rows, k), or an index pair is one that the tensor cores leave undefined.
    """
    _check_size("blocks", blocks, blocks_bytes(rows, k), f"X of shape ({rows}, {k})")
    row_blocks, column_blocks = -(-rows // BLOCK_ROWS), -(-k // BLOCK_K)
    split = blocks.view(row_blocks, column_blocks, BLOCK_BYTES)
    values = _unswizzled(split[..., :VALUE_BYTES])
    words = split[..., VALUE_BYTES:].reshape(row_blocks, column_blocks, 4, 8, 2, 2, 2, 2)
    # Back to rows (row block, warp, half, g) and groups (column block, step, h, byte, nibble).
    nibbles = torch.stack((words & 0xF, words >> 4), dim=-1).permute(0, 2, 6, 3, 1, 4, 5, 7, 8)
    nibbles = nibbles.reshape(row_blocks * BLOCK_ROWS, column_blocks * BLOCK_K // 4)
    if not bool(torch.isin(nibbles, nibbles.new_tensor(_LEGAL)).all()):
        raise ValueError("blocks hold an illegal index pair (the two indices must differ and be in order)")
    dense = values.new_zeros((*nibbles.shape, 4))
    position = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
    dense.scatter_(-1, position, values.unflatten(-1, (-1, 2)))
    return dense.flatten(-2)[:rows, :k].contiguous().view(torch.bfloat16)


def pack_lowrank(t: Tensor) -> Tensor:
    """Lay T (M, r) bf16 out in blocks: uint8 (lowrank_bytes(M, r),)."""
    below, beyond = -t.shape[0] % BLOCK_ROWS, -t.shape[1] % LOWRANK_COLUMNS
    return _swizzled(pad(t.view(torch.int16), (0, beyond, 0, below))).flatten()


def unpack_lowrank(blocks: Tensor, rows: int, rank: int) -> Tensor:
    """Inverse of `pack_lowrank`: T (rows, rank) bf16.

    Raises
    ------
    ValueError
        If the size is not that of (rows, rank).
    """
    _check_size("low-rank blocks", blocks, lowrank_bytes(rows, rank), f"T of shape ({rows}, {rank})")
    split = blocks.view(-(-rows // BLOCK_ROWS), -(-rank // LOWRANK_COLUMNS), LOWRANK_BYTES)
    return _unswizzled(split)[:rows, :rank].contiguous().view(torch.bfloat16)


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
    """int16 (64 a, 32 b) as bytes (a, b, 4096): blocks of 64 rows of 4 chunks, each in its place."""
    split = matrix.contiguous().view(-1, BLOCK_ROWS, matrix.shape[1] // 32, 4, 8).transpose(1, 2)
    places = _chunk_places(matrix.device).view(1, 1, BLOCK_ROWS, 4, 1).expand(split.shape)
    return split.gather(3, places).view(torch.uint8).flatten(2)


def _unswizzled(blocks: Tensor) -> Tensor:
    """Inverse of `_swizzled`: (a, b, 4096) bytes as int16 (64 a, 32 b)."""
    split = blocks.contiguous().view(torch.int16).unflatten(-1, (BLOCK_ROWS, 4, 8))
    places = _chunk_places(blocks.device).view(1, 1, BLOCK_ROWS, 4, 1).expand(split.shape)
    rows = split.gather(3, places).transpose(1, 2)
    return rows.reshape(blocks.shape[0] * BLOCK_ROWS, blocks.shape[1] * 32)
