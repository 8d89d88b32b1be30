"""Where a checkpoint can be saved, known before the work; and that nothing of others is lost there."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from saving_helpers import (
    NAMES,
    listing,
    small,
    stored,
    two_models,
)

import rtlynx
import rtlynx.storage.files
from rtlynx import CheckpointError, load, save
from rtlynx.storage.checkpoint_folder import check_replaceable


@pytest.fixture(scope="module")
def models():
    return two_models()


def test_the_working_folder_is_a_target(place, models, monkeypatch):
    (place / "lynx").mkdir()
    monkeypatch.chdir(place / "lynx")
    for name in ("all", "some"):
        save(models[name], ".")
        assert stored(Path(".")) == stored(place / "lynx") == name
        assert listing(place / "lynx") == NAMES


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_what_it_points_to_is_saved_to(place, models, exists):
    (place / "big").mkdir()
    if exists:
        save(models["all"], place / "big" / "lynx")
    (place / "link").symlink_to(Path("big") / "lynx")
    save(models["some"], place / "link")
    assert os.readlink(place / "link") == "big/lynx"
    assert stored(place / "big" / "lynx") == stored(place / "link") == "some"
    assert listing(place) == ["big", "link"]
    assert listing(place / "big") == ["lynx"]


def test_nothing_outside_an_existing_folder_is_written(place, models, monkeypatch):
    """It may be a mount point, or the only place where the user may write."""
    (place / "lynx").mkdir()

    def inside_only(function):
        def checked(path, *others, **settings):
            for one in (path, *(other for other in others if isinstance(other, str | Path))):
                if Path(os.path.abspath(one)).parent == place:
                    raise OSError(errno.EBUSY, "a mount point", str(one))
            return function(path, *others, **settings)

        return checked

    for name in ("mkdir", "rename", "replace", "rmdir"):
        monkeypatch.setattr(os, name, inside_only(getattr(os, name)))
    for name in ("all", "some"):
        save(models[name], place / "lynx")
        assert stored(place / "lynx") == name
    assert listing(place / "lynx") == NAMES


def test_the_folder_itself_is_never_replaced(place, models):
    save(models["all"], place / "lynx")
    os.chmod(place / "lynx", 0o750)
    before = (place / "lynx").stat()
    save(models["some"], place / "lynx")
    after = (place / "lynx").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


# ------------------------------------------------------------------------------------------ what is kept


def foreign(kind, folder):
    """Put something into `folder` that `save` did not write; its name."""
    if kind == "folder":
        (folder / "rtlynx").mkdir()
        (folder / "rtlynx" / "__init__.py").write_text("")
        return "rtlynx"
    if kind == "folder named like the index":
        (folder / "rtlynx.json").unlink()
        (folder / "rtlynx.json").mkdir()
        return "rtlynx.json"
    if kind == "link":
        (folder / "rtlynx.safetensors").rename(folder.parent / "elsewhere.safetensors")
        (folder / "rtlynx.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")
        return "rtlynx.safetensors"
    if kind == "pipe":
        (folder / "rtlynx.json").unlink()
        os.mkfifo(folder / "rtlynx.json")
        return "rtlynx.json"
    if kind == "tensors of others":
        safetensors.torch.save_file({"a": torch.ones(2)}, folder / "rtlynx.safetensors", {"format": "pt"})
        return "rtlynx.safetensors"
    name, content = {
        "source": ("rtlynx.py", "import this"),
        "text": ("rtlynx.txt", "notes"),
        "no suffix": ("rtlynx", "notes"),
        "case": ("RTLYNX.json", '{"format": "rtlynx"}'),
        "copy": ("rtlynx-old.safetensors", "x"),
        "digest": (f"rtlynx-{hashlib.sha256(b'').hexdigest()}.safetensors", "x"),
        "hidden": (".rtlynx.json.swp", "x"),
        "temporary": (".rtlynx.0123456789ab.0123456789abcdef.tmp", "x"),
        "lock": (".rtlynx.lock", "pid 17"),
        "index of others": ("rtlynx.json", '{"format": "mine"}'),
        "list": ("rtlynx.json", '["rtlynx"]'),
        "deep": ("rtlynx.json", "[" * 100_000),
        "no JSON": ("rtlynx.json", "years of work"),
        "no tensors": ("rtlynx.safetensors", "years of work"),
        "empty": ("rtlynx.safetensors", ""),
    }[kind]
    (folder / name).write_text(content)
    return name


KINDS = ["folder", "folder named like the index", "link", "pipe", "tensors of others", "source", "text"]
KINDS += ["no suffix", "case", "copy", "digest", "hidden", "temporary", "lock", "index of others", "list"]
KINDS += ["deep", "no JSON", "no tensors", "empty"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_others_wrote_is_kept_and_named(place, models, monkeypatch, kind):
    folder = place / "lynx"
    save(models["all"], folder)
    name = foreign(kind, folder)
    before = {path: path.lstat() for path in [place, *place.rglob("*")]}
    monkeypatch.setattr(rtlynx.io.checkpoint, "write_tensors", lambda *_: pytest.fail("work was done"))
    with pytest.raises(FileExistsError) as error:
        save(models["some"], folder)
    assert str(folder) in str(error.value)
    assert name in str(error.value)
    after = {path: path.lstat() for path in [place, *place.rglob("*")]}
    assert {path: (status.st_ino, status.st_mtime_ns) for path, status in after.items()} == {
        path: (status.st_ino, status.st_mtime_ns) for path, status in before.items()
    }


def test_what_others_write_during_a_save_is_kept(place, models, monkeypatch):
    folder, write = place / "lynx", rtlynx.io.checkpoint.write_tensors
    save(models["all"], folder)

    def beside(*arguments):
        write(*arguments)
        (folder / "notes.txt").write_text("mine")

    monkeypatch.setattr(rtlynx.io.checkpoint, "write_tensors", beside)
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        save(models["some"], folder)
    assert listing(folder) == ["notes.txt", *NAMES]
    assert stored(folder) == "all"


def test_a_checkout_of_this_library_is_kept(place, models):
    root = Path(rtlynx.__file__).parent
    shutil.copytree(root / "models", place / "rtlynx" / "models")
    shutil.copy(root / "__init__.py", place / "rtlynx.py")
    before = sorted(place.rglob("*"))
    for folder in (place, place / "rtlynx"):
        with pytest.raises(FileExistsError):
            save(models["all"], folder)
    assert sorted(place.rglob("*")) == before


def older_leftovers(folder, place):
    """What rtlynx 0.1.0 left of savers that were killed at different moments."""
    shutil.copytree(folder, place / ".lynx.k1x_9abc.old")
    shutil.copytree(folder, place / ".lynx.k1x_9abd.tmp")
    half = place / ".lynx.k1x_9abe.tmp"
    half.mkdir()
    (half / ".rtlynx.safetensors.0a_zzzz1.tmp").write_text("half of it")
    (place / ".lynx.k1x_9abf.tmp").mkdir()


def test_leftovers_of_the_older_version_go_with_the_next_save(place, models):
    save(models["all"], place / "lynx")
    older_leftovers(place / "lynx", place)
    save(models["some"], place / "lynx")
    assert listing(place) == ["lynx"]


def test_leftovers_stay_where_a_save_fails(place, models, monkeypatch):
    """One of them may be all that there is of the checkpoint."""
    save(models["all"], place / "lynx")
    (place / "lynx").rename(place / ".lynx.k1x_9abc.old")
    monkeypatch.setattr(rtlynx.io.checkpoint, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(models["some"], place / "lynx")
    assert listing(place) == [".lynx.k1x_9abc.old"]


def test_what_only_looks_like_a_leftover_is_kept(place, models):
    folder = place / "lynx"
    save(models["all"], folder)
    shutil.copytree(folder, place / ".lynx.k1x_9abc.old")
    (place / ".lynx.k1x_9abc.old" / "notes.txt").write_text("mine")
    shutil.copytree(folder, place / ".lynx.by-hand.old")
    shutil.copytree(folder, place / ".other.k1x_9abc.old")
    (place / ".lynx.k1x_9abd.tmp").write_text("a file")
    (place / ".lynx.k1x_9abe.old").symlink_to(folder)
    (place / ".rtlynx.mine.tmp").mkdir()
    before = sorted(place.rglob("*"))
    save(models["some"], folder)
    assert sorted(place.rglob("*")) == before


# ------------------------------------------------------------------------------- known before the work


def unwritable(kind, place):
    (place / "file").write_text("mine")
    if kind == "loop":
        (place / "loop").symlink_to(place / "loop")
    return {
        "no place for files": Path("/proc/lynx"),
        "no place for files, nested": Path("/proc/a/lynx"),
        "file": place / "file",
        "under a file": place / "file" / "lynx",
        "deep under a file": place / "file" / "a" / "b" / "lynx",
        "long name": place / ("x" * 256),
        "long name of a parent": place / ("x" * 256) / "lynx",
        "long path": Path(str(place) + "/x" * 2048) / "lynx",
        "device": Path("/dev/null"),
        "loop": place / "loop",
        "under the loop": place / "loop" / "lynx",
    }[kind]


UNWRITABLE = ["file", "under a file", "deep under a file", "long name", "long name of a parent", "long path"]
UNWRITABLE += ["device", "loop", "no place for files", "no place for files, nested"]


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_a_place_that_takes_no_checkpoint_is_refused_before_any_work(place, models, monkeypatch, kind):
    if kind.startswith("no place") and not Path("/proc/self").exists():
        pytest.skip("no /proc")
    folder = unwritable(kind, place)
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(rtlynx.io.checkpoint, "weight_fingerprint", lambda *_: pytest.fail("work was done"))
    for work in (lambda: check_replaceable(folder), lambda: save(models["all"], folder)):
        with pytest.raises(OSError) as error:  # noqa: PT011
            work()
        assert str(folder) in str(error.value)
    assert sorted(place.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused_before_any_work(place):
    os.chmod(place, 0o500)
    for folder in (place, place / "lynx"):
        with pytest.raises(PermissionError):
            check_replaceable(folder)


def test_the_longest_names_are_fine(place, models):
    for name in ("x" * 255, "ä" * 127):
        for model in models.values():
            save(model, place / name)
        assert stored(place / name) == "some"
        shutil.rmtree(place / name)
    assert listing(place) == []


def test_the_check_changes_nothing(place, models):
    save(models["all"], place / "lynx")
    before = sorted(place.rglob("*"))
    for folder in ("lynx", "new", "a/b/c"):
        check_replaceable(place / folder)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("command_name", ["convert", "calibrate"])
def test_the_commands_look_at_the_place_before_they_load_a_model(place, command, monkeypatch, command_name):
    monkeypatch.setattr(
        "rtlynx.models.pipelines.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    (place / "mine").mkdir()
    (place / "mine" / "rtlynx.py").write_text("import this")
    for folder, reason in ((place / "mine", "rtlynx.py"), (place / "mine" / "rtlynx.py" / "x", "directory")):
        code, _, error = command(command_name, "zoo:flux-emoji", "--out", folder)
        assert code == 1
        assert reason in error
        assert str(folder) in error.replace("\n", "")


def test_a_failed_save_leaves_no_parents_behind(place, models, monkeypatch):
    monkeypatch.setattr(rtlynx.io.checkpoint, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(models["all"], place / "a" / "b" / "lynx")
    assert listing(place) == []


def test_a_checkpoint_whose_saver_was_killed_is_not_read_from_outside(place, models):
    """The index names its tensors by digest alone."""
    save(models["all"], place / "lynx")
    path = place / "lynx" / "rtlynx.json"
    body = {**json.loads(path.read_text()), "tensors_sha256": "/../../secret"}
    del body["sha256"]
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match=r"rtlynx\.json is damaged: unknown tensors_sha256"):
        load(small(), place / "lynx")
