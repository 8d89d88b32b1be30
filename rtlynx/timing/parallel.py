"""One denoising step of a full-size transformer over several cards, each way to spread it beside one card.

One process a card. A variant is made for one card, in process 0, and for each arrangement in turn; windows of
the two take turns. So each arrangement has one card of its own beside it, measured in the same minute.

GPU time is that of a replayed CUDA graph of the step, NCCL's kernels included, where every process can
capture one ("graph"); else the time between CUDA events around calls ("events"), which is never less than
what the host needs. Wall time is that of calls. Both are those of the slowest card. While one card is
measured the others are idle: it may clock higher than beside neighbours at work.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, TensorParallelConfig
from torch import Tensor, nn

from rtlynx.timing.card import Card
from rtlynx.timing.full_models import MODELS, Call, Size, build, normals
from rtlynx.timing.processes import Processes, SharedTimer, captured
from rtlynx.timing.results import ONE_CARD
from rtlynx.timing.step import compile_blocks, peak_bytes, step_of, twin_of
from rtlynx.timing.step_split import kernels_ms
from rtlynx.timing.step_variants import RECOMMENDED, VARIANTS, Form, Variant, recommended
from rtlynx.timing.sustained import Measurement, Timer, measure

Step = Callable[[], list[Tensor]]


class Arrangement(NamedTuple):
    """A way to spread a step over cards.

    spread : does it to a model, for so many processes
    cuts_weights : whether `spread` comes before the model is made sparse; else after, so that blocks whose
        inputs diffusers splits by hooks are fused
    splits_guidance : whether each process makes one of the step's two calls, with a whole model
    """

    name: str
    spread: Callable[[Any, int], object]
    cuts_weights: bool = False
    splits_guidance: bool = False


def _ulysses(model: Any, count: int) -> None:
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count))


def _ring(model: Any, count: int) -> None:
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=count))


def _tensor(model: Any, count: int) -> None:
    model.enable_parallelism(config=TensorParallelConfig(tp_degree=count))


ARRANGEMENTS = (
    Arrangement("ulysses", _ulysses),
    Arrangement("ring", _ring),
    Arrangement("tensor", _tensor, cuts_weights=True),
    Arrangement("guidance", lambda model, count: None, splits_guidance=True),
)


class Bench(NamedTuple):
    """What variants are made of, and how they are measured."""

    model: nn.Module
    calls: list[Call]
    of: Processes
    card: Card
    seconds: float
    rounds: int
    graphs: bool
    report: Callable[[str], object]


class Ready(NamedTuple):
    """A variant that can be timed; `replay` is None where no graph holds its step, as `no_graph` says."""

    step: Step
    replay: Callable[[], object] | None
    no_graph: str | None
    kernels: dict[str, float] | None
    peaks_gib: list[float]


def guided_step(model: nn.Module, calls: Sequence[Call], of: Processes) -> Step:
    """The call of this process, and the velocities of all, as guidance mixes them."""
    step = step_of(model, [calls[of.rank]])

    @torch.no_grad()
    def both() -> list[Tensor]:
        (mine,) = step()
        mine = mine.contiguous()
        velocities = [torch.empty_like(mine) for _ in range(of.count)]
        dist.all_gather(velocities, mine)
        return velocities

    return both


def _made(variant: Variant, arrangement: Arrangement | None, bench: Bench) -> tuple[Step, int | None]:
    """The step of a variant, compiled and run, and the bytes that it takes on this card."""
    of, twin = bench.of, twin_of(bench.model)
    if arrangement is not None and arrangement.cuts_weights:
        arrangement.spread(twin, of.count)
    if variant.name.startswith(RECOMMENDED):  # of whose steps the sparse one is measured
        degree = of.count if arrangement is not None and arrangement.cuts_weights else 1
        variant = variant._replace(form=Form(recommended("fp8", tp_degree=degree)))
    variant.form.change(twin)
    variant.then(twin)
    if arrangement is not None and not arrangement.cuts_weights:
        arrangement.spread(twin, of.count)
    compile_blocks(twin, variant)
    guided = arrangement is not None and arrangement.splits_guidance
    step = guided_step(twin, bench.calls, of) if guided else step_of(twin, bench.calls)
    step()
    return step, peak_bytes(step, twin) if of.device.type == "cuda" else None


def prepare(variant: Variant, arrangement: Arrangement | None, bench: Bench) -> Ready | str:
    """A variant in an arrangement, or on one card in process 0; the reason where it does not run."""
    of, alone = bench.of, arrangement is None
    if arrangement is not None and arrangement.splits_guidance and len(bench.calls) != of.count:
        return f"a step of this model takes {len(bench.calls)} calls, and there are {of.count} cards"
    made, why = of.attempt(partial(_made, variant, arrangement, bench), alone=alone)
    if why is not None:
        return why
    step, peak = made or (list, None)
    peaks = [round(one / 2**30, 2) for one in of.all(peak) if one is not None]
    if of.device.type != "cuda":
        return Ready(step, None, "no card", None, peaks)
    replay: Callable[[], object] | None = None
    no_graph: str | None = "not asked for" if variant.mode == "default" else "its blocks are graphs"
    if variant.mode == "default" and bench.graphs:
        replay, no_graph = captured(step, of, alone=alone)
    kernels, _ = of.attempt(partial(kernels_ms, step), alone=alone)
    return Ready(step, replay, no_graph, kernels, peaks)


def measured(ready: Mapping[str, Ready], bench: Bench) -> dict[str, dict]:
    """Windows of all in turn; of each the fields of a row."""
    timers: dict[str, Timer] = {}
    for name, one in ready.items():
        alone = name == ONE_CARD
        if one.replay is not None:
            timers[f"{name}/gpu"] = SharedTimer(one.replay, bench.of, alone=alone, by_events=True)
        elif bench.of.device.type == "cuda":
            timers[f"{name}/gpu"] = SharedTimer(one.step, bench.of, alone=alone, by_events=True)
        timers[f"{name}/wall"] = SharedTimer(one.step, bench.of, alone=alone, by_events=False)
    missing: dict[str, str] = {}
    taken = measure(timers, bench.seconds, bench.rounds, bench.card.sample, missing)
    return {name: _fields(name, one, taken, missing) for name, one in ready.items()}


def _fields(
    name: str, ready: Ready, taken: Mapping[str, Measurement], missing: Mapping[str, str]
) -> dict[str, Any]:
    gpu, wall = taken.get(f"{name}/gpu"), taken.get(f"{name}/wall")
    reasons = [why for key, why in missing.items() if key.startswith(f"{name}/")]
    return {
        "gpu_ms": gpu and round(gpu.us / 1e3, 3),
        "gpu_time": gpu and ("events" if ready.replay is None else "graph"),
        "no_graph": ready.no_graph,
        "wall_ms": wall and round(wall.us / 1e3, 3),
        "gpu_rounds_ms": gpu and [round(us / 1e3, 3) for us in gpu.rounds_us],
        "wall_rounds_ms": wall and [round(us / 1e3, 3) for us in wall.rounds_us],
        "clock_mhz": gpu and gpu.clock_mhz,
        "power_w": gpu and gpu.power_w,
        "kernels_ms": ready.kernels and {kind: round(ms, 3) for kind, ms in ready.kernels.items()},
        "peak_gib": ready.peaks_gib,
        "reason": "; ".join(reasons) or None,
    }


def _row(variant: str, arrangement: str, fields: Mapping[str, Any]) -> dict:
    return {"name": variant, "arrangement": arrangement, **fields}


def failed(variant: str, arrangement: str, why: str) -> dict:
    """The row of what does not run."""
    return _row(variant, arrangement, {"gpu_ms": None, "gpu_time": None, "wall_ms": None, "reason": why})


def measure_variant(
    variant: Variant, arrangements: Sequence[Arrangement], bench: Bench, keep: Callable[[list[dict]], None]
) -> list[dict]:
    """Rows of one variant: one card, then each arrangement; `keep` takes what there is after each."""
    one = prepare(variant, None, bench)
    rows: list[dict] = [failed(variant.name, ONE_CARD, one)] if isinstance(one, str) else []
    beside: list[dict] = []
    for arrangement in arrangements:
        bench.report(f"{variant.name}, {arrangement.name}")
        other = prepare(variant, arrangement, bench)
        if isinstance(other, str):
            rows.append(failed(variant.name, arrangement.name, other))
        else:
            alone = {} if isinstance(one, str) else {ONE_CARD: one}
            fields = measured({**alone, arrangement.name: other}, bench)
            row = _row(variant.name, arrangement.name, fields[arrangement.name])
            if ONE_CARD in fields:
                beside.append(fields[ONE_CARD])
                row["beside"] = {key: beside[-1][key] for key in ("gpu_ms", "gpu_time", "wall_ms")}
            rows.append(row)
        del other
        gc.collect()
        if bench.of.device.type == "cuda":
            torch.cuda.empty_cache()
        keep([*_one_card(variant.name, beside), *rows])
    if not beside and not isinstance(one, str):
        beside.append(measured({ONE_CARD: one}, bench)[ONE_CARD])
    rows = [*_one_card(variant.name, beside), *rows]
    keep(rows)
    return rows


def _one_card(variant: str, beside: Sequence[Mapping[str, Any]]) -> list[dict]:
    """The row of one card: medians of all that was measured of it, beside the arrangements."""
    if not beside:
        return []
    times = {
        key: round(median(known), 3) if (known := [one[key] for one in beside if one[key]]) else None
        for key in ("gpu_ms", "wall_ms")
    }
    rounds = {
        key: [ms for one in beside for ms in one[key] or ()] for key in ("gpu_rounds_ms", "wall_rounds_ms")
    }
    return [_row(variant, ONE_CARD, {**beside[0], **times, **rounds})]


def run(
    name: str,
    card: Card,
    of: Processes,
    *,
    seconds: float,
    rounds: int = 2,
    size: Size | None = None,
    variants: Sequence[str] | None = None,
    arrangements: Sequence[str] | None = None,
    attention: str = "_native_cudnn",
    graphs: bool = True,
    commit: str | None = None,
    report: Callable[[str], object] = print,
    keep: Callable[[dict], object] = lambda document: None,
) -> dict:
    """Measure a step of MODELS[`name`] on all cards of `of`: the document of a results file.

    Every process calls this with the same arguments.

    Parameters
    ----------
    seconds : length of a window.
    rounds : windows of each variant, arrangement and kind of time.
    size : default one picture or video of the model's common size with a common prompt.
    variants, arrangements : names of VARIANTS and ARRANGEMENTS; default all but eager and every layer; all.
    attention : diffusers attention backend; ring needs one that gives its log-sum-exp.
    graphs : whether a CUDA graph of the step is captured for its GPU time.
    commit : what the figures belong to, where it cannot be found out.
    report : takes a line whenever something is begun.
    keep : takes the document as far as it is there, in process 0, after each arrangement.
    """
    full = MODELS[name]
    size = size or full.size
    chosen = [one for one in VARIANTS if one.name in (variants or default_variants())]
    spread = [one for one in ARRANGEMENTS if arrangements is None or one.name in arrangements]
    torch._dynamo.config.recompile_limit = 64  # blocks of all variants run the same code objects
    torch.manual_seed(0)  # the same weights on all cards
    model: Any = build(full)
    model.set_attention_backend(attention)
    calls = full.calls(size, normals(7))
    document = {
        **card.describe(commit),
        "cards": of.count,
        "model": name,
        **size.described(),
        "forwards": len(calls),
        "attention": attention,
        "window_s": seconds,
        "rounds": rounds,
        "rows": [],
    }
    report = report if of.rank == 0 else lambda line: None
    bench = Bench(model, calls, of, card, seconds, rounds, graphs, report)
    rows: list[dict] = []

    def keep_all(new: list[dict]) -> None:
        if of.rank == 0:
            keep({**document, "rows": [*rows, *new]})

    for variant in chosen:
        rows += measure_variant(variant, spread, bench, keep_all)
        torch._dynamo.reset()  # graphs of this variant's blocks go before those of the next are made
    return {**document, "rows": rows}


def default_variants() -> list[str]:
    """Names of what is compiled: dense, of others, ours, and with a CUDA graph a block."""
    return [one.name for one in VARIANTS if one.compiled and "every layer" not in one.name]
