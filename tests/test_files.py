"""Files are replaced whole: under kills, Ctrl-C, several writers; through links, with the mode they had."""

import json
import os
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from saving_helpers import (
    Interrupter,
    killed_at,
    lines_of,
    listing,
    needs_fork,
)

from rtlynx.storage.files import atomic_file, write_json, write_tensors


@needs_fork
def test_a_file_that_is_killed_anywhere_is_the_old_or_the_new_one(place):
    path, count = place / "results.json", 0
    write_json(path, -1)
    while not killed_at(count, partial(write_json, path, count)):
        assert json.loads(path.read_text()) in (count - 1, count)
        write_json(path, count)
        assert listing(place) == ["results.json"]
        count += 1
    assert count > 10
    assert json.loads(path.read_text()) == count
    assert listing(place) == ["results.json"]


def test_a_linked_file_is_replaced_and_the_link_stays(place):
    (place / "sub").mkdir()
    write_json(place / "sub" / "results.json", 1)
    (place / "link.json").symlink_to(Path("sub") / "results.json")
    write_json(place / "link.json", 2)
    assert os.readlink(place / "link.json") == "sub/results.json"
    assert json.loads((place / "sub" / "results.json").read_text()) == 2
    assert listing(place) == ["link.json", "sub"]
    assert listing(place / "sub") == ["results.json"]


def test_only_files_are_replaced(place):
    (place / "folder").mkdir()
    os.mkfifo(place / "pipe")
    for path in (place / "folder", place / "pipe", Path("/dev/null")):
        with pytest.raises(FileExistsError, match="not a file"):
            write_json(path, 1)
    assert not Path("/dev/null").is_file()


def test_a_replaced_file_keeps_its_mode_and_a_new_one_has_the_usual(place):
    old = os.umask(0o027)
    try:
        write_tensors(place / "new", {"a": torch.ones(2)})
        write_json(place / "private", 1)
        os.chmod(place / "private", 0o400)
        write_json(place / "private", 2)
    finally:
        os.umask(old)
    assert (place / "new").stat().st_mode & 0o777 == 0o640
    assert (place / "private").stat().st_mode & 0o777 == 0o400


def test_ctrl_c_leaves_a_file_whole_and_nothing_beside_it(place):
    path = place / "a" / "results.json"
    work = lambda: write_json(path, 1)  # noqa: E731
    for line in lines_of(work):
        Interrupter(line).run(work)
        assert json.loads(path.read_text()) == 1
    work()
    assert listing(path.parent) == ["results.json"]


def test_writers_of_one_file_do_not_disturb_each_other(place):
    errors = []

    def write(value):
        try:
            for _ in range(20):
                write_json(place / "results.json", [value] * 1000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(set(json.loads((place / "results.json").read_text()))) == 1
    assert listing(place) == ["results.json"]


def test_the_umask_is_left_alone(place, monkeypatch):
    """It belongs to the process: who sets it for a moment changes the files that other threads make."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("set"))
    write_json(place / "x.json", 1)


def test_a_failed_file_leaves_the_old_one_and_nothing_else(place):
    write_json(place / "results.json", 1)

    def half():
        with atomic_file(place / "results.json") as temporary:
            temporary.write_text("half")
            (temporary.parent / "a writer's own temporary").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert json.loads((place / "results.json").read_text()) == 1
    assert listing(place) == ["results.json"]
