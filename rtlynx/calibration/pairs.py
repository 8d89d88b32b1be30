"""Recorded calls taken apart by pictures, paired by guidance, and put together again in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rtlynx.calibration.calls import CalibrationError, Call, moved, pictures_in, timestep_of
from rtlynx.calibration.folder import digest
from rtlynx.models.architecture import TIMESTEPS, Architecture

# How far the output for a picture may be from that in the recorded batch; rounding in bfloat16 is below it.
_APART = 0.05
# Pairs that are looked at to tell the null call from the conditional one.
_LOOKED_AT = 64


class Pictures:
    """One recorded call, by pictures.

    Tensors and lists as long as the batch are taken apart, but for position ids without a batch; all other
    arguments belong to each picture. What diffusers passes first, latents, is as long as the batch.

    state : name of the argument that says which state a picture is at; None where none is by picture.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.count = pictures_in(call)
        self.apart = {name for name, value in call.items() if self._by_picture(name, value)}
        self.state = next((name for name in call if name in self.apart and name not in TIMESTEPS), None)
        whole = {name: value for name, value in call.items() if name not in self.apart}
        try:
            self.shared = digest(whole)
        except TypeError:  # an object that is only equal to itself
            self.shared = repr({name: id(value) for name, value in whole.items()})

    def _by_picture(self, name: str, value: Any) -> bool:
        if isinstance(value, Tensor):
            ids = name.endswith("ids") and value.ndim == 2
            return value.ndim > 0 and len(value) == self.count and not ids
        return isinstance(value, list) and len(value) == self.count


@dataclass(frozen=True)
class Row:
    """One picture of a call."""

    pictures: Pictures
    index: int

    def argument(self, name: str) -> Any:
        """What the call holds under `name` for this picture alone."""
        return self.pictures.call[name][self.index]

    @property
    def kind(self) -> Any:
        """Equal for rows that one call can hold."""
        own = self.pictures
        apart = {name: self.argument(name) for name in own.call if name in own.apart}
        shapes = [(name, one.shape, one.dtype) for name, one in apart.items() if isinstance(one, Tensor)]
        return own.shared, tuple(apart), tuple(shapes)


class State(NamedTuple):
    """A state of one picture at one timestep: what the model is called with there.

    null : the call without the prompt; None where a step is one call.
    """

    conditional: Row
    null: Row | None

    @property
    def rows(self) -> tuple[Row, ...]:
        return (self.conditional,) if self.null is None else (self.conditional, self.null)


def states_of(calls: Sequence[Call], architecture: Architecture) -> list[State]:
    """The states that consecutive `calls` are at.

    Two calls at one timestep and state are the two guidance passes, and so are the halves of a call whose
    halves are at the same states. The first is taken for the conditional one; see `null_first`.
    """
    found: list[State] = []
    number = 0
    while number < len(calls):
        call = Pictures(calls[number])
        second = Pictures(calls[number + 1]) if number + 1 < len(calls) else None
        half = call.count // 2
        if second is not None and _are_a_pair(call, second, architecture):
            found += [State(Row(call, i), Row(second, i)) for i in range(call.count)]
            number += 1
        elif call.count == 2 * half and all(
            _same_state(Row(call, i), Row(call, i + half)) for i in range(half)
        ):
            found += [State(Row(call, i), Row(call, i + half)) for i in range(half)]
        else:
            found += [State(Row(call, i), None) for i in range(call.count)]
        number += 1
    return found


def null_first(states: Sequence[State], architecture: Architecture) -> bool:
    """Whether the first call of each pair is the null one.

    The null prompt is one for all pictures, so fewer distinct prompts tell it. Where there is one prompt
    alone, it is as in most pipelines: the second of two calls, the first half of one.
    """
    pairs = [state for state in states if state.null is not None]
    spread = pairs[:: max(1, len(pairs) // _LOOKED_AT)]
    first, second = (len({_prompt(pair.rows[i], architecture) for pair in spread}) for i in (0, 1))
    in_one_call = any(
        pair.null is not None and pair.null.pictures is pair.conditional.pictures for pair in pairs
    )
    return first < second or (first == second and in_one_call)


def turned(states: Sequence[State]) -> list[State]:
    """The same states, the calls of each pair in the other order."""
    return [one if one.null is None else State(one.null, one.conditional) for one in states]


def outputs(model: nn.Module, rows: Sequence[Row], device: torch.device) -> list[Tensor]:
    """What `model` gives for each of `rows`, in as few calls as they allow."""
    kinds: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        kinds.setdefault(row.kind, []).append(number)
    found: dict[int, Tensor] = {}
    for numbers in kinds.values():
        call = moved(_together([rows[number] for number in numbers]), device)
        y = model(**{**call, "return_dict": False})[0]
        found.update(zip(numbers, y, strict=True))
    return [found[number] for number in range(len(rows))]


@torch.no_grad()
def check_apart(model: nn.Module, states: Sequence[State], device: torch.device) -> None:
    """CalibrationError unless calls taken apart and put together otherwise give what the whole ones gave."""
    some = [states[0].rows[-1], states[-1].rows[0]]
    expected = []
    for row in some:
        whole = model(**{**moved(row.pictures.call, device), "return_dict": False})[0]
        expected.append(whole[row.index])
    advice = "use CalibrationOptions(batch_size=1), or calibrate without distillation"
    what = f"calls of {type(model).__name__} cannot be taken apart by pictures"
    try:
        found = outputs(model, some, device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise CalibrationError(f"{what} ({error}): {advice}") from error
    for y, whole in zip(found, expected, strict=True):
        off = float((y.float() - whole.float()).norm() / whole.float().norm().clamp_min(1e-30))
        if not off <= _APART:
            raise CalibrationError(f"{what}: alone, one gives an output {off:.0%} away. To go on, {advice}")


def _together(rows: Sequence[Row]) -> Call:
    """One call of `rows`, which are of one kind."""
    call = dict(rows[0].pictures.call)
    for name in rows[0].pictures.apart:
        values = [row.argument(name) for row in rows]
        call[name] = torch.stack(values) if isinstance(call[name], Tensor) else values
    return call


def _are_a_pair(one: Pictures, other: Pictures, architecture: Architecture) -> bool:
    return (
        one.count == other.count
        and timestep_of(one.call, architecture) == timestep_of(other.call, architecture)
        and all(_same_state(Row(one, i), Row(other, i)) for i in range(one.count))
    )


def _same_state(one: Row, other: Row) -> bool:
    names = one.pictures.state, other.pictures.state
    if names[0] is None or names[1] is None:
        return False
    a, b = one.argument(names[0]), other.argument(names[1])
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)


def _prompt(row: Row, architecture: Architecture) -> str:
    """Digest of what differs between pictures but for their states."""
    own = row.pictures
    others = own.apart - {own.state, architecture.timestep_name(own.call)}
    return digest({name: row.argument(name) for name in others})
