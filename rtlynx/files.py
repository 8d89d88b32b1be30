"""Files that are whole or not there: atomic writes, checked reads. Nothing here unpickles."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from rtlynx.temporaries import flush_folder, is_regular, temporary_for


class CheckpointError(ValueError):
    """A file or folder that cannot be used: missing, damaged, or made for something else."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it on success and removed on any failure.

    Where `path` is a link, the file that it points to is replaced. A file that is replaced keeps its mode.

    Raises
    ------
    FileExistsError
        If `path` is something other than a file: a folder, a device, a pipe.
    """
    path = Path(os.path.realpath(path))
    exists = os.path.lexists(path)
    if exists and not is_regular(path):
        raise FileExistsError(f"{path} exists and is not a file")
    with temporary_for(path) as temporary:
        temporary.touch()
        mode = (path if exists else temporary).stat().st_mode
        yield temporary
        with temporary.open("rb+") as file:
            os.chmod(temporary, stat.S_IMODE(mode))  # safetensors makes files private
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; CheckpointError where the file is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; tensors may share memory or be strided."""
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        try:
            safetensors.torch.save_file(whole, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:  # an I/O error inside, the full disk among them
            raise OSError(f"could not write {path}: {error}") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; CheckpointError where it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
