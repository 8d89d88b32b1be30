"""One denoising step of a full-size transformer with random weights, as users run it.

GPU time is that of a replayed CUDA graph, wall time that of calls without one; windows of all variants take
turns in one process. Where variants do not fit the card together, groups that do are measured one after the
other, each with compiled bfloat16 among it. Of a model that runs some steps of a picture dense, both kinds of
step are measured, and their mean over a picture.
"""

import copy
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rtlynx.models import compilation, make_plan, sparse_layers
from rtlynx.models.sparsify import state_of
from rtlynx.nn.call import calling, schedule
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.recipe import Recipe
from rtlynx.timing.card import Card
from rtlynx.timing.full_models import MODELS, TIMESTEP, Call, Size, build, normals
from rtlynx.timing.results import REFERENCE
from rtlynx.timing.step_split import split
from rtlynx.timing.step_variants import OURS, VARIANTS, Form, Variant, named
from rtlynx.timing.sustained import (
    Graphs,
    Measurement,
    Sample,
    Timer,
    Window,
    attempt,
    measure,
)


class WallTimer:
    """Steps one after the other, as a sampler makes them, without a graph."""

    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step

    def window(self, seconds: float, sample: Sample, discard: float) -> Window:
        window = Window([], [], [])
        for length in (discard, seconds):
            torch.cuda.synchronize()
            start, count = perf_counter(), 0
            while perf_counter() - start < length:
                self._step()
                count += 1
            torch.cuda.synchronize()
            elapsed = perf_counter() - start
        window.call_us.append(elapsed / count * 1e6)
        window.note(sample())
        return window


class Ready(NamedTuple):
    """A variant, or one kind of its steps, that can be timed. `gpu` is None where no graph holds it.

    steps : how many of a picture are of this kind; None where all are alike.
    """

    gpu: Timer | None
    wall: Timer
    shares: dict[str, float]
    peak_gib: float
    steps: int | None = None


ROOM = 0.9  # share of the card's memory for weights: activations and CUDA graphs take the rest
Step = Callable[[], list[Tensor]]
# Kinds of step of a model that runs some dense, as rows of results are called.
SPARSE_STEP, DENSE_STEP = ", sparse step", ", dense step"


class Kind(NamedTuple):
    """Steps of one kind.

    users : one of them, as users call it.
    captured : the same for a CUDA graph, which holds no hook that reads a timestep.
    steps : how many of a picture; None where all are alike.
    """

    users: Step
    captured: Step
    steps: int | None


def step_of(
    call_model: Callable[..., Any],
    calls: list[Call],
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> Step:
    """The calls of one step, in the context that `around` makes."""

    @torch.no_grad()
    def step() -> list[Tensor]:
        outputs = []
        with around():
            for call in calls:
                torch.compiler.cudagraph_mark_step_begin()  # for dense blocks in mode "reduce-overhead"
                for y in call_model(**call, return_dict=False):  # video and audio of LTX-2
                    outputs += y if isinstance(y, list) else [y]
        return outputs

    return step


def kinds_of_steps(model: nn.Module, calls: list[Call], sigmas: Sequence[float]) -> dict[str, Kind]:
    """The kinds of step that a picture of `model` has, by what they add to the name of a variant.

    Parameters
    ----------
    model : dense, or sparse; which steps run dense is then a matter of their noise level alone.
    calls : arguments of the forwards of one step.
    sigmas : noise levels of all steps of a picture.

    Raises
    ------
    ValueError
        If the rows of text run dense besides: a captured step does not know which they are.
    """
    state = state_of(model)
    if state is None or not state.plan.recipe.has_dense_steps:
        step = step_of(model, calls)
        return {"": Kind(step, step, None)}
    recipe, kinds = state.plan.recipe, {}
    if recipe.text_rows == "dense":
        raise ValueError("dense steps cannot be measured with text_rows='dense': leave one of both out")
    for name, dense in ((SPARSE_STEP, False), (DENSE_STEP, True)):
        levels = [
            sigma for i, sigma in enumerate(sigmas) if recipe.is_dense_step(i, len(sigmas), sigma) is dense
        ]
        if levels:
            users = step_of(model, calls, partial(schedule, [TIMESTEP], levels[:1]))
            # Without the model's own hook, which finds the step out from a timestep on the card.
            captured = step_of(model.forward, calls, partial(calling, dense=dense))
            kinds[name] = Kind(users, captured, len(levels))
    return kinds


def twin_of(model: nn.Module) -> Any:
    """A copy of `model` that shares its parameters, buffers, and what sparse layers made of them."""
    return copy.deepcopy(model, {id(one): one for one in (*model.parameters(), *model.buffers())})


class Forms:
    """Copies of a model, one of each form that is asked for. They share its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._made = model, dict[Form, nn.Module]()

    def copy_of(self, form: Form) -> Any:
        """A copy of the model in this form; copies of one form share their weights."""
        if form not in self._made:
            made = twin_of(self._model)
            form.change(made)
            for layer in sparse_layers(made).values():
                layer.prepare()
            self._made[form] = made
        return twin_of(self._made[form])

    def forget(self) -> None:
        """Free what was made so far."""
        self._made.clear()
        gc.collect()
        torch.cuda.empty_cache()


def compile_blocks(model: Any, variant: Variant) -> None:
    """Compile the blocks of `model` as the variant says: ours as users do, all others as diffusers does."""
    if not variant.compiled:
        return
    if state_of(model) is not None:
        compilation.compile(model, cuda_graphs=variant.mode == "reduce-overhead")
    else:
        model.compile_repeated_blocks(fullgraph=True, mode=variant.mode)


def peak_bytes(step: Callable[[], object], model: nn.Module) -> int:
    """What one `step` of `model`, which has run before, takes on the card, the model's own included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + held_bytes(model)


def prepare(variant: Variant, of: "Bench", missing: dict[str, str]) -> dict[str, Ready]:
    """Make the variant, compile and capture each kind of its steps; row of results -> what is timed.

    RuntimeError and the like where it does not run.
    """
    twin = of.forms.copy_of(variant.form)
    variant.then(twin)
    compile_blocks(twin, variant)
    kinds = kinds_of_steps(twin, of.calls, of.sigmas)
    return {
        variant.name + suffix: _ready(variant, variant.name + suffix, kind, twin, missing)
        for suffix, kind in kinds.items()
    }


def _ready(variant: Variant, name: str, kind: Kind, twin: nn.Module, missing: dict[str, str]) -> Ready:
    step = kind.users
    step()
    peak = peak_bytes(step, twin)
    gpu = None
    if variant.mode == "default":
        gpu = attempt(missing, f"{name}, graph", partial(Graphs().timer, [kind.captured], replay_ms=1.0))
    return Ready(gpu, WallTimer(step), split(step), peak / 2**30, kind.steps)


def held_bytes(model: nn.Module) -> int:
    """Of a model's parameters, buffers and what sparse layers keep beside them, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, SparseLinear):
            tensors += module.kept_copies()
    storages = [plain.untyped_storage() for one in tensors for plain in _plain(one)]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def _plain(tensor: Any) -> list[Tensor]:
    """What a quantised tensor of another library holds; any other tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    inner, _ = tensor.__tensor_flatten__()
    return [plain for name in inner for plain in _plain(getattr(tensor, name))]


def variant_row(name: str, ready: Ready, taken: dict[str, Measurement], missing: dict[str, str]) -> dict:
    """Of a results file; its reason says why a time is missing, of `missing` where there is one."""
    reasons = [missing[key] for key in (f"{name}, graph", f"{name}/gpu", f"{name}/wall") if key in missing]
    gpu, wall = taken.get(f"{name}/gpu"), taken.get(f"{name}/wall")
    total = gpu and gpu.us / 1e3
    parts = {f"{part}_ms": total and round(total * share, 3) for part, share in ready.shares.items()}
    return {
        "name": name,
        "gpu_ms": total and round(total, 3),
        "wall_ms": wall and round(wall.us / 1e3, 3),
        "gpu_rounds_ms": gpu and [round(us / 1e3, 3) for us in gpu.rounds_us],
        "wall_rounds_ms": wall and [round(us / 1e3, 3) for us in wall.rounds_us],
        "clock_mhz": gpu and gpu.clock_mhz,
        "power_w": gpu and gpu.power_w,
        **parts,
        "peak_gib": round(ready.peak_gib, 2),
        "reason": "; ".join(reasons) or None,
    }


def picture_row(name: str, rows: Sequence[Mapping], counts: Mapping[str, int]) -> dict:
    """Mean of the rows of all kinds of step over the steps of a picture; memory is the largest.

    Parameters
    ----------
    rows : of the kinds of step.
    counts : name of each row -> how many such steps a picture has.
    """
    total = sum(counts.values())

    def mean(key: str) -> float | None:
        values = [(row.get(key), counts[row["name"]]) for row in rows]
        known = [value * count for value, count in values if value is not None]
        return round(sum(known) / total, 3) if len(known) == len(values) else None

    times = ("gpu_ms", "wall_ms", "linear_ms", "attention_ms", "rest_ms")
    return {
        "name": name,
        **{key: mean(key) for key in times},
        "peak_gib": max(row["peak_gib"] for row in rows),
        "steps": total,
        "dense_steps": counts.get(name + DENSE_STEP, 0),
        "reason": "; ".join(row["reason"] for row in rows if row["reason"]) or None,
    }


class Bench(NamedTuple):
    """What variants are made of, and how they are measured."""

    forms: Forms
    calls: list[Call]
    sigmas: list[float]
    sample: Sample
    seconds: float
    rounds: int
    report: Callable[[str], object]


def measure_together(variants: Sequence[Variant], of: Bench) -> list[dict]:
    """A row a variant, or one a kind of its steps and their mean; windows of all interleaved."""
    ready: dict[str, dict[str, Ready]] = {}
    missing: dict[str, str] = {}
    # cudagraph trees, of reduce-overhead, free cuBLAS's workspaces, which graphs captured before would read.
    for variant in sorted(variants, key=lambda one: one.mode == "default"):
        started = perf_counter()
        made = attempt(missing, variant.name, partial(prepare, variant, of, missing))
        if made is not None:
            ready[variant.name] = made
        why = f": {missing[variant.name]}" if variant.name in missing else ""
        of.report(
            f"{variant.name} {'does not run' if why else 'ready'} after {perf_counter() - started:.0f} s{why}"
        )
        gc.collect()
        torch.cuda.empty_cache()
    timers: dict[str, Timer] = {}
    for kinds in ready.values():
        for name, one in kinds.items():
            if one.gpu is not None:
                timers[f"{name}/gpu"] = one.gpu
            timers[f"{name}/wall"] = one.wall
    taken = measure(timers, of.seconds, of.rounds, of.sample, missing)
    return [row for one in variants for row in _rows(one.name, ready.get(one.name), taken, missing)]


def _rows(
    name: str, kinds: dict[str, Ready] | None, taken: dict[str, Measurement], missing: dict[str, str]
) -> list[dict]:
    """Of one variant; `kinds` is None where it does not run."""
    if kinds is None:
        return [{"name": name, "gpu_ms": None, "wall_ms": None, "reason": missing[name]}]
    rows = [variant_row(one, ready, taken, missing) for one, ready in kinds.items()]
    counts = {one: ready.steps for one, ready in kinds.items() if ready.steps is not None}
    return [*rows, picture_row(name, rows, counts)] if counts else rows


def run(
    name: str,
    card: Card,
    *,
    seconds: float,
    rounds: int = 2,
    size: Size | None = None,
    variants: Sequence[str] | None = None,
    attention: str = "_native_cudnn",
    commit: str | None = None,
    report: Callable[[str], object] = print,
) -> dict:
    """Measure a step of MODELS[`name`] on `card`: the document of a results file, without targets.

    Parameters
    ----------
    seconds : length of a window.
    rounds : windows of each variant and kind of time.
    size : default one picture or video of the model's common size with a common prompt.
    variants : names of variants and designs; default all variants.
    attention : diffusers attention backend.
    commit : what the figures belong to, where it cannot be found out.
    report : takes a line whenever a variant is ready.

    Raises
    ------
    ValueError
        Where a variant's name is not known.
    """
    of, taken = MODELS[name], named(variants)
    size = size or of.size
    torch._dynamo.config.recompile_limit = 64  # blocks of all variants run the same code objects
    model: Any = build(of)
    model.set_attention_backend(attention)
    calls = of.calls(size, normals(7))
    bench = Bench(Forms(model), calls, of.sampling.sigmas(size), card.sample, seconds, rounds, report)
    groups = groups_of(model, taken)
    rows = measure_together(taken, bench) if len(groups) == 1 else measure_in_groups(groups, bench)
    return {
        **card.describe(commit),
        "model": name,
        **size.described(),
        "forwards": len(calls),
        "attention": attention,
        "ours": OURS,
        "window_s": seconds,
        "rounds": rounds,
        "together": len(groups) == 1,
        "variants": rows,
    }


def groups_of(model: nn.Module, variants: Iterable[Variant]) -> list[list[Variant]]:
    """Variants that the card holds at once: the model once, each form's weights in eight bits, room to work.

    All variants of a form are in one group. `measure_in_groups` adds the reference to each.
    """
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    layers = make_plan(model, Recipe.dense_fp8()).sparse
    copy_bytes = sum(layer.in_features * layer.out_features for layer in layers)
    most = (ROOM * torch.cuda.get_device_properties().total_memory - weights) / copy_bytes
    by_form: dict[Form, list[Variant]] = {}
    for variant in variants:
        by_form.setdefault(variant.form, []).append(variant)
    groups: list[list[Variant]] = [[]]
    held = 0.0
    for form, some in by_form.items():
        if groups[-1] and held + form.weight_copies > most:
            groups.append([])
            held = 0.0
        groups[-1] += some
        held += form.weight_copies
    return groups


def measure_in_groups(groups: Sequence[Sequence[Variant]], of: Bench) -> list[dict]:
    """Each group beside the reference. `drift` says how far the reference moved between them."""
    (reference,) = (variant for variant in VARIANTS if variant.name == REFERENCE)
    rows, seen = [], []
    for group in groups:
        others = [variant for variant in group if variant is not reference]
        beside, *own = measure_together((reference, *others), of)  # in the order of the variants
        seen.append(beside)
        rows += [row | {"beside": {key: beside.get(key) for key in ("gpu_ms", "wall_ms")}} for row in own]
        of.forms.forget()
    return [seen[0] | {"drift": drift(seen)}, *rows]


def drift(seen: Iterable[Mapping]) -> float | None:
    """How far GPU times of one variant lie apart, over the least."""
    times = [row["gpu_ms"] for row in seen if row["gpu_ms"]]
    return max(times) / min(times) - 1 if times else None


def renewed(document: Mapping, again: Mapping) -> dict:
    """`document` with those variants that were measured `again`, each with the commit that it belongs to.

    For variants measured in groups: each has a reference beside it. The first reference stays.

    Raises
    ------
    ValueError
        Where variants were measured together, or the two are not of one card, model and size.
    """
    own = ("commit", "variants", "targets")  # the last in older files
    unlike = sorted(
        key for key in document.keys() | again if key not in own and document.get(key) != again.get(key)
    )
    if unlike or document["together"]:
        why = f"differ in {', '.join(unlike)}" if unlike else "hold variants measured together"
        raise ValueError(f"rows of one results file can't renew another's: they {why}; measure all again")
    rows = {row["name"]: row for row in document["variants"]}
    of = {"commit": again["commit"]}
    rows |= {row["name"]: row | of for row in again["variants"] if row["name"] != REFERENCE}
    apart = drift(row["beside"] for row in rows.values() if "beside" in row)
    rows[REFERENCE] = rows[REFERENCE] | {"drift": apart}
    return {**document, "variants": list(rows.values())}
