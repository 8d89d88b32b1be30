"""What changed layers do to the model's output, on a few recorded calls, as guidance mixes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rtlynx.calibration.calls import Call, CallStore, by_step, moved
from rtlynx.calibration.pairs import Pictures, State, null_first, states_of, turned
from rtlynx.calibration.replay import Position, SkippedBlocks, device_of, ending_at, replay
from rtlynx.models.architecture import Architecture

JUDGED_STEPS = 4
ASKED_BATCHES = 16  # that tell the null pass: reading calls of large models takes time
PLAIN, GUIDED = 0.1, 0.2  # weights of both predictions, and of the guided one


def guided_square(conditional: Tensor, null: Tensor, guidance: float) -> Tensor:
    """Mean square of both predictions (or their errors), and of what guidance makes of them.

    Guidance g (c - u) + u enlarges what moves one of the two alone.
    """
    plain = conditional.square().mean() + null.square().mean()
    if guidance == 1:
        return plain / 2
    guided = guidance * conditional - (guidance - 1) * null
    return PLAIN * plain + GUIDED * guided.square().mean()


class Guidance(NamedTuple):
    """How a pipeline mixes the passes of a step.

    scale : g of null + g (conditional - null)
    null_first : whether the null pass is the first of both
    """

    scale: float
    null_first: bool


def null_comes_first(store: CallStore, batches: Sequence[int], architecture: Architecture) -> bool:
    """Whether the null pass is the first one, by the prompts of some of the recorded `batches`."""
    states: list[State] = []
    for batch in batches[:: max(1, len(batches) // ASKED_BATCHES)][:ASKED_BATCHES]:
        states += states_of(by_step(store.get(batch), architecture)[0], architecture)
    return null_first(states, architecture)


def judged_calls(store: CallStore, batches: Sequence[int], architecture: Architecture) -> list[Call]:
    """Calls of a few steps, from noise to picture, of batches that are spread over `batches`.

    What guidance mixes at one step stays together.
    """
    found: dict[tuple[int, int], list[Call]] = {}
    for i in range(JUDGED_STEPS):
        batch = batches[i * len(batches) // JUDGED_STEPS]
        steps = by_step(store.get(batch), architecture)
        step = int((i + 0.5) / JUDGED_STEPS * len(steps))
        found[batch, step] = steps[step]
    return [call for step in found.values() for call in step]


class OutputError:
    """Relative squared error of a model's output against what it gave when this was made.

    Parameters
    ----------
    model : Module
        Dense now.
    calls : of `model`, on the CPU; consecutive ones at one timestep are guidance passes.
    guidance : Guidance, optional
        How the pipeline mixes passes. Without it, or where outputs are not by picture, each call counts for
        itself.
    order : sequence of str
        Names of the model's blocks, as they run: `behind` needs them.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        architecture: Architecture,
        guidance: Guidance | None = None,
        order: Sequence[str] = (),
    ) -> None:
        self.model, self.calls = model, calls
        self._skipped, self._at = SkippedBlocks(model, order), 0
        self.device = device_of(model)
        self.inputs = [moved(call, self.device) for call in calls]
        self.states: list[State] = []
        self.scale = 1.0 if guidance is None else guidance.scale
        self._first: Any = None  # what the model gives in the first call, whole
        self.references = self._outputs()
        counts = [Pictures(call).count for call in calls]
        if guidance is not None and counts == [len(pictures) for pictures in self.references]:
            self.states = states_of(calls, architecture)
            if guidance.null_first:
                self.states = turned(self.states)
        self.unit = self._square(self.references) or 1.0

    def __call__(self) -> float:
        """Of the model as it is now."""
        pairs = zip(self._outputs(), self.references, strict=True)
        errors = [[y - ref for y, ref in zip(*call, strict=True)] for call in pairs]
        return self._square(errors) / self.unit

    @contextmanager
    def behind(self, block: str) -> Iterator[None]:
        """Measure changes from `block` on: what runs before it is not run again.

        Entered with the dense model, for one block after the other as they run. Every block runs where one
        gives what more than the next reads.
        """
        self._keep_before(block)
        with self._skipped.in_place(self._position, self.device):
            yield

    def _keep_before(self, block: str) -> None:
        last = self._skipped.last_before(block)
        if last is None:
            return
        with (
            self._skipped.in_place(self._position, self.device),
            self._skipped.keeping(last, self._position),
            ending_at(self.model.get_submodule(last)),
        ):
            for call in self._each_input():
                replay(self.model, call)
        self._at = 0
        first = {**self.inputs[0], "return_dict": False}
        self._skipped.check("", first, self._position(), self.device, self._first)

    def _position(self) -> Position:
        return 0, self._at

    def _outputs(self) -> list[list[Tensor]]:
        """Of each call and picture, float32."""
        return list(self._each_output())

    @torch.no_grad()
    def _each_output(self) -> Iterator[list[Tensor]]:
        for call in self._each_input():
            output = self.model(**{**call, "return_dict": False})
            if self._first is None:
                self._first = moved(output, "cpu")
            yield [one.float() for one in output[0]]

    def _each_input(self) -> Iterator[Call]:
        for at, call in enumerate(self.inputs):
            self._at = at
            yield moved(call, self.device)  # copied again: a model may change what it is given, as a cache

    def _square(self, outputs: Sequence[Sequence[Tensor]]) -> float:
        if not self.states:
            return float(sum(y.square().sum() for call in outputs for y in call))
        of = {id(call): pictures for call, pictures in zip(self.calls, outputs, strict=True)}
        total = outputs[0][0].new_zeros(())
        for state in self.states:
            c, *others = (of[id(row.pictures.call)][row.index] for row in state.rows)
            for u in others:
                total += guided_square(c, u, self.scale) * c.numel()
            if not others:
                total += c.square().sum()
        return float(total)
