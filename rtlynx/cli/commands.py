"""The commands of `rtlynx`.

Each imports what it needs when it runs: `rtlynx --help` needs typer and rich alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from rtlynx._version import __version__
from rtlynx.cli.inputs import UsageError, calibration_options, pairs, read_prompts, recipe_of
from rtlynx.cli.output import (
    err,
    number,
    out,
    print_json,
    print_overview,
    print_report,
    report_json,
    say,
)

app = typer.Typer(
    name="rtlynx",
    help="2:4 activation sparsity for diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Model = Annotated[
    str, typer.Argument(help="zoo:flux-emoji, or a local diffusers folder.", show_default=False)
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A recipe as a JSON file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one recipe setting; repeatable."),
]
PipelineSettings = Annotated[
    list[str] | None,
    typer.Option("--pipeline", metavar="KEY=VALUE", help="An argument of the pipeline call; repeatable."),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 ...; default cuda where there is one.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Picture i starts from noise of seed + i.", min=0, max=2**32 - 1)]
PromptFile = Annotated[Path | None, typer.Option("--prompts", help="Text file, one prompt a line.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
# typer may bring a click of its own, so its base class is asked for here.
_ClickError: Any = typer.BadParameter.__mro__[2]


def run(arguments: list[str]) -> tuple[int, str | None]:
    """Run one command: the exit code, and what was wrong with how it was called.

    typer's own runner would turn errors and interrupts into output and codes of its own.
    """
    as_module = Path(sys.argv[0]).name == "__main__.py"
    program = "python -m rtlynx" if as_module else "rtlynx"
    command = typer.main.get_command(app)
    asked = arguments or ["--help"]
    try:
        with command.make_context(program, list(asked)) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return (stop.exit_code if arguments else 2), None
    except typer.Abort:
        raise KeyboardInterrupt from None
    except UsageError as error:
        return 2, f"{error}; try: {program} {context.invoked_subcommand} --help"
    except _ClickError as error:
        where = error.ctx.command_path if error.ctx else program
        return 2, f"{error.format_message().rstrip('. ')}; try: {where} --help"
    return 0, None


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """2:4 activation sparsity for diffusion transformers."""
    if version:
        say(__version__)
        raise typer.Exit


@app.command(epilog="Example: rtlynx demo --out rtlynx-demo --images 8 --steps 12")
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("rtlynx-demo"),
    images: Annotated[
        int | None, typer.Option(help="Pictures a variant.", min=1, max=64, show_default="24")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps.", min=1, max=1000, show_default="10")
    ] = None,
    seed: Seed = 0,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Calibrate live, which takes minutes, not with shipped solutions."),
    ] = False,
) -> None:
    """Draw with a real small diffusion transformer: dense, sparse and compensated; write a report."""
    from rtlynx.evaluate.demo import IMAGES, STEPS, run_demo

    results = run_demo(folder, images=images or IMAGES, steps=steps or STEPS, seed=seed, calibrate=calibrate)
    # Narrow enough for a terminal of 80 columns with the longest variant's name.
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("variant", no_wrap=True)
    for heading in ("error", "PSNR", "SSIM", "KID", "found", "layers", "sec."):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["variants"]:
        table.add_row(
            row["name"],
            number(row["layer_error"], ".4f"),
            number(row["psnr"], ".2f"),
            number(row["ssim"], ".3f"),
            number(row["kid"], ".4f"),
            number(row["retrieval"], ".3f"),
            str(row["sparse_layers"]),
            number(row["seconds"], ".1f"),
        )
    out.print(table)
    out.print("error: of the layers' outputs; found: nearest real picture is the prompted one", style="dim")
    say(
        f"Report: {folder / 'report.html'}   grid: {folder / 'grid.png'}   figures: {folder / 'results.json'}"
    )


@app.command(
    epilog="Example: rtlynx calibrate zoo:flux-emoji --out emoji-lynx --set rank=0.02 --set text_rows=dense"
)
def calibrate(
    model: Model,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint.")],
    prompts: PromptFile = None,
    recipe: RecipeFile = None,
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
    # What can be wrong is looked at before the model is loaded.
    chosen, texts = recipe_of(recipe, settings, Recipe.recommended()), _prompts(prompts, model)
    how = calibration_options(options, work, pairs(pipeline, "--pipeline"))
    with _processes(_device(device)) as (local_device, is_first):
        loaded = load_model(model, device=local_device)
        report = calibrate_model(loaded, texts, chosen, how)
        if not is_first:
            return
        save(loaded, folder)
    if as_json:
        print_json(report_json(report, folder))
        return
    print_report(report)
    say(f"Saved to {folder}")


@app.command(epilog="Example: rtlynx convert zoo:flux-emoji --out emoji-24 --set grouping=strided")
def convert(
    model: Model,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint.")],
    recipe: RecipeFile = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Make a model sparse without calibration (2:4 and norm compensation) and save the checkpoint."""
    from rtlynx.io.checkpoint import save
    from rtlynx.models import sparse_layers, sparsify, target_model
    from rtlynx.models.pipelines import load_model
    from rtlynx.recipe import Recipe

    _check_target(folder)
    chosen = recipe_of(recipe, settings, Recipe.immediate())
    loaded = load_model(model)
    sparsify(loaded, chosen)
    save(loaded, folder)
    count = len(sparse_layers(target_model(loaded)))
    if as_json:
        print_json({"checkpoint": str(folder), "sparse_layers": count})
    else:
        say(f"{count} sparse layers, saved to {folder}")


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

    chosen, on = _prompts(prompts, model, held_out=True)[:images], _device(device)
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
    loaded = load_model(model, device=_device(None) if activations else "cpu")
    kept: dict[str, Any] = {}
    if activations:
        from rtlynx.evaluate.activations import activation_energy_kept

        kept = activation_energy_kept(loaded, _prompts(None, model, held_out=True)[:activations])
    if checkpoint is not None:
        load(loaded, checkpoint)
        overview = describe(loaded)
    else:
        overview = describe(loaded, chosen)
    if as_json:
        print_json({**overview, "activation_energy_kept": kept})
        return
    print_overview(overview, kept)


@app.command(epilog="Example: rtlynx doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """What this machine can run, and why not. Exit code 1 where something that should work does not."""
    from rtlynx.cli.doctor import examine, to_json

    checks = examine()
    report = to_json(checks)
    if as_json:
        print_json(report)
    else:
        table = Table("check", "", "finding")
        for check in checks:
            mark = {True: "[green]ok[/green]", False: "[red]fails[/red]", None: ""}[check.ok]
            table.add_row(check.name, mark, escape(check.detail))
        out.print(table)
    if not report["ok"]:
        raise typer.Exit(1)


@app.command(epilog="Example: rtlynx precompile")
def precompile() -> None:
    """Compile the kernels for Hopper cards into the cache, so that first calls need not. Needs no GPU.

    The cache is $RTLYNX_CACHE_DIR, else rtlynx in $XDG_CACHE_HOME or ~/.cache. With RTLYNX_PRECOMPILE=1 in
    its environment a process does this by itself when it first needs a kernel.
    """
    from rtlynx.cuda import cache, jit

    usage = cache.usage()
    if usage.trouble:
        raise OSError(f"compiled kernels cannot be kept: {usage.trouble}; point RTLYNX_CACHE_DIR elsewhere")
    say(f"{jit.precompile()} kernels for {jit.ARCH} in {usage.folder}")


@app.command(epilog="Example: rtlynx bench --dtype fp8 --shapes flux-up,flux-down --out bench.json")
def bench(
    dtype: Annotated[
        Literal["bf16", "fp8"] | None, typer.Option(help="What the layers multiply.", show_default="bf16")
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(help="Comma-separated names, default all twelve.", show_default=False)
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Length of a window; each variant gets two.", min=0.01, max=3600)
    ] = 1.0,
    model: Annotated[
        str | None,
        typer.Option(help="flux1-dev, qwen-image or z-image: a denoising step instead of single layers."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--out", help="Write all figures to this JSON file.")] = None,
) -> None:
    """Measure linear layers, or a whole step, on this machine's Hopper card, beside what else there is."""
    if model is not None and (shapes is not None or dtype is not None):
        raise UsageError("--model measures a whole step in all its formats: leave out --shapes and --dtype")
    if file is not None and (file.is_dir() or (file.exists() and not os.access(file, os.W_OK))):
        raise ValueError(f"--out {file} is not a file that can be written")

    from rtlynx.timing import linear_layers, overview, step
    from rtlynx.timing.card import Card
    from rtlynx.timing.full_models import full_model
    from rtlynx.timing.results import write
    from rtlynx.timing.shapes import chosen

    def report(line: str) -> None:
        err.print(line, style="dim", soft_wrap=True)

    if model is not None:
        document = step.run(full_model(model), Card(), seconds=seconds, report=report)
        out.print(overview.step_overview(document))
    else:
        taken, card = chosen(shapes), Card()
        document = linear_layers.run(dtype or "bf16", taken, card, seconds=seconds, report=report)
        out.print(overview.overview(document))
        say(f"Whole layers: compression, norm scale, low-rank branch of rank {document['rank']}, bias.")
    if file is not None:
        write(file, document)


def _prompts(file: Path | None, model: str, *, held_out: bool = False) -> list[str]:
    if file is not None:
        return read_prompts(file)

    if not model.startswith("zoo:"):
        raise UsageError("give --prompts FILE: only zoo models bring prompts of their own")

    from rtlynx_zoo import prompts

    return prompts.demo_prompts() if held_out else prompts.calibration_prompts(512)


def _device(asked: str | None) -> str:
    """The device that was asked for, if it can be used, else what there is."""
    import torch

    from rtlynx.models.pipelines import usable_device

    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return usable_device(asked)


def _check_target(folder: Path) -> None:
    """What stands in the way of a checkpoint there is said before the work, not after it."""
    from rtlynx.storage.checkpoint_folder import check_replaceable

    check_replaceable(folder)


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
