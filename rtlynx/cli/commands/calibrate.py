"""`rtlynx calibrate` and `rtlynx convert`: make checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from rtlynx.cli.app import (
    AsJson,
    Device,
    ImmediateRecipe,
    Model,
    PipelineSettings,
    RecommendedRecipe,
    Settings,
    app,
    device_of,
    prompts_of,
)
from rtlynx.cli.inputs import (
    calibration_options,
    distillation,
    pairs,
    read_prompts_with_inputs,
    recipe_of,
)
from rtlynx.cli.output import print_json, print_report, report_json, say


@app.command(
    epilog="Example: rtlynx calibrate zoo:flux-emoji --out emoji-lynx --set rank=0.02 --set text_rows=dense"
)
def calibrate(
    model: Model,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file, one prompt a line; or JSON lines (.jsonl), a line the pipeline's arguments for "
            "one prompt, with paths of pictures relative to the file."
        ),
    ] = None,
    recipe: RecommendedRecipe = None,
    settings: Settings = None,
    pipeline: PipelineSettings = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="A calibration option (batch_size, seed, sequential ...)."
        ),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Keep recorded calls and solutions here; run again to resume.")
    ] = None,
    distill: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Train the sparse layers afterwards, with this setting (steps, rank ...).",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Plot error, time saved and format of each layer into this .png or .svg file, and "
            "what dense steps were compared beside it."
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Make a model sparse and compensate it on its own activations; save the checkpoint.

    Without --prompts, a zoo model uses its own list of calibration prompts. Several processes:
    torchrun --nproc-per-node 2 -m rtlynx calibrate ...
    """
    from rtlynx.calibration import calibrate as calibrate_model
    from rtlynx.io.checkpoint import save
    from rtlynx.models.pipelines import load_model
    from rtlynx.recipe import Recipe

    _check_target(folder)
    if plot is not None:
        _check_plot(plot, folder)
    # What can be wrong is looked at before the model is loaded.
    chosen = recipe_of(recipe, settings, Recipe.recommended)
    given = prompts_of(None, model) if prompts is None else read_prompts_with_inputs(prompts)
    how = calibration_options(options, work, pairs(pipeline, "--pipeline"))
    training = distillation(distill)
    with _processes(device_of(device)) as (local_device, is_first):
        loaded = load_model(model, device=local_device)
        report = calibrate_model(loaded, given, chosen, how, distill=training)
        if not is_first:
            return
        save(loaded, folder)
        plots = [] if plot is None else _write_plots(loaded, report, plot)
    if as_json:
        print_json(report_json(report, folder))
        return
    print_report(report)
    say(f"Saved to {folder}")
    for file in plots:
        say(f"Plot: {file}")


def _write_plots(model: Any, report: Any, file: Path) -> list[Path]:
    """The figure of the layers, and beside it that of dense steps where calibration compared some."""
    from rtlynx.evaluate import plot_dense_steps, plot_layers, save_plot

    save_plot(plot_layers(model, report), file)
    if report.choice is None or not report.choice.candidates:
        return [file]
    beside = file.with_stem(f"{file.stem}-dense-steps")
    save_plot(plot_dense_steps(report), beside)
    return [file, beside]


@app.command(epilog="Example: rtlynx convert zoo:flux-emoji --out emoji-24 --set grouping=strided")
def convert(
    model: Model,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint.")],
    recipe: ImmediateRecipe = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Make a model sparse, or dense fp8, without calibration, and save the checkpoint."""
    from rtlynx.io.checkpoint import save
    from rtlynx.models import sparse_layers, sparsify, transformers_of
    from rtlynx.models.pipelines import load_model
    from rtlynx.recipe import Recipe

    _check_target(folder)
    chosen = recipe_of(recipe, settings, Recipe.immediate)
    loaded = load_model(model)
    sparsify(loaded, chosen)
    save(loaded, folder)
    count = sum(len(sparse_layers(model)) for model in transformers_of(loaded).values())
    if as_json:
        print_json({"checkpoint": str(folder), "sparse_layers": count})
    else:
        say(f"{count} sparse layers, saved to {folder}")


def _check_target(folder: Path) -> None:
    """What stands in the way of a checkpoint there is said before the work, not after it."""
    from rtlynx.io.parts import check_target

    check_target(folder)


def _check_plot(plot: Path, folder: Path) -> None:
    """What stands in the way of a plot is said before the work, not after it."""
    from rtlynx.evaluate.layer_plots import check_plot_file

    check_plot_file(plot)
    if plot.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--plot {plot} is inside --out {folder}, which holds the checkpoint alone: move it")


@contextlib.contextmanager
def _processes(device: str) -> Iterator[tuple[str, bool]]:
    """Join the other processes where torchrun started this one; yields the device and "is this the first"."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield device, True
        return

    import torch
    import torch.distributed as dist

    on_gpu = device.startswith("cuda")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        local = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else device
        if on_gpu:
            torch.cuda.set_device(local)
        yield local, dist.get_rank() == 0
        dist.barrier()
    finally:
        dist.destroy_process_group()
