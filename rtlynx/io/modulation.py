"""Modulation in eight bits as checkpoints hold it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtlynx.models.plan import LayerPlan, Plan
from rtlynx.storage.files import CheckpointError


def stored_modulation(plan: Plan, entries: Mapping[str, Any], folder: Path) -> tuple[LayerPlan, ...]:
    """The modulation layers of `plan` that are among the `entries` of an index, which say nothing else.

    Raises
    ------
    CheckpointError
        If an entry is of more than a quantised weight.
    """
    found = tuple(layer for layer in plan.modulation if layer.name in entries)
    for layer in found:
        entry = entries[layer.name]
        flags = ("rank", "refitted", "intercept", "weight_sparse", "weight_dense")
        all_kept = entry["pattern"]["n"] == entry["pattern"]["m"] and entry["norm"] == "none"
        if entry.get("precision") != "fp8" or not all_kept or any(entry.get(flag) for flag in flags):
            raise CheckpointError(
                f"{folder} is damaged: modulation is of precision fp8, pattern 1:1 and rank 0, without norm, "
                f"refitted or original weight, and {layer.name} is not"
            )
    return found
