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

from rtlynx.cuda import cache, jit
from rtlynx.storage import locks
from rtlynx.storage.locks import locked

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
        monkeypatch.setattr(cache, "_open_new", _refuse)
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
    with locked(path):
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
        with locked(folder / "key.lock"):
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


def test_where_there_are_no_locks_entries_are_made_all_the_same(folder, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    make = Maker()
    assert [cache.cached("key", make) for _ in range(2)] == [ENTRY] * 2
    assert make.calls == 1


# --------------------------------------------------------------------- what another user could have written


def _refused(make: Maker, *said: str) -> None:
    """Twice asked, both times compiled, and one warning that says `said`."""
    before = make.calls
    with pytest.warns(RuntimeWarning) as warned:
        assert [cache.cached("key", make) for _ in range(2)] == [ENTRY] * 2
    assert make.calls == before + 2
    (warning,) = warned
    for words in (*said, "RTLYNX_CACHE_DIR"):
        assert words in str(warning.message)


def _give_away(path: Path, monkeypatch) -> None:
    """Let `path` belong to another user; where that takes root, let this process be of another user."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


@pytest.fixture
def filled(folder) -> Path:
    """An entry that would be served."""
    cache.cached("key", Maker())
    return folder


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_not_used(filled, mode):
    filled.chmod(mode)
    _refused(Maker(), f"write to {filled} (mode {mode:04o})", f"chmod go-w {filled}")
    assert "chmod go-w" in cache.usage().trouble
    filled.chmod(0o755)
    assert cache.cached("key", Maker()) == ENTRY
    assert cache.usage().trouble == ""


@pytest.mark.parametrize("levels", [1, 2])
def test_nor_is_one_that_others_may_exchange(tmp_path, monkeypatch, levels):
    monkeypatch.setattr(cache, "_warned", set())
    middle = tmp_path / "middle"
    deep = middle.joinpath(*"ab"[: levels - 1], "cache")
    monkeypatch.setenv("RTLYNX_CACHE_DIR", str(deep))
    cache.cached("key", Maker())
    middle.chmod(0o777)
    _refused(Maker(), f"write to {middle} (mode 0777)")
    assert str(middle) in cache.usage().trouble


def test_nothing_is_made_where_others_may_exchange_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_warned", set())
    tmp_path.chmod(0o777)
    monkeypatch.setenv("RTLYNX_CACHE_DIR", str(tmp_path / "cache"))
    _refused(Maker(), str(tmp_path))
    assert _names(tmp_path) == []


def test_a_sticky_folder_protects_what_is_ours_in_it(tmp_path, monkeypatch):
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setenv("RTLYNX_CACHE_DIR", str(shared / "mine"))
    make = Maker()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [cache.cached("key", make) for _ in range(2)] == [ENTRY] * 2
    assert make.calls == 1


@pytest.mark.parametrize("which", ["folder", "above", "entry"])
def test_what_belongs_to_another_user_is_not_used(filled, monkeypatch, which):
    _give_away({"folder": filled, "above": filled.parent, "entry": filled / "key.cubin"}[which], monkeypatch)
    _refused(Maker(), "belongs to user")
    assert "belongs to user" in cache.usage().trouble


def test_what_root_has_filled_is_used(filled, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("needs root to make what belongs to root")
    filled.chmod(0o555)
    (filled / "key.cubin").chmod(0o444)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    make = Maker()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.cached("key", make) == ENTRY
    assert make.calls == 0


@pytest.mark.parametrize("what", ["written by others", "link", "dangling link", "fifo", "folder", "huge"])
def test_an_entry_that_is_no_file_of_ours_is_not_used(filled, monkeypatch, what):
    path = filled / "key.cubin"
    elsewhere = filled.parent / "elsewhere"
    path.rename(elsewhere)
    if what == "written by others":
        path.write_bytes(elsewhere.read_bytes())
        path.chmod(0o646)
    elif what == "link":
        path.symlink_to(elsewhere)
    elif what == "dangling link":
        path.symlink_to(filled.parent / "nothing")
    elif what == "fifo":
        os.mkfifo(path, 0o600)
    elif what == "folder":
        path.mkdir(0o700)
    else:
        monkeypatch.setattr(cache, "MOST_BYTES", 40)
        path.write_bytes(elsewhere.read_bytes())
        path.chmod(0o600)
    before = path.lstat()
    _refused(Maker(), str(path))
    assert path.lstat() == before
    assert not (filled.parent / "nothing").exists()
    if what != "huge":
        assert str(path) in cache.usage().trouble


@pytest.mark.parametrize("what", ["link", "fifo"])
def test_a_lock_that_is_no_file_is_done_without(folder, what):
    folder.mkdir(0o700)
    lock, target = folder / "key.lock", folder.parent / "target"
    if what == "link":
        lock.symlink_to(target)
    else:
        os.mkfifo(lock)
    start = time.monotonic()
    assert cache.cached("key", Maker()) == ENTRY
    assert time.monotonic() - start < 1
    assert not target.exists()
    assert "key.cubin" in _names(folder)


def test_what_is_written_is_ours_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RTLYNX_CACHE_DIR", str(tmp_path / "a" / "b" / "cache"))
    before = os.umask(0)
    try:
        cache.cached("key", Maker())
    finally:
        os.umask(before)
    made = [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "cache"]
    assert [path.stat().st_mode & 0o7777 for path in made] == [0o700] * 3
    assert (made[-1] / "key.cubin").stat().st_mode & 0o7777 == 0o600


def test_a_link_to_a_good_folder_is_followed(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to("disk")
    monkeypatch.setenv("RTLYNX_CACHE_DIR", str(tmp_path / "home" / "cache"))
    (tmp_path / "disk" / "kernels").mkdir(0o700)
    (tmp_path / "disk" / "cache").symlink_to(tmp_path / "disk" / "kernels")
    make = Maker()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [cache.cached("key", make) for _ in range(2)] == [ENTRY] * 2
    assert make.calls == 1
    assert _names(tmp_path / "disk" / "kernels") == ["key.cubin"]


@pytest.mark.parametrize("fault", ["target", "above the target", "owner of the link"])
def test_a_link_is_worth_no_more_than_where_it_leads(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(cache, "_warned", set())
    disk, link = tmp_path / "disk", tmp_path / "cache"
    (disk / "kernels").mkdir(parents=True, mode=0o700)
    link.symlink_to(disk / "kernels")
    monkeypatch.setenv("RTLYNX_CACHE_DIR", str(link))
    if fault == "owner of the link":
        _give_away(link, monkeypatch)
    else:
        (disk if fault == "above the target" else disk / "kernels").chmod(0o777)
    _refused(Maker(), "could put other code there")
    assert _names(disk / "kernels") == []


NOWHERE = ("{}/file", "{}/file/cache", "{}/dangling", "{}/dangling/cache", "{}/loop", "{}/" + "x" * 300)
NOWHERE += ("relative", "./cache", "~nobody", "~no-such-user/cache", "/dev/null", "/dev/null/cache")


@pytest.mark.parametrize("place", NOWHERE)
def test_a_place_that_is_none_costs_one_warning(tmp_path, monkeypatch, place):
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("RTLYNX_CACHE_DIR", place.format(tmp_path))
    before = _names(tmp_path)
    _refused(Maker())
    assert cache.usage().trouble
    assert _names(tmp_path) == before


def test_systems_without_owners_ask_for_none(filled, monkeypatch):
    monkeypatch.setattr(cache, "_HAS_OWNERS", False)
    filled.chmod(0o777)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.cached("key", Maker()) == ENTRY


# ------------------------------------------------------------------------------------------------- a race


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
