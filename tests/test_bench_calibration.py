"""The benchmark of calibration picks one block of each kind."""

import fnmatch
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import qwen_call, tiny_flux, tiny_qwen, tiny_z_image
from parallel_helpers import torchrun

import rtlynx
from rtlynx import Recipe
from rtlynx.models import make_plan
from rtlynx.timing import card, full_models

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import calibration
from calibration import BLOCKS

SEVERAL = {
    "flux1-dev": lambda: tiny_flux(num_layers=3, num_single_layers=12),
    "qwen-image": tiny_qwen,
    "z-image": tiny_z_image,
}


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        ("flux1-dev", "double", "transformer_blocks.0"),
        ("flux1-dev", "single", "single_transformer_blocks.0"),
        ("qwen-image", "double", "transformer_blocks.0"),
        ("z-image", "layer", "layers.0"),
    ],
)
def test_one_block_of_a_kind_is_calibrated(name, kind, block):
    model = SEVERAL[name]()
    names = {candidate.name for candidate in make_plan(model, Recipe()).layers}
    skip = [glob for glob in BLOCKS[name][kind] if fnmatch.filter(names, glob)]
    plan = make_plan(model, Recipe(skip=tuple(skip)))
    assert {layer.candidate.block for layer in plan.sparse} == {block}


class FakeCard:
    slug = "card"

    def describe(self, commit):
        return {"device": "a card"}


def without_cards():
    """A tiny model, and a CPU that counts no memory."""
    full_models.MODELS["qwen-image"] = full_models.FullModel(
        "qwen-image", lambda: tiny_qwen(num_layers=2), lambda size, seed: [qwen_call(seed=seed)], 8
    )
    full_models.build, full_models.normals = (lambda full: full.build()), (lambda seed: seed)
    card.Card = FakeCard
    torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda: None
    torch.cuda.max_memory_allocated = lambda: 0


def test_two_processes_share_the_calls_and_find_the_same_bits(tmp_path):
    arguments = ["--model", "qwen-image", "--calls", 2, "--out", tmp_path / "out.json"]
    said = torchrun(tmp_path, calibration.__file__, arguments, without_cards)
    assert (tmp_path / "out.json").is_file(), said[0]
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["cards"] == 2
    runs = document["blocks"]["double"]["runs"]
    assert [run["calls"] for run in runs] == [2, 4]
    assert all(run["same"] for run in runs)
    assert "double" not in said[1]  # process 0 alone reports


def test_a_bit_is_seen():
    model = tiny_qwen()
    name = make_plan(model, Recipe()).sparse[0].name
    rtlynx.sparsify(model)
    first = calibration.digest(model)
    weight = model.get_submodule(name).weight.data.view(torch.int32)
    weight[0, 0] ^= 1
    assert calibration.digest(model) != first
