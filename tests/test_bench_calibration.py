"""The benchmark of calibration picks one block of each kind."""

import fnmatch
import sys
from pathlib import Path

import pytest
from helpers import tiny_flux, tiny_qwen, tiny_z_image

from rtlynx import Recipe
from rtlynx.models import make_plan

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
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
