"""Compiled kernels on disk. Entries are whole or made again; a disk that refuses costs time, not a crash.

What is read here runs on the card, so it is read only where no other user could have put it. That, the
checksum and the waiting for whoever compiles are why this is not cuda-core's `FileStreamProgramCache`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import secrets
import shlex
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rtlynx.storage.locks import locked

# Longer than any compilation: after it a waiting process compiles by itself, whatever holds the lock.
LOCK_SECONDS = 60.0
MOST_BYTES = 64 << 20  # of an entry; kernels have some 100 KB
_SUFFIX = ".cubin"
_DIGEST_BYTES = hashlib.sha256().digest_size
_MOST_LINKS = 40  # of a path, as Linux allows
_HAS_OWNERS = hasattr(os, "geteuid")  # Windows has none
# Of entries: links are not followed, and a FIFO keeps nobody waiting. Windows has none of these but "binary".
_NO_FOLLOWING = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
_warned: set[str] = set()


class Untrusted(OSError):
    """A file or folder of the cache that another user could have put there: what it holds is not run."""


def directory() -> Path:
    """$RTLYNX_CACHE_DIR, else rtlynx in $XDG_CACHE_HOME or ~/.cache.

    Raises
    ------
    OSError
        If that is no absolute path, or there is no home directory to put it in.
    """
    if chosen := os.environ.get("RTLYNX_CACHE_DIR"):
        if chosen != "~" and not chosen.startswith("~/"):
            return _absolute(Path(chosen), "RTLYNX_CACHE_DIR")
        return _absolute(_home() / chosen[1:].lstrip("/"), "the home directory")
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # others are to be ignored, its specification says
        return Path(base) / "rtlynx"
    return _absolute(_home() / ".cache" / "rtlynx", "the home directory")


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:  # a user number without a name, as in some containers
        raise OSError(f"no home directory ({error}): set RTLYNX_CACHE_DIR") from None


def _absolute(folder: Path, what: str) -> Path:
    """`folder`; a relative one would be another for each working directory."""
    if not folder.is_absolute():
        raise OSError(f"{what} is no absolute path: {folder}")
    return folder


def cached(key: str, make: Callable[[], bytes]) -> bytes:
    """The entry `key`, else what `make` returns, kept for the next process.

    Many processes may ask at once: one makes the entry and the others wait for it. A lock that cannot be
    had, or whose holder failed, only means that more than one of them makes it: the last rename wins, and
    all wrote the same. What another user could have written is neither read nor replaced.
    """
    try:
        folder = directory()
        _prepare(folder)
        path = folder / f"{key}{_SUFFIX}"
        entry = _read(path)
    except OSError as error:
        _warn(error)
        return make()
    if entry is not None:
        return entry
    lock = folder / f"{key}.lock"
    with contextlib.ExitStack() as held:
        free: bool | None = None
        with contextlib.suppress(OSError):  # a read-only disk: whoever writes will say so; or no file of ours
            free = held.enter_context(locked(lock, opener=_open_own))
        if free is not False:  # the first one: the others wait until it has written
            return _written_since(path) or _make_and_write(path, make)
    with contextlib.suppress(OSError), locked(lock, wait=LOCK_SECONDS, opener=_open_own):
        pass
    # If the holder failed, let those who waited for it work side by side.
    return _written_since(path) or _make_and_write(path, make)


def _written_since(path: Path) -> bytes | None:
    """The entry, where another process wrote it since it was found missing or damaged."""
    with contextlib.suppress(Untrusted):
        return _read(path)
    return None


def _prepare(folder: Path) -> None:
    """Make the folder, if need be, and make sure that its entries are ours."""
    _refuse_shared_path(folder)
    if not folder.is_dir():
        missing = itertools.takewhile(lambda part: not part.exists(), (folder, *folder.parents))
        for part in reversed(list(missing)):
            part.mkdir(mode=0o700, exist_ok=True)
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
        _refuse_shared_path(folder)  # another user may have been quicker
    _refuse_shared(folder, os.stat(folder))


def _refuse_shared_path(folder: Path) -> None:
    """Untrusted, where another user could exchange a part of the path for a folder of theirs.

    The rule by which ssh reads keys: every part belongs to this user or root, and others may not write to
    it. They may where it is sticky, as /tmp: what is ours there stays ours. A link counts with all that it
    leads through. Parts that do not exist yet are no fault.
    """
    pending, links = [folder], 0
    while pending:
        path = pending.pop()
        for part in (*reversed(path.parents), path):
            try:
                status = os.lstat(part)
            except FileNotFoundError:
                if path is not folder:
                    raise FileNotFoundError(f"{folder} leads to {part}, which does not exist") from None
                break
            _refuse_shared(part, status, sticky_protects=True)
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(f"{folder} leads through more than {_MOST_LINKS} links")
                pending.append(part.parent / os.readlink(part))


def _refuse_shared(path: str | Path, status: os.stat_result, sticky_protects: bool = False) -> None:
    """Untrusted, where a user other than this one and root could write what lies at `path`."""
    if not _HAS_OWNERS:
        return
    user = os.geteuid()
    if status.st_uid not in (user, 0):
        raise Untrusted(
            f"{path} belongs to user {status.st_uid}, who could put other code there, and this process "
            f"is of user {user}: use a folder of user {user}"
        )
    if stat.S_ISLNK(status.st_mode) or (sticky_protects and status.st_mode & stat.S_ISVTX):
        return
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        raise Untrusted(
            f"other users may write to {path} (mode {mode}) and could put other code there: "
            f"chmod go-w {shlex.quote(str(path))}"
        )


def _make_and_write(path: Path, make: Callable[[], bytes]) -> bytes:
    entry = make()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb", opener=_open_new) as file:
            file.write(hashlib.sha256(entry).digest() + entry)
        os.replace(temporary, path)
    except OSError as error:
        _warn(error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return entry


def _open_new(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_FOLLOWING, 0o600)


def _read(path: Path) -> bytes | None:
    """An entry that passes its checksum, else None.

    Raises
    ------
    Untrusted
        If what lies there is no regular file of ours, or of no size that an entry has.
    """
    try:
        with open(_open_own(path, os.O_RDONLY), "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except Untrusted:
        raise
    except OSError:
        return None
    if len(content) > MOST_BYTES:
        raise Untrusted(f"{path} is larger than any kernel: remove it")
    digest, entry = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return entry if entry and hashlib.sha256(entry).digest() == digest else None


def _open_own(path: str | Path, flags: int) -> int:
    """A descriptor of the regular file at `path`, which no other user could have written.

    What is opened is examined, not the path, which may lead elsewhere a moment later.
    """
    try:
        handle = os.open(path, flags | _NO_FOLLOWING, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):  # (the latter on some systems)
            raise Untrusted(f"{path} is a link, and entries are files: remove it") from None
        raise
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise Untrusted(f"{path} is no regular file: remove it")
        _refuse_shared(path, status)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _warn(error: OSError) -> None:
    """Say once a process and place that kernels are not kept, or not taken from there."""
    where = os.environ.get("RTLYNX_CACHE_DIR", "")
    if where in _warned:
        return
    _warned.add(where)
    if isinstance(error, Untrusted):
        said = (
            f"compiled kernels on disk are not used: {error}, or point RTLYNX_CACHE_DIR at another folder. "
            "Every process compiles them again, in memory."
        )
    else:
        said = (
            f"compiled kernels cannot be kept on disk ({error}): every process compiles them again. "
            "Point RTLYNX_CACHE_DIR at a folder that can be written."
        )
    warnings.warn(said, RuntimeWarning, stacklevel=3)


@dataclass(frozen=True)
class Usage:
    """What the cache holds. `trouble` says why it is not used or nothing can be written, or is empty."""

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
    sizes: list[int] = []
    try:
        _refuse_shared_path(folder)
        if folder.exists():
            _refuse_shared(folder, os.stat(folder))
        for entry in sorted(folder.glob(f"*{_SUFFIX}")):
            with open(_open_own(entry, os.O_RDONLY), "rb") as file:
                sizes.append(os.fstat(file.fileno()).st_size)
    except OSError as error:
        return Usage(str(folder), len(sizes), sum(sizes), str(error))
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return Usage(str(folder), len(sizes), sum(sizes), "" if writable else f"{nearest} cannot be written")
