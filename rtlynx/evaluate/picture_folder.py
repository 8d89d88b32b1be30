"""The folder of one evaluation: every picture as soon as it is drawn, and what it was drawn with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtlynx.storage.files import CheckpointError, read_json, read_tensors, write_json, write_tensors

MANIFEST = "evaluation.json"
PICTURES = "pictures"
FORMAT = 1


class PictureFolder:
    """Pictures of one evaluation, by variant and number.

    Parameters
    ----------
    path : Path
        Created with the first picture.
    settings : mapping
        All that decides what the pictures show, as JSON values.

    Raises
    ------
    NotADirectoryError
        If `path` is a file.
    CheckpointError
        If the folder holds other files, a damaged manifest, or an evaluation with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings, default=str))
        self._manifest: dict[str, Any] | None = None
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} exists and is not a folder: give another --out")
        if (path / MANIFEST).exists():
            self._manifest = self._read_manifest()
        elif path.exists() and any(path.iterdir()):
            raise CheckpointError(f"{path} holds other files, but no {MANIFEST}: give a new folder as --out")

    def _read_manifest(self) -> dict[str, Any]:
        file = self.path / MANIFEST
        found = read_json(file)
        known = isinstance(found, dict) and isinstance(found.get("settings"), dict)
        if not known or found.get("format") != FORMAT or not isinstance(found.get("variants"), dict):
            raise CheckpointError(f"{file} is damaged or of another version: give another --out or delete it")
        changed = differences(found["settings"], self.settings)
        if changed:
            raise CheckpointError(
                f"{self.path} holds an evaluation with other settings ({'; '.join(changed)}): "
                f"give another --out, or delete {self.path} to start anew"
            )
        return found

    def claim(self, fingerprint: str) -> None:
        """Say which weights draw; CheckpointError if others drew what is here."""
        if self._manifest is None:
            self._manifest = {
                "format": FORMAT,
                "settings": self.settings,
                "weights": fingerprint,
                "variants": {},
            }
            write_json(self.path / MANIFEST, self._manifest)
        elif self._manifest["weights"] != fingerprint:
            raise CheckpointError(
                f"{self.path} holds pictures that a model with other weights drew: give another --out, or "
                f"delete {self.path} to start anew"
            )

    def record(self, variant: str, facts: Mapping[str, Any]) -> None:
        """Keep what is known of a variant (JSON values), beside what was known before."""
        assert self._manifest is not None, "claim first"
        self._manifest["variants"][variant] = {**self.facts(variant), **facts}
        write_json(self.path / MANIFEST, self._manifest)

    def facts(self, variant: str) -> dict[str, Any]:
        """What `record` kept; empty before that."""
        return {} if self._manifest is None else self._manifest["variants"].get(variant, {})

    def missing(self, variant: str, count: int) -> list[int]:
        """Which of the first `count` pictures have not been drawn."""
        return [i for i in range(count) if not self._file(variant, i).exists()]

    def write(self, variant: str, number: int, picture: Tensor, seconds: float) -> None:
        """Keep a picture (3, H, W), float32, and the time it took. Atomic."""
        half = picture.bfloat16()  # what most pipelines on a GPU compute in: half the size, nothing lost
        kept = half if torch.equal(half.float(), picture) else picture
        file = self._file(variant, number)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {"picture": kept}, {"seconds": repr(seconds)})

    def read(self, variant: str, number: int) -> tuple[Tensor, float]:
        """What `write` kept: the picture (3, H, W), float32, and seconds."""
        file = self._file(variant, number)
        tensors, metadata = read_tensors(file)
        try:
            return tensors["picture"].float(), float(metadata["seconds"])
        except (KeyError, ValueError):
            raise CheckpointError(f"{file} holds no picture: delete it to have it drawn again") from None

    def _file(self, variant: str, number: int) -> Path:
        return self.path / PICTURES / variant / f"{number:05}.safetensors"


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Where two JSON values differ, one string a place, with the way to it: "recipe.rank: 4 there, 8 now"."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        inside = (differences(before.get(key), now.get(key), f"{name}.{key}".strip(".")) for key in keys)
        return [one for some in inside for one in some]
    return [] if before == now else [f"{name}: {before!r} there, {now!r} now"]
