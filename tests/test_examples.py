"""Every script of examples/ runs, on the small model in the box."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from parallel_helpers import torchrun
from PIL import Image

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))
# Arguments that make it quick, a line of what it must print, and the files that it must write.
QUICK = {
    "calibrate_save_load": (
        [
            "--steps",
            "2",
            "--prompts",
            "prompts.txt",
            "--skip",
            "transformer_blocks.*",
            "single_transformer_blocks.[1-9]*",
            "*.proj_out",
        ],
        r"4 layers; compensation leaves \d+% of",
        ["calibrated.png"],
    ),
    "fp8": (["--steps", "1"], r"parameters: 27\.\d MB dense, 1\d\.\d MB with fp8 layers", []),
    "how_sparse_are_activations": (["--steps", "1"], r"0\.\d+  independent normal numbers", []),
    "sparsify_a_pipeline": (["--steps", "1"], "48 layers are sparse", ["dense.png", "sparse.png"]),
    "your_own_model": ([], r"blocks\.1\.fc2: error 0\.\d+", []),
}
SEVERAL_PROCESSES = {"two_gpus"}
ALONE = [script for script in EXAMPLES if script.stem not in SEVERAL_PROCESSES]


def test_every_example_has_its_test():
    assert {script.stem for script in EXAMPLES} == {*QUICK, *SEVERAL_PROCESSES}


@pytest.mark.parametrize("script", ALONE, ids=lambda script: script.stem)
def test_it_runs(script, monkeypatch, tmp_path, capsys):
    arguments, printed, files = QUICK[script.stem]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("hot dog\nrocket\n")
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    assert re.search(printed, capsys.readouterr().out)
    for file in files:
        assert (tmp_path / file).stat().st_size > 500


def test_two_processes_draw_one_picture(monkeypatch, tmp_path):
    """By either split; roundings turn near ties, so that the two pictures are alike, not equal."""
    monkeypatch.chdir(tmp_path)
    (script,) = (one for one in EXAMPLES if one.stem in SEVERAL_PROCESSES)
    pictures = []
    for split in ("tokens", "weights"):
        first, second = torchrun(tmp_path, script, ["--steps", 1, "--split", split])
        assert re.search(r"2 processes drew two_gpus\.png in \d+\.\d s", first), first
        assert "drew" not in second
        pictures.append(np.asarray(Image.open("two_gpus.png").convert("RGB"), float))
    one, other = pictures
    assert abs(one - other).mean() < 0.5 * abs(one - other[::-1]).mean()


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_it_is_short_and_says_how_to_run_it(script):
    text = script.read_text()
    assert len(text.splitlines()) < 60
    start = "torchrun --nproc-per-node 2" if script.stem in SEVERAL_PROCESSES else "python"
    assert f"{start} examples/{script.name}" in text
