"""Plots of speed: bars of layers, shape by shape, and of whole steps, model by model."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from overview import MODELS, VARIANTS
from tables import speedup

from rtlynx.timing.results import BLOCK_GRAPHS, REFERENCE
from rtlynx.timing.step_variants import DENSE_FP8, MIXED, RECOMMENDED, TORCHAO

GREEN, GREY, BLUE, DARK = "#2f7d4f", "#9aa5b1", "#4c78a8", "#52606d"
LIGHT_GREEN = "#8fc1a3"
COLOURS = {REFERENCE: DARK, TORCHAO: GREY, DENSE_FP8: BLUE, RECOMMENDED: GREEN, MIXED: LIGHT_GREEN}
Time = Callable[[dict], float | None]


def draw_steps(steps: dict[str, dict], path: Path, source: str) -> None:
    """Bars: GPU time of a step of each model; marks: its wall time, without and with CUDA graphs.

    Parameters
    ----------
    steps : model of `MODELS` -> its results file.
    source : digest of the files; the plot carries it, so that a test sees when it is stale.
    """
    figure = Figure(figsize=(6.6, 4), layout="constrained")
    axes = figure.subplots()
    shown = [model for model in MODELS if model.step in steps]
    for index, model in enumerate(shown):
        rows = {row["name"]: row for row in steps[model.step]["variants"]}
        measured = [name for name in VARIANTS if rows.get(name, {}).get("gpu_ms")]
        apart = 0.8 / max(4, len(measured))
        for place, name in enumerate(measured):
            x, ms = index + apart * (place - (len(measured) - 1) / 2), rows[name]["gpu_ms"]
            axes.bar(x, ms, 0.9 * apart, color=COLOURS[name], label=VARIANTS[name][0].replace("*", ""))
            axes.text(x, ms / 2, f"{ms:.0f}", ha="center", va="center", fontsize=9, color="white")
            _mark(axes, x, rows[name], "D", 5, "wall time")
            _mark(axes, x, rows.get(name + BLOCK_GRAPHS, {}), "_", 14, "wall time with CUDA graphs")
    axes.set_xticks(range(len(shown)), [f"{one.title}\n{_card(steps[one.step])}" for one in shown])
    axes.set_ylabel("one denoising step, ms (bars: GPU time)")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(
        handles.values(),
        handles,
        ncols=2,
        fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        frameon=False,
    )
    _save(figure, axes, path, source)


def _mark(axes: Axes, x: float, row: dict, marker: str, size: int, label: str) -> None:
    if row.get("wall_ms"):
        axes.plot(x, row["wall_ms"], marker, color="black", markersize=size, label=label)


def _card(results: dict) -> str:
    """The card's short name."""
    return " ".join(results["device"].split()[:2])


def draw_speed(results: dict, path: Path, source: str) -> None:
    """Bars: whole layers' speed relative to cuBLAS in bf16; marks: the GEMM alone.

    source : digest of the results file; the plot carries it, so that a test sees when it is stale.
    """
    rows, fp8 = results["rows"], results.get("dtype") == "fp8"
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    peer: tuple[str, Time, str] = ("cuSPARSELt", _cusparselt_whole, "cusparselt_gemm_us")
    if fp8:
        peer = ("dense fp8 (PyTorch)", lambda row: row["fp8_linear_us"], "cublas_fp8_us")
    ours: tuple[str, Time, str] = ("rtlynx, sparse", lambda row: row["ours_us"], "ours_gemm_us")
    for (name, whole, gemm), colour, offset in ((peer, GREY, -0.2), (ours, GREEN, 0.2)):
        places = [index + offset for index in range(len(rows))]
        times = [whole(row) for row in rows]
        bars = [row["cublas_us"] / us if us else 0.0 for row, us in zip(rows, times, strict=True)]
        marks = [speedup(row, gemm) or float("nan") for row in rows]
        axes.bar(places, bars, 0.38, color=colour, label=f"{name}: whole layer")
        style = {"color": colour, "markeredgecolor": "black", "markersize": 5}
        axes.plot(places, marks, "D", label=f"{name}: GEMM alone", **style)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(rows)), [row["shape"] for row in rows], rotation=25, ha="right")
    axes.set_ylabel("speed relative to cuBLAS in bf16")
    axes.set_title(f"One linear layer in {'fp8' if fp8 else 'bf16'}, {results['device']}")
    axes.legend(ncols=2, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False)
    _save(figure, axes, path, source)


def _save(figure: Figure, axes: Axes, path: Path, source: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Source": source, "Software": None})


def _cusparselt_whole(row: dict) -> float | None:
    parts = row["cusparselt_compress_us"], row["cusparselt_gemm_us"]
    return None if None in parts else sum(parts)
