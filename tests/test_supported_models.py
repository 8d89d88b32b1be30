"""What is decided for every layer of diffusers' transformers is written down, and up to date."""

import difflib
import sys
from importlib.metadata import version
from pathlib import Path

import diffusers
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs"))

import supported_models

TEXT = supported_models.LISTING.read_text()
WRITTEN = supported_models.sections(TEXT)

pytestmark = pytest.mark.skipif(
    TEXT.split()[2] != version("diffusers"), reason=f"written for diffusers {TEXT.split()[2]}"
)


def test_every_transformer_of_diffusers_is_written_down():
    assert list(WRITTEN) == list(supported_models.classes()), f"run {supported_models.COMMAND}"


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_decided_for_every_layer_is_what_is_written_down(name):
    model = supported_models.build(getattr(diffusers, name))
    lines = supported_models.described(model).splitlines()
    changed = "\n".join(difflib.unified_diff(WRITTEN[name].splitlines(), lines, "written", "found", n=0))
    assert not changed, f"{changed}\nread what changed, then run {supported_models.COMMAND}"
