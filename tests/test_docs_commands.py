"""Every command in a shell block of the texts runs or parses, and every Python block runs or compiles.

Commands on the small model in the box run as they stand, with settings that make them quick. Those that need
a GPU, a model or hours are parsed: each option must be one of the command's.
"""

import ast
import builtins
import contextlib
import importlib
import io
import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import rtlynx_zoo as zoo
import torch
import typer
from diffusers import FluxTransformer2DModel
from zoo_helpers import TINY, emoji_pipeline, randomize

import rtlynx
from rtlynx.cli import commands  # noqa: F401  importing them registers them
from rtlynx.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
# Command on a zoo model -> arguments that make it quick.
DENSE = '["transformer_blocks.*", "single_transformer_blocks.[1-9]*", "*.proj_*", "*.to_[qk]"]'
CALIBRATE = (
    *("--set", f"skip={DENSE}", "--prompts", "prompts.txt", "--pipeline", "num_inference_steps=1"),
    *("--option", "batch_size=1", "--option", "steps_per_prompt=1"),
)
QUICK = {
    "inspect": (),
    "convert": (),
    "calibrate": CALIBRATE,
    "evaluate": ("--images", "1", "--pipeline", "num_inference_steps=1"),
}
PARSED = ("demo", "bench", "precompile", "doctor")  # these are run by tests of their own, or need a GPU


def commands_of(text):
    """The commands of a text's shell blocks that begin with a program of ours, split into words."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        for line in textwrap.dedent(block).replace("\\\n", " ").splitlines():
            for command in re.split(r"&&", line):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words = words[1:]
                if words and words[0] in ("rtlynx", "python", "torchrun"):
                    yield words


FOUND = {(page, " ".join(words)): words for page, text in TEXTS.items() for words in commands_of(text)}
OURS = {key: words for key, words in FOUND.items() if "rtlynx" in words}
SCRIPTS = {key: words for key, words in FOUND.items() if key not in OURS}


def subcommand(words):
    """Arguments of `rtlynx`, also where torchrun starts it."""
    return words[words.index("rtlynx") + 1 :]


def test_every_kind_of_command_is_found():
    assert {words[0] for words in FOUND.values()} == {"rtlynx", "python", "torchrun"}
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {subcommand(words)[0] for words in OURS.values()} == known == {*QUICK, *PARSED}


@pytest.mark.parametrize("key", OURS, ids=lambda key: " ".join(key))
def test_the_command_line_knows_every_argument(key):
    name, *arguments = subcommand(OURS[key])
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)


def test_an_argument_that_is_not_known_is_seen():
    command = typer.main.get_command(app).commands["inspect"]
    with pytest.raises(Exception, match="no-such"):
        command.make_context("inspect", ["MODEL", "--no-such"])


@pytest.mark.parametrize("page", sorted({page for page, words in OURS if "zoo:flux-emoji" in words}))
def test_commands_on_the_model_in_the_box_run_one_after_the_other(page, command, tmp_path, monkeypatch):
    some = [words for (of, _), words in OURS.items() if of == page and "zoo:flux-emoji" in words]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("red heart\nhot dog\n")
    for words in some:
        arguments = subcommand(words)
        code, _, error = command(*arguments, *QUICK[arguments[0]])
        assert code == 0, error


@pytest.mark.parametrize("key", SCRIPTS, ids=lambda key: " ".join(key))
def test_scripts_are_there_and_know_their_options(key, monkeypatch):
    words = SCRIPTS[key][1:]
    while words[0].startswith("--"):  # torchrun's own, with a value each
        words = words[2:]
    script, *arguments = words
    if script == "-m":
        assert importlib.util.find_spec(arguments[0]) is not None
        return
    assert (ROOT / script).is_file()
    options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    if options:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        monkeypatch.syspath_prepend(str((ROOT / script).parent))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert options <= set(re.findall(r"--[\w-]+", printed.getvalue()))


# --------------------------------------------------------------------------------- Python


def python_blocks(text):
    """Python blocks with the mark in front of each, "" where there is none."""
    pattern = r"(?:<!-- (\w+) -->\n)?^( *)```python\n(.*?)^ *```"
    for mark, _, code in re.findall(pattern, text, re.DOTALL | re.MULTILINE):
        yield mark, textwrap.dedent(code)


@pytest.mark.parametrize("page", TEXTS)
def test_python_compiles_and_uses_names_that_exist(page):
    for _, code in python_blocks(TEXTS[page]):
        tree = ast.parse(code)
        compile(code, page, "exec")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in ("rtlynx", "diffusers"):
                    assert hasattr(importlib.import_module(node.value.id), node.attr), ast.unparse(node)
            elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("rtlynx", "diffusers"):
                module = (
                    None if node.module == "rtlynx.models.pixart" else importlib.import_module(node.module)
                )
                assert module is None or all(hasattr(module, one.name) for one in node.names), node.module


RUN = [page for page, text in TEXTS.items() if any(mark == "run" for mark, _ in python_blocks(text))]


@pytest.mark.parametrize("page", RUN)
def test_python_that_is_marked_runs_on_a_tiny_pipeline(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    config = {**zoo.load().transformer.config, **TINY["flux"], "num_attention_heads": 4}

    def pipeline():
        return emoji_pipeline(randomize(FluxTransformer2DModel.from_config(config)))

    scope = {"rtlynx": rtlynx, "torch": torch, "__builtins__": builtins}
    scope |= {"pipe": pipeline(), "other_pipe": pipeline(), "prompts": ["red heart", "hot dog"]}
    for mark, code in python_blocks(TEXTS[page]):
        if mark == "run":
            exec(code, scope)


def test_pages_run_something():
    assert {"docs/guides/calibrate.md", "docs/guides/recipes.md"} <= set(RUN)
