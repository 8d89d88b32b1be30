"""What the README says is what the committed results file says, and its code runs."""

import importlib.util
import json
import re
from pathlib import Path

import rtlynx

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def load_updater():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs/update_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_the_results_file():
    assert load_updater().updated(README) == README
    results = json.loads((ROOT / "docs/demo/results.json").read_text())
    ours = next(row for row in results["variants"] if row["name"] == "activation-2:4+refit+lowrank")
    assert f"{ours['psnr']:.1f}" in README


def test_every_public_name_that_the_readme_uses_exists():
    used = set(re.findall(r"\brtlynx\.([A-Za-z_]+)\(", README))
    assert len(used) >= 5
    assert used <= set(rtlynx.__all__)


def test_every_recipe_setting_in_the_readme_is_one():
    block = re.search(r"<!-- recipe -->\n```python\n(.*?)```", README, re.DOTALL)
    scope = {"rtlynx": rtlynx}
    exec(block.group(1), scope)
    assert isinstance(scope["recipe"], rtlynx.Recipe)


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)|src=\"(?!https?:)([^\"]+)\"", README):
        assert (ROOT / (target[0] or target[1])).exists(), target
