"""Files and modules that texts name are there."""

import importlib
import re
from pathlib import Path

import pytest
from test_architecture import FLOORS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("rtlynx", "zoo", "studies", "tests", "benchmarks", "docs", "examples")
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
SOURCES = [
    source
    for folder in FOLDERS
    for kind in ("*.py", "*.cu", "*.cuh")
    for source in (ROOT / folder).rglob(kind)
]
# What these name is not there yet, or no longer: the worked example makes it, the history remembers it.
TO_COME = {"docs/develop/add-a-model.md": {"rtlynx/models/pixart.py"}}
HISTORY = {"CHANGELOG.md"}
PATH = re.compile(rf"(?<![\w/.~-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w/*](?![\w./*-]*\{{)")
MODULE = re.compile(r"`+((?:rtlynx|rtlynx_zoo)(?:\.\w+)+)")
BARE = re.compile(r"(?<![\w/{}.*-])[a-z][a-z0-9_]*\.(?:py|cuh?)\b")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def missing_paths(text):
    """Paths that lead nowhere; words in capitals stand for anything."""
    found = {path: re.sub(r"[A-Z]{4,}(?!\.md)", "*", path.rstrip("/")) for path in PATH.findall(text)}
    return {path for path, pattern in found.items() if not any(ROOT.glob(pattern))}


def resolves(dotted):
    """Whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def is_name_of_code(dotted):
    return not dotted.endswith((".json", ".safetensors"))  # the files of a checkpoint


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    if name_of(page) not in HISTORY:
        assert missing_paths(text) - TO_COME.get(name_of(page), set()) == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_modules_that_a_page_names_exist(page):
    if name_of(page) not in HISTORY:
        named = set(filter(is_name_of_code, MODULE.findall(page.read_text())))
        assert {dotted for dotted in named if not resolves(dotted)} == set()


def test_what_docstrings_and_comments_name_exists():
    there = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    wrong = {}
    for source in SOURCES:
        if source.parts[len(ROOT.parts)] == "tests":
            continue  # they invent names
        text = source.read_text()
        named = set(filter(is_name_of_code, MODULE.findall(text)))
        bad = {dotted for dotted in named if not resolves(dotted)}
        bad |= missing_paths(text) | (set(BARE.findall(text)) - there)
        if bad:
            wrong[name_of(source)] = bad
    assert not wrong


def test_the_map_shows_the_floors_as_they_are():
    page = (ROOT / "docs" / "develop" / "map.md").read_text()
    picture = page.partition("<!-- floors -->")[2].partition("## ")[0]
    drawn = [tuple(re.findall(r"│ (\w+)", line)) for line in picture.splitlines() if re.search(r"│ \w", line)]
    assert drawn == list(reversed(FLOORS))
    for package in (name for floor in FLOORS for name in floor):
        assert re.search(rf"^\| `rtlynx/{package}(?:\.py)?` \|", page, re.MULTILINE)


def test_old_modules_of_the_changelog_are_gone_and_new_ones_there():
    rows = re.findall(r"^  \| (`rtlynx.*?) \| (.*?) \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for old, new in rows:
        for one in re.findall(r"`(rtlynx[\w.]+)`", old):
            assert not resolves(one)
        for one in re.findall(r"`(rtlynx[\w.]+)`", new):
            assert resolves(one)


def test_linters_before_a_commit_are_those_of_the_constraints():
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    hooks = re.findall(r"\[([\w-]+)==([\d.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {name for name, _ in hooks} == {"ruff", "clang-format"}
    assert set(hooks) <= set(pinned.items())


def test_a_name_that_is_not_there_is_found():
    assert missing_paths("see rtlynx/linear.py, `rtlynx/nn/` and rtlynx/cuda/*.py") == {"rtlynx/linear.py"}
    for name in ("rtlynx.nn.sparse_linear.SparseLinear", "rtlynx.save"):
        assert resolves(name)
    for name in ("rtlynx.linear", "rtlynx.nn.sparse_linear.Nothing"):
        assert not resolves(name)
