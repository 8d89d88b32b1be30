"""The folder of one calibration: what it recorded and solved, sealed so that nothing else is taken for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtlynx.storage.files import CheckpointError, read_json, read_tensors, write_json, write_tensors

MANIFEST = "calibration.json"
FORMAT = 7
_FILES = ("calls-*", "solution-*", "bases*", "distillation*")


class WorkFolder:
    """A folder that one calibration has claimed, and its files.

    Parameters
    ----------
    path : Path
    settings : mapping
        Everything that decides what is recorded and solved, as JSON.

    Raises
    ------
    CheckpointError
        If the folder holds another calibration, or files of which it is not known which.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        whole = json.loads(json.dumps({"format": FORMAT, **settings}))
        self._claim(whole)
        self._settings = digest(whole)

    def _claim(self, settings: dict[str, Any]) -> None:
        # Looked for before the manifest: another process of this run may write both just now.
        leftovers = sorted(file.name for pattern in _FILES for file in self.path.glob(pattern))
        manifest = self.path / MANIFEST
        if not manifest.is_file():
            if leftovers:
                raise CheckpointError(
                    f"{self.path} holds {leftovers[0]}, but no {MANIFEST} that says of which calibration: "
                    "choose another folder, or delete it"
                )
            write_json(manifest, settings)
            return
        old = read_json(manifest)
        if not isinstance(old, dict):
            raise CheckpointError(f"{manifest} is damaged: choose another folder, or delete {self.path}")
        if old.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.path} holds a calibration of another version of rtlynx: choose another folder, "
                "or delete it"
            )
        different = sorted(key for key in {*settings, *old} if old.get(key) != settings.get(key))
        if different:
            raise CheckpointError(
                f"{self.path} holds a calibration with other {', '.join(different)}: choose another folder, "
                "or delete it"
            )

    def has(self, name: str) -> bool:
        """Whether there is a file `name`."""
        return (self.path / name).is_file()

    def write(self, name: str, tensors: dict[str, Tensor], about: Any) -> None:
        """Write tensors, and what is to be known `about` them (JSON), atomically."""
        text = json.dumps(about)
        seal = self._seal(name, tensors, text)
        write_tensors(self.path / name, tensors, {"settings": self._settings, "about": text, "seal": seal})

    def read(self, name: str) -> tuple[dict[str, Tensor], Any]:
        """What `write` was given.

        Raises
        ------
        CheckpointError
            If the file is missing, damaged in any bit, or of another calibration or name.
        """
        path = self.path / name
        tensors, metadata = read_tensors(path)
        if metadata.get("settings") != self._settings:
            raise CheckpointError(f"{path} is not of this calibration: delete it and run again")
        text = metadata.get("about", "")
        if metadata.get("seal") != self._seal(name, tensors, text):
            raise CheckpointError(f"{path} is damaged: delete it and run again")
        return tensors, json.loads(text)

    def _seal(self, name: str, tensors: dict[str, Tensor], text: str) -> str:
        return digest([self._settings, name, tensors, text])


def digest(value: Any) -> str:
    """SHA-256 of nested values, each part with its kind and length; arrays, pictures, files by their content.

    Raises
    ------
    TypeError
        For a value that cannot be told from another one in a later run.
    """
    sha = hashlib.sha256()

    def put(kind: str, content: Any) -> None:
        sha.update(f"{kind}:{len(content)};".encode())
        sha.update(content)

    def feed(item: Any) -> None:
        if isinstance(item, Tensor):
            whole = item.detach().cpu().contiguous()
            # One entry may be contiguous with a stride of 0, as an expanded timestep is.
            whole = whole.as_strided((whole.numel(),), (1,))
            put("tensor", f"{item.dtype} {tuple(item.shape)}".encode())
            put("entries", whole.view(torch.uint8).numpy())
        elif isinstance(item, Mapping):
            put("mapping", str(len(item)).encode())
            for key in sorted(item, key=repr):
                feed(key)
                feed(item[key])
        elif isinstance(item, list | tuple):
            put("list", str(len(item)).encode())
            for one in item:
                feed(one)
        elif isinstance(item, Path):
            put("file", item.read_bytes())
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            put("dataclass", type(item).__name__.encode())
            feed({one.name: getattr(item, one.name) for one in dataclasses.fields(item)})
        elif isinstance(item, str):
            put("text", item.encode("utf-8", "surrogatepass"))
        elif isinstance(item, int | float) and not isinstance(item, bool):
            whole_number = isinstance(item, int) or item.is_integer()  # 1 and 1.0 are one setting
            put("number", repr(int(item) if whole_number else float(item)).encode())
        elif item is None or isinstance(item, bool | torch.dtype | torch.device):
            put(type(item).__name__, repr(item).encode())
        elif hasattr(item, "__array_interface__"):  # numpy's arrays, PIL's pictures
            array = np.ascontiguousarray(item)
            if array.dtype.hasobject:
                raise TypeError(f"an array of {array.dtype} cannot be written down: leave out `folder`")
            put("array", f"{array.dtype} {array.shape} {getattr(item, 'mode', '')}".encode())
            put("entries", array.tobytes())
        else:
            raise TypeError(f"a {type(item).__name__} cannot be written down: leave out `folder`")

    feed(value)
    return sha.hexdigest()
