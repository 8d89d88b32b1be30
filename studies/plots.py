"""The study's plots from its results: `python studies/plots.py studies/results/quality-MODEL.json`.

Writes PNG files into a folder of the results' name, beside them or in `--to`: distributions (the paper's
Figure 2), errors by layer and by step, quality against modelled speed with its Pareto front, pictures of
the main variants, and those furthest from dense. Of a file of `widths.py`: damage by width; of one of
`noise_levels.py`: quality by the noise levels that run sparse or dense.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jobs import atlas_path
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from measure import read_atlas
from measured_rows import Results
from rtlynx_zoo import draws_emoji
from rtlynx_zoo.prompts import demo_prompts, fashion_prompts
from torch import Tensor

from rtlynx.evaluate.grid import picture_grid, png_bytes
from rtlynx.evaluate.layers import HISTOGRAM_BINS, HISTOGRAM_RANGE
from rtlynx.storage.files import CheckpointError, atomic_file, read_json, sha256_of

# The main variants, from bad to good, whose errors and pictures are shown.
SHOWN = (
    "weight-2:4:wanda",
    "activation-2:4",
    "activation-2:4+norm",
    "paper",
    "refit+lowrank+strided",
    "recommended",
)
WORST = {"worst": "activation-2:4", "worst-recommended": "recommended"}  # plot -> variant
REACHES = (9, 20, 34, 50, 70)  # points between a label and what it names
MARKER = 5  # pixels from the middle of a marker to its rim
FLOOR_SHOWN = 5.0  # dB: a noise floor further above the best variant is told and not drawn
MAGNIFIED = 4  # differences to dense
COLUMNS = 8
DPI = 150


def distributions(document: Mapping[str, Any]) -> Figure | None:
    """Histograms of weights and inputs of each role of layer, with the energy that 2:4 keeps."""
    found = document.get("distributions")
    if not found or not found["roles"]:
        return None
    roles = found["roles"]
    figure, axes = _panels(len(roles), 2.6, 2.4)
    edges = np.linspace(-HISTOGRAM_RANGE, HISTOGRAM_RANGE, HISTOGRAM_BINS + 1)
    for one, (role, kinds) in zip(axes, roles.items(), strict=True):
        for kind, of in kinds.items():
            counts = np.asarray(of["counts"], dtype=float)
            density = counts / max(counts.sum(), 1) / (edges[1] - edges[0])
            label = f"{kind}: 2:4 keeps {of['share']:.1%}"
            one.stairs(np.maximum(density, 1e-5), edges, label=label, baseline=None)
        one.set_yscale("log")
        one.set_ylim(1e-4, 30)
        one.set_title(role, fontsize=9)
        one.set_xlabel("value / root mean square", fontsize=8)
        one.legend(fontsize=6)
    figure.suptitle(f"Independent normal entries would keep {found['normal']:.1%}", fontsize=8)
    return figure


def errors_by_layer(document: Mapping[str, Any]) -> Figure | None:
    """Relative squared error of each layer, one line a variant."""
    rows = [row for row in _shown(document) if row["errors"]["layers"]]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row["errors"]["layers"]))
    figure = Figure(figsize=(6.5, 2 + 0.16 * len(names)), layout="constrained")
    axes = figure.subplots()
    place = {name: i for i, name in enumerate(names)}
    for row in rows:
        layers = row["errors"]["layers"]
        axes.plot(
            list(layers.values()), [place[name] for name in layers], "o", markersize=4, label=row["name"]
        )
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("relative squared error of the layer's output")
    axes.legend(fontsize=7)
    return figure


def errors_by_step(document: Mapping[str, Any]) -> Figure | None:
    """Errors of layers and of the model's output over the noise level, one line a variant."""
    rows = _shown(document)
    if not rows:
        return None
    figure, panels = _panels(2, 4.2, 3.2)
    titles = {"layer_error_by_step": "layers, mean", "output_error_by_step": "the model's output"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for row in rows:
            axes.plot(row["errors"]["noise"], row["errors"][key], label=row["name"])
        axes.set_yscale("log")
        axes.invert_xaxis()  # as sampling goes
        axes.set_xlabel("share of noise, from start to end of sampling")
        axes.set_ylabel("relative squared error")
        axes.set_title(title, fontsize=9)
    panels[0].legend(fontsize=7)
    return figure


class Family(NamedTuple):
    """Variants drawn alike: whose names match the pattern, and none before."""

    title: str
    names: str
    colour: str
    marker: str


# The first that matches decides.
FAMILIES = (
    Family("dense fp8", r"fp8:dense$", "#1f4e9c", "*"),
    Family(
        "ours, sparse fp8",
        r"recommended(\+|$)|saving:auto|fp8-budget|fp8:|free:fp8|last-steps:|distilled:",
        "#2f7d4f",
        "o",
    ),
    Family("weights 2:4", r"weight-2:4", "#b45f06", "s"),
    Family("the paper's recipe", r"paper|\w+:paper", "#8e44ad", "^"),
    Family("activations 2:4, norm or none", r"activation|\w+:norm", "#c0392b", "v"),
    Family("ours in bf16", r"", "#7f8c8d", "D"),
)
LABELLED = {  # variant -> what the plot calls it
    "weight-2:4:wanda": "2:4 weights (Wanda)",
    "activation-2:4": "2:4 activations",
    "paper": "the paper's recipe",
    "weight-2:4:refit-fp8": "2:4 weights, refitted, fp8",
    "fp8:dense": "dense fp8",
    "saving:auto-80%": "80 % of the saving",
    "last-steps:90%-2": "90 %, last 2 steps dense",
    "recommended": "recommended",
    "fp8:refit": "every layer sparse",
}


def family_of(name: str) -> Family:
    return next(family for family in FAMILIES if re.match(family.names, name))


def front(document: Mapping[str, Any]) -> Figure | None:
    """PSNR over modelled speed of every row at the study's steps; the Pareto front is a line.

    Rows with caching are left out: they save steps, with any layers.
    """
    rows = [row for row in Results(document).rows.values() if _speed_and_quality(row) is not None]
    steps = max((row["steps"] for row in rows), default=0)
    rows = [row for row in rows if row["steps"] == steps and row["sweep"] != "cache"]
    if not rows:
        return None
    figure = Figure(figsize=(6.6, 5.6), layout="constrained")
    axes = figure.subplots()
    points = {row["name"]: _speed_and_quality(row) for row in rows}
    for family in FAMILIES:
        some = [point for name, point in points.items() if family_of(name) is family]
        if some:
            size = 160 if family.marker == "*" else 24
            style: dict[str, Any] = {"c": family.colour, "marker": family.marker, "s": size}
            axes.scatter(*np.transpose(some), label=family.title, **style)
    best = pareto(points)
    axes.plot(*zip(*(points[name] for name in best), strict=True), "k-", linewidth=0.8, zorder=0)
    floor = Results(document).rows.get("dense:other-seed")
    if floor is not None and floor["figures"]["psnr"]["mean"] is not None:
        level, top = floor["figures"]["psnr"]["mean"], max(y for _, y in points.values())
        if level < top + FLOOR_SHOWN:
            axes.axhline(level, color="grey", linestyle=":", label=f"dense, other noise: {level:.1f} dB")
    axes.set_xlabel("linear layers of the full-size model: modelled speed over bf16 (H100)")
    axes.set_ylabel("PSNR against dense bfloat16, dB")
    axes.margins(x=0.12, y=0.08)
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    place_labels(axes, {LABELLED[name]: points[name] for name in LABELLED if name in points}, points.values())
    return figure


WIDTH_PANELS = {  # figure -> title, axis
    "psnr": ("pictures", "PSNR against dense, dB"),
    "output_error": ("one call of the model", "relative squared error"),
    "frechet": ("all pictures together", "Fréchet distance to real ones"),
}


def by_width(document: Mapping[str, Any]) -> Figure | None:
    """Damage over the width of the model: a point for each training, a line through their means."""
    rows = document["rows"]
    if not rows:
        return None
    figure, panels = _panels(len(WIDTH_PANELS), 3.6, 3.4)
    for axes, (key, (title, unit)) in zip(panels, WIDTH_PANELS.items(), strict=True):
        for number, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
            points: dict[int, list[float]] = {}
            for row in rows:
                value = row["errors"][key] if key in row["errors"] else row["figures"][key]["mean"]
                # Dense is at no distance from itself: only its pictures as a whole can be judged.
                if row["name"] == name and value:
                    points.setdefault(row["width"], []).append(value)
            if not points:
                continue
            widths, colour = sorted(points), f"C{number}"
            axes.plot(widths, [np.mean(points[width]) for width in widths], color=colour, label=name)
            each = [(width, value) for width in widths for value in points[width]]
            axes.plot(*zip(*each, strict=True), "o", color=colour, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["width"] for row in rows}), minor=False)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("width of the model")
        axes.set_ylabel(unit)
        axes.set_title(title, fontsize=9)
        if axes.lines:
            axes.legend(fontsize=7)
    panels[1].set_yscale("log")
    return figure


def noise_level_recipe(row: Mapping[str, Any]) -> str:
    """What the plot calls the recipe of a row of noise_levels.py."""
    recipe, *marks = row["recipe"].removeprefix("every-").split("-")
    said = {
        "unpermuted": "features not permuted",
        "distilled": f"{row.get('training_steps')} steps distilled",
    }
    name = "every layer sparse" if recipe == "layer" else f"{marks.pop(0)} % of the saving sparse"
    return ", ".join([name, *(said[mark] for mark in marks)])


def by_noise_level(document: Mapping[str, Any]) -> Figure | None:
    """PSNR by the one range of noise levels that runs sparse or dense, and by the bound below which all do.

    A further panel shows the latter over modelled time, where that is known.
    """
    rows = document["rows"]
    below = [row for row in rows if row["kind"] == "dense-below"]
    if not below:
        return None
    timed = any(row["modelled_ms"] is not None for row in below)
    figure, panels = _panels(2 + timed, 4.2, 4)
    for kind, label, colour in (
        ("sparse-at", "sparse here, dense elsewhere", "#2f7d4f"),
        ("dense-at", "dense here, sparse elsewhere", "#1f4e9c"),
    ):
        ranges = sorted((*row["range"], row["psnr"]) for row in rows if row["kind"] == kind)
        if ranges:
            low, high, quality = zip(*ranges, strict=True)
            panels[0].hlines(quality, low, high, linewidth=3, label=label, colors=colour)
    recipes: dict[str, list[tuple[float, float, float | None]]] = {}
    for row in below:
        point = row["range"][1], row["psnr"], row["modelled_ms"]
        recipes.setdefault(noise_level_recipe(row), []).append(point)
    for number, (label, points) in enumerate(recipes.items()):
        of = sorted(points)
        bound, quality, times = zip(*of, strict=True)
        # No line from none dense to all: nothing is known of the way between them.
        line = "o-" if len(of) > 2 else "o"
        panels[1].plot(bound, quality, line, color=f"C{number}", markersize=4, label=label)
        if None not in times:
            panels[2].plot(times, quality, line, color=f"C{number}", markersize=4, label=label)
    xlabels = (
        "noise level",
        "noise level at and below which steps are dense",
        "modelled time of linear layers, ms",
    )
    for axes, xlabel in zip(panels, xlabels, strict=False):
        axes.set_xlabel(xlabel)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    panels[0].set_xlim(1.02, -0.02)  # as sampling goes
    panels[0].set_ylabel("PSNR against dense bfloat16, dB")
    bottom, top = (choose(axes.get_ylim()[i] for axes in panels) for i, choose in enumerate((min, max)))
    for axes in panels:
        axes.set_ylim(bottom, top)
    return figure


def place_labels(
    axes: Axes, labels: Mapping[str, tuple[float, float]], points: Iterable[tuple[float, float]]
) -> None:
    """Write each label beside its point where it covers no other label, and as few points as it can.

    A label that stands further off has a line to its point.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()  # fixes the place of the axes, in which labels are measured
    figure.set_layout_engine("none")
    dots, inside = axes.transData.transform(list(points)), axes.get_window_extent()
    taken: list[Bbox] = []

    def cost_of(box: Bbox, reach: float) -> float:
        outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
        covered = sum(box.padded(MARKER).contains(x, y) for x, y in dots)
        return 1000.0 * (outside + sum(map(box.overlaps, taken))) + 60 * covered + reach

    for text, point in sorted(labels.items(), key=lambda item: item[1][1]):
        note: Any = axes.annotate(text, point, (0, 0), textcoords="offset points", fontsize=9, va="center")
        size = Text.get_window_extent(note)
        tried: list[tuple[float, int, tuple[float, float], float, Bbox]] = []
        for reach, angle in itertools.product(REACHES, range(0, 360, 30)):
            dx, dy = reach * np.cos(np.radians(angle)), reach * np.sin(np.radians(angle))
            side = 0.0 if dx > 1 else 1.0 if dx < -1 else 0.5  # the share of the label left of its place
            x, y = axes.transData.transform(point) + np.array([dx, dy]) * figure.dpi / 72
            box = Bbox.from_bounds(x - side * size.width, y - size.height / 2, size.width, size.height)
            tried.append((cost_of(box.padded(2), reach), len(tried), (dx, dy), side, box.padded(2)))
        _, _, offset, side, box = min(tried, key=lambda one: one[:2])
        note.set_position(offset)
        note.set_horizontalalignment({0.0: "left", 0.5: "center", 1.0: "right"}[side])
        if np.hypot(*offset) > REACHES[0] + 1:
            line = {"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
            axes.annotate("", point, offset, textcoords="offset points", arrowprops=line)
        taken.append(box)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names that no other beats in both coordinates, from slow to fast."""
    best: list[str] = []
    for name in sorted(points, key=lambda name: points[name], reverse=True):
        if not best or points[name][1] > points[best[-1]][1]:
            best.append(name)
    return best[::-1]


def pictures(document: Mapping[str, Any], results: Path) -> bytes | None:
    """Dense, then each shown variant and its magnified difference, as a PNG; None without their files."""
    files = {name: atlas_path(results, name) for name in ("dense", *SHOWN)}
    there = {name: read_atlas(path)[:COLUMNS] for name, path in files.items() if path.is_file()}
    if "dense" not in there or len(there) < 2:
        return None
    dense, rows = there.pop("dense"), Results(document).rows
    shown: dict[str, Tensor] = {"dense": dense}
    notes = {}
    for name, some in there.items():
        shown[name] = some
        value = rows[name]["figures"]["psnr"]["mean"] if name in rows else None
        notes[name] = "" if value is None else f"PSNR {value:.1f} dB"
        shown[f"{name}: difference x{MAGNIFIED}"] = magnified_difference(some, dense)
    prompts = demo_prompts if draws_emoji(document["model"].removeprefix("zoo:")) else fashion_prompts
    return png_bytes(picture_grid(shown, prompts(len(dense)), notes))


def worst_pictures(document: Mapping[str, Any], results: Path, name: str) -> bytes | None:
    """A variant's pictures that are furthest from dense, under the dense ones; None without their file."""
    path, row = atlas_path(results, f"{name}-worst"), Results(document).rows.get(name)
    if row is None or not path.is_file():
        return None
    count, tiles = len(row["worst"]), read_atlas(path)
    return png_bytes(picture_grid({"dense": tiles[:count], name: tiles[count : 2 * count]}, row["worst"]))


def magnified_difference(some: Tensor, dense: Tensor) -> Tensor:
    """Difference (n, 3, H, W) around middle grey."""
    return (0.5 + MAGNIFIED * (some - dense)).clamp(0, 1)


PLOTS: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {
    "distributions": distributions,
    "errors-by-layer": errors_by_layer,
    "errors-by-step": errors_by_step,
    "front": front,
}


def write_plots(results: Path, to: Path | None = None) -> list[Path]:
    """Write every plot that the results allow; the files written.

    to : where their folder is made, default beside the results.
    """
    document, written = read_json(results), []
    folder = (to or results.parent) / results.stem
    folder.mkdir(parents=True, exist_ok=True)
    digest = sha256_of(results)  # so that a test sees when a plot is stale
    plots = PLOTS
    if "training" in document:
        plots = {"by-width": by_width}
    elif any("kind" in row for row in document["rows"]):
        plots = {"noise-levels": by_noise_level}
    for name, plot in plots.items():
        figure = plot(document)
        if figure is None:
            continue
        with atomic_file(folder / f"plot-{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, metadata={"Source": digest})
        written.append(folder / f"plot-{name}.png")
    grids = {"pictures": pictures(document, results)}
    grids |= {plot: worst_pictures(document, results, variant) for plot, variant in WORST.items()}
    for name, grid in grids.items():
        if grid is not None:
            with atomic_file(folder / f"plot-{name}.png") as temporary:
                temporary.write_bytes(grid)
            written.append(folder / f"plot-{name}.png")
    return written


def _shown(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = Results(document).rows
    return [rows[name] for name in SHOWN if name in rows]


def _speed_and_quality(row: Mapping[str, Any]) -> Any:
    quality, speed = row["figures"]["psnr"]["mean"], row["modelled_speedup"]
    if quality is None or speed is None or row["name"].startswith("dense"):
        return None
    return speed, quality


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", type=Path, nargs="+", help="files of quality.py, widths.py or noise_levels.py"
    )
    parser.add_argument("--to", type=Path, help="folder of the plots' folders, default that of each file")
    options = parser.parse_args(arguments)
    for results in options.results:
        try:
            for path in write_plots(results, options.to):
                print(f"wrote {path}")
        except CheckpointError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
