"""Every script of examples/ runs, on the small model in the box."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))
# Arguments that make it quick, a line of what it must print, and the files that it must write.
QUICK = {
    "calibrate_save_load": (
        ["--steps", "2", "--skip", "transformer_blocks.*", "single_transformer_blocks.[1-9]*", "*.proj_out"],
        r"4 layers; compensation leaves \d+% of",
        ["calibrated.png"],
    ),
    "fp8": (["--steps", "1"], r"parameters: 27\.\d MB dense, 1\d\.\d MB with fp8 layers", []),
    "how_sparse_are_activations": (["--steps", "1"], r"0\.\d+  independent normal numbers", []),
    "sparsify_a_pipeline": (["--steps", "1"], "48 layers are sparse", ["dense.png", "sparse.png"]),
    "your_own_model": ([], r"blocks\.1\.fc2: error 0\.\d+", []),
}


def test_every_example_has_its_test():
    assert {script.stem for script in EXAMPLES} == set(QUICK)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_it_runs(script, monkeypatch, tmp_path, capsys):
    arguments, printed, files = QUICK[script.stem]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    assert re.search(printed, capsys.readouterr().out)
    for file in files:
        assert (tmp_path / file).stat().st_size > 500


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_it_is_short_and_says_how_to_run_it(script):
    text = script.read_text()
    assert len(text.splitlines()) < 60
    assert f"python examples/{script.name}" in text
