"""The torch operator `rtlynx::prologue_linear`: a prologue, its compression and the layers that read it.

What `<name>_compress` and `gemm_joint` do one after the other, to the bit. A block then has half as many
operators, each of which costs the host more than a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtlynx.cuda.forms import keep
from rtlynx.cuda.sm90.linear import CallArguments, contiguous, known_call, launch_call, plan_call
from rtlynx.cuda.sm90.prologues import IDENTITY, PROLOGUES
from rtlynx.ops.prologues import COMPRESS
from rtlynx.ops.registry import operator
from rtlynx.ops.sparse_linear import compress, gemm_joint, options_of, zipped

# Forms of calls that are made in two parts each time: inputs or weights are copied to be read.
_in_two_parts: dict[tuple[Any, ...], bool] = {}


def _arguments(prologue: str, x: Tensor, others: Sequence[Tensor], numbers: Sequence[float]) -> list[Any]:
    """In the order of the prologue's."""
    if prologue not in PROLOGUES:
        raise ValueError(f"a prologue is one of {', '.join(PROLOGUES)}, got {prologue!r}")
    tensors, values = iter((x, *others)), iter(numbers)
    kinds = [kind for _, kind in PROLOGUES[prologue].arguments]
    expected = len(kinds) - kinds.count("float"), kinds.count("float")
    if (1 + len(others), len(numbers)) != expected:
        raise ValueError(
            f"{prologue} reads {expected[0]} tensors and {expected[1]} numbers, got {1 + len(others)} and "
            f"{len(numbers)}"
        )
    return [next(values) if kind == "float" else next(tensors) for kind in kinds]


def _one_by_one(
    x: Tensor,
    others: Sequence[Tensor],
    numbers: Sequence[float],
    prologue: str,
    lowrank_a: Tensor | None,
    grouping: str,
    parts: Sequence[int],
    norm: bool,
    format: str,
    score: str,
    *of: Any,
) -> Tensor:
    arguments = _arguments(prologue, x, others, numbers)
    first = compress if prologue == IDENTITY.name else COMPRESS[prologue]
    packed_a, scale, lowrank = first(*arguments, lowrank_a, grouping, parts, norm, format, score)
    kinds = [kind for _, kind in PROLOGUES[prologue].arguments]
    widths = [one.shape[-1] for kind, one in zip(kinds, arguments, strict=True) if kind == "rows"]
    k = PROLOGUES[prologue].columns(widths)
    weights = of[0]
    if any(one.shape[1:] != (k,) for one in weights):  # packed_a is in whole tiles, and does not tell
        raise ValueError(f"weights are (N, K) with K = {k}, got {[tuple(one.shape) for one in weights]}")
    rows = x.numel() // x.shape[-1]
    return gemm_joint(packed_a, scale, lowrank, *of, rows)


def _hopper(
    x: Tensor,
    others: Sequence[Tensor],
    numbers: Sequence[float],
    prologue: str,
    lowrank_a: Tensor | None,
    grouping: str,
    parts: Sequence[int],
    norm: bool,
    format: str,
    score: str,
    weights: Sequence[Tensor],
    lowrank_bs: Sequence[Tensor],
    biases: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    first_ranks: Sequence[int],
) -> Tensor:
    how = grouping, tuple(parts), norm, format, score
    lists = weights, lowrank_bs, biases, weight_scales
    layers, lengths = zipped(*lists), tuple(map(len, lists))
    known = PROLOGUES.get(prologue, IDENTITY)
    inputs, factor = (x, *others, *numbers), contiguous(lowrank_a)
    given = CallArguments(known, inputs, layers, factor, tuple(first_ranks), (prologue, *how, lengths))
    form, call = known_call(given)
    if call is not None:
        return launch_call(call, inputs)
    y = _one_by_one(x, others, numbers, prologue, lowrank_a, *how, *lists, first_ranks)  # checks, too
    if y.numel() and not torch.is_grad_enabled() and form not in _in_two_parts:
        arguments = _arguments(prologue, x, others, numbers)
        plan_call(given._replace(inputs=arguments), options_of(*how), form)
        if known_call(given)[1] is None:
            keep(_in_two_parts, form, True)
    return y


prologue_linear = operator(
    "prologue_linear(Tensor x, Tensor[] others, float[] numbers, str prologue, Tensor? lowrank_a,"
    " str grouping, int[] parts, bool norm, str format, str score, Tensor[] weights, Tensor[] lowrank_bs,"
    " Tensor[] biases, Tensor[] weight_scales, int[] first_ranks) -> Tensor",
    hopper=_hopper,
    reference=_one_by_one,
    fake=_one_by_one,
)
"""Y of layers that read a prologue, of which nothing is stored.

Parameters
----------
x, others, numbers
    Arguments of the prologue: its tensors and its numbers, each in order.
prologue : str
    Of `rtlynx.cuda.sm90.prologues.PROLOGUES`.
lowrank_a, grouping, parts, norm, format, score
    As of `compress`.
weights, lowrank_bs, biases, weight_scales, first_ranks
    As of `gemm_joint`.

Returns
-------
Tensor (M, sum of N_i) bfloat16
    Outputs beside each other.
"""
