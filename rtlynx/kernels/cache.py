"""Compiled kernels on disk. Entries are whole or made again; a disk that refuses costs time, not a crash."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if sys.platform != "win32":
    import fcntl

# Longer than any compilation: after it a waiting process compiles by itself, whatever holds the lock.
LOCK_SECONDS = 60.0
_SUFFIX = ".cubin"
_DIGEST_BYTES = hashlib.sha256().digest_size
_warned: set[str] = set()


def directory() -> Path:
    """$RTLYNX_CACHE_DIR, else rtlynx in $XDG_CACHE_HOME or ~/.cache.

    Raises
    ------
    OSError
        If there is no home directory to put it in.
    """
    if chosen := os.environ.get("RTLYNX_CACHE_DIR"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "rtlynx"
    try:
        return Path.home() / ".cache" / "rtlynx"
    except RuntimeError as error:  # a user number without a name, as in some containers
        raise OSError(f"no home directory ({error}): set RTLYNX_CACHE_DIR") from None


def cached(key: str, make: Callable[[], bytes]) -> bytes:
    """The entry `key`, else what `make` returns, kept for the next process.

    Many processes may ask at once: one makes the entry and the others wait for it. A lock that cannot be
    had, or whose holder failed, only means that more than one of them makes it: the last rename wins, and
    all wrote the same.
    """
    try:
        folder = directory()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _warn(error)
        return make()

    path = folder / f"{key}{_SUFFIX}"
    if (entry := _read(path)) is not None:
        return entry
    with _lock(folder / f"{key}.lock") as waited:
        if (entry := _read(path)) is not None:  # another process wrote it since
            return entry
        if not waited:  # the first one: the others wait until it has written
            return _make_and_write(path, make)
    return _make_and_write(path, make)  # the holder failed; let those who waited for it work side by side


def _make_and_write(path: Path, make: Callable[[], bytes]) -> bytes:
    entry = make()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(hashlib.sha256(entry).digest() + entry)
        os.replace(temporary, path)
    except OSError as error:
        _warn(error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return entry


def _read(path: Path) -> bytes | None:
    """An entry that passes its checksum, else None."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, entry = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return entry if entry and hashlib.sha256(entry).digest() == digest else None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the lock, or give up; yields whether another process was waited for.

    The system drops a `flock` when its holder ends, however that happens.
    """
    if sys.platform == "win32":
        yield False
        return
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # a read-only disk: whoever writes will say so
        yield False
        return
    held = waited = False
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
                break
            except BlockingIOError:
                waited = True
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        yield waited
    finally:
        if held:  # removed while held: who still waits on it looks for the entry, and so does who comes later
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        os.close(handle)


def _warn(error: OSError) -> None:
    """Say once a process and place that kernels are not kept."""
    where = os.environ.get("RTLYNX_CACHE_DIR", "")
    if where in _warned:
        return
    _warned.add(where)
    warnings.warn(
        f"compiled kernels cannot be kept on disk ({error}): every process compiles them again. "
        "Point RTLYNX_CACHE_DIR at a folder that can be written.",
        RuntimeWarning,
        stacklevel=2,
    )


@dataclass(frozen=True)
class Usage:
    """What the cache holds. `trouble` says why nothing can be written, or is empty."""

    folder: str
    entries: int
    size: int
    trouble: str


def usage() -> Usage:
    """Look at the cache without making it."""
    try:
        folder = directory()
    except OSError as error:
        return Usage("none", 0, 0, str(error))
    try:
        sizes = [entry.stat().st_size for entry in folder.glob(f"*{_SUFFIX}")]
    except OSError as error:
        return Usage(str(folder), 0, 0, str(error))
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return Usage(str(folder), len(sizes), sum(sizes), "" if writable else f"{nearest} cannot be written")
