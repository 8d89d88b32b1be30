"""The torch operators of attention in eight bits and in front of any, and what is around them in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtlynx.cuda import cudnn_attention
from rtlynx.cuda.forms import form_of, keep
from rtlynx.cuda.sm90 import attention_inputs as kernel
from rtlynx.math.attention import AttentionInputs, Stream, quantize_values, saturated
from rtlynx.math.attention import attention_fp8 as reference
from rtlynx.math.attention import attention_inputs as inputs_reference
from rtlynx.math.attention import qk_norm_rotary as norm_reference
from rtlynx.math.fp8 import E4M3
from rtlynx.ops.registry import operator, refuse_gradients


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, one in (("q", q), ("k", k), ("v", v)):
        if one.dtype is not E4M3:
            raise TypeError(f"{name} is float8_e4m3fn, got {one.dtype}")
        if one.ndim != 4:
            raise ValueError(f"{name} is (B, S, H, D), got shape {tuple(one.shape)}")
        if one.device != q.device:
            raise ValueError(f"{name} is on {q.device} like q, got {one.device}")
    batch, _, heads, width = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[2], k.shape[3]) != (batch, heads, width):
        raise ValueError(
            f"k and v are (B, S_kv, H, D) with q's B, H and D, got q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}"
        )
    if not k.shape[1]:
        raise ValueError("there is no key to attend to: k and v are empty")


def _hopper(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    _check(q, k, v)
    return cudnn_attention.launch(q, k, v, scale)


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    _check(q, k, v)
    return reference(q, k, v, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    _check(q, k, v)
    return torch.empty(q.shape, dtype=E4M3, device=q.device)


# (B, S_q, H, D) by (B, S_kv, H, D), all e4m3; the result is contiguous.
attention_fp8 = operator(
    "attention_fp8(Tensor q, Tensor k, Tensor v, float scale) -> Tensor",
    hopper=_hopper,
    reference=_reference,
    fake=_fake,
)


def _streams(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    behind: list[Tensor],
    weights: list[Tensor],
    rotary: list[Tensor],
) -> list[Stream]:
    """Arguments of the operator as streams.

    Raises
    ------
    ValueError
        If a list has another length than streams need.
    RuntimeError
        If a gradient is asked for.
    """
    refuse_gradients(query, key, value, *behind, *weights)
    count = 1 + bool(behind)
    each = len(rotary) // count
    if len(behind) not in (0, 3) or len(weights) != 2 * count or len(rotary) % count or each > 2:
        raise ValueError(
            "behind has the query, key and value of a second stream or nothing, weights two for each stream, "
            f"rotary none, one or two for each, got {len(behind)}, {len(weights)} and {len(rotary)} tensors"
        )
    streams = [Stream(query, key, value, weights[0], weights[1], tuple(rotary[:each]))]
    if behind:
        streams.append(Stream(behind[0], behind[1], behind[2], weights[2], weights[3], tuple(rotary[each:])))
    return streams


def _check_streams(streams: Sequence[Stream]) -> None:
    first = streams[0].query
    if first.ndim != 4 or first.shape[-1] % 2 or not first.is_floating_point():
        raise ValueError(
            f"query is (B, T, H, D) of numbers, D even, got {tuple(first.shape)} of {first.dtype}"
        )
    batch, _, heads, width = first.shape
    if not batch or not heads or not any(stream.query.shape[1] for stream in streams):
        raise ValueError(f"there is nothing to attend to: query is {tuple(first.shape)}")
    for stream in streams:
        shape = (batch, stream.query.shape[1] if stream.query.ndim == 4 else 0, heads, width)
        for one in stream.heads:
            if tuple(one.shape) != shape or one.dtype is not first.dtype or one.device != first.device:
                raise ValueError(
                    f"queries, keys and values of a stream are {shape} of {first.dtype} on {first.device}, "
                    f"got {tuple(one.shape)} of {one.dtype} on {one.device}"
                )
        for one in (stream.q_weight, stream.k_weight):
            if tuple(one.shape) != (width,) or one.device != first.device:
                raise ValueError(
                    f"norm weights are ({width},) on {first.device}, got {tuple(one.shape)} on {one.device}"
                )
        _check_rotary(stream)


def _check_rotary(stream: Stream) -> None:
    batch, tokens, _, width = stream.query.shape
    pairs = (tokens, width // 2, 2)
    allowed = [(tokens, width)] if len(stream.rotary) == 2 else [pairs, (1, *pairs), (batch, *pairs)]
    for one in stream.rotary:
        if tuple(one.shape) not in allowed or one.dtype is not torch.float32:
            raise ValueError(
                f"rotary is float32 of shape {allowed[0]}, got {tuple(one.shape)} of {one.dtype}"
            )
        if one.device != stream.query.device:
            raise ValueError(f"rotary is on {stream.query.device} like query, got {one.device}")


_packings: dict[tuple[Any, ...], kernel.Packing | None] = {}


def _packed(tensors: Sequence[Any], fp8: bool) -> tuple[list[Stream], kernel.Packing | None]:
    """Streams, and what the kernel has to be told of them; None where it does not take them."""
    streams, form = _streams(*tensors), (fp8, *form_of(tensors))
    if form not in _packings:
        _check_streams(streams)
        keep(_packings, form, kernel.pack(streams, fp8=fp8))
    return streams, _packings[form]


def _inputs_hopper(*arguments: Any) -> AttentionInputs:
    numbers = arguments[6:]
    streams, packing = _packed(arguments[:6], fp8=True)
    if packing is None:
        return inputs_reference(streams, *numbers)
    return kernel.launch(packing, streams, *numbers)


def _inputs_reference(*arguments: Any) -> AttentionInputs:
    streams = _streams(*arguments[:6])
    _check_streams(streams)
    return inputs_reference(streams, *arguments[6:])


def _inputs_fake(*arguments: Any) -> AttentionInputs:
    streams = _streams(*arguments[:6])
    _check_streams(streams)
    like = streams[0].query
    batch, _, heads, width = like.shape
    tokens = sum(stream.query.shape[1] for stream in streams)
    return AttentionInputs(
        *(like.new_empty((batch, tokens, heads, width), dtype=E4M3) for _ in "qkv"),
        *(like.new_empty((batch, 1, heads, width), dtype=torch.float32) for _ in range(2)),
    )


# Of one stream, or of two, the second `behind` the first. Norm weights are q's and k's, stream by stream.
attention_inputs = operator(
    "attention_inputs(Tensor query, Tensor key, Tensor value, Tensor[] behind, Tensor[] weights, "
    "Tensor[] rotary, float eps, int q_exponent, int k_exponent) "
    "-> (Tensor q, Tensor k, Tensor v, Tensor v_scale, Tensor v_mean)",
    hopper=_inputs_hopper,
    reference=_inputs_reference,
    fake=_inputs_fake,
)


def _norm_hopper(*arguments: Any) -> list[Tensor]:
    eps = arguments[6]
    streams, packing = _packed(arguments[:6], fp8=False)
    return norm_reference(streams, eps) if packing is None else kernel.launch_bf16(packing, streams, eps)


def _norm_reference(*arguments: Any) -> list[Tensor]:
    streams = _streams(*arguments[:6])
    _check_streams(streams)
    return norm_reference(streams, arguments[6])


def _norm_fake(*arguments: Any) -> list[Tensor]:
    streams = _streams(*arguments[:6])
    _check_streams(streams)
    like = streams[0].query
    tokens = sum(stream.query.shape[1] for stream in streams)
    return [
        like.new_empty((like.shape[0], tokens, *like.shape[2:])) for _ in ("qkv" if streams[1:] else "qk")
    ]


# Queries and keys, normed and rotated, in their own dtype; of two streams values, too, joined. Arguments are
# those of `attention_inputs`.
qk_norm_rotary = operator(
    "qk_norm_rotary(Tensor query, Tensor key, Tensor value, Tensor[] behind, Tensor[] weights, "
    "Tensor[] rotary, float eps) -> Tensor[]",
    hopper=_norm_hopper,
    reference=_norm_reference,
    fake=_norm_fake,
)


def _arguments_of(streams: Sequence[Stream]) -> tuple[Any, ...]:
    """The tensors that the operators of streams take."""
    first, *others = streams
    return (
        *first.heads,
        [one for stream in others for one in stream.heads],
        [one for stream in streams for one in (stream.q_weight, stream.k_weight)],
        [one for stream in streams for one in stream.rotary],
    )


def joint_heads(streams: Sequence[Stream], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one or two streams as attention in their own dtype reads them.

    (B, S, H, D) each, S the tokens of all streams. One kernel norms, rotates and joins them; values of one
    stream are its own.
    """
    query, key, *values = qk_norm_rotary(*_arguments_of(streams), eps)
    return query, key, values[0] if values else streams[0].value


def joint_attention(
    streams: Sequence[Stream], *, scale: float, eps: float, q_exponent: int, k_exponent: int
) -> Tensor:
    """Attention in eight bits over the tokens of one or two streams, before their norms and rotation.

    Parameters
    ----------
    streams : sequence of rtlynx.math.attention.Stream
        Queries, keys and values as linear layers give them, the second's tokens behind the first's. One
        kernel norms, rotates and rounds them.
    scale : float
    eps : float
        Of the RMS norms of queries and keys.
    q_exponent, k_exponent : int
        Normalised queries and keys times 2^exponent fit e4m3; what does not saturates.

    Returns
    -------
    Tensor (B, S, H, D) in the dtype of the queries, S the tokens of all streams

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, or the card's kernel does not take the head dimension.
    RuntimeError
        If gradients are asked for.
    """
    q, k, v, unit, mean = attention_inputs(*_arguments_of(streams), eps, q_exponent, k_exponent)
    out = attention_fp8(q, k, v, scale * 2.0 ** -(q_exponent + k_exponent))
    return (out.float() * unit + mean).to(streams[0].query.dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, q_exponent: int, k_exponent: int
) -> Tensor:
    """softmax(scale Q K^T) V with all products in eight bits.

    Parameters
    ----------
    query : Tensor (B, S_q, H, D)
    key, value : Tensor (B, S_kv, H, D)
    scale : float
    q_exponent, k_exponent : int
        Queries and keys times 2^exponent fit e4m3; what does not saturates.

    Returns
    -------
    Tensor (B, S_q, H, D) in the dtype of `query`

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, or the card's kernel does not take the head dimension.
    RuntimeError
        If gradients are asked for.
    """
    refuse_gradients(query, key, value)
    q, k = saturated(query * 2.0**q_exponent), saturated(key * 2.0**k_exponent)
    values, unit, mean = quantize_values(value)
    out = attention_fp8(q, k, values, scale * 2.0 ** -(q_exponent + k_exponent))
    return (out.float() * unit + mean).to(query.dtype)
