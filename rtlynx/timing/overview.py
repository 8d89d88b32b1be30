"""A measurement as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from rtlynx.timing.results import (
    WAYS,
    geomean,
    picture_size,
    plain_layer_speed,
    plain_layer_us,
    ratio,
    speed_up,
    step_speed_up,
)

WITH_BRANCH = "activations, rank {rank}"


def overview(document: Mapping[str, Any]) -> Table:
    """Whole layers of `rtlynx.timing.linear_layers.run`, a row a shape, and the mean speed-ups.

    Those without a branch, as recommended, come before those with one.
    """
    fp8, rows = document["dtype"] == "fp8", document["rows"]
    title = f"One linear layer, {document['dtype']}, {document['device']}, microseconds and speed over cuBLAS"
    table = Table(title=title)
    table.add_column("layer", no_wrap=True)
    peers = {"cuBLAS bf16": "cublas_us", **({"dense fp8": "fp8_linear_us"} if fp8 else {})}
    ours = (*WAYS, WITH_BRANCH) if fp8 else ("2:4 activations", WITH_BRANCH)
    for heading in ("M, K, N", *peers):
        table.add_column(heading, justify="right")
    for heading in ours:
        table.add_column(heading.format(rank=document["rank"]), justify="right")
    for row in rows:
        size = f"{row['M']}, {row['K']}, {row['N']}"
        cells = [_microseconds(row[name]) for name in peers.values()]
        for way in ours:
            cells.append(f"{_microseconds(_ours_us(row, way))} {_times(_over_cublas(row, way))}")
        table.add_row(row["shape"], size, *cells)
    means = (_times(geomean(_over_cublas(row, way) for row in rows)) for way in ours)
    table.add_section()
    table.add_row("geometric mean", *[""] * (1 + len(peers)), *means)
    return table


def _ours_us(row: Mapping[str, Any], way: str) -> float | None:
    return row["ours_us"] if way == WITH_BRANCH else plain_layer_us(row, way)


def _over_cublas(row: Mapping[str, Any], way: str) -> float | None:
    return ratio(row, "cublas_us", "ours_us") if way == WITH_BRANCH else plain_layer_speed(row, way)


def step_overview(document: Mapping[str, Any]) -> Table:
    """`rtlynx.timing.step.run`, a row a variant, and the speed-ups over compiled bfloat16."""
    rows = document["variants"]
    title = f"One step of {document['model']}, {picture_size(document)}, batch {document['batch']}"
    table = Table(title=f"{title}, {document['device']}, milliseconds")
    table.add_column("variant", no_wrap=True)
    for heading in ("GPU", "wall", "linear", "attention", "rest", "GiB", "speed-up", "by wall"):
        table.add_column(heading, justify="right")
    columns = ("gpu_ms", "wall_ms", "linear_ms", "attention_ms", "rest_ms", "peak_gib")
    for row in rows:
        cells = ("-" if row.get(name) is None else f"{row[name]:.1f}" for name in columns)
        speed_ups = (_times(step_speed_up(rows, row["name"], time=time)) for time in ("gpu_ms", "wall_ms"))
        table.add_row(row["name"], *cells, *speed_ups)
        for line in (dense_steps(row), row.get("reason")):
            if line:
                table.add_row(f"  {line}")
    return table


def dense_steps(row: Mapping[str, Any]) -> str | None:
    """Of a row that is a mean over the steps of a picture: how many of them run dense."""
    return f"{row['dense_steps']} of {row['steps']} steps dense" if "dense_steps" in row else None


def parallel_overview(document: Mapping[str, Any]) -> Table:
    """`rtlynx.timing.parallel.run`, a row a variant and arrangement, and the speed-ups over one card."""
    title = f"One step of {document['model']}, {picture_size(document)}, on {document['cards']} cards"
    table = Table(title=f"{title}, {document['device']}, milliseconds")
    for heading in ("variant", "arrangement"):
        table.add_column(heading, no_wrap=True)
    for heading in ("GPU", "by", "wall", "NCCL", "GiB a card", "speed-up", "by wall"):
        table.add_column(heading, justify="right")
    for row in document["rows"]:
        communication = (row.get("kernels_ms") or {}).get("communication")
        cells = [
            "-" if one is None else f"{one:.1f}" for one in (row["gpu_ms"], row["wall_ms"], communication)
        ]
        speed_ups = (_times(speed_up(row, time)) for time in ("gpu_ms", "wall_ms"))
        memory = " ".join(f"{one:.1f}" for one in row.get("peak_gib", ()))
        gpu, *others = cells
        table.add_row(
            row["name"], row["arrangement"], gpu, row["gpu_time"] or "-", *others, memory, *speed_ups
        )
        if row["reason"]:
            table.add_row(f"  {row['reason']}")
    return table


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _microseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
