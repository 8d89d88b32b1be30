"""What is to be reached, beside what results files say; docs/goals.py makes the page of goals of it.

The counters that say why a goal is missed, and the next ideas, are in NOTES.md, in the section that it names.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rtlynx.timing.results import (
    BLOCK_GRAPHS,
    ONE_CARD,
    REFERENCE,
    WAYS,
    geomean,
    over_reference,
    plain_layer_speed,
    ratio,
    speed_up,
    step_speed_up,
)
from rtlynx.timing.shapes import SHAPES, Shape
from rtlynx.timing.step_variants import (
    DENSE_FP8,
    EVERY_LAYER,
    EVERY_WEIGHT,
    FP8_ATTENTION,
    FP8_MODULATION,
    MIXED,
    RECOMMENDED,
    TORCHAO,
    WITH_LORA,
)

PRODUCT, LAYER, COMPRESSION = "What bounds the GEMM", "Where it stands", "Compression, version by version"
PRODUCERS, HOST, FP8, STEP = "Producers, version by version", "Host time", "fp8", "A whole step"
CARDS, LORA = "Several cards", "LoRAs in the product"
CALIBRATION = "Calibration of a whole model"
Measured = Mapping[str, float | None]  # what was measured -> its figure


class Target(NamedTuple):
    """`what` is to be at least `wanted`, or at most.

    section : of NOTES.md, about what decides it
    measured : None where it was not
    by : which of several things that may reach the goal was best; empty where there is one
    unit : "x", "TFLOP/s", "min" or "GiB"
    """

    section: str
    what: str
    wanted: float
    measured: float | None
    by: str = ""
    unit: str = "x"
    at_most: bool = False

    @property
    def met(self) -> bool:
        if self.measured is None:
            return False
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted


def best(measured: Measured) -> tuple[float | None, str]:
    """The largest figure, and what it is of."""
    known = [(figure, name) for name, figure in measured.items() if figure is not None]
    return max(known, default=(None, ""))


def linear_targets(document: Mapping) -> list[Target]:
    """Of linear-*.json."""
    return (_fp8_targets if document["dtype"] == "fp8" else _bf16_targets)(document["rows"])


# Rows of X: those of the benchmark's shapes, whose means are goals, and few.
_USUAL, FEW = {shape.m for shape in SHAPES}, 1024


def _fp8_targets(rows: Iterable[Mapping]) -> list[Target]:
    rows = list(rows)
    usual = [row for row in rows if row["M"] in _USUAL]
    few, odd = ([row for row in rows if row["M"] == FEW], [row for row in rows if row["M"] % 2])
    whole = [ratio(row, "cublas_us", "ours_us") for row in usual]
    layers = {way: geomean(_over_dense(row, way) for row in usual) for way in WAYS}
    products = {
        way: geomean(ratio(row, "cublas_fp8_us", gemm) for row in usual) for way, (_, gemm) in WAYS.items()
    }
    targets = [
        Target(FP8, "fp8 layer with a branch of rank 64, speed over cuBLAS bf16, mean", 2.4, geomean(whole)),
        Target(FP8, "fp8 layer, speed over the dense fp8 layer, mean", 1.35, *best(layers)),
        Target(FP8, "fp8 GEMM, speed over cuBLAS fp8, mean", 1.42, *best(products)),
    ]
    for what, some in ((f"of {FEW:,} rows", few), ("of an odd number of rows", odd)):
        slowest = _least(best({way: _over_dense(row, way) for way in WAYS})[0] for row in some)
        targets.append(
            Target(FP8, f"fp8 layer {what}, speed over the dense fp8 layer, slowest shape", 1.15, slowest)
        )
    for name in ("flux-up", "zimage-w13"):
        speeds = {way: _teraflops(usual, name, gemm) for way, (_, gemm) in WAYS.items()}
        targets.append(Target(FP8, f"fp8 GEMM, {name}", 1850.0, *best(speeds), "TFLOP/s"))
    return targets


def _over_dense(row: Mapping, way: str) -> float | None:
    """Speed of a whole layer without a branch over the dense fp8 layer."""
    return plain_layer_speed(row, way, "fp8_linear_us")


def _bf16_targets(rows: Iterable[Mapping]) -> list[Target]:
    rows = [row for row in rows if row["M"] in _USUAL]
    layers = [ratio(row, "cublas_us", "ours_us") for row in rows]
    over = {
        name: geomean(ratio(row, f"{name}_us", "ours_gemm_us") for row in rows)
        for name in ("cublas", "cusparselt_gemm")
    }
    return [
        Target(PRODUCT, "GEMM, speed over cuBLAS, mean", 1.70, over["cublas"]),
        Target(PRODUCT, "GEMM, speed over cuSPARSELt's, mean", 1.05, over["cusparselt_gemm"]),
        Target(LAYER, "whole layer, speed over cuBLAS, mean", 1.45, geomean(layers)),
        Target(LAYER, "whole layer, speed over cuBLAS, slowest shape", 1.25, _least(layers)),
        *(
            Target(PRODUCT, f"GEMM, {name}", 1150.0, _teraflops(rows, name, "ours_gemm_us"), "", "TFLOP/s")
            for name in ("flux-up", "paper-b")
        ),
    ]


def _teraflops(rows: Iterable[Mapping], name: str, column: str) -> float | None:
    """Of the product of the shape `name`."""
    row = next((row for row in rows if row["shape"] == name), {})
    us = row.get(column)
    return Shape(name, row["M"], row["K"], row["N"]).teraflops(us) if us else None


# Inputs of the benchmark's layers.
_WIDTHS = sorted({shape.k for shape in SHAPES})


def compress_targets(document: Mapping) -> list[Target]:
    """Of compress-*.json."""
    over_copy = {
        (row.get("format", "bf16-sparse"), row["K"]): row["speed_vs_copy"]  # (older files are of bf16)
        for row in document["rows"]
    }
    targets = []
    for format, precision in (("fp8-sparse", "fp8"), ("bf16-sparse", "bf16")):
        goals = {"compress_adjacent": ("without T", 0.90)}
        if precision == "bf16":
            goals["compress_adjacent_lowrank"] = (f"with T at rank {document['rank']}", 0.70)
        for name, (label, wanted) in goals.items():
            for k in _WIDTHS:
                what = f"{precision} compression {label}, speed over a plain copy, K = {k:,}"
                measured = over_copy.get((format, k), {}).get(name)
                targets.append(Target(COMPRESSION, what, wanted, measured))
    for row in document["producers"]:
        what = f"fused {row['name']}, time over the compiled chain"
        targets.append(Target(PRODUCERS, what, 1.0, row["ratio"], at_most=True))
    return targets


# Calls of benchmarks/host.py: what is recommended, and beside what.
def calibration_targets(document: Mapping) -> list[Target]:
    """Of calibration-whole-*.json, of a run that came to its end."""
    if not document["finished"]:
        return []
    minutes = sum(document["run_seconds"]) / 60
    peak = max(stage["peak_gib"] or 0.0 for stage in document["stages"].values())
    model = document["model"]
    return [
        Target(
            CALIBRATION, f"{model}, calibration of the whole model", 15, minutes, unit="min", at_most=True
        ),
        Target(CALIBRATION, f"{model}, its peak memory", 70, peak or None, unit="GiB", at_most=True),
    ]


HOST_LAYER, HOST_REFERENCE = "SparseLinear, fp8 2:4 weights", "F.linear"


def host_targets(document: Mapping) -> list[Target]:
    """Of host-*.json."""
    of_call = {row["call"]: row["median_us"] for row in document["rows"]}
    over = ratio(of_call, HOST_LAYER, HOST_REFERENCE)
    what = f"eager call of a layer by 2:4 weights in fp8, host time over `{HOST_REFERENCE}`"
    return [Target(HOST, what, 1.5, over, at_most=True)]


def _least(values: Iterable[float | None]) -> float | None:
    """None where one is missing, or all are."""
    known = list(values)
    present = [value for value in known if value is not None]
    return min(present) if present and len(present) == len(known) else None


EVERY_SPARSE = "every layer sparse"  # by activations or by weights
# Model -> (variant, beside which, at least).
STEP_SPEED_UPS = {
    "flux1-dev": (
        (RECOMMENDED, REFERENCE, 1.9),
        (RECOMMENDED, TORCHAO, 1.4),
        (RECOMMENDED, DENSE_FP8, 1.25),
        (EVERY_SPARSE, REFERENCE, 2.05),
        (DENSE_FP8, REFERENCE, 1.65),
    ),
    "qwen-image": ((RECOMMENDED, REFERENCE, 1.85), (DENSE_FP8, REFERENCE, 1.65)),
    "qwen-edit": ((RECOMMENDED, REFERENCE, 1.5),),
    "z-image": ((RECOMMENDED, REFERENCE, 1.9), (DENSE_FP8, REFERENCE, 1.65)),
    "flux2-dev": ((RECOMMENDED, REFERENCE, 1.5),),
    "flux2-klein": ((RECOMMENDED, REFERENCE, 1.5),),
    "wan2.2-14b": ((RECOMMENDED, REFERENCE, 1.5),),
    "chroma": ((RECOMMENDED, REFERENCE, 1.5),),
    "hunyuan-video-1.5": ((RECOMMENDED, REFERENCE, 1.5),),
    "ltx-2": ((RECOMMENDED, REFERENCE, 1.4),),
    "sd3.5-large": ((RECOMMENDED, REFERENCE, 1.5),),
}
# What is wanted beyond that.
_STRETCH = {"flux1-dev": ((EVERY_SPARSE, REFERENCE, 2.2),)}
# Whose speed by the clock on the wall is a goal, too.
_BY_WALL = ("flux1-dev", "flux2-klein", "wan2.2-14b")
# Whose wall time is to be near GPU time, measured or not.
_BY_HOST = ("flux1-dev", "qwen-image", "z-image")
# What reaches a variant's goals: the fastest of these forms of it.
_FORMS = ("", FP8_ATTENTION, FP8_MODULATION, FP8_ATTENTION + FP8_MODULATION)
_SLOWER_BY_LORA = {"flux1-dev": 1.05}


def fastest(
    rows: Iterable[Mapping], variant: str, than: str = REFERENCE, time: str = "gpu_ms"
) -> tuple[float | None, str]:
    """How much faster the fastest form of a variant is than another variant, and which form that is.

    By wall time CUDA graphs of blocks count, too.
    """
    rows = list(rows)
    kinds = (EVERY_LAYER, EVERY_WEIGHT) if variant == EVERY_SPARSE else (variant,)
    names = [kind + form + how for kind in kinds for form in _FORMS for how in ("", BLOCK_GRAPHS)]
    speed, name = best({name: step_speed_up(rows, name, than, time) for name in names})
    return speed, name.removeprefix(variant)


def step_targets(document: Mapping) -> list[Target]:
    """Of step-*.json."""
    rows, model = document["variants"], document["model"]
    by_name, targets = {row["name"]: row for row in rows}, []
    for more, goals in (("", STEP_SPEED_UPS), (", stretch goal", _STRETCH)):
        for variant, than, least in goals.get(model, ()):
            what = f"{model}, {variant}, speed over {than}"
            targets.append(Target(STEP, what + more, least, *fastest(rows, variant, than)))
            if model in _BY_WALL:
                by_wall = fastest(rows, variant, than, "wall_ms")
                targets.append(Target(STEP, f"{what}, by wall time{more}", least, *by_wall))
    if model in _SLOWER_BY_LORA:
        lora = RECOMMENDED + WITH_LORA
        slower, what = step_speed_up(rows, RECOMMENDED, lora), f"{model}, {lora}, time over that without"
        targets.append(Target(LORA, what, _SLOWER_BY_LORA[model], slower, at_most=True))
    for variant in (DENSE_FP8, RECOMMENDED):
        for how in ("", BLOCK_GRAPHS):
            # CUDA graphs of blocks have no GPU time of their own. The fastest form has most to lose.
            times = [
                (gpu, wall / gpu, form)
                for form in _FORMS
                if (gpu := by_name.get(variant + form, {}).get("gpu_ms"))
                and (wall := by_name.get(variant + form + how, {}).get("wall_ms"))
            ]
            _, over, form = min(times, default=(None, None, ""))
            if over is None and model not in _BY_HOST:
                continue
            what = f"{model}, {variant}{how}, wall time over GPU time"
            most = 1.1 if model == "qwen-image" else 1.03
            targets.append(Target(HOST, what, most, over, form, at_most=True))
    return targets


# Side of a FLUX.1 picture -> speed of Ulysses on two cards over one, at least.
_ULYSSES = {1024: 1.75, 2048: 1.85}


def parallel_targets(document: Mapping) -> list[Target]:
    """Of parallel-*.json."""
    rows, side = document["rows"], document["resolution"]
    ours = next((name for name in (RECOMMENDED, MIXED) if name in {row["name"] for row in rows}), RECOMMENDED)
    about = f"{document['model']}, {side}²"
    targets = []
    for row in rows:
        if row["name"] != ours or row["arrangement"] == ONE_CARD or row["wall_ms"] is None:
            continue
        what = f"{about}, {ours}, {row['arrangement']} {document['cards']}"
        if row["arrangement"] == "ulysses" and document["cards"] == 2:
            wanted = _ULYSSES.get(side, min(_ULYSSES.values()))
            targets.append(Target(CARDS, f"{what}, speed over one card", wanted, speed_up(row)))
        kept = over_reference(rows, ours, row["arrangement"], REFERENCE)
        targets.append(Target(CARDS, f"{what}, speed over {REFERENCE} beside that on one card", 1.0, kept))
    return targets
