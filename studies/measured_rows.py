"""Rows of a results file by name, and why a figure is not there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from variants import VARIANTS


class Missing(Exception):
    """A row or figure that is needed is not there."""


class DoesNotApply(Exception):
    """The model has no such variant, or nothing is wanted of it; the message says why."""


class Results:
    """Rows by name; of several with one name the one with most pictures."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.model = document.get("model", "").removeprefix("zoo:")
        self.architecture = document.get("architecture", "")
        self.rows: dict[str, dict[str, Any]] = {}
        for row in document.get("rows", ()):
            known = self.rows.get(row["name"])
            if known is None or row["n"] >= known["n"]:
                self.rows[row["name"]] = row

    def row(self, name: str) -> dict[str, Any]:
        if name in self.rows:
            return self.rows[name]
        (variant,) = [variant for variant in VARIANTS if variant.name == name]
        reason = variant.missing_for(self.architecture)
        raise Missing(name) if reason is None else DoesNotApply(reason)

    def figure(self, name: str, figure: str = "psnr") -> float:
        value = self.row(name)["figures"][figure]["mean"]
        if value is None:
            raise Missing(f"{figure} of {name}")
        return value

    def spread(self, *names: str) -> float:
        """The largest spread of PSNR over the seeds of some rows, 0 where there was one seed."""
        return max(self.row(name)["figures"]["psnr"]["spread"] or 0.0 for name in names)

    def ms(self, name: str) -> float:
        value = self.row(name)["modelled_ms"]
        if value is None:
            raise Missing(f"modelled time of {name}")
        return value
