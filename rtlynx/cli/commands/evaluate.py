"""`rtlynx evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rtlynx.cli.app import (
    AsJson,
    Device,
    Model,
    PipelineSettings,
    PromptFile,
    RecommendedRecipe,
    Seed,
    app,
    device_of,
    prompts_of,
)
from rtlynx.cli.inputs import UsageError, pairs, read_prompts, recipe_of
from rtlynx.cli.output import number, out, print_json, say

ZOO_PROMPTS = 32  # `rtlynx calibrate` takes hundreds; these are for trying it out


@app.command(epilog="Example: rtlynx evaluate zoo:flux-emoji --recipe immediate --images 4")
def evaluate(
    model: Model,
    recipe: RecommendedRecipe = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint that calibrate or convert saved, in place of a recipe.")
    ] = None,
    prompts: PromptFile = None,
    calibration_prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line, none of which is drawn.")
    ] = None,
    images: Annotated[int, typer.Option(help="How many of the prompts to draw.", min=1)] = 8,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder for pictures and report; run again to resume.")
    ] = Path("rtlynx-evaluation"),
    download: Annotated[
        bool,
        typer.Option("--download", help="Download the networks of LPIPS, CLIP score and ImageReward."),
    ] = False,
    seed: Seed = 0,
    pipeline: PipelineSettings = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Draw the same prompts dense, in dense fp8 and sparse; compare pictures, seconds and memory in a report.

    A recipe that needs calibration is calibrated here, on --calibration-prompts; zoo models bring their own.
    For other calibration options, run `rtlynx calibrate` first and give its --checkpoint.
    """
    from rtlynx.recipe import Recipe

    if recipe is not None and checkpoint is not None:
        raise UsageError("give --recipe or --checkpoint, not both: a checkpoint holds its recipe")
    chosen = None if checkpoint is not None else recipe_of(recipe, default=Recipe.recommended)
    texts = prompts_of(prompts, model, held_out=True)
    calibrated: list[str] = []
    if chosen is not None and chosen.needs_calibration:
        calibrated = _calibration_prompts(calibration_prompts, model)
    elif calibration_prompts is not None:
        raise UsageError("nothing is calibrated: leave out --calibration-prompts")
    from rtlynx.evaluate.evaluation import EvaluationSettings, evaluate_model

    settings = EvaluationSettings(
        model=model,
        prompts=texts,
        recipe=chosen,
        checkpoint=checkpoint,
        calibration_prompts=calibrated,
        seed=seed,
        pipeline_kwargs=pairs(pipeline, "--pipeline"),
        device=device_of(device),
    )
    results = evaluate_model(settings, folder, images=images, download=download)
    if as_json:
        print_json(results)
        return
    _print(results)
    say(f"Report: {folder / 'report.html'}   figures: {folder / 'results.json'}")


def _calibration_prompts(file: Path | None, model: str) -> list[str]:
    if file is not None:
        return read_prompts(file)
    if not model.startswith("zoo:"):
        raise UsageError(
            "this recipe needs calibration: give --calibration-prompts FILE, other prompts than those drawn, "
            "or --recipe immediate"
        )
    return prompts_of(None, model)[:ZOO_PROMPTS]


def _print(results: dict[str, Any]) -> None:
    from rtlynx.evaluate.picture_metrics import METRICS

    metrics = [metric for metric in METRICS if metric.name not in results["unavailable"]]
    title = f"{results['images']} pictures from the same noise"
    table = Table("", *(metric.title for metric in metrics), "KID", "seconds", "peak GB", title=title)
    for row in results["variants"]:
        peak = row["peak_memory_bytes"]
        table.add_row(
            row["title"],
            *(number(row[metric.name], f".{metric.digits}f") for metric in metrics),
            number(row.get("kid"), ".3f"),
            number(row["seconds"], ".3f"),
            number(None if peak is None else peak / 1e9, ".2f"),
        )
    out.print(table)
    for name, reason in results["unavailable"].items():
        say(f"{name} is not available: {reason}")
