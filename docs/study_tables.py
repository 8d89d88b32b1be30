"""The study's results files (studies/results) as Markdown, for docs/results/quality.md."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tables import Place, factor, number

sys.path.append(str(Path(__file__).resolve().parent.parent / "studies"))

from claims import answers, table_of
from measured_rows import Results
from variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PLOTS = Path("studies/results"), Path("docs/study")
# What each plot shows.
CAPTIONS = {
    "pictures": "First prompts: dense, then variants with their difference to dense, magnified four times",
    "worst": "The pictures furthest from dense, 2:4 without compensation",
    "worst-recommended": "The pictures furthest from dense with the recommended recipe",
    "front": "Picture quality over modelled speed of the linear layers; the line is the Pareto front",
    "distributions": "Weights and inputs of layers by role, and the energy that 2:4 keeps",
    "errors-by-layer": "Error of each layer's output",
    "errors-by-step": "Errors over the steps of sampling",
    "noise-levels": "Quality by the noise levels that run sparse or in dense fp8",
}
LAYER_PLOTS = ("distributions", "errors-by-layer", "errors-by-step")
SWEEPS = {
    "floor": "Rounding to bfloat16",
    "saving": "Layers left dense by the budget rule, until this share of the saving is reached",
    "rank": "Rank of the low-rank branch, of a layer's inputs (*width*: of the model's width in every layer)",
    "ridge": "Ridge",
    "prompts": "Calibration prompts",
    "factors": "Low-rank factors: one A for layers that share an input, or each its own",
    "order": "Layers calibrated at once, or block by block on the outputs of sparse blocks",
    "grouping": "Strided groups of attention outputs",
    "layers": "Layers left dense, by hand or by budget at the same modelled time",
    "text": "Text stream sparse; text rows of joint blocks dense",
    "dense-steps": "First steps dense",
    "last-steps": "Last steps in dense fp8",
    "schedule": "Dense fp8 below a noise level; above it every input sparse, or this share of the saving",
    "steps": "8 steps, compared with dense at 8",
    "pattern": "Other patterns, for which there is no kernel",
    "fp8": "fp8, dense and sparse",
    "drop": "Half of the weights dropped in place of activations",
    "attention": "Attention in eight bits, beside layers of these forms",
    "modulation": "Modulation in eight bits, beside layers of these forms",
    "fp8-budget": "Formats by an error budget, fp8 among them",
    "free": "What costs nothing at inference: an intercept, rotated values, permuted hidden features",
    "rotation": "Every layer in sparse fp8: parts of the rotation of values",
    "distilled": "Sparse layers trained after calibration, for 500 steps",
    "bf16-budget": "Layers by an error budget, in bfloat16",
    "cache": "On top of first-block caching",
}


# Title of a column -> its cell, of a row.
Columns = dict[str, Callable[[dict], str]]


def figure(name: str, form: str = ".3f") -> Callable[[dict], str]:
    """A figure's mean over seeds."""
    return lambda row: number(row["figures"][name]["mean"], form)


NAMED: Columns = {
    "variant": lambda row: f"`{row['name']}`",
    "PSNR, dB": lambda row: _psnr(row["figures"]["psnr"]),
    "SSIM": figure("ssim"),
    "perceptual": figure("perceptual"),
}
SPEED: Columns = {"linear layers, modelled": lambda row: factor(row["modelled_speedup"])}
MAIN: Columns = {
    **NAMED,
    "Fréchet": figure("frechet"),
    "retrieval": figure("retrieval"),
    "layer error": lambda row: number(row["errors"]["layer_error"], ".3f"),
    **SPEED,
    "calibration, s": lambda row: number(row["calibration_seconds"], ".0f"),
}
SWEPT: Columns = {
    **NAMED,
    "layer error": lambda row: number(row["errors"]["layer_error"], ".4f"),
    "output error": lambda row: number(row["errors"]["output_error_weighted"], ".4f"),
    **SPEED,
}


def main_section(results: dict, source: Path, place: Place) -> str:
    """The main comparison of one model as a table, with how it was measured."""
    rows = _in_order(results, "group", "main")
    return f"{_table(MAIN, rows)}\n\n{_measured(results, rows, source, place)}"


def claims_section(documents: Iterable[dict]) -> str:
    """Every claim with its answer for each model."""
    by_model = {_name(document): answers(document) for document in documents}
    claims = zip(*by_model.values(), strict=True)
    return table_of((model, one) for told in claims for model, one in zip(by_model, told, strict=True))


def verdicts_section(documents: Iterable[dict]) -> str:
    """Every claim with its answer for each model, without figures, and in a line why it fails."""
    by_model = {_name(document): answers(document) for document in documents}
    lines = [f"| claim | {' | '.join(by_model)} |", "|---" * (1 + len(by_model)) + "|"]
    reasons = []
    for told in zip(*by_model.values(), strict=True):
        lines.append(f"| {told[0].claim} | {' | '.join(one.verdict for one in told)} |")
        reasons += [
            f"- {model}, {one.claim}: {one.why}."
            for model, one in zip(by_model, told, strict=True)
            if one.why
        ]
    return "\n".join([*lines, *(["", "Why some fail:", "", *reasons] if reasons else [])])


def sweeps_section(results: dict) -> str:
    """One table a sweep of a model."""
    parts = []
    for sweep, title in SWEEPS.items():
        rows = _in_order(results, "sweep", sweep)
        if rows:
            parts.append(f"**{title}**\n\n{_table(SWEPT, rows)}")
    return "\n\n".join(parts)


def plots_section(source: Path, place: Place, names: Iterable[str] = CAPTIONS, root: Path = ROOT) -> str:
    """The plots of a results file that are there."""
    files = {name: plots_of(source) / f"plot-{name}.png" for name in names}
    return "\n\n".join(
        f"![{CAPTIONS[name]}]({place.path(file)})" for name, file in files.items() if (root / file).is_file()
    )


def plots_of(source: Path) -> Path:
    """The folder of a results file's plots."""
    return PLOTS / source.stem


def model_title(results: dict) -> str:
    """What stands over a model's tables."""
    architecture = results["architecture"].removesuffix("2DModel").removesuffix("Transformer")
    return f"{_name(results)} ({architecture} architecture)"


def rows_of(results: dict) -> dict[str, dict]:
    """Rows by name, of each the one with most pictures."""
    return Results(results).rows


def _in_order(results: dict, key: str, value: str) -> list[dict]:
    """Rows whose `key` is `value`, as the study lists its variants: a file has them as they were done."""
    place = {variant.name: i for i, variant in enumerate(VARIANTS)}
    rows = (row for row in results["rows"] if row[key] == value)
    return sorted(rows, key=lambda row: place.get(row["name"], len(place)))


def _table(columns: Columns, rows: Iterable[dict]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]
    return "\n".join(lines)


def _measured(results: dict, rows: list[dict], source: Path, place: Place) -> str:
    known = Results(results).rows
    floor = known["dense:other-seed"]["figures"]["psnr"]["mean"] if "dense:other-seed" in known else None
    sizes = sorted({(row["pictures"], len(row["seeds"]), row["steps"]) for row in rows})
    size = "; ".join(
        f"{count:,} pictures from each of {seeds} seeds, {steps} steps" for count, seeds, steps in sizes
    )
    noise = "" if floor is None else f" Dense from other noise: {floor:.1f} dB."
    cards = " and ".join(_distinct(rows, "device"))
    return (
        f"{size}, against dense pictures from the same noise; ± over seeds where it is 0.05 dB or more."
        f"{noise} Speed is modelled for the linear layers of the full-size model on an H100. "
        f"{cards}, {results['dtype']}, torch {results['torch']}, {_commits(rows)} "
        f"({place.file(source)})."
    )


def _commits(rows: list[dict]) -> str:
    found = _distinct(rows, "commit")
    return f"{'commit' if len(found) == 1 else 'commits'} {', '.join(found)}"


def _distinct(rows: list[dict], name: str) -> list[str]:
    return list(dict.fromkeys(str(row[name]) for row in rows))


def _name(results: dict) -> str:
    return results["model"].removeprefix("zoo:")


def _psnr(figure: dict) -> str:
    spread = figure["spread"] or 0.0
    return number(figure["mean"], ".2f") + (f" ± {spread:.2f}" if spread >= 0.05 else "")
