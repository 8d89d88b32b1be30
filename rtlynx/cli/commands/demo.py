"""`rtlynx demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rtlynx.cli.app import Seed, app
from rtlynx.cli.output import number, out, say

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@app.command(epilog="Example: rtlynx demo --out rtlynx-demo --images 4 --steps 8")
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("rtlynx-demo"),
    full: Annotated[
        bool, typer.Option("--full", help="Ten variants and a report with the error of every layer: minutes.")
    ] = False,
    images: Annotated[
        int | None,
        typer.Option(help="Pictures a variant.", min=1, max=64, show_default="8; 24 with --full"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps.", min=1, max=1000, show_default="8; 10 with --full")
    ] = None,
    seed: Seed = 0,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Calibrate live, which takes minutes, not with shipped solutions."),
    ] = False,
) -> None:
    """Draw with a real small diffusion transformer: dense, dense fp8, the paper's recipe, ours."""
    _keep_freed_memory()
    if full:
        _full(folder, images, steps, seed, calibrate)
        return
    from rtlynx.evaluate.demo import IMAGES, STEPS, run_demo, sentences

    results = run_demo(folder, images=images or IMAGES, steps=steps or STEPS, seed=seed, calibrate=calibrate)
    _print_table(results, {"PSNR": ("psnr", ".2f"), "SSIM": ("ssim", ".3f"), "sec.": ("seconds", ".1f")})
    for sentence in sentences(results):
        out.print(sentence, highlight=False)
    say(f"Pictures: {folder / 'pictures.png'}   figures: {folder / 'results.json'}")


def _keep_freed_memory() -> None:
    """glibc gives freed tensors back to the system at once; getting pages anew costs a fifth of the time."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(option, 2**30)


def _full(folder: Path, images: int | None, steps: int | None, seed: int, calibrate: bool) -> None:
    from rtlynx.evaluate.full_demo import IMAGES, STEPS, run_full_demo

    results = run_full_demo(
        folder, images=images or IMAGES, steps=steps or STEPS, seed=seed, calibrate=calibrate
    )
    columns = {
        "error": ("layer_error", ".4f"),
        "PSNR": ("psnr", ".2f"),
        "SSIM": ("ssim", ".3f"),
        "KID": ("kid", ".4f"),
        "found": ("retrieval", ".3f"),
        "layers": ("sparse_layers", "d"),
        "sec.": ("seconds", ".1f"),
    }
    _print_table(results, columns)
    out.print("error: of the layers' outputs; found: nearest real picture is the prompted one", style="dim")
    say(
        f"Report: {folder / 'report.html'}   grid: {folder / 'grid.png'}   figures: {folder / 'results.json'}"
    )


def _print_table(results: dict[str, Any], columns: dict[str, tuple[str, str]]) -> None:
    """Heading -> (key of a row, format). Narrow enough for a terminal of 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("variant", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["variants"]:
        cells = (number(row[key], spec) for key, spec in columns.values())
        table.add_row(row.get("label", row["name"]), *cells)
    out.print(table)
