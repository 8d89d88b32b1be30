"""`rtlynx demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from rtlynx.cli.app import (
    Seed,
    app,
)
from rtlynx.cli.output import number, out, say


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
