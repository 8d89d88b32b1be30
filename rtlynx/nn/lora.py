"""LoRAs of peft beside sparse layers, as low-rank factors that a product of those layers takes with it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rtlynx.cuda.sm90.weights import STORE_COLUMNS, stored_columns
from rtlynx.math.tiles import LOWRANK_COLUMNS, lowrank_bytes
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.nn.tensor_parallel import TensorParallelLinear
from rtlynx.ops.dispatch import wants_gradient
from rtlynx.ops.fp8_linear import Beside, CompressedFp8, Fp8Parameters
from rtlynx.ops.lora import lora as lora_operator

# peft's class of a linear layer with LoRAs, once `rtlynx.nn.prologue.fuse_adapters` changed its forward.
adapter_classes: list[type[nn.Module]] = []

_DTYPES = torch.bfloat16, torch.float32, torch.float16


class Lora(NamedTuple):
    """What one LoRA adds to a layer: `scaling` * (X A) B^T, of the dense X.

    lowrank_a : (r, K), A^T
    lowrank_b : (N, r), B
    scaling : a number, or a tensor of one that peft changes in place
    """

    lowrank_a: Tensor
    lowrank_b: Tensor
    scaling: float | Tensor

    def scaled_b(self, channel: Tensor | None) -> Tensor:
        """`scaling` * B (N, r), divided by the scale (N,) of each output channel: bfloat16, rounded once."""
        scaled = self.lowrank_b.float() * self.scaling
        return (scaled if channel is None else scaled / channel.unsqueeze(-1)).bfloat16()


class Reader(NamedTuple):
    """A layer that reads a prologue, and the LoRAs that are active beside it."""

    layer: SparseLinear
    loras: tuple[Lora, ...]


def untouched(module: nn.Module) -> bool:
    """Whether calling `module` does nothing but its class's forward."""
    return not ("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def reader_of(module: nn.Module) -> Reader | None:
    """`module` as a reader; None where it is none, or hooks or more than LoRAs are around it."""
    if type(module) is TensorParallelLinear:
        return Reader(module, ()) if module.reads_prepared else None
    if not untouched(module):
        return None
    if type(module) is SparseLinear:
        return Reader(module, ())
    if not any(type(module) is one for one in adapter_classes):
        return None
    layer = module._modules["base_layer"]
    if type(layer) is not SparseLinear or not untouched(layer):
        return None
    loras = _active(module, layer)
    return None if loras is None else Reader(layer, loras)


def _active(wrapper: Any, layer: SparseLinear) -> tuple[Lora, ...] | None:
    """The LoRAs that peft's `wrapper` adds to `layer` in this call; None where it does anything else."""
    if wrapper.merged_adapters:
        return None
    if wrapper.disable_adapters:
        return ()
    loras = []
    for adapter in wrapper.active_adapters:
        if adapter not in wrapper.lora_A:
            continue
        lora = _lora(wrapper, layer, adapter)
        if lora is None:
            return None
        loras.append(lora)
    return tuple(loras)


def _lora(wrapper: Any, layer: SparseLinear, adapter: str) -> Lora | None:
    """One LoRA; None where it is another variant, is trained, or lies where a hook has yet to fetch it."""
    if adapter in wrapper.lora_variant or (
        wrapper.training and type(wrapper.lora_dropout[adapter]) is nn.Dropout
    ):
        return None
    factors = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
    if any(not untouched(factor) or factor.bias is not None for factor in factors):
        return None
    weights = [factor.weight for factor in factors]
    if wants_gradient(*weights):
        return None
    if any(one.dtype not in _DTYPES or one.device != layer.held_weight.device for one in weights):
        return None
    lowrank_a, lowrank_b = (
        weight if type(factor) is nn.Linear else factor.turned_weight()  # of a layer in another basis
        for factor, weight in zip(factors, weights, strict=True)
    )
    return Lora(lowrank_a, lowrank_b, wrapper.scaling[adapter])


def joint_factors(readers: Sequence[Reader]) -> tuple[Tensor, list[Tensor], list[int]]:
    """Factors of layers that read one input, their own and those of LoRAs, of which there is at least one.

    Made at each call, in compiled code too: peft changes LoRAs in ways that no version of a tensor tells.

    Returns
    -------
    lowrank_a : Tensor (r, K) bfloat16
        A^T of all, the layers' own first; LoRAs lie close together, so that several share a tile of T.
    lowrank_bs : list of Tensor (N_i, r_i) bfloat16
        B of each layer over the columns of T from its first to its last, zeros between them.
    first_ranks : list of int
        First of each layer's columns of T, a multiple of LOWRANK_COLUMNS.
    """
    layers = [reader.layer for reader in readers]
    own, own_starts = layers[0].shared_input.factor([layer.lowrank_a for layer in layers])
    lowrank_as = [] if own is None else [own]
    end = 0 if own is None else own.shape[0]
    placed: list[list[tuple[int, Tensor]]] = []
    for reader, start in zip(readers, own_starts, strict=True):
        of = reader.layer.multiplied()
        pieces = [] if of.lowrank_b is None else [(start, of.lowrank_b)]
        for lora in reader.loras:
            pieces.append((end, lora.scaled_b(of.column_scale)))
            lowrank_as.append(lora.lowrank_a.bfloat16())
            end += lora.lowrank_a.shape[0]
        # (A layer without any, beside others that have some, multiplies with a column of zeros.)
        placed.append(pieces or [(0, of.weight.new_zeros(of.weight.shape[0], 1, dtype=torch.bfloat16))])
    lowrank_a = lowrank_as[0] if len(lowrank_as) == 1 else torch.cat(lowrank_as)
    return lowrank_a, *_windows(placed)


def _windows(placed: Sequence[Sequence[tuple[int, Tensor]]]) -> tuple[list[Tensor], list[int]]:
    """B of each layer and its first column of T, of pieces (N, r) and the columns of T that they begin at.

    One matrix holds all: one kernel of torch.compile's makes it.
    """
    firsts = [min(start for start, _ in pieces) // LOWRANK_COLUMNS * LOWRANK_COLUMNS for pieces in placed]
    widths = [
        max(start + piece.shape[1] for start, piece in pieces) - first
        for pieces, first in zip(placed, firsts, strict=True)
    ]
    stored = -(-max(widths) // STORE_COLUMNS) * STORE_COLUMNS  # rows start at multiples of 16 bytes
    wide = []
    for pieces, first in zip(placed, firsts, strict=True):
        padded = [
            pad(piece, (start - first, stored - (start - first) - piece.shape[1])) for start, piece in pieces
        ]
        wide.append(reduce(torch.add, padded))
    joined = torch.cat(wide).split([len(one) for one in wide])
    return [one[:, :width] for one, width in zip(joined, widths, strict=True)], firsts


def beside_quantized(
    x: CompressedFp8, readers: Sequence[Reader], parameters: Sequence[Fp8Parameters]
) -> list[Beside | None]:
    """What LoRAs add to layers that read all of the quantised `x`; None for one without any.

    T is of the quantised input: what e4m3 moves it by is 3 % of what the LoRA adds, and moves the layer's
    own output by as much of that. Layers whose weights are packed take T and B into their products.
    """
    beside: list[Beside | None] = [None] * len(readers)
    for packs in (True, False):
        chosen = [
            i
            for i, (reader, of) in enumerate(zip(readers, parameters, strict=True))
            if reader.loras and (of.packed is not None) is packs
        ]
        if chosen:
            loras, weight_scales = [readers[i].loras for i in chosen], [parameters[i].scale for i in chosen]
            for i, one in zip(chosen, _prepare(x, loras, weight_scales, packs), strict=True):
                beside[i] = one
    return beside


def _prepare(
    x: CompressedFp8, layers: Sequence[tuple[Lora, ...]], weight_scales: Sequence[Tensor], packs: bool
) -> list[Beside]:
    """What the LoRAs of each of `layers` add; the scaling is in T."""
    loras = [lora for layer in layers for lora in layer]
    lowrank_bs = [lora.lowrank_b.bfloat16() for lora in loras]
    counts = [len(layer) for layer in layers]
    ranks = [sum(lora.lowrank_a.shape[0] for lora in layer) for layer in layers]
    t, tiles = lora_operator(
        *(x.values.contiguous(), x.scale.contiguous(), [lora.lowrank_a.bfloat16() for lora in loras]),
        *(lowrank_bs if packs else [], list(weight_scales) if packs else [], counts, _scalings(loras)),
    )
    pieces = t.split([stored_columns(rank) for rank in ranks], dim=1)
    ts = [piece[:, :rank] for piece, rank in zip(pieces, ranks, strict=True)]
    if packs:
        sizes = [lowrank_bytes(len(c), rank) for c, rank in zip(weight_scales, ranks, strict=True)]
        return [Beside(*one) for one in zip(ts, tiles.split(sizes), strict=True)]
    rest = iter(lowrank_bs)
    of_layers = [[next(rest) for _ in layer] for layer in layers]
    joined = [one[0] if len(one) == 1 else torch.cat(one, dim=1) for one in of_layers]
    return [Beside(*one) for one in zip(ts, joined, strict=True)]


def _scalings(loras: Sequence[Lora]) -> Tensor | None:
    """One a LoRA, float32; None where all are 1, as of most."""
    if all(not isinstance(lora.scaling, Tensor) and lora.scaling == 1.0 for lora in loras):
        return None
    one = torch.ones(1, dtype=torch.float32, device=loras[0].lowrank_a.device)
    return torch.cat([one * lora.scaling for lora in loras])
