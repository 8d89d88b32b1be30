"""The study's plots from its results: `python studies/plots.py studies/results/quality-MODEL.json`.

Writes PNG files into a folder of the results' name, beside them or in `--to`: distributions (the paper's
Figure 2), errors by layer and by step, quality against modelled speed with its Pareto front, pictures of
the main variants, and those furthest from dense.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims import Results
from jobs import atlas_path
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import read_atlas
from rtlynx_zoo.pipeline import SIZE
from rtlynx_zoo.prompts import demo_prompts
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
ALSO_NAMED = ("all-of-ours", "paper:by-hand", "recommended:bf16", "weight-2:4:slim")
WORST = {"worst": "activation-2:4", "worst-recommended": "recommended"}  # plot -> variant
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


def front(document: Mapping[str, Any]) -> Figure | None:
    """PSNR over modelled speed of every row at the study's steps; the Pareto front is a line.

    Rows with caching are crosses and not part of the front: they save steps, with any layers.
    """
    rows = [row for row in Results(document).rows.values() if _speed_and_quality(row) is not None]
    steps = max((row["steps"] for row in rows), default=0)
    rows = [row for row in rows if row["steps"] == steps]
    if not rows:
        return None
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    points = {row["name"]: _speed_and_quality(row) for row in rows}
    cached = {row["name"] for row in rows if row["sweep"] == "cache"}
    best = pareto({name: point for name, point in points.items() if name not in cached})
    named = {*SHOWN, *ALSO_NAMED, *best, *(name for name in pareto(points) if name in cached)}
    for row in rows:
        x, y = points[row["name"]]
        main = row["group"] == "main"
        marker = "o" if main else "x" if row["name"] in cached else "."
        axes.errorbar(x, y, row["figures"]["psnr"]["spread"], fmt=marker, alpha=1 if main else 0.5)
        if row["name"] in named:
            axes.annotate(row["name"], (x, y), fontsize=6, xytext=(4, 2), textcoords="offset points")
    axes.plot(*zip(*(points[name] for name in best), strict=True), "k-", linewidth=0.8, zorder=0)
    floor = Results(document).rows.get("dense:other-seed")
    if floor is not None and floor["figures"]["psnr"]["mean"] is not None:
        level, top = floor["figures"]["psnr"]["mean"], max(y for _, y in points.values())
        if level < top + FLOOR_SHOWN:
            axes.axhline(level, color="grey", linestyle=":")
        axes.set_title(f"dense from other noise: {level:.1f} dB", fontsize=8, loc="left")
    axes.set_xlabel(
        "speed of the linear layers of a full-size step on an H100, modelled, over dense bfloat16"
    )
    axes.set_ylabel("PSNR against dense, dB")
    return figure


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
    there = {name: read_atlas(path, SIZE)[:COLUMNS] for name, path in files.items() if path.is_file()}
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
    return png_bytes(picture_grid(shown, demo_prompts(len(dense)), notes))


def worst_pictures(document: Mapping[str, Any], results: Path, name: str) -> bytes | None:
    """A variant's pictures that are furthest from dense, under the dense ones; None without their file."""
    path, row = atlas_path(results, f"{name}-worst"), Results(document).rows.get(name)
    if row is None or not path.is_file():
        return None
    count, tiles = len(row["worst"]), read_atlas(path, SIZE)
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
    for name, plot in PLOTS.items():
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
    parser.add_argument("results", type=Path, nargs="+", help="files of studies/quality.py")
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
