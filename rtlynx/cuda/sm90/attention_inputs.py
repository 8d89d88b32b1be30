"""Host side of attention_inputs.cu: which inputs it takes, parameters, launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rtlynx.cuda import jit
from rtlynx.cuda.jit import Defines, Instantiation
from rtlynx.cuda.layout import Layout
from rtlynx.math.attention import REACH, AttentionInputs, Stream, sample_step
from rtlynx.math.fp8 import E4M3

HEAD_DIMS = (64, 128)
_WARPS, _WARP = 8, 32
# Tokens of a CTA of values, and the most such CTAs of a head: each looks at every 11th of all tokens first.
_CHUNK_TOKENS, _MOST_CHUNKS = 1024, 6
_MOST_TOKENS = 2**31 // 16  # of all batches
_ALIGNMENT = 16  # bytes

_HEADS = Layout(("data", "pointer"), *((f"{axis}_stride", "int64") for axis in ("batch", "token", "head")))
_STREAM = Layout(
    *((name, _HEADS) for name in ("query", "key", "value")),
    *((name, "pointer") for name in ("query_weight", "key_weight", "cosine", "sine")),
    ("rotary_batch_stride", "int64"),
    ("rotary_token_stride", "int64"),
)
_STREAM_FIELDS = 3 * 4 + 4 + 2
_OUTPUTS = 2 * _STREAM_FIELDS  # the first field behind the streams
_PARAMETERS = Layout(
    ("stream", _STREAM, 2),
    *((name, "pointer") for name in ("query", "key", "value", "value_scale", "value_mean")),
    *((name, "float") for name in ("query_factor", "key_factor", "eps")),
    *((name, "int") for name in ("batches", "tokens", "first_tokens", "heads")),
    *((name, "int") for name in ("value_chunks", "chunk_tokens", "samples", "sample_step")),
)


def _defines(head_dim: int, fp8: bool) -> Defines:
    sizes = (("HEAD_DIM", head_dim), ("REACH", int(REACH)), ("WARPS", _WARPS))
    return (("FP8", int(fp8)), *sizes, *_PARAMETERS.defines)


INSTANTIATIONS = [
    Instantiation("attention_inputs.cu", "attention_inputs", _defines(head_dim, fp8))
    for head_dim in HEAD_DIMS
    for fp8 in (True, False)
]


@functools.cache
def _kernel(head_dim: int, fp8: bool) -> jit.Kernel:
    return jit.load(
        "attention_inputs.cu",
        "attention_inputs",
        _defines(head_dim, fp8),
        threads=_WARPS * _WARP,
        shared_bytes=0,
        pdl=True,
    )


class Packing(NamedTuple):
    """What launches of streams of one form share.

    values : parameters, but for addresses and factors
    grid : of CTAs
    shape : of q, k and v, (B, S, H, D)
    fp8 : whether they leave in e4m3, else in bf16
    """

    values: list[Any]
    grid: tuple[int, int, int]
    shape: tuple[int, int, int, int]
    fp8: bool


def _fits(streams: Sequence[Stream]) -> bool:
    """Whether the kernel can read `streams`, 16 bytes at a time, but for where they begin."""
    first = streams[0].query
    batch, _, heads, width = first.shape
    tokens = batch * sum(stream.query.shape[1] for stream in streams)
    if width not in HEAD_DIMS or not 0 < tokens < _MOST_TOKENS or not heads or len(streams) > 2:
        return False
    for stream in streams:
        tensors = _tensors(stream)
        dtypes = [torch.bfloat16] * 5 + [torch.float32] * len(stream.rotary)
        if [one.dtype for one in tensors] != dtypes or not all(map(_rows_fit, tensors)):
            return False
        if len({_rotary_strides(one) for one in stream.rotary}) > 1:
            return False
    return True


def _tensors(stream: Stream) -> list[Tensor]:
    """In the order of the kernel's structure."""
    return [*stream.heads, stream.q_weight, stream.k_weight, *stream.rotary]


def _copied(stream: Stream) -> Stream:
    """Contiguous, and where the allocator begins."""
    q, k, v, q_weight, k_weight, *rotary = (
        one.clone(memory_format=torch.contiguous_format) for one in _tensors(stream)
    )
    return Stream(q, k, v, q_weight, k_weight, tuple(rotary))


def _rows_fit(x: Tensor) -> bool:
    """Whether rows of dense entries lie at multiples of 16 bytes, if the first one does."""
    last = -2 if x.ndim > 2 and x.shape[-1] == 2 else -1  # (pairs of cosine and sine are dense, too)
    if x.stride(-1) != 1 or (last == -2 and x.stride(-2) != 2):
        return False
    apart = zip(x.shape[:last], x.stride()[:last], strict=True)
    return not any(size > 1 and stride * x.element_size() % _ALIGNMENT for size, stride in apart)


def _rotary_strides(x: Tensor) -> tuple[int, int]:
    """From batch to batch and token to token of (T, D), (T, D / 2, 2) or (B, T, D / 2, 2)."""
    if x.ndim == 4:
        return (x.stride(0) if x.shape[0] > 1 else 0), x.stride(1)
    return 0, x.stride(0)


def pack(streams: Sequence[Stream], *, fp8: bool = True) -> Packing | None:
    """What launches of streams of this form share; None where the kernel does not take them."""
    if not _fits(streams):
        return None
    values: list[Any] = []
    for stream in streams:
        for one in stream.heads:
            values += [0, *one.stride()[:3]]
        values += [0] * 4
        values += _rotary_strides(stream.rotary[0]) if stream.rotary else (0, 0)
    values += [0] * (_OUTPUTS - len(values))
    batch, first_tokens, heads, width = streams[0].query.shape
    tokens = sum(stream.query.shape[1] for stream in streams)
    values += [0] * 5 + [0.0] * 3 + [batch, tokens, first_tokens, heads]
    grid = -(-batch * tokens // _WARPS)
    if fp8:
        chunks = min(-(-tokens // _CHUNK_TOKENS), _MOST_CHUNKS)
        step = sample_step(tokens)
        values += [chunks, -(-tokens // chunks), -(-tokens // step), step]
        grid += batch * heads * chunks
    else:
        values += [0] * 4
    return Packing(values, (grid, 1, 1), (batch, tokens, heads, width), fp8)


def launch(
    packing: Packing, streams: Sequence[Stream], eps: float, q_exponent: int, k_exponent: int
) -> AttentionInputs:
    """`rtlynx.math.attention.attention_inputs` of `streams` on the current device and stream.

    packing : what `pack` gave for them, or for others of the form
    """
    shape, device = packing.shape, streams[0].query.device
    q = torch.empty(shape, dtype=E4M3, device=device)
    scale = torch.empty((shape[0], 1, *shape[2:]), dtype=torch.float32, device=device)
    made = AttentionInputs(q, torch.empty_like(q), torch.empty_like(q), scale, torch.empty_like(scale))
    _launch(packing, streams, made, (2.0**q_exponent, 2.0**k_exponent, eps))
    return made


def launch_bf16(packing: Packing, streams: Sequence[Stream], eps: float) -> list[Tensor]:
    """`rtlynx.math.attention.qk_norm_rotary` of `streams` on the current device and stream.

    packing : what `pack` gave for them with `fp8=False`, or for others of the form
    """
    made = [
        torch.empty(packing.shape, dtype=torch.bfloat16, device=streams[0].query.device)
        for _ in ("qkv" if streams[1:] else "qk")
    ]
    _launch(packing, streams, made, (1.0, 1.0, eps))
    return made


def _launch(
    packing: Packing, streams: Sequence[Stream], made: Sequence[Tensor], numbers: tuple[float, float, float]
) -> None:
    """Fill `made`, in the order of the kernel's structure."""
    values = packing.values.copy()
    at = unaligned = 0
    for stream in streams:
        addresses = [one.data_ptr() for one in _tensors(stream)]
        for address in addresses:
            unaligned |= address % _ALIGNMENT
        values[at : at + 12 : 4] = addresses[:3]
        values[at + 12 : at + 9 + len(addresses)] = addresses[3:]
        at += _STREAM_FIELDS
    if unaligned:
        copies = [_copied(one) for one in streams]
        packing_of_copies = pack(copies, fp8=packing.fp8)
        assert packing_of_copies is not None
        return _launch(packing_of_copies, copies, made, numbers)
    values[_OUTPUTS : _OUTPUTS + len(made)] = [one.data_ptr() for one in made]
    values[_OUTPUTS + 5 : _OUTPUTS + 8] = numbers
    current = torch._C._cuda_getCurrentRawStream(streams[0].query.get_device())
    _kernel(packing.shape[-1], packing.fp8).launch(packing.grid, current, _PARAMETERS.pack(*values))
