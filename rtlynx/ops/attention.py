"""The torch operator of attention in eight bits, and what is around it in PyTorch, which compilers fuse."""

from __future__ import annotations

import torch
from torch import Tensor

from rtlynx.cuda import cudnn_attention
from rtlynx.math.attention import attention_fp8 as reference
from rtlynx.math.attention import quantize_values, saturated
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
