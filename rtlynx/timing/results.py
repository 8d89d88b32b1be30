"""Results: rows, means, writing."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median

from rtlynx.timing.operands import Errors
from rtlynx.timing.shapes import Shape, paper_rank
from rtlynx.timing.sustained import Measurement

# The variant of a step that others are compared with.
REFERENCE = "bf16 compiled"
# In names of variants: each block a CUDA graph of its own, by torch.compile's mode.
BLOCK_GRAPHS = " (reduce-overhead)"
# Of a step on several cards: what the others are compared with.
ONE_CARD = "one card"
# The variants of a linear layer; each gives a column `<name>_us`.
LINEAR_VARIANTS = (
    "cublas",
    "ours",
    "ours_paper_rank",
    "ours_gemm",
    "cusparselt_gemm",
    "ours_gemm_lowrank",
    "ours_compress",
    "ours_compress_plain",
    "cusparselt_compress",
)
# Those that there are in fp8 besides: PyTorch's dense product and its dynamic quantisation; our product by
# weights of which half is dropped, and our quantisation.
FP8_VARIANTS = ("cublas_fp8", "cublas_fp8_quant", "ours_weight_sparse_gemm", "ours_quantize")
# A whole layer without a branch, by what it drops half of: columns of what prepares X, and of the product.
# The recommended way comes first.
WAYS = {
    "2:4 weights": ("ours_quantize_us", "ours_weight_sparse_gemm_us"),
    "2:4 activations": ("ours_compress_plain_us", "ours_gemm_us"),
}
RATIOS = {
    "linear_vs_cublas": ("cublas_us", "ours_us"),
    "linear_paper_rank_vs_cublas": ("cublas_us", "ours_paper_rank_us"),
    "gemm_vs_cublas": ("cublas_us", "ours_gemm_us"),
    "gemm_vs_cusparselt": ("cusparselt_gemm_us", "ours_gemm_us"),
}
FP8_RATIOS = {
    "linear_vs_cublas_bf16": ("cublas_us", "ours_us"),
    "linear_paper_rank_vs_cublas_bf16": ("cublas_us", "ours_paper_rank_us"),
    "linear_vs_fp8_linear": ("fp8_linear_us", "ours_us"),
    "gemm_vs_cublas_bf16": ("cublas_us", "ours_gemm_us"),
    "gemm_vs_cublas_fp8": ("cublas_fp8_us", "ours_gemm_us"),
    "weight_sparse_gemm_vs_cublas_fp8": ("cublas_fp8_us", "ours_weight_sparse_gemm_us"),
    "gemm_vs_cusparselt": ("cusparselt_gemm_us", "ours_gemm_us"),
}


def linear_row(
    shape: Shape,
    variants: Iterable[str],
    measured: Mapping[str, Measurement],
    errors: Errors | None,
    missing: Mapping[str, str],
) -> dict:
    """One shape of linear-*.json; null for what was not measured, with the reason in `missing`."""
    row: dict = {"shape": shape.name, "M": shape.m, "K": shape.k, "N": shape.n}
    for name in variants:
        row[f"{name}_us"] = round(measured[name].us, 3) if name in measured else None
    if "cublas_fp8_us" in row:
        parts = row["cublas_fp8_us"], row["cublas_fp8_quant_us"]
        row["fp8_linear_us"] = None if None in parts else round(sum(parts), 3)
        row["quantization_err"] = errors and errors.of_quantization
    row["rel_err"] = errors and errors.of_kernels
    row["paper_rank"] = paper_rank(shape.k)
    row["windows"] = {name: window_details(taken) for name, taken in measured.items()}
    row["missing"] = dict(missing)
    return row


def window_details(taken: Measurement) -> dict:
    return {
        "rounds_us": [round(us, 3) for us in taken.rounds_us],
        "clock_mhz": taken.clock_mhz,
        "power_w": taken.power_w,
    }


def ratio(row: Mapping, over: str, under: str) -> float | None:
    """row[over] / row[under], None where either was not measured."""
    if row.get(over) is None or row.get(under) is None:
        return None
    return row[over] / row[under]


def plain_layer_us(row: Mapping, way: str) -> float | None:
    """Time of a whole layer without a branch, in one of `WAYS`; None where it was not measured."""
    prepared, product = (row.get(column) for column in WAYS[way])
    return None if prepared is None or product is None else prepared + product


def plain_layer_speed(row: Mapping, way: str, over: str = "cublas_us") -> float | None:
    """How much faster than the column `over` such a layer is; None where either was not measured."""
    whole, other = plain_layer_us(row, way), row.get(over)
    return None if whole is None or other is None else other / whole


def picture_size(document: Mapping) -> str:
    """What was drawn, of a results file: "1024²", or "832x480, 81 frames"."""
    if "frames" not in document:
        return f"{document['resolution']}²"
    return f"{document['width']}x{document['resolution']}, {document['frames']} frames"


def step_speed_up(
    rows: Iterable[Mapping], name: str, than: str = REFERENCE, time: str = "gpu_ms"
) -> float | None:
    """How much faster a variant's step is than another's; None where either was not measured.

    Where variants were measured in groups, each is first compared with the reference of its own.

    Parameters
    ----------
    time : "gpu_ms" or "wall_ms".
    """
    by_name = {row["name"]: row for row in rows}
    own, other = by_name.get(name, {}), by_name.get(than, {})
    speed = ratio({"other": other.get(time), "own": own.get(time)}, "other", "own")
    if speed is None or not ("beside" in own or "beside" in other):
        return speed
    reference = by_name.get(REFERENCE, {})
    own_reference, other_reference = (
        row if row is reference else row.get("beside", reference) for row in (own, other)
    )
    moved = ratio({"own": own_reference.get(time), "other": other_reference.get(time)}, "own", "other")
    return None if moved is None else speed * moved


def speed_up(row: Mapping, time: str = "gpu_ms") -> float | None:
    """How much faster than one card, measured beside it; None where GPU times are not of one kind."""
    beside = row.get("beside", {})
    if time == "gpu_ms" and beside.get("gpu_time") != row["gpu_time"]:
        return None
    return ratio({"one": beside.get(time), "own": row[time]}, "one", "own")


def over_reference(rows: Iterable[Mapping], name: str, arrangement: str, reference: str) -> float | None:
    """How much more a variant gains by an arrangement over `reference` than on one card: 1 keeps all.

    By GPU time.
    """
    at = {(row["name"], row["arrangement"]): row for row in rows}
    spread = [at.get((one, arrangement), {}) for one in (reference, name)]
    if len({one.get("gpu_time") for one in spread}) > 1:
        return None
    gains = [
        ratio({"reference": first.get("gpu_ms"), "own": second.get("gpu_ms")}, "reference", "own")
        for first, second in (spread, [one.get("beside", {}) for one in spread])
    ]
    return ratio(dict(zip(("spread", "alone"), gains, strict=True)), "spread", "alone")


def geomean(values: Iterable[float | None]) -> float | None:
    """Geometric mean; None where a value is missing: a mean over a part would not be the claimed one."""
    logarithms = [None if value is None else math.log(value) for value in values]
    known = [value for value in logarithms if value is not None]
    if not known or len(known) < len(logarithms):
        return None
    return math.exp(math.fsum(known) / len(known))


def geomeans(rows: Iterable[Mapping], dtype: str = "bf16") -> dict[str, float | None]:
    """Mean of each ratio, but of those whose columns an older file does not have."""
    taken, ratios = list(rows), FP8_RATIOS if dtype == "fp8" else RATIOS
    known = {
        name: columns for name, columns in ratios.items() if all(set(columns) <= row.keys() for row in taken)
    }
    means = {name: geomean(ratio(row, *columns) for row in taken) for name, columns in known.items()}
    return {name: None if mean is None else round(mean, 4) for name, mean in means.items()}


def card_state(rows: Iterable[Mapping]) -> dict[str, float | None]:
    """Median clock and power over the windows of all rows."""
    windows = [window for row in rows for window in row["windows"].values()]
    state: dict[str, float | None] = {}
    for field in ("clock_mhz", "power_w"):
        known = [window[field] for window in windows if window[field] is not None]
        state[field] = round(median(known), 1) if known else None
    return state


def write(path: Path, document: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {path}")
