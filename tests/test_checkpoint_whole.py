"""A checkpoint is whole at every moment: under kills, Ctrl-C, several savers and readers."""

import os
import shutil
import threading

import pytest
import safetensors.torch
from saving_helpers import (
    NAMES,
    Interrupter,
    killed_at,
    lines_of,
    listing,
    needs_fork,
    stored,
    two_models,
)

import rtlynx
import rtlynx.storage.files
from rtlynx import save


@pytest.fixture(scope="module")
def models():
    return two_models()


@needs_fork
@pytest.mark.parametrize(("linked", "stride"), [(False, 3), (True, 7)])
def test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new_one(place, models, linked, stride):
    """Each save starts from what the last one left: all kinds of leftovers are met."""
    folder = place / "lynx"
    save(models["all"], folder)
    target = folder
    if linked:
        target = place / "link"
        target.symlink_to(folder)
    count, seen, old = 0, [], "all"
    while True:
        new = "some" if old == "all" else "all"
        finished = killed_at(count, lambda new=new: save(models[new], target))
        found = stored(target)
        assert found in (old, new)
        if finished:
            break
        seen.append(found == new)
        old, count = found, count + stride
    assert found == new
    assert len(seen) > 50 / stride
    assert {True, False} == set(seen)  # some before, some after the moment of change
    assert listing(folder) == NAMES
    assert listing(place) == ["link", "lynx"] if linked else ["lynx"]


@needs_fork
@pytest.mark.parametrize(("parents", "stride"), [("a/b", 3), ("", 4)])
def test_a_first_save_that_is_killed_anywhere_leaves_all_or_nothing(place, models, parents, stride):
    folder, count, whole = place / parents / "lynx", 0, []
    while not killed_at(count, lambda: save(models["all"], folder)):
        whole.append(folder.exists())
        if folder.exists():
            assert stored(folder) == "all"
            shutil.rmtree(folder)
        count += stride
    assert len(whole) > 40 / stride
    assert stride > 1 or {True, False} == set(whole)
    assert stored(folder) == "all"
    assert listing(folder) == NAMES
    assert listing(folder.parent) == ["lynx"]


# ---------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_anywhere_leaves_the_old_or_the_new_one(place, models):
    folder = place / "lynx"
    save(models["all"], folder)
    lines = lines_of(lambda: save(models["all"], folder))
    assert len(lines) > 100
    old = "all"
    for line in lines[::2]:
        new = "some" if old == "all" else "all"
        Interrupter(line).run(lambda new=new: save(models[new], folder))
        found = stored(folder)
        assert found in (old, new), line
        old = found
    save(models["some"], folder)
    assert stored(folder) == "some"
    assert listing(folder) == NAMES
    assert listing(place) == ["lynx"]


def test_ctrl_c_during_a_first_save_leaves_all_or_nothing(place, models):
    lines = lines_of(lambda: save(models["all"], place / "a" / "lynx"))
    shutil.rmtree(place / "a")
    for line in lines[1::2]:
        Interrupter(line).run(lambda: save(models["all"], place / "a" / "lynx"))
        if (place / "a" / "lynx").exists():
            assert stored(place / "a" / "lynx") == "all"
            shutil.rmtree(place / "a" / "lynx")
    save(models["all"], place / "a" / "lynx")
    assert listing(place) == ["a"]
    assert listing(place / "a") == ["lynx"]


# ------------------------------------------------------------------------------------ several at a time


def test_savers_and_readers_in_threads(place, models):
    folder, errors, stop = place / "lynx", [], threading.Event()

    def saver(name):
        for _ in range(4):
            save(models[name], folder)

    def reader():
        while not stop.is_set():
            if folder.exists():
                stored(folder)

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except BaseException as error:
            errors.append(error)

    savers = [threading.Thread(target=guarded, args=(saver, name)) for name in [*models, *models]]
    readers = [threading.Thread(target=guarded, args=(reader,)) for _ in range(2)]
    for thread in savers + readers:
        thread.start()
    for thread in savers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert errors == []
    assert stored(folder) in models
    assert listing(folder) == NAMES
    assert listing(place) == ["lynx"]


@needs_fork
def test_savers_in_processes(place, models):
    for _ in range(3):
        folder = place / "a" / "lynx"
        children = []
        for name in [*models, *models]:
            child = os.fork()
            if not child:
                code = 1
                try:
                    save(models[name], folder)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
        assert stored(folder) in models
        assert listing(folder) == NAMES
        assert listing(folder.parent) == ["lynx"]
        shutil.rmtree(place / "a")


@pytest.mark.parametrize("first", [True, False])
def test_a_slow_saver_is_not_disturbed_by_a_fast_one(place, models, monkeypatch, first):
    """What it has written so far is no leftover."""
    folder, half, go = place / "lynx", threading.Event(), threading.Event()
    if not first:
        save(models["all"], folder)
    write = safetensors.torch.save_file

    def slow(*arguments, **settings):
        write(*arguments, **settings)
        if threading.current_thread() is thread:
            half.set()
            go.wait(30)

    monkeypatch.setattr(safetensors.torch, "save_file", slow)
    thread = threading.Thread(target=save, args=(models["some"], folder))
    thread.start()
    assert half.wait(30)
    save(models["all"], folder)
    assert stored(folder) == "all"
    go.set()
    thread.join()
    assert stored(folder) == "some"
    assert listing(folder) == NAMES
    assert listing(place) == ["lynx"]


def test_a_reader_that_is_overtaken_reads_again(place, models, monkeypatch):
    save(models["all"], place / "lynx")
    digest, overtaken = rtlynx.io.checkpoint.sha256_of, []

    def then_save(path):
        result = digest(path)
        if not overtaken:
            overtaken.append(path)
            save(models["some"], place / "lynx")
        return result

    monkeypatch.setattr(rtlynx.io.checkpoint, "sha256_of", then_save)
    assert stored(place / "lynx") == "some"
