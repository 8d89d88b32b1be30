"""Attention in eight bits (e4m3), and what comes before any attention: their definition, on any device.

Queries and keys, which norms bound, are scaled by a power of two that is known beforehand. Values are centred
and scaled channel by channel; the output comes in the same units, so it fits e4m3 as they do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rtlynx.math.fp8 import E4M3, E4M3_MAX, TOKEN_SCALE_FLOOR

# Of softmax's numerators, which are at most 1, before they are rounded. A power of two, which costs no bits.
P_SCALE = 256.0
# Of more tokens than this, every 11th is looked at for the mean and the largest of values: a pass over all of
# them takes as long as a tenth of the attention. (11 divides no row of a picture; 16 saw one border alone.)
_FEW, _EVERY = 256, 11
# The largest sampled value becomes this; what is 64 times larger still fits.
REACH = 7.0
# Room for what bfloat16 adds to a norm's bound.
_MARGIN = 1.0625
# Between two exponents of queries or keys. The 15 octaves of e4m3's normal numbers hide a step of 8, and
# few exponents mean that blocks share compiled code.
_STEP = 8


class QuantizedValues(NamedTuple):
    """Values in eight bits, channel by channel: values * scale + mean.

    values : (B, S, H, D) float8_e4m3fn.
    scale, mean : (B, 1, H, D) float32.
    """

    values: Tensor
    scale: Tensor
    mean: Tensor


class Stream(NamedTuple):
    """Queries, keys and values of some tokens, before queries and keys are normalised and rotated.

    query, key, value : (B, T, H, D).
    q_weight, k_weight : (D,), of the RMS norms.
    rotary : nothing, or float32: cosine and sine, each (T, D), or one tensor of both, (T, D / 2, 2) or
        (B, T, D / 2, 2).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    q_weight: Tensor
    k_weight: Tensor
    rotary: tuple[Tensor, ...] = ()

    @property
    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value


class AttentionInputs(NamedTuple):
    """What attention in eight bits reads, and values * value_scale + value_mean.

    query, key, value : (B, S, H, D) float8_e4m3fn, contiguous.
    value_scale, value_mean : (B, 1, H, D) float32.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    value_scale: Tensor
    value_mean: Tensor


def exponent_below(bound: float) -> int:
    """The largest multiple of 8, e, for which numbers up to `bound` times 2^e fit e4m3; 0 for a bound of 0.

    Raises
    ------
    ValueError
        If `bound` is no finite number, or negative.
    """
    if not (math.isfinite(bound) and bound >= 0):
        raise ValueError(f"a bound is finite and at least 0, got {bound}")
    return _STEP * math.floor(math.log2(E4M3_MAX / (_MARGIN * bound)) / _STEP) if bound else 0


def saturated(x: Tensor) -> Tensor:
    """`x` in e4m3, +-448 where it is larger; NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def sample_step(tokens: int) -> int:
    """Of so many tokens, mean and largest of values are those of every one by this."""
    return _EVERY if tokens > _FEW else 1


def quantize_values(v: Tensor) -> QuantizedValues:
    """Values (B, S, H, D) without a mean over tokens, each channel scaled so that 64 times its largest fits.

    Weights that add up to 1 leave any mean as it is, so no rounding need touch it. Where there are more than
    256 tokens, mean and largest are those of every 11th; values of others that are more than 64 times as
    large saturate.
    """
    x = v.float()
    sample = x[:, :: sample_step(x.shape[1])]
    mean = sample.mean(1, keepdim=True)
    largest = sample.abs().amax(1, keepdim=True)  # in one pass with the mean
    scale = (largest * (1 / REACH)).clamp_min(TOKEN_SCALE_FLOOR)
    return QuantizedValues(saturated((x - mean) * scale.reciprocal()), scale, mean)


def rotated(x: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
    """Pairs of neighbours in `x` (B, T, H, D) turned, in float32; `rotary` as a `Stream` has it."""
    x = x.float()
    if not rotary:
        return x
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    if len(rotary) == 2:
        cosine, sine = (one.unsqueeze(-2) for one in rotary)
        return x * cosine + torch.stack([-imaginary, real], dim=-1).flatten(-2) * sine
    cosine, sine = rotary[0].unsqueeze(-3).unbind(-1)
    turned = (real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    return torch.stack(turned, dim=-1).flatten(-2)


def _normalized(x: Tensor, weight: Tensor, rotary: tuple[Tensor, ...], eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight, rotated, in float32."""
    x = x.float()
    return rotated(x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float(), rotary)


def qk_norm_rotary(streams: Sequence[Stream], eps: float) -> list[Tensor]:
    """Queries and keys of the tokens of all `streams`, one after the other, and of two streams values, too.

    (B, S, H, D) in the dtype of the queries. Queries and keys as `attention_inputs` has them, rounded once;
    values as they are, which of one stream nobody has to copy.
    """
    q = [_normalized(one.query, one.q_weight, one.rotary, eps).type_as(one.query) for one in streams]
    k = [_normalized(one.key, one.k_weight, one.rotary, eps).type_as(one.key) for one in streams]
    joined = [torch.cat(q, dim=1), torch.cat(k, dim=1)]
    if streams[1:]:
        joined.append(torch.cat([one.value for one in streams], dim=1))
    return joined


def attention_inputs(
    streams: Sequence[Stream], eps: float, q_exponent: int, k_exponent: int
) -> AttentionInputs:
    """What `attention_fp8` reads of the tokens of all `streams`, one after the other.

    Queries and keys, in float32 and rounded once: x / sqrt(mean x^2 + eps) * weight, rotated, times
    2^exponent. Values as `quantize_values` makes them of all tokens.
    """

    def rounded(x: Tensor, weight: Tensor, of: Stream, exponent: int) -> Tensor:
        # (As bytes: PyTorch joins no float8 on every device.)
        return saturated(_normalized(x, weight, of.rotary, eps) * 2.0**exponent).view(torch.uint8)

    q = [rounded(one.query, one.q_weight, one, q_exponent) for one in streams]
    k = [rounded(one.key, one.k_weight, one, k_exponent) for one in streams]
    values, scale, mean = quantize_values(torch.cat([one.value for one in streams], dim=1))
    query, key = (torch.cat(one, dim=1).view(E4M3) for one in (q, k))
    return AttentionInputs(query, key, values.contiguous(), scale, mean)


def attention_fp8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v of e4m3 numbers, in e4m3.

    In float32: p = exp(s - max s), then e4m3(256 p) v / (256 sum p), saturated. Kernels that go
    through the keys in blocks round p by the largest s so far instead. One head of one picture at a time: a
    kernel need not hold (S_q, S_kv), this does.

    Parameters
    ----------
    q : Tensor (B, S_q, H, D), float8_e4m3fn
    k, v : Tensor (B, S_kv, H, D), float8_e4m3fn
    scale : float

    Returns
    -------
    Tensor (B, S_q, H, D), float8_e4m3fn, contiguous
    """
    out = torch.empty(q.shape, dtype=E4M3, device=q.device)
    for batch in range(q.shape[0]):
        for head in range(q.shape[2]):
            queries, keys, values = (one[batch, :, head].float() for one in (q, k, v))
            s = queries @ keys.T * scale
            p = (s - s.amax(-1, keepdim=True)).exp()
            mixed = (p * P_SCALE).to(E4M3).float() @ values
            o = mixed / (P_SCALE * p.sum(-1, keepdim=True))
            out[batch, :, head] = saturated(o)
    return out
