"""Temporary places that a killed process cannot leave for ever.

Each is a folder with a name that only this module gives, and its writer holds a lock. The next writer to the
same place removes those whose lock is free.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from rtlynx.storage.locks import locked

LOCK = ".rtlynx.lock"
# Where there are no locks, what nobody touched for a day is abandoned.
_DAY = 24 * 3600.0
_TRIES = 20
_NAME = re.compile(r"\.rtlynx\.[0-9a-f]{12}\.[0-9a-f]{16}\.tmp")


def is_temporary_name(name: str) -> bool:
    """Whether `name` is one that this module gives."""
    return _NAME.fullmatch(name) is not None


@contextlib.contextmanager
def temporary_for(path: Path) -> Iterator[Path]:
    """A free path on the file system of `path`: what is put there may be renamed to it, the rest is removed.

    Missing parents of `path` are made, and removed again if they stay empty.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    remove_abandoned(path)
    # A folder of its own, because writers may put temporary files of theirs beside what they write. Its name
    # is known before it is there: an interrupt never leaves one that `finally` does not know.
    folder = path.parent / f"{_prefix(path)}{secrets.token_hex(8)}.tmp"
    try:
        with contextlib.ExitStack() as held:
            _make_locked(folder, held)
            yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in missing:  # the innermost first
                parent.rmdir()


def _make_locked(folder: Path, held: contextlib.ExitStack) -> None:
    """Make `folder` and hold its lock, also where another writer tidies up at the same moment."""
    for attempt in range(_TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / LOCK, wait=60))
            return
        except FileNotFoundError:
            if attempt == _TRIES - 1:
                raise


def remove_abandoned(path: Path) -> None:
    """Remove what killed writers to `path` left beside it."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if is_temporary_name(name) and name.startswith(_prefix(path)):
                _remove_if_abandoned(path.parent / name)


def _remove_if_abandoned(folder: Path) -> None:
    if folder.is_symlink():
        return
    with contextlib.suppress(OSError):
        age = time.time() - folder.stat().st_mtime
        with locked(folder / LOCK) as taken:
            if taken or (taken is None and age > _DAY):
                shutil.rmtree(folder)


def _prefix(path: Path) -> str:
    # A digest, because the name itself may be as long as a name can be.
    return f".rtlynx.{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}."


def is_regular(path: Path) -> bool:
    """Whether `path` is a file itself: no link, pipe or device."""
    return path.is_file() and not path.is_symlink()


def flush_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk, where the system can do that."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
