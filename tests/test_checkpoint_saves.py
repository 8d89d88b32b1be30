"""What is not saved, and what a save that fails leaves behind."""

import errno
import json
import os
import stat

import pytest
import safetensors.torch
import torch
from checkpoint_helpers import RECIPES, make
from helpers import flux_call, output, tiny_flux

import rtlynx.storage.files
from rtlynx import Recipe, load, save, sparsify
from rtlynx.models import sparse_layers


@pytest.fixture
def folder(tmp_path):
    """An older checkpoint, with refitted weights."""
    save(make(RECIPES["refit"]), tmp_path / "lynx")
    return tmp_path / "lynx"


def test_a_dense_model_has_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="dense, there is nothing to save"):
        save(tiny_flux(), tmp_path / "lynx")
    assert not list(tmp_path.iterdir())


def test_a_model_with_an_adapter_is_not_saved(tmp_path):
    from peft import LoraConfig

    model = make(RECIPES["immediate"])
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="adapters"):
        save(model, tmp_path / "lynx")
    assert not list(tmp_path.iterdir())


def test_other_files_are_not_replaced(tmp_path):
    model = make(RECIPES["immediate"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("mine too")
    for name in ("mine", "file"):
        with pytest.raises(FileExistsError, match=name):
            save(model, tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "mine too"
    assert {path.name for path in tmp_path.rglob("*")} == {"mine", "thesis.txt", "file"}


def test_other_files_beside_an_older_checkpoint_are_not_lost(folder):
    (folder / "notes.txt").write_text("which prompts I used")
    model = make(RECIPES["immediate"])
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        save(model, folder)
    assert len(sparse_layers(load(tiny_flux(), folder))) == 11  # the older one is whole
    assert (folder / "notes.txt").read_text() == "which prompts I used"


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    model = make(RECIPES["immediate"])
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        save(model, folder)
        assert len(sparse_layers(load(tiny_flux(), folder))) == 11


def test_an_older_checkpoint_is_replaced_whole(folder):
    immediate = make(RECIPES["immediate"])
    save(immediate, folder)
    other = load(tiny_flux(), folder)
    assert torch.equal(output(other, flux_call()), output(immediate, flux_call()))
    assert not any(layer.refitted for layer in sparse_layers(other).values())
    assert [path.name for path in folder.parent.iterdir()] == ["lynx"]


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*_args, **_kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", [full_disk, interrupted])
@pytest.mark.parametrize("where", ["tensors", "index", "rename"])
def test_a_failed_save_leaves_nothing_behind_and_the_older_one_whole(folder, monkeypatch, failure, where):
    model = make(RECIPES["immediate"])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        if where == "tensors":
            patch.setattr(safetensors.torch, "save_file", failure)
        elif where == "index":
            patch.setattr(json, "dumps", failure)
        else:
            patch.setattr(rtlynx.storage.files.os, "replace", failure)
        error = OSError if failure is full_disk else KeyboardInterrupt
        with pytest.raises(error):
            save(model, folder)
        with pytest.raises(error):
            save(model, folder.parent / "fresh")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["lynx"]
    assert len(sparse_layers(model)) == 11
    assert len(sparse_layers(load(tiny_flux(), folder))) == 11


def test_half_written_tensors_are_removed(folder, monkeypatch):
    def half(_tensors, path, **_kwargs):
        path.write_bytes(b"half of it")
        full_disk()

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        save(make(RECIPES["immediate"]), folder.parent / "fresh")
    assert [path.name for path in folder.parent.iterdir()] == ["lynx"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_saved_files_are_readable_by_others_as_the_umask_says(tmp_path, mask):
    old = os.umask(mask)
    try:
        save(make(RECIPES["immediate"]), tmp_path / "lynx")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "lynx").stat().st_mode) == 0o777 & ~mask
    for path in (tmp_path / "lynx").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_merged_change_of_the_weight_is_not_lost_silently(tmp_path):
    model = sparsify(tiny_flux(), Recipe.immediate())
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_q.weight.add_(0.05)
    with pytest.raises(ValueError, match=r"weight of transformer_blocks.0.attn.to_q has changed"):
        save(model, tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []
