"""What the commands print."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

out = Console()
err = Console(stderr=True)


def print_json(value: Any) -> None:
    """JSON has no infinity and no NaN: they become null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """A line as it is: paths may have brackets in them, and are copied."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def number(value: float | None, spec: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, spec)


def memory(extra_bytes: int) -> str:
    return f"{abs(extra_bytes) / 1e6:.1f} MB {'less' if extra_bytes < 0 else 'more'} memory"


def report_json(report: Any, folder: Path) -> dict[str, Any]:
    return {
        "checkpoint": str(folder),
        "layers": {
            name: {"ridge": one.ridge, "error_before": one.error_before, "error": one.error}
            for name, one in report.solutions.items()
        },
        "dense": report.dense,
        "unrotated": dict(report.unrotated),
        "unpermuted": dict(report.unpermuted),
        "budget": None
        if report.choice is None
        else {
            "output_error": report.choice.error,
            "speedup_share": report.choice.speedup_share,
            "formats": report.choice.formats,
            "dense_steps": report.choice.compared(),
            "costs": [
                {
                    "input": cost.name,
                    "layers": list(cost.layers),
                    "format": cost.format,
                    "output_error": cost.error,
                    "us_saved": cost.saving,
                }
                for cost in report.costs
            ],
        },
        "distillation": None if report.distillation is None else asdict(report.distillation),
        "extra_bytes": report.extra_bytes,
        "others": {name: report_json(one, folder / name) for name, one in report.others.items()},
    }


def print_report(report: Any) -> None:
    table = Table(Column("layer", overflow="fold"), "error before", "after", "ridge")
    for name, one in report.solutions.items():
        table.add_row(name, number(one.error_before, ".4f"), number(one.error, ".4f"), number(one.ridge, "g"))
    out.print(table)
    if report.choice is not None:
        columns = (
            Column("input", overflow="fold"),
            "layers",
            "format",
            "error at the output",
            "us saved",
            "decision",
        )
        budget = Table(*columns, title="Budget")
        for cost in sorted(report.costs, key=lambda one: one.error / max(one.saving, 1e-9)):
            decision = report.dense.get(cost.layers[0]) or report.choice.formats[cost.layers[0]]
            numbers = f"{cost.error:.2e}", f"{cost.saving:.1f}"
            budget.add_row(cost.name, str(len(cost.layers)), cost.format, *numbers, decision)
        out.print(budget)
        formats = Counter(report.choice.formats.values())
        counts = ", ".join(f"{count} {format}" for format, count in formats.items())
        where = " in steps that run sparse" if report.choice.candidates else ""
        reached = f"{report.choice.speedup_share:.0%} of the possible saving{where}"
        out.print(f"{counts}: measured error at the output {report.choice.error:.3e}, {reached}")
        _print_candidates(report.choice)
    trained = report.distillation
    if trained is not None:
        out.print(
            f"{trained.layers} layers trained for {trained.steps} steps: "
            f"loss {trained.loss_before:.3e} before, {trained.loss_after:.3e} after"
        )
    for name, reason in report.unrotated.items():
        out.print(f"The values of {name} were not rotated: {reason}")
    for name, reason in report.unpermuted.items():
        out.print(f"The hidden features of {name} were not permuted: {reason}")
    out.print(
        f"{len(report.solutions)} layers changed, {len(report.dense)} left dense, "
        + memory(report.extra_bytes)
    )
    for name, one in report.others.items():
        out.print(f"{name}:")
        print_report(one)


def _print_candidates(choice: Any) -> None:
    """What `dense_sigmas="auto"` compared."""
    if not choice.candidates:
        return
    columns = (
        "last steps in dense fp8",
        "noise levels",
        "saving of the others",
        "modelled time",
        "error of pictures",
        "decision",
    )
    table = Table(*columns, title="Dense steps")
    for one in choice.candidates:
        levels = " ".join(f"{max(low, 0):g} to {high:.3g}" for low, high in one.dense_sigmas) or "-"
        decision = "chosen" if one is choice.best_candidate else ""
        steps = f"{one.last_steps} of {one.steps}"
        table.add_row(
            steps, levels, f"{one.speedup_share:.1%}", f"{one.time:.1%}", f"{one.error:.3e}", decision
        )
    out.print(table)


def print_overview(overview: dict[str, Any], kept: dict[str, Any]) -> None:
    by_name = overview["architecture"] != "generic"
    ranks = any(layer["rank"] for layer in overview["layers"])
    columns = ["shape", "stream", *([] if by_name else ["because"]), "pattern", *(["rank"] if ranks else [])]
    columns += ["state", *(["energy kept"] if kept else [])]
    table = Table(
        Column("layer", overflow="fold"),
        *columns,
        title=f"{overview['model']}, rule: {overview['architecture']}",
    )
    for layer in overview["layers"]:
        row = [
            layer["name"],
            f"{layer['in_features']} -> {layer['out_features']}",
            layer["stream"],
            *([] if by_name else [layer["rule"]]),
            "-" if layer["dense_reason"] or layer["pattern"].startswith("1:1") else layer["pattern"],
            *([str(layer["rank"] or "-")] if ranks else []),
            f"dense: {layer['dense_reason']}" if layer["dense_reason"] else layer["format"],
        ]
        if kept:
            row.append(number(kept.get(layer["name"]), ".3f"))
        table.add_row(*row)
    out.print(table)
    out.print(
        f"{overview['sparse_layers']} of {len(overview['layers'])} candidates sparse, "
        f"{overview['sparse_share']:.1%} of the weights of all linear layers; "
        + memory(overview["extra_bytes"])
    )
    if overview["modulation"]:
        out.print(f"{len(overview['modulation'])} layers of modulation hold their weights in eight bits")
    others = Counter(overview["other_layers"].values())
    if others:
        listed = "; ".join(f"{count} {reason}" for reason, count in others.most_common())
        out.print(f"{others.total()} linear layers are no candidates and stay dense: {listed}")
    if overview["undecided"]:
        out.print("Calibration decides, by the budget, which of these stay dense or take another format.")
    if overview["recipe"]["dense_sigmas"] == "auto":
        out.print("It also decides how many of the last steps run in dense fp8.")
