"""What the kernels are to reach, beside what was measured: `targets` of a results file, met or missed.

The counters that say why one is missed, and the next ideas, are in NOTES.md, in the section that `why` names.
"""

from collections.abc import Container, Iterable, Mapping

from rtlynx.timing.results import (
    BLOCK_GRAPHS,
    ONE_CARD,
    REFERENCE,
    over_reference,
    ratio,
    speed_up,
    step_speed_up,
)
from rtlynx.timing.shapes import Shape
from rtlynx.timing.step_variants import (
    DENSE_FP8,
    EVERY_LAYER,
    EVERY_WEIGHT,
    FP8_ATTENTION,
    MIXED,
    RECOMMENDED,
    TORCHAO,
)

PRODUCT, LAYER, COMPRESSION = "What bounds the GEMM", "Where it stands", "Compression, version by version"
PRODUCERS, HOST, FP8, STEP = "Producers, version by version", "Host time", "fp8", "A whole step"
CARDS = "Several cards"


def _target(
    what: str, wanted: float, measured: float | None, unit: str, why: str, *, at_most: bool = False
) -> dict:
    met = measured is not None and (measured <= wanted if at_most else measured >= wanted)
    return {
        "what": what,
        "bound": "at most" if at_most else "at least",
        "wanted": wanted,
        "measured": None if measured is None else round(measured, 4),
        "unit": unit,
        "met": met,
        "why": None if met else f"benchmarks/NOTES.md, {why}",
    }


def linear_targets(document: Mapping) -> list[dict]:
    """Of linear-*.json."""
    return (_fp8_targets if document["dtype"] == "fp8" else _bf16_targets)(document)


def _fp8_targets(document: Mapping) -> list[dict]:
    means = document["geomean"]
    wanted = (
        ("fp8 layer, speed over cuBLAS bf16, mean", 2.4, "linear_vs_cublas_bf16"),
        ("fp8 layer, speed over the dense fp8 layer, mean", 1.4, "linear_vs_fp8_linear"),
        ("fp8 GEMM, speed over cuBLAS fp8, mean", 1.5, "gemm_vs_cublas_fp8"),
    )
    targets = [_target(what, least, means[name], "x", FP8) for what, least, name in wanted]
    return targets + _teraflops(document["rows"], "fp8 GEMM", 2000.0, FP8)


def _bf16_targets(document: Mapping) -> list[dict]:
    rows, means = document["rows"], document["geomean"]
    targets = [
        _target("GEMM, speed over cuBLAS, mean", 1.70, means["gemm_vs_cublas"], "x", PRODUCT),
        _target("GEMM, speed over cuSPARSELt's, mean", 1.05, means["gemm_vs_cusparselt"], "x", PRODUCT),
        _target("whole layer, speed over cuBLAS, mean", 1.45, means["linear_vs_cublas"], "x", LAYER),
        _target(
            "whole layer, speed over cuBLAS, slowest shape",
            1.25,
            _least(ratio(row, "cublas_us", "ours_us") for row in rows),
            "x",
            LAYER,
        ),
    ]
    return targets + _teraflops(rows, "GEMM", 1150.0, PRODUCT)


def _teraflops(rows: Iterable[Mapping], what: str, least: float, why: str) -> list[dict]:
    targets = []
    for row in rows:
        if row["shape"] in ("flux-up", "paper-b"):
            us, shape = row["ours_gemm_us"], Shape(row["shape"], row["M"], row["K"], row["N"])
            speed = None if us is None else shape.teraflops(us)
            targets.append(_target(f"{what}, {row['shape']}", least, speed, "TFLOP/s", why))
    return targets


def compress_targets(document: Mapping) -> list[dict]:
    """Of compress-*.json."""
    targets = []
    for row in document["rows"]:
        for name, label, wanted in (
            ("compress_adjacent", "without T", 0.85),
            ("compress_adjacent_lowrank", f"with T at rank {document['rank']}", 0.70),
        ):
            what = f"compression {label}, speed over a plain copy, K = {row['K']}"
            targets.append(_target(what, wanted, row["speed_vs_copy"].get(name), "x", COMPRESSION))
    for row in document["producers"]:
        what = f"fused {row['name']}, time over the compiled chain"
        targets.append(_target(what, 1.0, row["ratio"], "x", PRODUCERS, at_most=True))
    return targets


def host_targets(document: Mapping) -> list[dict]:
    """Of host-*.json."""
    of_call = {row["call"]: row["median_us"] for row in document["rows"]}
    measured = of_call["SparseLinear, rank 64"]
    return [_target("host time of a layer's call, rank 64", 30.0, measured, "us", HOST, at_most=True)]


def _least(values: Iterable[float | None]) -> float | None:
    known = list(values)
    present = [value for value in known if value is not None]
    return min(present) if present and len(present) == len(known) else None


# Model -> (variant, beside which, at least).
_STEP_SPEED_UPS = {
    "chroma": ((RECOMMENDED, REFERENCE, 1.5),),
    "flux1-dev": (
        (RECOMMENDED, REFERENCE, 1.9),
        (RECOMMENDED, TORCHAO, 1.4),
        (RECOMMENDED, DENSE_FP8, 1.25),
        (EVERY_LAYER, REFERENCE, 2.05),
        (DENSE_FP8, REFERENCE, 1.65),
    ),
    "flux2-klein": ((RECOMMENDED, REFERENCE, 1.5),),
    "ltx-2": ((RECOMMENDED, REFERENCE, 1.4),),
    "qwen-image": ((RECOMMENDED, REFERENCE, 1.85), (DENSE_FP8, REFERENCE, 1.65)),
    "sd3.5-large": ((RECOMMENDED, REFERENCE, 1.5),),
    "wan2.2-14b": ((RECOMMENDED, REFERENCE, 1.5),),
    "z-image": ((RECOMMENDED, REFERENCE, 1.9), (DENSE_FP8, REFERENCE, 1.65)),
}


def step_targets(document: Mapping) -> list[dict]:
    """Of step-*.json."""
    rows = {row["name"]: row for row in document["variants"]}
    model = document["model"]
    targets = []
    for goal, than, least in _STEP_SPEED_UPS.get(model, ()):
        name = _fastest(goal, rows)
        speed = step_speed_up(document["variants"], name, than)
        targets.append(_target(f"{model}, {name}, speed over {than}", least, speed, "x", STEP))
    for name in (DENSE_FP8, _fastest(RECOMMENDED, rows)):
        gpu = rows.get(name, {}).get("gpu_ms")  # block graphs have none of their own
        for how in ("", BLOCK_GRAPHS):
            wall = rows.get(name + how, {}).get("wall_ms")
            over = gpu and wall and wall / gpu
            most = 1.1 if model == "qwen-image" else 1.03
            targets.append(
                _target(f"{model}, {name}{how}, wall time over GPU time", most, over, "x", STEP, at_most=True)
            )
    return targets


# What a goal is about -> the variants that may reach it, the fastest first: a file has some.
_FASTEST = {
    RECOMMENDED: (RECOMMENDED + FP8_ATTENTION, RECOMMENDED, MIXED),
    DENSE_FP8: (DENSE_FP8 + FP8_ATTENTION, DENSE_FP8),
    EVERY_LAYER: (EVERY_WEIGHT + FP8_ATTENTION, EVERY_WEIGHT, EVERY_LAYER),
}


def _fastest(name: str, names: Container[str]) -> str:
    """The fastest variant among `names` that may reach the goals of `name`."""
    return next((one for one in _FASTEST.get(name, ()) if one in names), name)


# Side of a FLUX.1 picture -> speed of Ulysses on two cards over one, at least.
_ULYSSES = {1024: 1.75, 2048: 1.85}


def parallel_targets(document: Mapping) -> list[dict]:
    """Of parallel-*.json."""
    rows, side = document["rows"], document["resolution"]
    ours = _fastest(RECOMMENDED, {row["name"] for row in rows})
    about = f"{document['model']}, {side}²"
    targets = []
    for row in rows:
        if row["name"] != ours or row["arrangement"] == ONE_CARD or row["wall_ms"] is None:
            continue
        what = f"{about}, {ours}, {row['arrangement']} {document['cards']}"
        if row["arrangement"] == "ulysses" and document["cards"] == 2:
            wanted = _ULYSSES.get(side, min(_ULYSSES.values()))
            targets.append(_target(f"{what}, speed over one card", wanted, speed_up(row), "x", CARDS))
        kept = over_reference(rows, ours, row["arrangement"], REFERENCE)
        targets.append(
            _target(f"{what}, speed over {REFERENCE} beside that on one card", 1.0, kept, "x", CARDS)
        )
    return targets
