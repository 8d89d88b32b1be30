"""`rtlynx inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rtlynx.cli.app import (
    AsJson,
    Model,
    RecipeFile,
    Settings,
    app,
    device_of,
    prompts_of,
)
from rtlynx.cli.inputs import UsageError, recipe_of
from rtlynx.cli.output import print_json, print_overview


@app.command(epilog="Example: rtlynx inspect zoo:flux-emoji --set text_stream=sparse")
def inspect(
    model: Model,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Show what a checkpoint makes of the model.")
    ] = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    activations: Annotated[
        int, typer.Option(help="Also draw so many prompts and measure how much energy 2:4 keeps.", min=0)
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """List the layers that can be sparse, what happens to each and why."""
    if checkpoint is not None and (recipe or settings):
        raise UsageError("--checkpoint holds its own recipe: leave out --recipe and --set")
    if activations and not model.startswith("zoo:"):
        raise UsageError("--activations draws prompts that only zoo models bring: leave it out")

    from rtlynx.cli.inspection import describe
    from rtlynx.io.checkpoint import load
    from rtlynx.models.pipelines import load_model
    from rtlynx.recipe import Recipe

    chosen = recipe_of(recipe, settings, Recipe.recommended())
    loaded = load_model(model, device=device_of(None) if activations else "cpu")
    kept: dict[str, Any] = {}
    if activations:
        from rtlynx.evaluate.activations import activation_energy_kept

        kept = activation_energy_kept(loaded, prompts_of(None, model, held_out=True)[:activations])
    if checkpoint is not None:
        load(loaded, checkpoint)
        overview = describe(loaded)
    else:
        overview = describe(loaded, chosen)
    if as_json:
        print_json({**overview, "activation_energy_kept": kept})
        return
    print_overview(overview, kept)
