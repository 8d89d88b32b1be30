"""The study's results file: a header, and a row for each variant, appended one at a time and whole."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtlynx.storage.files import read_json, write_json

# Header entries that must agree for rows to stand in one file.
SAME = ("model", "dtype", "guidance", "calibration", "training")


class RowStore:
    """A JSON document on disk, `{header ..., "rows": [...]}`.

    Every row tells the commit and the device that it was measured with: `commit` and `device` for those that
    this run adds.

    Raises
    ------
    ValueError
        If the file exists and was made with another model or other settings.
    """

    def __init__(
        self, path: Path, header: Mapping[str, Any], commit: str | None = None, device: str | None = None
    ) -> None:
        self.path = path
        self.measured = {"commit": commit, "device": device}
        self.document: dict[str, Any] = {**header, "rows": []}
        if path.exists():
            self.document = read_json(path)
            for name in SAME:
                if self.document.get(name) != header.get(name):
                    raise ValueError(
                        f"{path} was made with {name} {self.document.get(name)!r}, not {header.get(name)!r}: "
                        "choose another file"
                    )

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.document["rows"]

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row whose entries include `key`, or None."""
        return next((row for row in self.rows if all(row.get(k) == v for k, v in key.items())), None)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row with what this run measures with, forget a failure of its name, write the file whole."""
        self.document["rows"].append({**row, **self.measured})
        self.document.get("failures", {}).pop(row["name"], None)
        write_json(self.path, self.document)

    def fail(self, name: str, reason: str) -> None:
        """Note that a variant failed, until a row of it is there."""
        self.document.setdefault("failures", {})[name] = reason
        write_json(self.path, self.document)

    def note(self, name: str, value: Any) -> None:
        """Set a header entry, written with the next row."""
        self.document[name] = value


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, spread (standard deviation, None for one seed) and the values; None where any is missing."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values) or not known:
        return {"mean": None, "spread": None, "by_seed": list(values)}
    spread = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "spread": spread, "by_seed": known}
