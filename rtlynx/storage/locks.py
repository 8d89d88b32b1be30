"""Locks between processes: a `flock`, which the system drops when its holder ends, however that happens.

Not filelock's: that leaves its files behind, which would lie in users' checkpoint folders, and where `flock`
is missing some versions fall back to a file that outlives a killed process; torch asks for no version.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_POLL = 0.01  # seconds


@contextlib.contextmanager
def locked(
    path: Path, wait: float = 0.0, opener: Callable[[str, int], int] | None = None
) -> Iterator[bool | None]:
    """Hold the lock of a file that is there for nothing else: it is made first and removed in the end.

    Yields True; or False where another holds it for longer than `wait` seconds; or None where there are no
    locks. A process that dies gives its locks up. `opener` is that of `open`.
    """
    deadline = time.monotonic() + wait
    while True:
        with open(path, "ab", opener=opener) as file:
            taken: bool | None = False
            try:
                taken = _take(file, path)
                if taken is None:
                    file.close()  # Windows removes no open files
                if taken is not False or time.monotonic() >= deadline:
                    yield taken
                    return
            finally:
                if taken:
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)
        time.sleep(_POLL)


def _take(file: IO[bytes], path: Path) -> bool | None:
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False  # whoever held it before has removed the file: this is a lock of nothing
