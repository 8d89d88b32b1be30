"""The packed tiles that the compress kernel writes and the GEMM reads, in plain PyTorch on any device.

X (M, K) after selection 2 of 4 is cut into tiles of 64 rows and 64 columns in *compute order*: group after
group, 4 entries each (`compute_order` puts a weight into that order). Tile (mt, kb) lies at byte
`(mt * ceil(K / 64) + kb) * TILE_BYTES`:

- 64 rows of 32 kept values, 64 bytes each, as 4 chunks of 16 bytes; chunk j of row r lies in place
  `j ^ ((r >> 1) & 3)`: the 64-byte swizzle of shared memory, applied beforehand.
- 512 bytes of indices: one 32-bit word for each lane of the 4 warps of a warpgroup, as the tensor cores take
  them. Lane 4g + 2 step + h of warp w holds groups 8 step + 4h ... + 3 of rows 16w + g (low 16 bits) and
  16w + g + 8 (high 16 bits), lowest nibble first. A nibble is `i0 | i1 << 2` with i0 < i1.

In fp8 a tile has 64 rows and 128 columns, 5,120 bytes: 64 kept e4m3 values a row in the same chunks, then
two words for each lane. Word `step` of lane 4g + 2b + i of warp w holds the eight groups of row 16w + g + 8i
from column 64 step + 32 b on.

What is beyond M or K is value +0 with nibble 4; in fp8 a token that is not finite has no value but NaN.
A 2:4-sparse weight (N, K) in e4m3 is cut into the same fp8 tiles, output channels in place of rows of X.
T (M, r) of the low-rank branch is cut into tiles of 64 rows and 32 columns in the same swizzle, zeros
beyond r.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rtlynx.math.formats import BF16_SPARSE, FP8_SPARSE, TILE_ROWS, Format
from rtlynx.math.fp8 import E4M3, quantize_tokens
from rtlynx.math.selection import Pattern, pack, to_groups

# How the groups of a tile's columns split: (step, h, byte, nibble of the byte), in fp8 b instead of h. And
# the order of indices in memory, of axes (row tile, warp, half or i, g, column tile) and those.
_COLUMNS = {BF16_SPARSE: (2, 2, 2, 2), FP8_SPARSE: (2, 2, 4, 2)}
_ORDER = {BF16_SPARSE: (0, 4, 1, 3, 5, 6, 2, 7, 8), FP8_SPARSE: (0, 4, 1, 3, 6, 2, 5, 7, 8)}
LOWRANK_COLUMNS = 32
LOWRANK_BYTES = TILE_ROWS * LOWRANK_COLUMNS * 2

_ROWS_PACKED = 16 * TILE_ROWS  # of a weight, at one time
_FILLER = 0x4  # indices 0 and 1: legal, for groups that are not there
_LEGAL = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)


def packed_a_bytes(rows: int, k: int, format: Format = BF16_SPARSE) -> int:
    """Size of the tiles of X (rows, k)."""
    return -(-rows // TILE_ROWS) * -(-k // format.tile_k) * format.tile_bytes


def lowrank_bytes(rows: int, rank: int) -> int:
    """Size of the tiles of T (rows, rank)."""
    return -(-rows // TILE_ROWS) * -(-rank // LOWRANK_COLUMNS) * LOWRANK_BYTES


def compute_order(weight: Tensor, pattern: Pattern) -> Tensor:
    """`weight` (N, K) with its columns in the order of the tiles; the tensor itself for adjacent groups."""
    if pattern.grouping == "adjacent":
        return weight
    return to_groups(weight, pattern).flatten(-2)


def pack_a(x: Tensor, pattern: Pattern) -> Tensor:
    """Select 2 of 4 entries of `x` (M, K) bf16 and lay them out in tiles: uint8 (packed_a_bytes(M, K),).

    Raises
    ------
    ValueError
        If the pattern is not 2:4, K does not split into its groups, or `x` is no bf16 matrix.
    """
    kept, nibbles = _select(x, pattern)
    return _packed(kept.view(torch.uint8), nibbles, BF16_SPARSE)


def pack_a_fp8(x: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Select 2 of 4 entries of `x` (M, K) bf16 and quantise them: tiles and the scale t (M,) of each row.

    Raises
    ------
    ValueError
        As `pack_a`.
    """
    kept, nibbles = _select(x, pattern)
    quantized = quantize_tokens(pad(kept, (0, -kept.shape[1] % 64)))
    return _packed(quantized.values.view(torch.uint8), nibbles, FP8_SPARSE), quantized.scale.squeeze(-1)


def pack_weight(weight: Tensor) -> Tensor:
    """Lay a 2:4-sparse `weight` (N, K) float8_e4m3fn out in tiles: uint8 (packed_a_bytes(N, K, FP8_SPARSE),).

    `unpack_weight` gives it back. A tile holds two entries of each group: nonzero ones first, then -0.

    Raises
    ------
    ValueError
        If it is no e4m3 matrix with K a multiple of 4, or has more than two nonzero entries in a group.
    """
    if weight.dtype is not E4M3 or weight.ndim != 2 or weight.shape[1] % 4:
        raise ValueError(
            "a packed weight is (N, K) of float8_e4m3fn with K a multiple of 4, got "
            f"{weight.dtype} of shape {tuple(weight.shape)}"
        )
    # Row tile after row tile, so that the indices of few rows are in memory at one time.
    pieces = weight.detach().view(torch.uint8).split(_ROWS_PACKED)
    return torch.cat([_pack_bytes(rows) for rows in pieces])


def _pack_bytes(rows: Tensor) -> Tensor:
    """`pack_weight` of some rows of a weight, as bytes."""
    groups = rows.unflatten(-1, (-1, 4))
    zero = groups & 0x7F == 0  # of either sign
    if bool((zero.sum(-1) < 2).any()):
        raise ValueError("a packed weight has at most two nonzero entries in every four neighbouring inputs")
    order = zero.byte() + (groups == 0).byte()
    places = order.argsort(dim=-1, stable=True)[..., :2].sort(dim=-1).values
    nibbles = (places[..., 0] | places[..., 1] << 2).byte()
    return _packed(groups.gather(-1, places).flatten(-2), nibbles, FP8_SPARSE)


def _select(x: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Kept values (M, K / 2) and index nibbles (M, K / 4) in compute order."""
    if x.dtype != torch.bfloat16 or x.ndim != 2:
        raise ValueError(f"packed tiles hold a bfloat16 matrix, got {x.dtype} of shape {tuple(x.shape)}")
    if (pattern.n, pattern.m) != (2, 4):
        raise ValueError(f"packed tiles hold 2 of 4 entries, got a pattern {pattern.n}:{pattern.m}")
    values, indices, _ = pack(x, pattern.grouping, pattern.parts, pattern.score)
    nibbles = torch.stack((indices & 0xF, indices >> 4), dim=-1).flatten(-2)[:, : x.shape[1] // 4]
    return values, nibbles


def _packed(kept: Tensor, nibbles: Tensor, format: Format) -> Tensor:
    """Blocks of kept values, as bytes, and their nibbles."""
    below, beyond = -kept.shape[0] % TILE_ROWS, -nibbles.shape[1] % (format.tile_k // 4)
    values = _swizzled(pad(kept, (0, -kept.shape[1] % 64, 0, below)))
    split = pad(nibbles, (0, beyond, 0, below), value=_FILLER).unflatten(1, (-1, *_COLUMNS[format]))
    split = split.unflatten(0, (-1, 4, 2, 8)).permute(_ORDER[format])
    words = (split[..., 0] | split[..., 1] << 4).reshape(*values.shape[:2], format.metadata_bytes)
    return torch.cat((values, words), dim=-1).flatten()


def unpack_a(packed_a: Tensor, rows: int, k: int, format: Format = BF16_SPARSE) -> Tensor:
    """Inverse of packing: X~ (rows, k) of `format.dtype`, zeros where entries were dropped, in compute order.

    Raises
    ------
    ValueError
        If the size is not that of (rows, k), or an index pair is one that the tensor cores leave undefined.
    """
    _check_size("packed_a", packed_a, packed_a_bytes(rows, k, format), f"X of shape ({rows}, {k})")
    values, nibbles = _kept(packed_a, k, format)
    if not bool(torch.isin(nibbles, nibbles.new_tensor(_LEGAL)).all()):
        raise ValueError(
            "packed tiles hold an illegal index pair (the two indices must differ and be in order)"
        )
    return _spread(values, nibbles)[:rows, :k].contiguous().view(format.dtype)


def unpack_weight(packed: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `pack_weight`: the weight (n, k) float8_e4m3fn; its indices are taken as they are.

    Bit for bit, but where more than two entries of a group are not +0: of those, some -0 come back as +0.

    Raises
    ------
    ValueError
        If the size is not that of (n, k).
    """
    _check_size("a packed weight", packed, packed_a_bytes(n, k, FP8_SPARSE), f"a weight of shape ({n}, {k})")
    bytes_a_row = packed_a_bytes(1, k, FP8_SPARSE) // TILE_ROWS
    starts, pieces = range(0, max(n, 1), _ROWS_PACKED), packed.split(_ROWS_PACKED * bytes_a_row)
    dense = [
        _spread(*_kept(piece, k, FP8_SPARSE))[: n - start, :k]
        for start, piece in zip(starts, pieces, strict=True)
    ]
    return torch.cat(dense).view(E4M3)


def _kept(packed: Tensor, k: int, format: Format) -> tuple[Tensor, Tensor]:
    """Inverse of `_packed`, as integers of the size of `format.dtype`, with all that is beyond the matrix."""
    column_tiles = -(-k // format.tile_k)
    split = packed.view(-1, column_tiles, format.tile_bytes)
    element = format.dtype.itemsize
    values = _unswizzled(split[..., : format.value_bytes]).view(torch.int16 if element == 2 else torch.uint8)
    order = _ORDER[format]
    sizes = (len(split), 4, 2, 8, column_tiles, *_COLUMNS[format][:3])  # of the axes before they were moved
    words = split[..., format.value_bytes :].reshape([sizes[axis] for axis in order[:-1]])
    back = [order.index(axis) for axis in range(9)]
    nibbles = torch.stack((words & 0xF, words >> 4), dim=-1).permute(back)
    return values, nibbles.reshape(len(values), column_tiles * format.tile_k // 4)


def _spread(values: Tensor, nibbles: Tensor) -> Tensor:
    """Kept values (M, K / 2) in their places of (M, K), zeros elsewhere."""
    place, zero = torch.arange(4, device=nibbles.device), values.new_zeros(())
    first, second = values.unflatten(-1, (-1, 2)).unsqueeze(-1).unbind(-2)
    at = nibbles.unsqueeze(-1)
    dense = torch.where(at & 3 == place, first, torch.where(at >> 2 == place, second, zero))
    return dense.flatten(-2)


def pack_lowrank(t: Tensor) -> Tensor:
    """Lay T (M, r) bf16 out in tiles: uint8 (lowrank_bytes(M, r),)."""
    below, beyond = -t.shape[0] % TILE_ROWS, -t.shape[1] % LOWRANK_COLUMNS
    return _swizzled(pad(t.contiguous(), (0, beyond, 0, below)).view(torch.uint8)).flatten()


def unpack_lowrank(lowrank: Tensor, rows: int, rank: int) -> Tensor:
    """Inverse of `pack_lowrank`: T (rows, rank) bf16.

    Raises
    ------
    ValueError
        If the size is not that of (rows, rank).
    """
    _check_size("low-rank tiles", lowrank, lowrank_bytes(rows, rank), f"T of shape ({rows}, {rank})")
    split = lowrank.view(-(-rows // TILE_ROWS), -(-rank // LOWRANK_COLUMNS), LOWRANK_BYTES)
    return _unswizzled(split)[:rows, : 2 * rank].contiguous().view(torch.bfloat16)


def _check_size(what: str, tiles: Tensor, expected: int, of: str) -> None:
    if tiles.dtype != torch.uint8 or tiles.shape != (expected,):
        raise ValueError(
            f"{what} of {of} are {expected} bytes, got {tiles.dtype} of shape {tuple(tiles.shape)}"
        )


def _chunk_places(device: torch.device) -> Tensor:
    """(64, 4): the place of each chunk in its row, and also the chunk in each place (its own inverse)."""
    row = torch.arange(TILE_ROWS, device=device).unsqueeze(1)
    return torch.arange(4, device=device) ^ (row >> 1 & 3)


def _swizzled(matrix: Tensor) -> Tensor:
    """Bytes (64 a, 64 b) as (a, b, 4096): tiles of 64 rows of 4 chunks, each in its place."""
    split = matrix.contiguous().view(-1, TILE_ROWS, matrix.shape[1] // 64, 4, 16).transpose(1, 2)
    places = _chunk_places(matrix.device).view(1, 1, TILE_ROWS, 4, 1).expand(split.shape)
    return split.gather(3, places).flatten(2)


def _unswizzled(tiles: Tensor) -> Tensor:
    """Inverse of `_swizzled`: (a, b, 4096) bytes as (64 a, 64 b)."""
    split = tiles.contiguous().unflatten(-1, (TILE_ROWS, 4, 16))
    places = _chunk_places(tiles.device).view(1, 1, TILE_ROWS, 4, 1).expand(split.shape)
    rows = split.gather(3, places).transpose(1, 2)
    return rows.reshape(tiles.shape[0] * TILE_ROWS, tiles.shape[1] * 64)
