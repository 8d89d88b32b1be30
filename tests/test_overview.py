"""Tables and charts of steps show what the results files hold."""

import json
import re
import sys
from pathlib import Path

import pytest
from helpers import SMALL
from PIL import Image
from results_helpers import step, step_results, write_step

from rtlynx.timing.full_models import MODELS
from rtlynx.timing.results import BLOCK_GRAPHS, REFERENCE
from rtlynx.timing.step_variants import (
    DENSE_FP8,
    EVERY_WEIGHT,
    FP8_ATTENTION,
    RECOMMENDED,
    TORCHAO,
)

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs"))

import overview
import speed_plots
import supported_models
import tables
import update

README = tables.Place(Path("README.md"))
SPEED = tables.Place(Path("docs/results/speed.md"))
DASH = "\N{EN DASH}"
# All that a table shows, one after the other, 10 ms apart.
NAMES = (
    *("bf16 eager", REFERENCE, TORCHAO, DENSE_FP8, DENSE_FP8 + FP8_ATTENTION, RECOMMENDED),
    *(RECOMMENDED + FP8_ATTENTION, EVERY_WEIGHT, EVERY_WEIGHT + FP8_ATTENTION),
)
ALL = {name: 110.0 - 10 * place for place, name in enumerate(NAMES)}


def study(root, name, **psnr):
    """A study's results with these rows: name -> PSNR."""
    figures = {row: {"psnr": {"mean": value}, "ssim": {"mean": value / 100}} for row, value in psnr.items()}
    rows = [{"name": row, "n": 256, "figures": of} for row, of in figures.items()]
    file = root / "studies" / "results" / f"quality-{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rows": rows}))


def table_of(text, model):
    """Lines of one model."""
    return [line for line in text.splitlines() if line.startswith(f"| {model} |")]


def test_a_file_of_every_variant_is_shown_with_pictures_beside(tmp_path):
    graphs = [step(RECOMMENDED + BLOCK_GRAPHS, None, 61.5), step(REFERENCE + BLOCK_GRAPHS, None, 100.5)]
    root = write_step(tmp_path, "flux1-dev", "H200", [*(step(*one) for one in ALL.items()), *graphs])
    study(
        root,
        "flux-emoji",
        **{"fp8:dense": 40.0, "attention:dense-fp8": 38.0, "recommended": 39.0},
        **{"attention:recommended": 36.0, "drop:fp8-weights+rotated": 28.0},
    )
    lines = table_of(overview.overview_section(root, SPEED), "FLUX.1-dev")
    assert lines == [
        f"| FLUX.1-dev | {variant} | {gpu} | {wall} | {graphs} | {speed} | 10.0 | {psnr} | {ssim} |"
        for variant, gpu, wall, graphs, speed, psnr, ssim in (
            ("eager bf16", "110.0", "111.0", DASH, "0.91x", DASH, DASH),
            ("compiled bf16", "100.0", "101.0", "100.5", "1.00x", DASH, DASH),
            ("dense fp8 of torchao", "90.0", "91.0", DASH, "1.11x", DASH, DASH),
            ("dense fp8", "80.0", "81.0", DASH, "1.25x", "40.0", "0.400"),
            ("dense fp8, fp8 attention", "70.0", "71.0", DASH, "1.43x", "38.0", "0.380"),
            ("**recommended**", "60.0", "61.0", "61.5", "1.67x", "39.0", "0.390"),
            ("**recommended, fp8 attention**", "50.0", "51.0", DASH, "2.00x", "36.0", "0.360"),
            ("every layer by 2:4 weights", "40.0", "41.0", DASH, "2.50x", "28.0", "0.280"),
            ("every layer by 2:4 weights, fp8 attention", "30.0", "31.0", DASH, "3.33x", DASH, DASH),
        )
    ]
    short = table_of(overview.overview_section(root, README), "FLUX.1-dev")
    assert short == [line for line in lines if "2:4 weights, fp8 attention" not in line]


def test_other_models_are_shown_on_the_site_with_the_size_of_what_they_draw(tmp_path):
    video = {"resolution": 480, "width": 832, "frames": 81}
    write_step(tmp_path, "wan2.2-14b", "H200", {REFERENCE: 900.0, RECOMMENDED: 600.0}, **video)
    root = write_step(tmp_path, "flux1-dev", "H200", ALL)
    on_site = overview.overview_section(root, SPEED)
    wan = (
        "| Wan 2.2 14B | 832x480, 81 frames | **recommended** | 600.0 | 601.0 | \N{EN DASH} | 1.50x | 10.0 |"
    )
    assert wan in on_site.splitlines()
    assert "steps-others.png" in on_site
    assert "`benchmarks/results/step-wan2.2-14b-h200.json`" in on_site
    readme = overview.overview_section(root, README)
    assert "Wan" not in readme
    assert "steps-others.png" not in readme


def test_the_readme_is_short_with_all_variants_of_all_models_measured(tmp_path):
    for model in MODELS:
        write_step(tmp_path, model, "H200", ALL)
    for name in overview.STUDIED.values():
        study(tmp_path, name, **{"fp8:dense": 40.0, "recommended": 39.0})
    text = (Path(update.ROOT) / "README.md").read_text()
    assert len(update.updated(text, Path("README.md"), tmp_path).splitlines()) <= 150


def test_of_several_files_that_of_most_variants_on_the_newest_card_is_shown(tmp_path):
    write_step(tmp_path, "flux1-dev", "H100", {REFERENCE: 100.0, RECOMMENDED: 60.0})
    root = write_step(tmp_path, "flux1-dev", "H200", {REFERENCE: 90.0, DENSE_FP8: 60.0, RECOMMENDED: 50.0})
    write_step(root, "z-image", "H100", {REFERENCE: 80.0, RECOMMENDED: 40.0})
    write_step(root, "z-image", "H200", {REFERENCE: 80.0, DENSE_FP8: None})
    write_step(root, "qwen-image", "H100", {REFERENCE: 280.0, DENSE_FP8: 200.0})
    write_step(root, "qwen-image", "H200", {REFERENCE: 270.0, DENSE_FP8: 190.0})
    shown = {model: file.stem[-4:] for model, file in overview.current_steps(root).items()}
    assert shown == {"flux1-dev": "h200", "qwen-image": "h200", "z-image": "h100"}
    text = overview.overview_section(root, README)
    assert f"| FLUX.1-dev | dense fp8 | 60.0 | 61.0 | {DASH} | 1.50x | 10.0 | {DASH} | {DASH} |" in text
    assert "100.0" not in text
    assert not re.search(r"\| Z-Image \| dense fp8", text)  # not measured
    assert "A step by the recommended recipe is 1.20x as fast (FLUX.1-dev)." in text
    assert '??? note "Earlier: FLUX.1-dev, NVIDIA H100"' in update.steps(root, SPEED)


def test_the_recommended_recipe_is_shown_as_the_mean_of_its_steps(tmp_path):
    rows = [
        step(REFERENCE, 90.0),
        *(step(f"{RECOMMENDED}, {kind} step", ms) for kind, ms in (("sparse", 44.0), ("dense", 60.0))),
        step(RECOMMENDED, 45.0, steps=16, dense_steps=1),
    ]
    root = write_step(tmp_path, "z-image", "H200", rows)
    text = overview.overview_section(root, README)
    assert "| Z-Image | **recommended** (1 of 16 steps dense) | 45.0 | 46.0 |" in text
    assert "44.0" not in text
    table = update.steps(root, SPEED)
    assert "| recommended, sparse step | 44.0 |" in table
    assert "| recommended: 1 of 16 steps dense, mean | 45.0 |" in table


def test_nothing_is_said_where_nothing_was_measured(tmp_path):
    assert update.PARTS["overview"](tmp_path, README) == ""
    assert update.charts(tmp_path) == {}


def test_each_chart_is_of_the_files_whose_models_it_shows(tmp_path):
    write_step(tmp_path, "flux1-dev", "H200", {REFERENCE: 90.0})
    root = write_step(tmp_path, "ltx-2", "H200", {REFERENCE: 90.0})
    own, others = update.charts(root).values()
    assert (list(own), list(others)) == (["flux1-dev"], ["ltx-2"])
    before = update.digest(own.values(), root)
    write_step(root, "ltx-2", "H200", {REFERENCE: 80.0})
    assert update.digest(own.values(), root) == before
    write_step(root, "flux1-dev", "H200", {REFERENCE: 80.0})
    assert update.digest(own.values(), root) != before


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_chart_shows_models_with_and_without_dense_fp8(tmp_path, count):
    models = list(MODELS)[:count]
    rows = {model: {REFERENCE: 90.0, RECOMMENDED: 50.0} for model in models}
    rows[models[0]][DENSE_FP8] = 60.0
    steps = {model: step_results(model, "H200", rows[model]) for model in models}
    speed_plots.draw_steps(steps, tmp_path / "steps.png", "digest")
    with Image.open(tmp_path / "steps.png") as image:
        assert image.text["Source"] == "digest"
        assert image.width > 800
        blue = tuple(bytes.fromhex(speed_plots.BLUE[1:]))  # dense fp8: of one model alone
        pixels = image.convert("RGB")
        columns = {
            x
            for x in range(image.width)
            for y in range(0, image.height, 4)
            if pixels.getpixel((x, y)) == blue
        }
    assert columns
    assert max(columns) - min(columns) < image.width / min(count, speed_plots.COLUMNS)


# -------------------------------------------------------------------------- the table of models


@pytest.mark.parametrize("model", MODELS)
def test_each_full_size_model_stands_at_its_class(model):
    assert model in supported_models.STEPS[type(SMALL[model]()).__name__]


def test_the_table_of_models_says_how_fast_a_step_was_measured(tmp_path):
    listing = tmp_path / supported_models.LISTING.relative_to(supported_models.ROOT)
    listing.parent.mkdir(parents=True)
    listing.write_text(supported_models.LISTING.read_text())
    root = write_step(tmp_path, "flux1-dev", "H200", ALL)
    write_step(root, "qwen-image", "H100 80GB HBM3", {REFERENCE: 280.0, DENSE_FP8: 200.0})
    write_step(root, "z-image", "H200", {REFERENCE: 100.0})
    lines = supported_models.models_section(root, SPEED).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines if " | " in line}
    place = cells["model class"].index("step on H100, H200")
    measured = {name: line[place] for name, line in cells.items() if name != "model class"}
    assert measured.pop("`FluxTransformer2DModel`") == "dense fp8 1.43x, recommended 2.00x (H200)"
    assert measured.pop("`QwenImageTransformer2DModel`") == (
        f"Qwen-Image: dense fp8 1.40x (H100); Qwen-Image-Edit: {DASH}"
    )
    assert set(measured.values()) == {DASH}
