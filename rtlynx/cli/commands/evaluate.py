"""`rtlynx evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from rtlynx.cli.app import (
    AsJson,
    Device,
    Model,
    PipelineSettings,
    PromptFile,
    Seed,
    app,
    device_of,
    prompts_of,
)
from rtlynx.cli.inputs import pairs
from rtlynx.cli.output import out, print_json


@app.command(epilog="Example: rtlynx evaluate zoo:flux-emoji --checkpoint emoji-lynx --images 8 --json")
def evaluate(
    model: Model,
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint that calibrate or convert saved.")],
    prompts: PromptFile = None,
    images: Annotated[int, typer.Option(help="How many of the prompts to draw.", min=1)] = 8,
    seed: Seed = 0,
    pipeline: PipelineSettings = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Draw the same prompts and seeds dense and sparse; print layer error, PSNR and SSIM."""
    from rtlynx.evaluate import compare
    from rtlynx.io.checkpoint import load, read_index
    from rtlynx.models.pipelines import load_model

    chosen, on = prompts_of(prompts, model, held_out=True)[:images], device_of(device)
    how = pairs(pipeline, "--pipeline")
    read_index(checkpoint)
    dense, sparse = load_model(model, device=on), load_model(model, device=on)
    load(sparse, checkpoint)
    figures = compare(dense, sparse, chosen, seed=seed, pipeline_kwargs=how)
    if as_json:
        print_json(
            {"model": model, "checkpoint": str(checkpoint), "images": len(chosen), "seed": seed, **figures}
        )
        return
    table = Table(
        "figure", "value", title=f"{len(chosen)} pictures, sparse against dense with the same seeds"
    )
    for key, value in figures.items():
        table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    out.print(table)
