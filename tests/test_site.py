"""The site's pages say what the results files, the docstrings and the recipe say, and their code runs."""

import ast
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import rtlynx
from rtlynx.recipe import FORMAT_NAMES

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs"))

import diagrams
import study_tables
import tables
import update

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page.read_text() for page in DOCS.rglob("*.md")}
STEP = {
    "ours": "the recommended recipe",
    "device": "a card",
    "power_limit_w": 700.0,
    "driver": "1",
    "torch": "2.11",
    "cuda": "13.0",
    "commit": "0123456789abcdef",
    "model": "a model",
    "resolution": 1024,
    "batch": 1,
    "text_tokens": 512,
    "attention": "sdpa",
}
TIMES = {
    "wall_ms": 41.0,
    "linear_ms": 30.0,
    "attention_ms": 6.0,
    "rest_ms": 4.0,
    "peak_gib": 24.5,
    "reason": None,
}


@pytest.mark.parametrize("file", [file for file in update.TEXTS if file.parts[0] == "docs"], ids=str)
def test_generated_parts_are_up_to_date(file):
    text = (ROOT / file).read_text()
    assert update.updated(text, file) == text, "run python docs/update.py"


@pytest.mark.parametrize("name", diagrams.DIAGRAMS)
def test_diagrams_are_up_to_date(name):
    assert (ROOT / diagrams.FOLDER / name).read_text() == diagrams.DIAGRAMS[name]()


def test_steps_on_several_cards_appear_with_their_results(tmp_path):
    place = tables.Place(Path("docs/guides/parallel.md"))
    assert update.PARTS["parallel"](tmp_path, place) == update.PARTS["plan"](tmp_path, place) == ""
    times = {"gpu_time": "graph", "wall_ms": 100.0, "reason": None}
    beside = {"gpu_ms": 90.0, "gpu_time": "graph", "wall_ms": 130.0}
    rows = [
        {"name": "rtlynx fp8-2:4", "arrangement": "one card", "gpu_ms": 90.5, **times},
        {"name": "rtlynx fp8-2:4", "arrangement": "ulysses", "gpu_ms": 50.0, **times, "beside": beside}
        | {"kernels_ms": {"communication": 4.25}, "peak_gib": [17.5, 17.25]},
        {"name": "rtlynx fp8-2:4", "arrangement": "ring", "gpu_ms": None, **dict.fromkeys(times)}
        | {"reason": "no log-sum-exp"},
    ]
    folder = tmp_path / update.RESULTS
    folder.mkdir(parents=True)
    (folder / "parallel-2-x-h200.json").write_text(json.dumps(STEP | {"cards": 2, "rows": rows}))
    lines = [line.strip() for line in update.PARTS["parallel"](tmp_path, place).splitlines()]
    assert '??? note "a model, 1024², 2 a card"' in lines
    ulysses = "| sparse fp8 | ulysses | 50.0 | 90.0 | **1.80x** | 100.0 | 1.30x | 4.2 | 17.5 + 17.2 |"
    assert ulysses in lines
    assert "- sparse fp8, ring: not measured: no log-sum-exp" in lines
    runs = [{"layers": 5, "same": True}, {"layers": 5, "same": True}]
    block = {"runs": runs, "seconds_to_solve": 6.14, "seconds_a_call": 0.2, "peak_gib": 57.5}
    calibration = STEP | {"cards": 2, "image_tokens": 4096, "blocks": {"one": block}}
    (folder / "calibration-x-2-h200.json").write_text(json.dumps(calibration))
    text = update.PARTS["calibration"](tmp_path, place)
    assert "share the calls and end with the same bits. 2 a card (limit 700 W)" in text


def test_the_plan_divides_a_measured_step(tmp_path):
    place = tables.Place(Path("docs/guides/parallel.md"))
    folder = tmp_path / update.RESULTS
    folder.mkdir(parents=True)
    variants = [{"name": name, "gpu_ms": 80.0} for name in ("rtlynx dense fp8", "rtlynx fp8-2:4")]
    step = STEP | {"model": "flux1-dev", "variants": variants}
    (folder / "step-flux1-dev-h200.json").write_text(json.dumps(step))
    lines = update.PARTS["plan"](tmp_path, place).splitlines()
    # 57 blocks, of 4,608 tokens of 3,072 numbers a quarter of four tensors of two bytes: 1.61 GB, 3.6 ms.
    assert lines[2].startswith("| FLUX.1-dev, 1024², 80 | Ulysses | 1.61 / 0.71 | 3.6 / 1.6 | 1.84x | ")
    assert "2048²" not in lines[-1]
    for name, told in (("rtlynx fp8-2:4 (recommended)", False), ("rtlynx fp8-2:4", True)):
        large = STEP | {"resolution": 2048, "variants": [{"name": name, "gpu_ms": 500.0}]}
        (folder / "sizes-flux1-dev-h200.json").write_text(json.dumps({"rows": [large]}))
        lines = update.PARTS["plan"](tmp_path, place).splitlines()
        assert any(line.startswith("| FLUX.1-dev, 2048², 500 | Ulysses |") for line in lines)
        assert ("2048² was measured with every layer by 2:4 activations." in lines[-1]) is told


def test_steps_and_sizes_appear_with_their_results(tmp_path):
    place = tables.Place(Path("docs/results/speed.md"))
    variants = [
        {"name": "bf16 eager", "gpu_ms": 80.0, **TIMES},
        {"name": "bf16 compiled", "gpu_ms": 60.0, **TIMES},
        {"name": "rtlynx fp8-2:4", "gpu_ms": 40.0, **TIMES},
        {"name": "fp8 compiled (torchao)", "gpu_ms": None, **dict.fromkeys(TIMES), "reason": "not installed"},
    ]
    folder = tmp_path / update.RESULTS
    folder.mkdir(parents=True)
    sizes = [{"resolution": 512, "batch": 4, "text_tokens": 32, "commit": "def", "variants": variants}]
    block = {"runs": [{"layers": 5}], "seconds_to_solve": 6.14, "seconds_a_call": 0.2, "peak_gib": 57.5}
    tokens = {"image_tokens": 4096, "text_tokens": 512}
    for name, document in (
        ("step-x", STEP | {"variants": variants}),
        ("sizes-x", STEP | {"rows": sizes}),
        ("calibration-x", STEP | tokens | {"blocks": {"one": block}}),
    ):
        assert update.PARTS[name.partition("-")[0].replace("step", "steps")](tmp_path, place) == ""
        (folder / f"{name}-h100.json").write_text(json.dumps(document))
    parts = [update.PARTS[name](tmp_path, place) for name in ("steps", "sizes", "calibration")]
    lines = [line.strip() for line in "\n".join(parts).splitlines()]
    assert '??? note "Earlier: a model, a card"' in lines
    assert "| sparse fp8 | 40.0 | 30.0 | 6.0 | 4.0 | 41.0 | 24.5 | 1.50x | 1.00x |" in lines
    assert any(line.startswith("| dense fp8 of torchao | – | – |") for line in lines)  # noqa: RUF001
    assert "- dense fp8 of torchao: not measured: not installed" in lines
    assert "| picture | batch | text tokens | compiled bf16, ms | sparse fp8 | wall, ms |" in lines
    assert "| 512² | 4 | 32 | 60.0 | 1.50x | 41 / 41 |" in lines
    assert any("commit 0123456789, batch 4 at def" in line for line in lines)
    assert "| one | 5 | 6.1 | 0.20 | 57.5 |" in lines


def test_stages_of_a_whole_calibration_and_a_distillation_stand_apart_from_those_of_blocks(tmp_path):
    place = tables.Place(Path("docs/results/speed.md"))
    row = {"calls": 57, "seconds": 401.26, "longest_seconds": 12.345, "peak_gib": 61.04}
    whole = STEP | {
        "image_tokens": 4096,
        "text_tokens": 512,
        "prompts": 8,
        "steps_per_prompt": 4,
        "run_seconds": [550.0, 60.4],
        "finished": False,
        "stages": {"moments": row, "budget": row | {"peak_gib": None}},
    }
    trained = whole | {"distill_rank": 32, "distill_batch": 4, "finished": True, "run_seconds": [60.0]}
    folder = tmp_path / update.RESULTS
    folder.mkdir(parents=True)
    (folder / "calibration-whole-x-h100.json").write_text(json.dumps(whole))
    (folder / "distillation-x-h100.json").write_text(json.dumps(trained))
    lines = [line.strip() for line in update.PARTS["calibration"](tmp_path, place).splitlines()]
    assert [line.split('"')[1] for line in lines if line.startswith("???")] == [
        "Calibration of a whole model, a card",
        "Distillation of a whole model, a card",
    ]
    assert lines.count("| moments | 57 | 401.3 | 12.35 | 61.0 |") == 2
    assert "| budget | 57 | 401.3 | 12.35 | – |" in lines  # noqa: RUF001
    text = " ".join(lines)
    assert "610 s in 2 runs, each going on where the one before was cut off; not finished." in text
    assert "60 s in one run." in text
    assert text.count("A training step: a correction of rank 32") == 1


def test_dense_fp8_is_before_bf16_sparsity_as_the_quality_page_says():
    for file in (ROOT / study_tables.RESULTS).glob("quality-*.json"):
        rows = study_tables.rows_of(json.loads(file.read_text()))
        dense = rows["fp8:dense"]
        for row in rows.values():
            speed, psnr = row["modelled_speedup"], row["figures"]["psnr"]["mean"]
            of_bf16 = not any("fp8" in form for form in row["forms"])
            if speed is None or psnr is None or not of_bf16 or row["sweep"] == "cache":
                continue
            assert speed < dense["modelled_speedup"], row["name"]
            assert speed <= 1.01 or psnr < dense["figures"]["psnr"]["mean"], row["name"]


def test_every_public_name_is_on_the_api_page_and_has_a_docstring():
    listed = re.findall(r"^::: rtlynx\.(\w+)$", PAGES["reference/api.md"], re.MULTILINE)
    assert sorted(listed) == sorted(rtlynx.__all__)
    assert all((getattr(rtlynx, name).__doc__ or "").strip() for name in listed)


def test_every_field_of_the_recipe_is_explained_with_its_default():
    rows = re.findall(
        r"^\| (`.*?) \| (`.*?) \|", PAGES["guides/recipes.md"].partition("## Every field")[2], re.MULTILINE
    )
    shown = {
        name: ast.literal_eval(value)
        for names, values in rows
        for name, value in zip(re.findall(r"`(\w+)`", names), re.findall(r"`(.+?)`", values), strict=False)
    }
    recipe = rtlynx.Recipe()
    assert shown == {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    assert all(f"| `{form}` |" in PAGES["guides/recipes.md"] for form in FORMAT_NAMES)


def test_every_recipe_on_the_pages_is_one():
    scope = {"rtlynx": rtlynx, "Recipe": rtlynx.Recipe, "Budget": rtlynx.Budget}
    found = re.findall(r"`(Recipe(?:\.\w+)?\(.*?\)|Budget\(\w+=[\d.]+\))`", PAGES["guides/recipes.md"])
    assert len(found) > 6
    for expression in found:
        assert isinstance(eval(expression, scope), rtlynx.Recipe | rtlynx.Budget)


def python_after(name, mark):
    """The first Python block of a page after `mark`."""
    return re.search(r"```python\n(.*?)```", PAGES[name].partition(mark)[2], re.DOTALL).group(1)


def test_the_operators_run_as_the_reference_says():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (6, 32), "weight": (16, 32), "lowrank_a": (4, 32), "lowrank_b": (16, 4), "bias": (16,)}
    scope = {name: torch.randn(*shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    code = python_after("reference/api.md", "## Kernels as torch operators").splitlines(keepends=True)
    exec("".join(code[:-1]), scope)
    two_calls = scope["y"]
    exec(code[-1], scope)
    torch.testing.assert_close(scope["y"], two_calls, rtol=0, atol=0)


def test_a_kernel_compiles_as_the_page_says(capsys):
    pytest.importorskip("cuda.core")
    exec(python_after("develop/kernels.md", "<!-- report -->"), {})
    assert capsys.readouterr().out.endswith(" ()\n")  # no faults


def test_files_and_macros_of_the_kernel_page_exist():
    text = PAGES["develop/kernels.md"]
    table = text.partition("## What is where")[2].partition("## Macros")[0]
    named = set()
    for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):  # names of one cell lie in one folder
        first, *others = re.findall(r"`([\w/]+\.(?:cuh?|py))`", cell)
        named |= {ROOT / "rtlynx" / first, *((ROOT / "rtlynx" / first).with_name(name) for name in others)}
    for folder in ("cuda", "cuda/sm90", "ops"):
        there = {path for path in (ROOT / "rtlynx" / folder).glob("*.*") if path.name != "__init__.py"}
        assert {path for path in named if path.parent == ROOT / "rtlynx" / folder} == there
    assert all(path.exists() for path in named)
    macros = set(
        re.findall(r"`([A-Z][A-Z0-9_]+)`", text.partition("## Macros")[2].partition("## Compile")[0])
    )
    kernels = ROOT / "rtlynx" / "cuda" / "sm90"
    heads = "".join(path.read_text() for path in kernels.glob("*.cu"))
    assert macros - {"INSTANTIATIONS"} <= set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", heads))


def test_the_site_builds_and_fetches_nothing(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed (extra docs)")
    pytest.importorskip("mkdocstrings_handlers.python", reason="mkdocstrings is not installed (extra docs)")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        fetched = re.findall(
            r"<(?:script|img|link)[^>]+(?:src|href)=\"?((?:https?:)?//[^\" >]+)", page.read_text()
        )
        assert not fetched, page
    assert not list(tmp_path.rglob("*.py"))
    reference = (tmp_path / "reference" / "api" / "index.html").read_text()
    assert all(f'id="rtlynx.{name}"' in reference for name in rtlynx.__all__)
    assert "doc-module" not in reference  # the source alone is read: it finds the function, not its namesake
