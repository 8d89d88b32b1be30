"""`rtlynx doctor`, `rtlynx precompile` and `rtlynx bench`: this machine and the kernels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from rtlynx.cli.app import (
    AsJson,
    app,
)
from rtlynx.cli.inputs import UsageError
from rtlynx.cli.output import err, out, print_json, say


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
        typer.Option(
            help="chroma, flux1-dev, flux2-dev, flux2-klein, hunyuan-video-1.5, ltx-2, qwen-edit, "
            "qwen-image, sd3.5-large, wan2.2-14b or z-image: a denoising step, not layers."
        ),
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
        say("Whole layers: what prepares the input, and the product; the last column with a low-rank branch.")
    if file is not None:
        write(file, document)
