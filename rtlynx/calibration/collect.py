"""Replay recorded calls and gather what the solvers need of a few blocks at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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


@dataclass(eq=False)
class GatheredInput:
    """What is gathered of one input, for all formats that its readers may take.

    A way is what a format makes of the input before its product: pattern, norm scale and rounding.

    layer : one of its readers.
    ways : a reader that sees each way; `cross[i]` and `kept[i]` of the moments are of `ways[i]`.
    moments : split ("fit" or "heldout") -> kind of token -> moments.
    tokens : dense input tokens (M, K) on the CPU, where a solver trains on them.
    """

    layer: LayerPlan
    ways: list[LayerPlan] = field(default_factory=list)
    moments: dict[str, dict[str, RunningMoments]] = field(default_factory=dict)
    tokens: list[Tensor] = field(default_factory=list)

    @property
    def kinds(self) -> int:
        """How many kinds of tokens are kept apart."""
        return _kinds(self.layer)

    @property
    def bytes(self) -> int:
        """Memory of the moments: two splits of each kind of token."""
        return 2 * self.kinds * RunningMoments.bytes_for(self.layer.in_features, len(self.ways))

    def way_of(self, layer: LayerPlan) -> int:
        """The number of what `layer` sees."""
        for number, other in enumerate(self.ways):
            if _way(other) == _way(layer):
                return number
        self.ways.append(layer)
        return len(self.ways) - 1

    def of(self, split: str, kind: str, device: torch.device) -> RunningMoments:
        """Moments of one kind of token, none yet at first."""
        by_kind = self.moments.setdefault(split, {})
        if kind not in by_kind:
            by_kind[kind] = RunningMoments(self.layer.in_features, len(self.ways), device=device)
        return by_kind[kind]

    def all_reduce(self, device: torch.device) -> None:
        """Merge the moments, and gather the tokens, over the processes of the default group."""
        if not distributed():
            return
        kinds = ("image", "text") if self.kinds == 2 else ("all",)
        for split in ("fit", "heldout"):
            for kind in kinds:  # every process takes part, also one that saw no such token
                self.of(split, kind, device).all_reduce()
        none = torch.zeros(0, self.layer.in_features)
        every = all_rows(torch.cat(self.tokens) if self.tokens else none, device)
        self.tokens = [every] if len(every) else []

    def clear(self) -> None:
        """Free it all."""
        self.moments.clear()
        self.tokens.clear()


@dataclass
class InputGroup:
    """Layers in one format that read one input: what is solved together.

    gathered : what is known of the input
    way : which of its ways they see
    """

    layers: tuple[LayerPlan, ...]
    gathered: GatheredInput
    way: int

    @property
    def block(self) -> str:
        return self.layers[0].candidate.block

    @property
    def key(self) -> str:
        layer = self.layers[0]
        reads = layer.candidate.reads
        return f"{reads}.{layer.format.name}" if layer.quantized else reads

    def count(self, split: str) -> int:
        """Tokens of one split that were gathered."""
        return sum(moments.count for moments in self.gathered.moments.get(split, {}).values())

    def combined(self, split: str, balance: str) -> Moments | None:
        """Moments of one split over all kinds of tokens, per token; None where it has no tokens."""
        kinds = [one for one in self.gathered.moments.get(split, {}).values() if one.count]
        return balanced(kinds, balance, self.way) if kinds else None


def _way(layer: LayerPlan) -> tuple[object, ...]:
    """What tells apart what products see of an input."""
    return layer.pattern, layer.norm, layer.quantized


def input_groups(layers: Sequence[LayerPlan]) -> list[InputGroup]:
    """Group layers by the tensor they read and their format, in the order given."""
    members: dict[tuple[object, ...], list[LayerPlan]] = {}
    gathered: dict[tuple[object, ...], GatheredInput] = {}
    for layer in layers:
        members.setdefault((_input(layer), *_way(layer), layer.weight_sparse), []).append(layer)
        gathered.setdefault(_input(layer), GatheredInput(layer))
    groups = []
    for some in members.values():
        of = gathered[_input(some[0])]
        groups.append(InputGroup(tuple(some), of, of.way_of(some[0])))
    return groups


def _input(layer: LayerPlan) -> tuple[object, ...]:
    return layer.candidate.reads, _kinds(layer), layer.text_rows_dense


def inputs_of_groups(groups: Iterable[InputGroup]) -> list[GatheredInput]:
    """What is gathered for `groups`, each once."""
    return list(dict.fromkeys(group.gathered for group in groups))


def passes(groups: Sequence[InputGroup], order: Sequence[str], memory: int) -> Iterator[list[InputGroup]]:
    """Groups of as many consecutive blocks as fit into `memory` bytes of moments, at least one block each."""
    batch: list[InputGroup] = []
    used = 0
    for block in order:
        members = [group for group in groups if group.block == block]
        need = sum(gathered.bytes for gathered in inputs_of_groups(members))
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
            for gathered in inputs_of_groups(groups):
                stack.callback(self._watch(gathered, position).remove)
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

    def _watch(self, gathered: GatheredInput, position: dict[str, Any]) -> Any:
        layer = gathered.layer

        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            for kind, tokens in split_kinds(x, position["rows"], layer).items():
                tokens = tokens.reshape(-1, tokens.shape[-1])
                if not tokens.shape[0]:
                    continue
                moments = gathered.of(position["split"], kind, x.device)
                try:
                    moments.add(tokens, *(_seen(tokens, way) for way in gathered.ways))
                except ValueError as error:
                    raise CalibrationError(
                        f"{error}: input of {layer.name}, batch {position['batch']}"
                    ) from None
                if self.tokens_per_call and position["split"] == "fit":
                    spread = torch.linspace(0, len(tokens) - 1, min(self.tokens_per_call, len(tokens)))
                    gathered.tokens.append(tokens[spread.long().to(tokens.device)].float().cpu())

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
