"""The worked examples of the site are true: their code runs, their diffs apply, their counts are right."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rtlynx.models import plan

ROOT = Path(__file__).resolve().parent.parent
MODEL, PROLOGUE = (
    (ROOT / "docs" / "develop" / f"add-a-{name}.md").read_text() for name in ("model", "prologue")
)
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git, which applies the diff")

# What the new prologue gives, in plain PyTorch; and its kernels, where the compiler is there.
SILU = """
import importlib.util
import torch
from torch.nn.functional import silu
from rtlynx.ops import prologues, sparse_linear
from rtlynx.nn import prologue

x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
y, tail = silu(x.float()).bfloat16(), (None, "adjacent", [], True)
call = prologue.silu_activated(silu, x)
assert torch.equal(call.dense(), silu(x))
for one, other in (
    (prologues.COMPRESS[call.name](*call.arguments, *tail), sparse_linear.compress(y, *tail)),
    (prologues.QUANTIZE[call.name](*call.arguments), prologues.quantize(y)),
):
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other))
if importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.core"):
    from rtlynx.cuda import jit

    new = [one for one in jit.instantiations() if ("PROLOGUE_SILU", 1) in one.defines]
    assert {one.source for one in new} == {"compress.cu", "compress_rows.cu", "quantize.cu"}
    for one in [one for one in new if one.source != "compress.cu"] + new[:1]:
        assert jit.report(one.source, one.defines).faults == ()
print("as the page says")
"""


def block_after(page, mark):
    return re.search(r"```python\n(.*?)```", page.partition(mark)[2], re.DOTALL).group(1)


def diff_of(page):
    """All diffs of a page as one."""
    return "".join(re.findall(r"```diff\n(.*?)```", page, re.DOTALL))


def applied(page, folder):
    """Files and added and removed lines of the page's diff, applied to a copy of what it changes."""
    diff = diff_of(page)
    for name in re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            shutil.copy(ROOT / name, folder / name)
    command = ["git", "apply", "--numstat", "--apply", "-"]
    done = subprocess.run(command, cwd=folder, input=diff, capture_output=True, text=True)
    assert done.returncode == 0, f"mend the page's diff: {done.stderr}"
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return {name: (int(added), int(removed)) for added, removed, name in rows}


def test_a_model_becomes_known_as_the_page_says(monkeypatch):
    scope = {}
    exec(block_after(MODEL, "<!-- architecture -->"), scope)
    exec(block_after(MODEL, "<!-- test -->"), scope)
    with pytest.raises(AssertionError):  # not before it is registered
        scope["test_pixart_is_known"]()
    monkeypatch.setitem(plan.ARCHITECTURES, scope["PIXART"].class_name, scope["PIXART"])
    scope["test_pixart_is_known"]()


@needs_git
def test_a_model_takes_as_little_as_the_page_says(tmp_path):
    assert applied(MODEL, tmp_path) == {"rtlynx/models/plan.py": (2, 0)}
    lines = block_after(MODEL, "<!-- architecture -->").count("\n")
    assert f"one new file of {lines} lines, and\ntwo lines in another" in MODEL
    for line in (tmp_path / "rtlynx/models/plan.py").read_text().splitlines():
        assert len(line) <= 110


@needs_git
def test_a_prologue_is_added_as_the_page_says(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rtlynx", tmp_path / "rtlynx", ignore=ignored)
    changed = applied(PROLOGUE, tmp_path)
    library = [lines for name, lines in changed.items() if name.startswith("rtlynx/")]
    tests = [lines for name, lines in changed.items() if name.startswith("tests/")]
    assert len(library) + len(tests) == len(changed)
    added, added_tests = (sum(plus for plus, _ in one) for one in (library, tests))
    said = f"{len(library)} files of the library ({added} lines)"
    assert f"{said} and {len(tests)} of tests ({added_tests} lines)" in PROLOGUE.replace("\n", " ")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", SILU]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "as the page says\n", done.stderr
