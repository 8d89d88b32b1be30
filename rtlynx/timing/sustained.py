"""Time variants against each other on a loaded card.

Each variant is a list of calls, one for each of several operand sets that together exceed the cache. It is
captured as one CUDA graph of many calls, so that host time plays no part, and replayed for windows of about a
second: a card under load clocks lower than in a burst. Windows of the variants take turns.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")
Call = Callable[[], object]
Sample = Callable[[], tuple[float | None, float | None]]

REPLAY_MS = 30.0
DISCARD_S = 0.2  # of each window: clock and power settle
QUEUED = 3  # replays ahead of the card, so that it never waits for the host


class Window(NamedTuple):
    """Time per call of every replay of a window, and what the card said meanwhile."""

    call_us: list[float]
    clock_mhz: list[float]
    power_w: list[float]

    def note(self, readings: tuple[float | None, float | None]) -> None:
        """Keep clock and power, as far as the card says them."""
        for reading, kept in zip(readings, (self.clock_mhz, self.power_w), strict=True):
            if reading is not None:
                kept.append(reading)


class Measurement(NamedTuple):
    """Medians over all windows of a variant; `rounds_us` has one median per window."""

    us: float
    rounds_us: list[float]
    clock_mhz: float | None
    power_w: float | None


class Timer(Protocol):
    def window(self, seconds: float, sample: Sample, discard: float) -> Window: ...


class TimerFactory(Protocol):
    def timer(self, calls: Sequence[Call], replay_ms: float = REPLAY_MS) -> Timer: ...


class Graphs:
    """Makes timers whose graphs share one pool of output memory (they run one after another)."""

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def timer(self, calls: Sequence[Call], replay_ms: float = REPLAY_MS) -> "GraphTimer":
        """A timer of `calls`; RuntimeError if their graph does not write what the calls return."""
        torch.cuda.synchronize()  # what the calls read was made on another stream
        with torch.cuda.stream(self._stream):
            for call in calls:  # kernels compile and libraries choose before the capture
                call()
            # Clones: a call may return the same memory every time.
            expected = tuple(tensor.clone() for tensor in _tensors(calls[-1]()))
        graph, outputs = self._capture(calls, 1)
        _check(graph, outputs, expected)
        outputs = expected = ()
        passes = passes_per_replay(_replay_us(graph), replay_ms)
        if passes > 1:
            graph, _ = self._capture(calls, passes)
        return GraphTimer(graph, calls, passes)

    def _capture(self, calls: Sequence[Call], passes: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        graph = torch.cuda.CUDAGraph()
        held: list[object] = [None] * len(calls)  # outputs rotate like inputs
        torch.cuda.synchronize()
        try:
            with torch.cuda.stream(self._stream):
                # Relaxed: libraries that allocate while they plan are welcome.
                graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
                try:
                    for _ in range(passes):
                        for index, call in enumerate(calls):
                            held[index] = call()
                finally:
                    graph.capture_end()
        except Exception:
            self._renew()  # the allocator cannot record into this pool again
            raise
        return graph, _tensors(held[-1])


class GraphTimer:
    """A graph that makes `calls` in turn, `passes` times."""

    def __init__(self, graph: torch.cuda.CUDAGraph, calls: Sequence[Call], passes: int) -> None:
        self._graph = graph
        self._calls = calls  # keeps alive what the graph reads
        self._count = passes * len(calls)

    def window(self, seconds: float, sample: Sample, discard: float) -> Window:
        """Replay for `seconds`, and forget what ended in the first `discard` of them."""
        window = Window([], [], [])
        pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        torch.cuda.synchronize()
        start = perf_counter()
        while not window.call_us or perf_counter() - start < seconds:
            while len(pending) < QUEUED:
                events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                events[0].record()
                self._graph.replay()
                events[1].record()
                pending.append(events)
            first, last = pending.popleft()
            last.synchronize()
            if perf_counter() - start < discard:
                continue
            window.call_us.append(first.elapsed_time(last) * 1e3 / self._count)
            window.note(sample())
        torch.cuda.synchronize()
        return window


class ProfilerTimer:
    """For calls that no graph can hold: durations of their kernels alone, read from the profiler.

    The card idles between kernels while the host catches up, and so runs cooler: this flatters the calls.
    """

    CALLS = 200

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls

    def window(self, seconds: float, sample: Sample, discard: float) -> Window:
        window = Window([], [], [])
        start = perf_counter()
        while perf_counter() - start < discard:
            for call in self._calls:
                call()
            torch.cuda.synchronize()
        count = 0
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            while count == 0 or (count < self.CALLS and perf_counter() - start < seconds):
                for call in self._calls:
                    call()
                count += len(self._calls)
            torch.cuda.synchronize()
        window.note(sample())
        kernels = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
        if not kernels:
            raise RuntimeError("the profiler saw no kernel")
        window.call_us.append(sum(event.time_range.elapsed_us() for event in kernels) / count)
        return window


def attempt(missing: dict[str, str], name: str, make: Callable[[], T]) -> T | None:
    """`make()`, or None with the reason in `missing`: one variant that fails takes no other with it."""
    try:
        return make()
    except Exception as error:
        lines = str(error).strip().splitlines()
        missing[name] = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
        return None


def measure(
    timers: Mapping[str, Timer],
    seconds: float,
    rounds: int,
    sample: Sample,
    missing: dict[str, str],
    discard: float = DISCARD_S,
) -> dict[str, Measurement]:
    """Windows of all `timers` in turn, `rounds` times, every other round in reverse order.

    A timer that fails is left out, with the reason in `missing`.
    """
    windows: dict[str, list[Window]] = {name: [] for name in timers}
    for index in range(rounds):
        for name in list(windows)[:: -1 if index % 2 else 1]:
            window = attempt(missing, name, partial(timers[name].window, seconds, sample, discard))
            if window is None:
                del windows[name]
            else:
                windows[name].append(window)
    return {name: summary(taken) for name, taken in windows.items()}


def summary(windows: Sequence[Window]) -> Measurement:
    clocks = [value for window in windows for value in window.clock_mhz]
    powers = [value for window in windows for value in window.power_w]
    return Measurement(
        us=median(value for window in windows for value in window.call_us),
        rounds_us=[median(window.call_us) for window in windows],
        clock_mhz=median(clocks) if clocks else None,
        power_w=median(powers) if powers else None,
    )


def passes_per_replay(pass_us: float, replay_ms: float) -> int:
    """How often a graph goes through all operand sets, for replays of about `replay_ms`."""
    return max(1, round(replay_ms * 1e3 / pass_us))


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    graph.replay()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e3


def _tensors(result: object) -> tuple[Tensor, ...]:
    results = result if isinstance(result, list | tuple) else (result,)
    return tuple(tensor for tensor in results if isinstance(tensor, Tensor) and tensor.numel())


def _check(graph: torch.cuda.CUDAGraph, outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Replay over poisoned outputs: a graph that missed a kernel must not be timed."""
    for output in outputs:
        output.fill_(float("nan") if output.is_floating_point() else 0xA5)
    graph.replay()
    for output, wanted in zip(outputs, expected, strict=True):
        if not (_same_bytes(output, wanted) or close(output, wanted)):
            raise RuntimeError("the captured graph does not give what the calls give")


def _same_bytes(output: Tensor, wanted: Tensor) -> bool:
    """But for a hundredth: a library's packed format may have bytes that nothing writes."""
    same = output.contiguous().view(torch.uint8) == wanted.contiguous().view(torch.uint8)
    return int(same.count_nonzero()) >= 0.99 * same.numel()


def close(output: Tensor, wanted: Tensor) -> bool:
    if not output.is_floating_point():
        return False
    return bool((output.float() - wanted.float()).norm() <= 1e-2 * wanted.float().norm())
