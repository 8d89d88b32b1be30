"""Run recorded calls again, as far as is of interest and without blocks whose outputs are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.calibration.calls import CalibrationError, moved

Position = tuple[int, int]  # batch, call of it


def device_of(model: nn.Module) -> torch.device:
    """Where calls of `model` run: offloaded as a whole, it may lie elsewhere between them."""
    runs_on = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return next(model.parameters()).device if runs_on is None else torch.device(runs_on)


class StopForward(Exception):
    """Ends a forward pass behind the last block of interest."""


def block_order(model: nn.Module, blocks: Sequence[str], call: dict[str, Any]) -> list[str]:
    """The blocks that run in `call`, in the order in which they first run."""
    seen: dict[str, None] = {}
    handles = [
        model.get_submodule(block).register_forward_pre_hook(lambda _m, _a, name=block: seen.setdefault(name))
        for block in blocks
    ]
    try:
        replay(model, call)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen)


def replay(model: nn.Module, call: dict[str, Any]) -> None:
    """Run a recorded call, as far as is of interest."""
    try:
        with torch.no_grad():
            model(**call)
    except StopForward:
        pass
    except (CalibrationError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise CalibrationError(
            f"a recorded call of {type(model).__name__} does not run again ({type(error).__name__}: "
            f"{error}): the model depends on more than the arguments of its calls, so it cannot be calibrated"
        ) from error


@contextmanager
def ending_at(block: nn.Module) -> Iterator[None]:
    """End replays behind `block`."""

    def enough(_module: nn.Module, _args: Any, _output: Any) -> None:
        raise StopForward

    handle = block.register_forward_hook(enough)
    try:
        yield
    finally:
        handle.remove()


def tokens_per_layer(model: nn.Module, names: list[str], call: dict[str, Any]) -> dict[str, int]:
    """Rows that each of these layers gives in `call`."""
    tokens: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, y: Tensor) -> None:
            tokens[name] = y.numel() // y.shape[-1]

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in names]
    try:
        with torch.no_grad():
            model(**call)
    finally:
        for handle in handles:
            handle.remove()
    return tokens


_MOST_BYTES = 16e9  # of outputs that are kept; beyond it blocks run again


class SkippedBlocks:
    """The blocks of a model up to one, replaced by what they gave.

    What lies between blocks runs. Of each list of blocks the output of the last one that ran is kept, on the
    CPU; those before it in the list give the same. That is right where nothing but the next block reads what
    a block gives. One call tells that (`check`) for all that run the same blocks. Where some run others, or
    outputs take more than 16 GB, every block runs again.

    Parameters
    ----------
    model : nn.Module
        Whose blocks do not change from one replay to the next.
    order : sequence of str
        Names of its blocks, as they run.
    """

    def __init__(self, model: nn.Module, order: Sequence[str]) -> None:
        self._model, self._order = model, list(order)
        self._outputs: dict[str, dict[Position, Any]] = {}  # of each list
        self._bytes = self._skipped = 0
        self._skips = True

    @contextmanager
    def in_place(self, position: Callable[[], Position], device: torch.device) -> Iterator[None]:
        """Skip the blocks; `position` says which call is replayed."""
        here: dict[str, tuple[Position, Any]] = {}  # of each list, of the call that is replayed

        def stand_in(of: str) -> Callable[..., Any]:
            def give(*_args: Any, **_kwargs: Any) -> Any:
                at = position()
                if of not in here or here[of][0] != at:
                    here[of] = at, moved(self._outputs[of][at], device)
                return here[of][1]

            return give

        blocks = [(name, self._model.get_submodule(name)) for name in self._order[: self._skipped]]
        before = [block.__dict__.get("forward") for _, block in blocks]
        for name, block in blocks:
            block.forward = stand_in(_list_of(name))
        try:
            yield
        finally:
            for (_, block), forward in zip(blocks, before, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    @contextmanager
    def keeping(self, last: str, position: Callable[[], Position]) -> Iterator[None]:
        """Keep what calls give up to the block `last`, and skip these blocks from then on."""
        if not self._skips or last == self._order[-1]:  # (nothing comes behind the last)
            yield
            return
        end = self._order.index(last) + 1
        kept = {_list_of(name): name for name in self._order[self._skipped : end]}
        ran: dict[Position, list[str]] = {}

        def note(name: str) -> Callable[..., None]:
            return lambda _module, _args: ran.setdefault(position(), []).append(name)

        handles = [
            self._model.get_submodule(name).register_forward_pre_hook(note(name))
            for name in self._order[self._skipped : end]
        ]
        for of, name in kept.items():
            outputs = self._outputs.setdefault(of, {})

            def hook(_module: nn.Module, _args: Any, output: Any, outputs: Any = outputs) -> None:
                self._bytes += _bytes_of(output) - _bytes_of(outputs.get(position()))
                if self._bytes <= _MOST_BYTES:
                    outputs[position()] = moved(output, "cpu")

            handles.append(self._model.get_submodule(name).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._skipped = end
        one = next(iter(ran.values()), None)
        if self._bytes > _MOST_BYTES or any(path != one for path in ran.values()):
            self.skip_nothing()

    def check(
        self,
        last: str,
        call: dict[str, Any],
        position: Position,
        device: torch.device,
        expected: Any = None,
    ) -> None:
        """Skip nothing any more where `last` gives something else in `call` without the skipped blocks.

        `last` is a block, or "" for the model. `expected` is what it gives with them, where that is known.
        """
        if not self._skipped:
            return
        seen: list[Any] = [] if expected is None else [expected]

        def see(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.append(moved(output, "cpu"))
            raise StopForward

        handle = self._model.get_submodule(last).register_forward_hook(see)
        try:
            if expected is None:
                replay(self._model, moved(call, device))
            with self.in_place(lambda: position, device):
                replay(self._model, moved(call, device))
        except CalibrationError:  # what stands in for a block does not fit what comes between
            seen.clear()
        finally:
            handle.remove()
        if len(seen) != 2 or not same(*seen):
            self.skip_nothing()

    def last_before(self, block: str) -> str | None:
        """What runs last before `block`; None where that is skipped already, or nothing may be."""
        index = self._order.index(block) if block in self._order else 0
        return self._order[index - 1] if self._skips and index > self._skipped else None

    def skip_nothing(self) -> None:
        """Run every block again from now on."""
        self._outputs, self._skipped, self._skips = {}, 0, False


def _list_of(block: str) -> str:
    return block.rpartition(".")[0]


def _bytes_of(value: Any) -> int:
    """Of the tensors in nested outputs."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_bytes_of, value))
    return _bytes_of(vars(value)) if hasattr(value, "__dict__") and not callable(value) else 0


def same(one: Any, other: Any) -> bool:
    """Whether nested outputs hold the same bits."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dict__") and not callable(one):
        return same(vars(one), vars(other))
    return bool(one == other)
