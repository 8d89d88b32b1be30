"""The command line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

import rtlynx
from rtlynx import CalibrationOptions, Recipe
from rtlynx.bench import linear as linear_bench
from rtlynx.bench import step as step_bench
from rtlynx.bench.card import Card
from rtlynx.bench.full_models import full_model
from rtlynx.bench.overview import overview as bench_overview
from rtlynx.bench.overview import step_overview
from rtlynx.bench.results import write as write_results
from rtlynx.bench.shapes import chosen as chosen_shapes
from rtlynx.checkpoint import read_index
from rtlynx.checkpoint_folder import check_replaceable
from rtlynx.doctor import examine, to_json
from rtlynx.evaluate import compare
from rtlynx.evaluate.demo import IMAGES, STEPS, run_demo
from rtlynx.evaluate.layers import activation_energy_kept
from rtlynx.inspection import describe
from rtlynx.kernels import cache, jit
from rtlynx.models import sparse_layers, target_model
from rtlynx.pipelines import ZOO_PREFIX, load_model
from rtlynx.recipe import refuse_unknown
from rtlynx.zoo import prompts as zoo_prompts

app = typer.Typer(
    name="rtlynx",
    help="2:4 activation sparsity for diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console()
err = Console(stderr=True)

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
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Entry point: errors in one line, exit codes 0 (done), 1 (bad input), 2 (usage), 130 (interrupted)."""
    try:
        app()
    except KeyboardInterrupt:
        err.print("interrupted", style="bold red")
        sys.exit(130)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("RTLYNX_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        err.print(f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """2:4 activation sparsity for diffusion transformers."""
    if version:
        out.print(rtlynx.__version__)
        raise typer.Exit


@app.command(epilog="Example: rtlynx demo --out rtlynx-demo --images 8 --steps 12")
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("rtlynx-demo"),
    images: Annotated[int, typer.Option(help="Pictures a variant.", min=1, max=64)] = IMAGES,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = STEPS,
    seed: Annotated[int, typer.Option(help="Picture i starts from noise of seed + i.")] = 0,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Calibrate live, which takes minutes, not with shipped solutions."),
    ] = False,
) -> None:
    """Draw with a real small diffusion transformer: dense, sparse and compensated; write a report."""
    results = run_demo(folder, images=images, steps=steps, seed=seed, calibrate=calibrate)
    # Narrow enough for a terminal of 80 columns with the longest variant's name.
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("variant", no_wrap=True)
    for heading in ("error", "PSNR", "SSIM", "KID", "found", "layers", "sec."):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["variants"]:
        table.add_row(
            row["name"],
            _number(row["layer_error"], ".4f"),
            _number(row["psnr"], ".2f"),
            _number(row["ssim"], ".3f"),
            _number(row["kid"], ".4f"),
            _number(row["retrieval"], ".3f"),
            str(row["sparse_layers"]),
            _number(row["seconds"], ".1f"),
        )
    out.print(table)
    out.print("error: of the layers' outputs; found: nearest real picture is the prompted one", style="dim")
    out.print(
        f"Report: {folder / 'report.html'}   grid: {folder / 'grid.png'}   figures: {folder / 'results.json'}"
    )


@app.command(
    epilog="Example: rtlynx calibrate zoo:flux-emoji --out emoji-lynx --set rank=0.02 --set text_rows=dense"
)
def calibrate(
    model: Model,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint.")],
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
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
    device: Device = DEFAULT_DEVICE,
    as_json: AsJson = False,
) -> None:
    """Make a model sparse and compensate it on its own activations; save the checkpoint.

    Without --prompts, a zoo model uses its own list of calibration prompts. Several processes:
    torchrun --nproc-per-node 2 -m rtlynx calibrate ...
    """

    check_replaceable(folder)  # before the work, not after it
    # What can be wrong is looked at before the model is loaded.
    chosen, texts = _recipe(recipe, settings, Recipe.recommended()), _prompts(prompts, model)
    how = _calibration_options(options, work, _pairs(pipeline))
    with _processes(device) as (local_device, is_first):
        loaded = load_model(model, device=local_device)
        report = rtlynx.calibrate(loaded, texts, chosen, how)
        if not is_first:
            return
        rtlynx.save(loaded, folder)
    if as_json:
        _print_json(_report_json(report, folder))
        return
    _print_report(report)
    out.print(f"Saved to {folder}")


@app.command(epilog="Example: rtlynx convert zoo:flux-emoji --out emoji-24 --set grouping=strided")
def convert(
    model: Model,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint.")],
    recipe: RecipeFile = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Make a model sparse without calibration (2:4 and norm compensation) and save the checkpoint."""

    check_replaceable(folder)  # before the work, not after it
    chosen = _recipe(recipe, settings, Recipe.immediate())
    loaded = load_model(model)
    rtlynx.sparsify(loaded, chosen)
    rtlynx.save(loaded, folder)
    count = len(sparse_layers(target_model(loaded)))
    if as_json:
        _print_json({"checkpoint": str(folder), "sparse_layers": count})
    else:
        out.print(f"{count} sparse layers, saved to {folder}")


@app.command(epilog="Example: rtlynx evaluate zoo:flux-emoji --checkpoint emoji-lynx --images 8 --json")
def evaluate(
    model: Model,
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint that calibrate or convert saved.")],
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
    images: Annotated[int, typer.Option(help="How many of the prompts to draw.")] = 8,
    seed: Annotated[int, typer.Option(help="Picture i starts from noise of seed + i.")] = 0,
    pipeline: PipelineSettings = None,
    device: Device = DEFAULT_DEVICE,
    as_json: AsJson = False,
) -> None:
    """Draw the same prompts and seeds dense and sparse; print layer error, PSNR and SSIM."""

    chosen = _prompts(prompts, model, held_out=True)[:images]
    read_index(checkpoint)
    dense, sparse = load_model(model, device=device), load_model(model, device=device)
    rtlynx.load(sparse, checkpoint)
    figures = compare(dense, sparse, chosen, seed=seed, pipeline_kwargs=_pairs(pipeline))
    if as_json:
        _print_json(
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
        raise typer.BadParameter("--checkpoint holds its own recipe: leave out --recipe and --set")
    chosen = _recipe(recipe, settings, Recipe.recommended())
    loaded = load_model(model, device=DEFAULT_DEVICE if activations else "cpu")
    kept: dict[str, Any] = {}
    if activations:
        kept = activation_energy_kept(loaded, _prompts(None, model, held_out=True)[:activations])
    if checkpoint is not None:
        rtlynx.load(loaded, checkpoint)
        overview = describe(loaded)
    else:
        overview = describe(loaded, chosen)
    if as_json:
        _print_json({**overview, "activation_energy_kept": kept})
        return
    _print_overview(overview, kept)


@app.command(epilog="Example: rtlynx doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """What this machine can run, and why not. Exit code 1 where something that should work does not."""

    checks = examine()
    report = to_json(checks)
    if as_json:
        _print_json(report)
    else:
        table = Table("check", "", "finding")
        for check in checks:
            mark = {True: "[green]ok[/green]", False: "[red]fails[/red]", None: ""}[check.ok]
            table.add_row(check.name, mark, check.detail)
        out.print(table)
    if not report["ok"]:
        raise typer.Exit(1)


@app.command(epilog="Example: rtlynx precompile")
def precompile() -> None:
    """Compile the kernels for Hopper cards into the cache, so that first calls need not. Needs no GPU.

    The cache is $RTLYNX_CACHE_DIR, else rtlynx in $XDG_CACHE_HOME or ~/.cache. With RTLYNX_PRECOMPILE=1 in
    its environment a process does this by itself when it first needs a kernel.
    """
    usage = cache.usage()
    if usage.trouble:
        raise OSError(f"compiled kernels cannot be kept: {usage.trouble}; point RTLYNX_CACHE_DIR elsewhere")
    out.print(f"{jit.precompile()} kernels for {jit.ARCH} in {usage.folder}")


@app.command(epilog="Example: rtlynx bench --dtype fp8 --shapes flux-up,flux-down --out bench.json")
def bench(
    dtype: Annotated[Literal["bf16", "fp8"], typer.Option(help="What the layers multiply.")] = "bf16",
    shapes: Annotated[
        str | None, typer.Option(help="Comma-separated names, default all twelve.", show_default=False)
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Length of a window; each variant gets two.", min=0.01)
    ] = 1.0,
    model: Annotated[
        str | None,
        typer.Option(help="flux1-dev, qwen-image or z-image: a denoising step instead of single layers."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--out", help="Write all figures to this JSON file.")] = None,
) -> None:
    """Measure linear layers, or a whole step, on this machine's Hopper card, beside what else there is."""

    def report(line: str) -> None:
        err.print(line, style="dim", soft_wrap=True)

    if model is not None:
        document = step_bench.run(full_model(model), Card(), seconds=seconds, report=report)
        out.print(step_overview(document))
        if file is not None:
            write_results(file, document)
        return
    taken, card = chosen_shapes(shapes), Card()
    document = linear_bench.run(dtype, taken, card, seconds=seconds, report=report)
    out.print(bench_overview(document))
    out.print(f"Whole layers: compression, norm scale, low-rank branch of rank {document['rank']}, bias.")
    if file is not None:
        write_results(file, document)


def _recipe(file: Path | None, settings: list[str] | None, default: Recipe) -> Recipe:
    """A recipe from a file, or the default, with single settings changed."""
    base = default.to_dict() if file is None else Recipe.from_json(file.read_text()).to_dict()
    return Recipe.from_dict({**base, **_pairs(settings)})


def _calibration_options(
    options: list[str] | None, work: Path | None, pipeline: dict[str, Any]
) -> CalibrationOptions:
    """CalibrationOptions from KEY=VALUE pairs; unknown keys are refused like those of a recipe."""

    pairs = _pairs(options)
    known = {field.name for field in dataclasses.fields(CalibrationOptions)} - {"folder", "pipeline_kwargs"}
    refuse_unknown("calibration option", pairs, known)
    return CalibrationOptions(folder=work, pipeline_kwargs=pipeline, **pairs)


def _pairs(items: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE pairs; values are JSON where they parse as such (numbers, true, null, lists), else text."""
    pairs: dict[str, Any] = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"expected KEY=VALUE, got {item!r}")
        try:
            pairs[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            pairs[key.strip()] = value
    return pairs


def _prompts(file: Path | None, model: str, *, held_out: bool = False) -> list[str]:
    if file is not None:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"{file} holds no prompts")
        return prompts

    if not model.startswith(ZOO_PREFIX):
        raise typer.BadParameter("give --prompts FILE: only zoo models bring prompts of their own")

    return zoo_prompts.demo_prompts() if held_out else zoo_prompts.calibration_prompts(512)


@contextlib.contextmanager
def _processes(device: str) -> Iterator[tuple[str, bool]]:
    """Join the other processes where torchrun started this one; yields the device and "is this the first"."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device, True
        return

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


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _memory(extra_bytes: int) -> str:
    return f"{abs(extra_bytes) / 1e6:.1f} MB {'less' if extra_bytes < 0 else 'more'} memory"


def _report_json(report: Any, folder: Path) -> dict[str, Any]:
    return {
        "checkpoint": str(folder),
        "layers": {
            name: {"ridge": one.ridge, "error_before": one.error_before, "error": one.error}
            for name, one in report.solutions.items()
        },
        "dense": report.dense,
        "budget": None
        if report.choice is None
        else {
            "output_error": report.choice.error,
            "share_of_saving": report.choice.saving,
            "forms": report.choice.forms,
            "costs": [
                {
                    "layer": cost.name,
                    "form": cost.form,
                    "output_error": cost.error,
                    "flops_saved": cost.saving,
                }
                for cost in report.costs
            ],
        },
        "extra_bytes": report.extra_bytes,
    }


def _print_report(report: Any) -> None:
    table = Table("layer", "error before", "after", "ridge")
    for name, one in report.solutions.items():
        table.add_row(name, f"{one.error_before:.4f}", f"{one.error:.4f}", _number(one.ridge, "g"))
    out.print(table)
    if report.choice is not None:
        budget = Table("layer", "form", "error at the output", "GFLOP saved", "decision", title="Budget")
        for cost in sorted(report.costs, key=lambda one: one.error / max(one.saving, 1e-9)):
            decision = report.dense.get(cost.name) or report.choice.forms[cost.name]
            numbers = f"{cost.error:.2e}", f"{cost.saving / 1e9:.3f}"
            budget.add_row(cost.name, cost.form, *numbers, decision)
        out.print(budget)
        forms = Counter(report.choice.forms.values())
        out.print(
            f"{', '.join(f'{count} {form}' for form, count in forms.items())}: measured error at the output "
            f"{report.choice.error:.3e}, {report.choice.saving:.0%} of the possible saving"
        )
    out.print(
        f"{len(report.solutions)} layers changed, {len(report.dense)} left dense, "
        + _memory(report.extra_bytes)
    )


def _print_overview(overview: dict[str, Any], kept: dict[str, Any]) -> None:
    columns = ["layer", "shape", "stream", "pattern", "rank", "state"] + (["energy kept"] if kept else [])
    table = Table(*columns, title=f"{overview['model']}, rule: {overview['architecture']}")
    for layer in overview["layers"]:
        row = [
            layer["name"],
            f"{layer['in_features']} -> {layer['out_features']}",
            layer["stream"],
            layer["pattern"],
            str(layer["rank"] or "-"),
            f"dense: {layer['dense_reason']}" if layer["dense_reason"] else layer["form"],
        ]
        if kept:
            row.append(_number(kept.get(layer["name"]), ".3f"))
        table.add_row(*row)
    out.print(table)
    out.print(
        f"{overview['sparse_layers']} of {len(overview['layers'])} candidates sparse, "
        f"{overview['sparse_share']:.1%} of the weights of all linear layers; "
        + _memory(overview["extra_bytes"])
    )
    if overview["undecided"]:
        out.print("Calibration decides, by the budget, which of these stay dense or take another form.")
