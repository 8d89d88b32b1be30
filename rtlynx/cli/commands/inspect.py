"""`rtlynx inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rtlynx.cli.app import (
    AsJson,
    Model,
    RecommendedRecipe,
    Settings,
    app,
    device_of,
    prompts_of,
)
from rtlynx.cli.inputs import UsageError, recipe_of
from rtlynx.cli.output import print_json, print_overview, say


@app.command(epilog="Example: rtlynx inspect zoo:flux-emoji --set text_stream=sparse")
def inspect(
    model: Model,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Show what a checkpoint makes of the model.")
    ] = None,
    recipe: RecommendedRecipe = None,
    settings: Settings = None,
    activations: Annotated[
        int, typer.Option(help="Also draw so many prompts and measure how much energy 2:4 keeps.", min=0)
    ] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot error, time saved and format of each layer into this .png or .svg file."),
    ] = None,
    tokens: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="IMAGE TEXT",
            help="Tokens in one call, for the time in --plot.",
            show_default="4096 512; 256 16 for zoo models",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the layers that can be sparse, what happens to each and why."""
    if checkpoint is not None and (recipe or settings):
        raise UsageError("--checkpoint holds its own recipe: leave out --recipe and --set")
    if activations and not model.startswith("zoo:"):
        raise UsageError("--activations draws prompts that only zoo models bring: leave it out")

    if tokens is not None and plot is None:
        raise UsageError("--tokens is about the time in the plot: give --plot FILE too, or leave it out")
    if plot is not None:
        from rtlynx.evaluate.layer_plots import check_plot_file

        check_plot_file(plot)

    from rtlynx.cli.inspection import describe
    from rtlynx.io.checkpoint import load
    from rtlynx.models import transformers_of
    from rtlynx.models.pipelines import load_model
    from rtlynx.recipe import Recipe

    chosen = recipe_of(recipe, settings, Recipe.recommended)
    loaded = load_model(model, device=device_of(None) if activations else "cpu")
    kept: dict[str, Any] = {}
    if activations:
        from rtlynx.evaluate.activations import activation_energy_kept

        kept = activation_energy_kept(loaded, prompts_of(None, model, held_out=True)[:activations])
    planned = chosen if checkpoint is None else None
    if checkpoint is not None:
        load(loaded, checkpoint)
    overviews = {name: describe(model, planned) for name, model in transformers_of(loaded).items()}
    if plot is not None:
        from rtlynx.evaluate.layer_plots import plot_layers, save_plot

        save_plot(plot_layers(loaded, recipe=planned, tokens=tokens or _zoo_tokens(model)), plot)
    if as_json:
        whole = {name: {**one, "activation_energy_kept": kept} for name, one in overviews.items()}
        print_json(whole if len(whole) > 1 else next(iter(whole.values())))
        return
    for name, overview in overviews.items():
        if len(overviews) > 1:
            say(f"{name}:")
        print_overview(overview, kept)
    if plot is not None:
        say(f"Plot: {plot}")


def _zoo_tokens(model: str) -> tuple[int, int] | None:
    """Image and text tokens of the zoo's models, None for others."""
    if not model.startswith("zoo:"):
        return None
    import rtlynx_zoo as zoo
    from rtlynx_zoo.patches import PATCH
    from rtlynx_zoo.text import TEXT_TOKENS

    return (zoo.pipeline_class(model.removeprefix("zoo:")).size // PATCH) ** 2, TEXT_TOKENS
