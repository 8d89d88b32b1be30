"""Plots of speed: bars of layers, shape by shape, and of whole steps, model by model."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from overview import VARIANTS, measured
from tables import in_words, speedup

from rtlynx.timing.card import card_slug
from rtlynx.timing.results import BLOCK_GRAPHS, WAYS, plain_layer_us
from rtlynx.timing.step_variants import DENSE_FP8, EVERY_WEIGHT, RECOMMENDED, TORCHAO

GREEN, GREY, BLUE, DARK = "#2f7d4f", "#9aa5b1", "#4c78a8", "#52606d"
LIGHT_GREEN = "#8fc1a3"
# Beginnings of variants' names.
COLOURS = {"bf16": DARK, TORCHAO: GREY, DENSE_FP8: BLUE, RECOMMENDED: GREEN, EVERY_WEIGHT: LIGHT_GREEN}
# Ways of a layer.
WAY_COLOURS = {"2:4 weights": GREEN, "2:4 activations": LIGHT_GREEN}
COLUMNS = 3  # of models beside each other
# Name and colour of bars, a whole layer's time, and the column of the GEMM alone.
Bars = tuple[str, str, Callable[[dict], float | None], str]


def draw_steps(steps: dict[str, dict], path: Path, source: str) -> None:
    """A plot a model. Bars: GPU time of a step of each variant; marks: its wall time, also with CUDA graphs.

    Parameters
    ----------
    steps : model -> its results file.
    source : digest of the files; the plot carries it, so that a test sees when it is stale.
    """
    known = {model: measured(document) for model, document in steps.items()}
    names = [name for name in VARIANTS if any(name in rows for rows in known.values())]
    lines = -(-len(steps) // COLUMNS)
    figure = Figure(figsize=(10, lines * (0.28 * len(names) + 0.8) + 0.3), layout="constrained")
    grid = figure.subplots(lines, min(COLUMNS, len(steps)), sharey=True, squeeze=False).flatten()
    for axes in grid[len(steps) :]:
        axes.set_axis_off()
    for axes, (model, document) in zip(grid, steps.items(), strict=False):
        rows = {row["name"]: row for row in document["variants"]}
        for place, name in enumerate(names):
            if name not in known[model]:
                continue
            ms = rows[name]["gpu_ms"]
            colour = next((one for start, one in COLOURS.items() if name.startswith(start)), LIGHT_GREEN)
            written = "black" if colour in (GREY, LIGHT_GREEN) else "white"
            axes.barh(place, ms, 0.8, color=colour)
            axes.text(ms / 2, place, f"{ms:.0f}", ha="center", va="center", fontsize=9, color=written)
            _mark(axes, place, rows[name], "D", 4, "wall time")
            _mark(axes, place, rows.get(name + BLOCK_GRAPHS, {}), "|", 12, "wall time with CUDA graphs")
        axes.set_title(f"{in_words(model)}, {card_slug(document['device']).upper()}", fontsize=10)
        axes.set_yticks(range(len(names)), [in_words(name) for name in names])
    grid[0].invert_yaxis()  # which all share
    figure.supxlabel("one denoising step, ms (bars: GPU time)", fontsize=10)
    marks = {
        label: handle
        for axes in grid
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(marks.values(), marks, ncols=2, fontsize=9, loc="outside lower right", frameon=False)
    _save(figure, grid, path, source)


def _mark(axes: Axes, y: float, row: dict, marker: str, size: int, label: str) -> None:
    if row.get("wall_ms"):
        axes.plot(row["wall_ms"], y, marker, color="black", markersize=size, label=label)


def draw_speed(results: dict, path: Path, source: str) -> None:
    """Bars: whole layers' speed relative to cuBLAS in bf16, without a branch; marks: the GEMM alone.

    source : digest of the results file; the plot carries it, so that a test sees when it is stale.
    """
    rows, fp8 = results["rows"], results.get("dtype") == "fp8"
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    peer: Bars = ("cuSPARSELt", GREY, _cusparselt_whole, "cusparselt_gemm_us")
    if fp8:
        peer = ("dense fp8 (PyTorch)", GREY, lambda row: row["fp8_linear_us"], "cublas_fp8_us")
    ours = [
        (f"rtlynx, {way}", WAY_COLOURS[way], partial(plain_layer_us, way=way), WAYS[way][1])
        for way in WAYS
        if all(set(WAYS[way]) <= row.keys() for row in rows)
    ]
    width = 0.8 / (1 + len(ours))
    for number, (name, colour, whole, gemm) in enumerate((peer, *ours)):
        places = [index + width * (number - len(ours) / 2) for index in range(len(rows))]
        times = [whole(row) for row in rows]
        bars = [row["cublas_us"] / us if us else 0.0 for row, us in zip(rows, times, strict=True)]
        marks = [speedup(row, gemm) or float("nan") for row in rows]
        axes.bar(places, bars, 0.95 * width, color=colour, label=f"{name}: whole layer")
        style = {"color": colour, "markeredgecolor": "black", "markersize": 5}
        axes.plot(places, marks, "D", label=f"{name}: GEMM alone", **style)
    # The last bars are of activations, which have a branch.
    with_branch = [speedup(row, "ours_us") or float("nan") for row in rows]
    axes.plot(places, with_branch, "_", color="black", label=f"{name}, rank {results['rank']}: whole layer")
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(rows)), [row["shape"] for row in rows], rotation=25, ha="right")
    axes.set_ylabel("speed relative to cuBLAS in bf16")
    axes.set_title(f"One linear layer in {'fp8' if fp8 else 'bf16'}, {results['device']}")
    axes.legend(ncols=2, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False)
    _save(figure, [axes], path, source)


def _save(figure: Figure, plots: Iterable[Axes], path: Path, source: str) -> None:
    for axes in plots:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Source": source, "Software": None})


def _cusparselt_whole(row: dict) -> float | None:
    parts = row["cusparselt_compress_us"], row["cusparselt_gemm_us"]
    return None if None in parts else sum(parts)
