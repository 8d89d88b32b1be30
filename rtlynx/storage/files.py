"""Files that are whole or not there: atomic writes, checked reads. Nothing here unpickles."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from rtlynx.storage.temporaries import flush_folder, is_regular, temporary_for

# The index of a model of 3,000 layers is 2 MB.
LARGEST_JSON = 16 << 20
MOST_DIGITS = 20


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


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file, or a link to one (caches of downloads are links), for reading.

    Raises
    ------
    CheckpointError
        If it is missing, cannot be read, or is something else, such as a pipe, on which readers would hang.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # or a pipe waits for a writer
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError(f"{path} is not a regular file")
    return open(handle, "rb")


def read_json(path: Path) -> Any:
    """Read JSON; CheckpointError where the file is missing, damaged or larger than any that rtlynx writes.

    Stricter than Python's: no key twice, no NaN or Inf, no number of more digits than a computer's.
    """
    with open_regular(path) as file:
        try:
            text = file.read(LARGEST_JSON + 1)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from None
    if len(text) > LARGEST_JSON:
        raise CheckpointError(f"{path} is larger than {LARGEST_JSON >> 20} MB, which no file of rtlynx is")
    try:
        return json.loads(
            text.decode(),
            object_pairs_hook=_once_each,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("it has a key twice")
    return values


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"it has a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it has a number that is not finite, {text[:MOST_DIGITS]}")
    return number


def first_line(error: BaseException) -> str:
    """What an error says, in one line of bounded length."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300]


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
    open_regular(path).close()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # a header can claim shapes and dtypes that fail in many ways
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from None


def sha256_of(path: Path) -> str:
    """Hex digest of a file; CheckpointError where it is no regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
