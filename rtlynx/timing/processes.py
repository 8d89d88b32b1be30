"""The processes of one measurement, one a card: what they tell each other, and windows that they share."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rtlynx.timing.sustained import Sample, Window, attempt, close


class Processes:
    """All processes of the default group, which talk over gloo: no card takes part, and none waits busily.

    Parameters
    ----------
    device : this process's.
    timeout_s : seconds that one waits for another, as while process 0 measures one card alone.
    """

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self.device = device
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def all(self, mine: Any) -> list[Any]:
        """What each process says, in order; a barrier, too."""
        words: list[Any] = [None] * self.count
        dist.all_gather_object(words, mine, group=self._group)
        return words

    def attempt(self, make: Callable[[], Any], *, alone: bool = False) -> tuple[Any, str | None]:
        """`make()` in every process, or in process 0 `alone`, and why it failed in one of them, or None.

        What the others made is dropped then: a step of two cards needs both.
        """
        missing: dict[str, str] = {}
        made = attempt(missing, "", make) if self.rank == 0 or not alone else None
        why = next((one for one in self.all(missing.get("")) if one), None)
        return (made, None) if why is None else (None, why)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Taken(NamedTuple):
    """Milliseconds of one call, of several in a row: between two CUDA events, and by the wall clock."""

    events_ms: float | None
    wall_ms: float


class SharedTimer:
    """Windows of `call`: the same number of calls in all processes, or in process 0 while the others wait.

    The same number, since a process that made one more would wait for a collective that no other joins. The
    slowest card's time counts.
    """

    def __init__(self, call: Callable[[], object], of: Processes, *, alone: bool, by_events: bool) -> None:
        self._call, self._of, self._by_events = call, of, by_events
        self._works = of.rank == 0 or not alone

    def window(self, seconds: float, sample: Sample, discard: float) -> Window:
        """Calls for about `seconds`, after calls for about `discard`, or for as long; in microseconds."""
        window = Window([], [], [])
        few = self._calls(2)
        count = max(2, round(seconds * 1e3 / max(one.wall_ms for one in few)))
        self._calls(max(1, round(min(1.0, discard / seconds) * count)))
        taken = self._calls(count, lambda: window.note(sample()))
        times = [one.events_ms if self._by_events else one.wall_ms for one in taken]
        window.call_us.append(max(time for time in times if time is not None) * 1e3)
        return window

    def _calls(self, count: int, meanwhile: Callable[[], object] = lambda: None) -> list[Taken]:
        """What each process that works took for a call; they begin together."""
        of = self._of
        of.all(None)
        mine = None
        if self._works:
            timed = of.device.type == "cuda"
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * timed)]
            of.synchronize()
            start = perf_counter()
            for event in events[:1]:
                event.record()
            for _ in range(count):
                self._call()
            for event in events[1:]:
                event.record()
            meanwhile()  # the card is at work still, as far as the host is ahead
            of.synchronize()
            wall = (perf_counter() - start) * 1e3 / count
            mine = Taken(events[0].elapsed_time(events[1]) / count if events else None, wall)
        return [one for one in of.all(mine) if one is not None]


def captured(
    step: Callable[[], list[Tensor]], of: Processes, *, alone: bool
) -> tuple[Callable[[], object] | None, str | None]:
    """The replay of a CUDA graph of `step`, collectives included, or why a process cannot capture one.

    A graph that does not give what the step gives is none.
    """
    graph, why = of.attempt(partial(_capture, step), alone=alone)
    if why is None:
        _, why = of.attempt(partial(_check, graph, step), alone=alone)
    if why is not None:
        return None, why
    return graph[0].replay if graph else _nothing, None


def _nothing() -> None:
    """What a process replays that waits."""


def _capture(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # libraries choose, and communicators are made, before the capture
    torch.cuda.synchronize()
    # Relaxed: NCCL's watchdog, another thread, asks for events meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        outputs = step()
    return graph, outputs


def _check(captured: tuple[torch.cuda.CUDAGraph, list[Tensor]], step: Callable[[], list[Tensor]]) -> None:
    graph, outputs = captured
    expected = [tensor.clone() for tensor in step()]
    for output in outputs:
        output.fill_(float("nan"))  # a graph that missed a kernel must not be timed
    graph.replay()
    torch.cuda.synchronize()
    if not all(close(output, wanted) for output, wanted in zip(outputs, expected, strict=True)):
        raise RuntimeError("the captured graph does not give what the step gives")
