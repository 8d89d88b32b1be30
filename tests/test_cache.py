"""The cache of compiled kernels under races, damage, dead processes and disks that refuse."""

import errno
import hashlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest

from rtlynx.kernels import cache, jit

ENTRY = b"\x7fELF compiled"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RTLYNX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_warned", set())
    return tmp_path / "cache"


class Maker:
    """Makes the entry and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return ENTRY


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_an_entry_is_made_once_and_nothing_else_stays(folder):
    make = Maker()
    assert [cache.cached("key", make) for _ in range(3)] == [ENTRY] * 3
    assert make.calls == 1
    assert _names(folder) == ["key.cubin"]
    usage = cache.usage()
    assert (usage.folder, usage.entries, usage.trouble) == (str(folder), 1, "")
    assert usage.size == len(ENTRY) + 32


@pytest.mark.parametrize("damage", ["", "short", "cut", "flipped", "longer"])
def test_a_damaged_entry_is_made_again_and_overwritten(folder, damage):
    cache.cached("key", Maker())
    path = folder / "key.cubin"
    whole = path.read_bytes()
    path.write_bytes(
        {
            "": b"",
            "short": whole[:10],
            "cut": whole[:-1],
            "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
            "longer": whole + b"\0",
        }[damage]
    )
    make = Maker()
    assert cache.cached("key", make) == ENTRY
    assert make.calls == 1
    assert path.read_bytes() == whole


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.delenv("RTLYNX_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "rtlynx"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg" / "rtlynx"
    monkeypatch.setenv("RTLYNX_CACHE_DIR", "~/kernels")
    assert cache.directory() == tmp_path / "kernels"


def _refuse(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def _no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("trouble", ["a file in the way", "full", "locks only", "no home"])
def test_a_disk_that_refuses_costs_one_warning_and_no_more(folder, monkeypatch, trouble):
    if trouble == "a file in the way":
        folder.write_text("not a folder")
    elif trouble == "full":
        monkeypatch.setattr(os, "replace", _refuse)
    elif trouble == "locks only":
        monkeypatch.setattr(Path, "write_bytes", _refuse)
    else:
        monkeypatch.delenv("RTLYNX_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", _no_home)
    make = Maker()
    with pytest.warns(RuntimeWarning, match="cannot be kept on disk") as said:
        assert cache.cached("one", make) == ENTRY
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.cached("two", make) == ENTRY
    assert make.calls == 2
    if folder.is_dir():
        assert _names(folder) == []
    if trouble in ("a file in the way", "no home"):
        assert cache.usage().trouble


def test_a_failing_compilation_leaves_nothing_and_can_be_tried_again(folder):
    def fail():
        raise jit.CompileError("no")

    with pytest.raises(jit.CompileError):
        cache.cached("key", fail)
    assert _names(folder) == []
    assert cache.cached("key", Maker()) == ENTRY


def _hold_and_die(path: Path) -> None:
    with cache._lock(path):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_killed_with_the_lock_holds_nobody_up(folder):
    folder.mkdir()
    child = multiprocessing.get_context("fork").Process(target=_hold_and_die, args=(folder / "key.lock",))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert _names(folder) == ["key.lock"]
    start = time.monotonic()
    assert cache.cached("key", Maker()) == ENTRY
    assert time.monotonic() - start < 1
    assert _names(folder) == ["key.cubin"]


def test_a_holder_that_hangs_is_waited_for_only_so_long(folder, monkeypatch):
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.2)
    folder.mkdir()
    hung, done = threading.Event(), threading.Event()

    def hang():
        with cache._lock(folder / "key.lock"):
            hung.set()
            done.wait()

    holder = threading.Thread(target=hang)
    holder.start()
    hung.wait()
    try:
        assert cache.cached("key", Maker()) == ENTRY
    finally:
        done.set()
        holder.join()
    assert _names(folder) == ["key.cubin"]


PROCESSES = 16


def _race(barrier, results, sources: Path, log: Path, broken_disk: bool) -> None:
    """One process on a cold cache: compile a real kernel; note each compilation in `log`."""
    compile_source = jit.compile

    def noted(*unit):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return compile_source(*unit)

    jit.compile = noted
    if broken_disk:
        os.replace = _refuse
        warnings.simplefilter("ignore")
    barrier.wait()
    results.put(hashlib.sha256(jit.cubin("tiny.cu", (), sources)).hexdigest())


@pytest.mark.parametrize("broken_disk", [False, True], ids=["cold", "disk full"])
def test_sixteen_processes_race_and_all_get_the_right_cubin(folder, tmp_path, broken_disk):
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "tiny.cu").write_text('extern "C" __global__ void tiny(int* x) { *x = 1; }')
    log = tmp_path / "log"
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(PROCESSES), fork.Queue()
    children = [
        fork.Process(target=_race, args=(barrier, results, sources, log, broken_disk))
        for _ in range(PROCESSES)
    ]
    for child in children:
        child.start()
    digests = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * PROCESSES
    assert set(digests) == {hashlib.sha256(jit.compile("tiny.cu", (), sources)).hexdigest()}
    compilations = len(log.read_text().splitlines())
    assert compilations == (PROCESSES if broken_disk else 1)
    assert len(_names(folder)) == (0 if broken_disk else 1)
