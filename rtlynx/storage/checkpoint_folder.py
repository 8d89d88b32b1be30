"""Two files that are replaced as one: the folder of a checkpoint is whole at every moment.

`rtlynx.json` holds the digest of its tensors. To replace both files, a saver

1. puts the new tensors beside the old ones, as `rtlynx-<digest>.safetensors`;
2. replaces `rtlynx.json`: from here on the checkpoint is the new one;
3. renames the new tensors to `rtlynx.safetensors`.

Readers take the tensors with the digest in their name if there are such, so a saver may be killed anywhere.
The folder itself is never renamed or removed: it may be `.`, a mount point, or what a link points to.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rtlynx.storage.files import CheckpointError
from rtlynx.storage.locks import locked
from rtlynx.storage.temporaries import (
    LOCK,
    flush_folder,
    is_regular,
    is_temporary_name,
    remove_abandoned,
    temporary_for,
)

INDEX = "rtlynx.json"
TENSORS = "rtlynx.safetensors"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NEW_TENSORS = re.compile(r"rtlynx-([0-9a-f]{64})\.safetensors")
_MAX_JSON_BYTES = 1 << 26
_WAIT = 60.0  # seconds for another saver's three renames
_TRIES = 100

T = TypeVar("T")


def check_replaceable(folder: Path) -> None:
    """Find out, before any work, whether a checkpoint can be saved to `folder`. Nothing changes there.

    Raises
    ------
    FileExistsError
        If there is anything that `rtlynx.save` did not write.
    OSError
        If nothing can be written there.
    """
    try:
        target = _target(folder)
        _refuse_others(target)
        with temporary_for(_staged(target)) as trial:
            trial.mkdir()
            (trial / _new_tensors("0" * 64)).write_bytes(b"\0")  # the longest name that is needed
    except FileExistsError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"no checkpoint can be saved there: {reason}", str(folder)) from None


@contextlib.contextmanager
def replaced_checkpoint(folder: Path) -> Iterator[Path]:
    """An empty folder to write both files into. In the end they take the place of those in `folder`.

    Raises
    ------
    FileExistsError
        If `folder` holds anything that `rtlynx.save` did not write.
    OSError
        If it cannot be written. `folder` is then as before.
    """
    target = _target(folder)
    _refuse_others(target)
    with temporary_for(_staged(target)) as new:
        new.mkdir()
        yield new
        _install(new, target)
    _remove_leftovers(target)


def tensors_of(folder: Path, index: dict[str, Any]) -> Path:
    """The file of the tensors that belong to `index`, which was read from `folder`."""
    digest = index.get("tensors_sha256")
    if isinstance(digest, str) and _DIGEST.fullmatch(digest):
        new = folder / _new_tensors(digest)
        if new.is_file():
            return new
    return folder / TENSORS


def while_unchanged(folder: Path, read: Callable[[], T]) -> T:
    """The result of `read()`; it is called again if a saver replaced the files of `folder` meanwhile."""
    for _ in range(_TRIES):
        before = _state(folder)
        try:
            result = read()
        except CheckpointError:
            if _state(folder) == before:
                raise
        else:
            if _state(folder) == before:
                return result
    return read()


def _target(folder: Path) -> Path:
    """The folder itself, where `folder` is a link to it."""
    return Path(os.path.realpath(folder))


def _staged(target: Path) -> Path:
    """Files are written beside what this names: a new folder beside it, an old one's new files inside."""
    return target / "new" if target.is_dir() else target


def _new_tensors(digest: str) -> str:
    return f"rtlynx-{digest}.safetensors"


def _install(new: Path, target: Path) -> None:
    if not target.is_dir():
        try:
            os.rename(new, target)
        except OSError:
            if not target.is_dir():
                raise
        else:
            flush_folder(target.parent)
            return
    # It is an old folder, or another saver was faster.
    lock = target / LOCK
    with locked(lock, wait=_WAIT) as taken:
        if taken is False:
            raise OSError(errno.EBUSY, "another process saves there and does not finish", str(target))
        try:
            _refuse_others(target)
            index = _read_index(new / INDEX)
            assert index is not None
            os.replace(new / TENSORS, target / _new_tensors(index["tensors_sha256"]))
            flush_folder(target)
            os.replace(new / INDEX, target / INDEX)
            flush_folder(target)
        finally:
            _settle(target)
            if taken is None:
                lock.unlink(missing_ok=True)


def _settle(target: Path) -> None:
    """Finish what a saver began if its index is in place, else undo it; the caller holds the lock."""
    index = None
    with contextlib.suppress(FileNotFoundError):
        index = _read_index(target / INDEX)
    for name in sorted(os.listdir(target)):
        match = _NEW_TENSORS.fullmatch(name)
        if match is None or not _is_ours(target / name):
            continue
        if index is not None and match[1] == index.get("tensors_sha256"):
            os.replace(target / name, target / TENSORS)
        else:
            (target / name).unlink()
    flush_folder(target)


def _refuse_others(target: Path) -> None:
    """FileExistsError unless `target` is free, or a folder of nothing but our own files."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a folder")
    for name in sorted(os.listdir(target)):
        if _is_ours(target / name):
            continue
        if name in (INDEX, TENSORS):
            raise FileExistsError(
                f"{target} holds {name}, which rtlynx.save did not write, or which is damaged: choose "
                "another folder, or delete that file"
            )
        raise FileExistsError(f"{target} exists and holds other files ({name}): choose another folder")


def _is_ours(path: Path) -> bool:
    """Whether `rtlynx.save` wrote `path`, by its name, kind and content. What is gone was another saver's."""
    try:
        status = path.lstat()
        if is_temporary_name(path.name):
            return stat.S_ISDIR(status.st_mode)
        if not stat.S_ISREG(status.st_mode):
            return False
        if path.name == INDEX:
            return _read_index(path) is not None
        if path.name == TENSORS or _NEW_TENSORS.fullmatch(path.name):
            return _holds_our_tensors(path)
        return path.name == LOCK and status.st_size == 0
    except FileNotFoundError:
        return True


def _read_index(path: Path) -> dict[str, Any] | None:
    """What is in the file `path`, or None if it is no index of ours."""
    with path.open("rb") as file:
        text = file.read(_MAX_JSON_BYTES + 1)
    index = _parsed(text) if len(text) <= _MAX_JSON_BYTES else {}
    return index if index.get("format") == "rtlynx" else None


def _holds_our_tensors(path: Path) -> bool:
    with path.open("rb") as file:  # opened once: another saver may replace it
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_JSON_BYTES:
            return False
        header = _parsed(file.read(size))
    metadata = header.get("__metadata__")
    return isinstance(metadata, dict) and metadata.get("format") == "rtlynx"


def _parsed(text: bytes) -> dict[str, Any]:
    """A JSON object; an empty one if `text` is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _state(folder: Path) -> list[tuple[Any, ...]]:
    """Changes whenever a saver changes anything that a reader reads."""
    found = []
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(folder)):
            if name in (INDEX, TENSORS) or _NEW_TENSORS.fullmatch(name):
                status = (folder / name).stat()
                found.append((name, status.st_ino, status.st_mtime_ns, status.st_size))
    return found


def _remove_leftovers(target: Path) -> None:
    """Remove what killed savers to `target` left in it and beside it."""
    remove_abandoned(target / "new")
    remove_abandoned(target)
    # rtlynx 0.1.0 made whole folders beside the target. It holds no lock: a saver of that version that runs
    # at this very moment fails, and the target stays whole.
    name = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.(tmp|old)")
    with contextlib.suppress(OSError):
        for leftover in os.listdir(target.parent):
            if name.fullmatch(leftover):
                _remove_older_leftover(target.parent / leftover)


def _remove_older_leftover(folder: Path) -> None:
    """Remove `folder` if it holds nothing but what rtlynx 0.1.0 wrote."""
    unfinished = re.compile(r"\.rtlynx\.(json|safetensors)\.[a-z0-9_]{8}\.tmp")
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return
        files = list(folder.iterdir())
        for path in files:
            finished = path.name in (INDEX, TENSORS) and _is_ours(path)
            if not finished and not (unfinished.fullmatch(path.name) and is_regular(path)):
                return
        for path in files:
            path.unlink()
        folder.rmdir()
