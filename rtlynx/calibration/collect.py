"""Replay recorded calls and gather what the solvers need of a few blocks at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.calibration.calls import CalibrationError, CallStore
from rtlynx.calibration.moments import Moments, RunningMoments, balanced
from rtlynx.calibration.processes import all_rows, distributed
from rtlynx.calibration.replay import Position, SkippedBlocks, device_of, ending_at, replay
from rtlynx.math.reference import compress
from rtlynx.models.architecture import Architecture, TextRows
from rtlynx.models.plan import LayerPlan
from rtlynx.ops.fp8_linear import compress_fp8


@dataclass
class InputGroup:
    """Sparse layers that see the same of one tensor, and what was gathered of it.

    moments : split ("fit" or "heldout") -> kind of token -> moments.
    tokens : dense input tokens (M, K) on the CPU, where a solver trains on them.
    """

    layers: tuple[LayerPlan, ...]
    moments: dict[str, dict[str, RunningMoments]] = field(default_factory=dict)
    tokens: list[Tensor] = field(default_factory=list)

    @property
    def block(self) -> str:
        return self.layers[0].candidate.block

    @property
    def key(self) -> str:
        layer = self.layers[0]
        reads = layer.candidate.reads
        return f"{reads}.{layer.format.name}" if layer.quantized else reads

    @property
    def k(self) -> int:
        return self.layers[0].in_features

    @property
    def kinds(self) -> int:
        """How many kinds of tokens are kept apart."""
        return _kinds(self.layers[0])

    @property
    def bytes(self) -> int:
        """Memory of the moments: two splits of each kind of token."""
        return 2 * self.kinds * RunningMoments.bytes_for(self.k)

    def count(self, split: str) -> int:
        """Tokens of one split that were gathered."""
        return sum(moments.count for moments in self.moments.get(split, {}).values())

    def combined(self, split: str, balance: str) -> Moments | None:
        """Moments of one split over all kinds of tokens, per token; None where it has no tokens."""
        kinds = [moments for moments in self.moments.get(split, {}).values() if moments.count]
        return balanced(kinds, balance) if kinds else None

    def all_reduce(self, device: torch.device) -> None:
        """Merge the moments, and gather the tokens, over the processes of the default group."""
        if not distributed():
            return
        kinds = ("image", "text") if self.kinds == 2 else ("all",)
        for split in ("fit", "heldout"):
            for kind in kinds:  # every process takes part, also one that saw no such token
                by_kind = self.moments.setdefault(split, {})
                by_kind.setdefault(kind, RunningMoments(self.k, device=device)).all_reduce()
        every = all_rows(torch.cat(self.tokens) if self.tokens else torch.zeros(0, self.k), device)
        self.tokens = [every] if len(every) else []


def input_groups(layers: Sequence[LayerPlan]) -> list[InputGroup]:
    """Group layers by the tensor they read and what they see of it, in the order given."""
    groups: dict[object, list[LayerPlan]] = {}
    for layer in layers:
        key = (layer.candidate.reads, layer.pattern, layer.norm, layer.quantized, layer.weight_sparse)
        groups.setdefault(key, []).append(layer)
    return [InputGroup(tuple(members)) for members in groups.values()]


def passes(groups: Sequence[InputGroup], order: Sequence[str], memory: int) -> Iterator[list[InputGroup]]:
    """Groups of as many consecutive blocks as fit into `memory` bytes of moments, at least one block each."""
    batch: list[InputGroup] = []
    used = 0
    for block in order:
        members = [group for group in groups if group.block == block]
        need = sum(group.bytes for group in members)
        if batch and used + need > memory:
            yield batch
            batch, used = [], 0
        batch.extend(members)
        used += need
    if batch:
        yield batch


@dataclass
class Collector:
    """Replays recorded calls through a model and gathers moments (and tokens) of some input groups.

    tokens_per_call : how many tokens of each call to keep for a solver that trains; 0 for none.
    skipped : blocks that need not run again; None where blocks change between two collections.
    """

    model: nn.Module
    architecture: Architecture
    store: CallStore
    tokens_per_call: int = 0
    skipped: SkippedBlocks | None = None

    def collect(
        self,
        groups: Sequence[InputGroup],
        batches: Mapping[str, Sequence[int]],
        last_block: str,
        progress: Any,
    ) -> None:
        """Gather `groups` over `batches` (split -> batch numbers).

        Raises
        ------
        CalibrationError
            At the first token that is not finite, naming layer and batch.
        """
        device = device_of(self.model)
        position: dict[str, Any] = {}

        def which() -> Position:
            return position["batch"], position["index"]

        with ExitStack() as stack:
            if self.skipped is not None:
                self._check(self.skipped, batches, last_block, device)
                stack.enter_context(self.skipped.in_place(which, device))
                stack.enter_context(self.skipped.keeping(last_block, which))
            for group in groups:
                stack.callback(self._watch(group, position).remove)
            stack.enter_context(ending_at(self.model.get_submodule(last_block)))
            for split, numbers in batches.items():
                for number in numbers:
                    for index, call in enumerate(self.store.replay([number], device)):
                        rows = self._text_rows(call, groups)
                        position.update(split=split, batch=number, index=index, rows=rows)
                        replay(self.model, call)
                    progress(1)

    def _check(
        self,
        skipped: SkippedBlocks,
        batches: Mapping[str, Sequence[int]],
        last_block: str,
        device: torch.device,
    ) -> None:
        for number in (one for numbers in batches.values() for one in numbers):
            call = next(self.store.replay([number], device), None)
            if call is not None:
                skipped.check(last_block, call, (number, 0), device)
                return

    def _text_rows(self, call: dict[str, Any], groups: Sequence[InputGroup]) -> Any:
        joint = any(group.layers[0].candidate.stream == "joint" for group in groups)
        if not joint or self.architecture.text_rows is None:
            return None
        try:
            return self.architecture.text_rows(call)
        except ValueError:
            if any(group.layers[0].text_rows_dense for group in groups):
                raise
            return None  # where text is is not known in this call: its tokens are not told apart

    def _watch(self, group: InputGroup, position: dict[str, Any]) -> Any:
        layer = group.layers[0]

        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            for kind, tokens in split_kinds(x, position["rows"], layer).items():
                tokens = tokens.reshape(-1, tokens.shape[-1])
                if not tokens.shape[0]:
                    continue
                seen = _seen(tokens, layer)
                by_kind = group.moments.setdefault(position["split"], {})
                moments = by_kind.setdefault(kind, RunningMoments(group.k, device=x.device))
                try:
                    moments.add(tokens, seen)
                except ValueError as error:
                    raise CalibrationError(
                        f"{error}: input of {layer.name}, batch {position['batch']}"
                    ) from None
                if self.tokens_per_call and position["split"] == "fit":
                    spread = torch.linspace(0, len(tokens) - 1, min(self.tokens_per_call, len(tokens)))
                    group.tokens.append(tokens[spread.long().to(tokens.device)].float().cpu())

        return self.model.get_submodule(layer.name).register_forward_pre_hook(hook, with_kwargs=True)


def _seen(tokens: Tensor, layer: LayerPlan) -> Tensor:
    """What the layer's sparse product sees of `tokens` (M, K), in float32."""
    if layer.quantized:
        return compress_fp8(tokens, layer.pattern, layer.norm).dequantize()
    kept, scale = compress(tokens, layer.pattern, layer.norm)
    return kept.float() if scale is None else kept.float() * scale


def _kinds(layer: LayerPlan) -> int:
    """How many kinds of tokens of the input of `layer` are kept apart."""
    return 2 if layer.splits_text and not layer.text_rows_dense else 1


def split_kinds(x: Tensor, rows: TextRows, layer: LayerPlan) -> dict[str, Tensor]:
    """Tokens of `x` (..., S, K), an input of `layer`, by kind; `rows` are those of text.

    Rows that the recipe keeps dense are no business of the solver.
    """
    if layer.candidate.stream != "joint" or rows is None:
        return {"image" if _kinds(layer) == 2 else "all": x}
    start, stop, _ = slice(*rows).indices(x.shape[-2])
    image = torch.cat((x[..., :start, :], x[..., stop:, :]), dim=-2)
    if _kinds(layer) == 1:
        return {"all": image}
    return {"image": image, "text": x[..., start:stop, :]}
