"""The study's tables on invented results."""

import itertools
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs"))

import picture_goals
import study_tables
from matplotlib.text import Text
from plots import LABELLED, by_noise_level, front
from tables import Place

ON_SITE = Place(Path("docs/results/quality.md"))
SOURCE = study_tables.RESULTS / "quality-x.json"


def row(name, psnr, spread, **changes):
    figures = {"psnr": {"mean": psnr, "spread": spread}}
    figures |= {other: {"mean": 0.5} for other in ("ssim", "perceptual", "frechet", "retrieval")}
    return {
        "name": name,
        "group": "main",
        "sweep": "",
        "pictures": 1000,
        "seeds": [0, 1, 2],
        "n": 3000,
        "steps": 28,
        "figures": figures,
        "errors": {"layer_error": 0.0123, "output_error_weighted": 0.02},
        "modelled_speedup": 1.375,
        "calibration_seconds": 12.3,
        "commit": "abc",
        "device": "a card",
        **changes,
    }


def results(*rows):
    return {
        "model": "zoo:x",
        "architecture": "FluxTransformer2DModel",
        "dtype": "bfloat16",
        "torch": "2",
        "rows": list(rows),
    }


def test_rows_of_the_main_comparison_come_in_the_studys_order():
    document = results(
        row("paper", 22.684, 0.004),
        row("dense:other-seed", 45.57, 0.2, calibration_seconds=None),
        row("dense", None, None, modelled_speedup=None, commit="def", device="another"),
        row("ridge:1", 20.0, None, group="sweep", sweep="ridge"),
    )
    text = study_tables.main_section(document, SOURCE, ON_SITE)
    lines = text.splitlines()
    assert [line.split("`")[1] for line in lines[2:5]] == ["dense", "dense:other-seed", "paper"]
    assert lines[2].startswith("| `dense` | – | 0.500 |")  # noqa: RUF001
    assert "| `dense:other-seed` | 45.57 ± 0.20 |" in text
    assert lines[4] == "| `paper` | 22.68 | 0.500 | 0.500 | 0.500 | 0.500 | 0.012 | 1.38x | 12 |"
    assert "1,000 pictures from each of 3 seeds, 28 steps" in text
    assert "Dense from other noise: 45.6 dB." in text
    assert "another and a card, bfloat16" in text
    assert "commits def, abc (`studies/results/quality-x.json`)" in text


def test_each_sweep_that_was_run_is_a_table():
    swept = (row(f"ridge:{ridge}", 20.0, None, group="sweep", sweep="ridge") for ridge in ("1", "0.01"))
    text = study_tables.sweeps_section(results(row("dense", None, None), *swept))
    assert text.count("**Ridge**") == text.count("**") / 2 == 1
    assert text.index("`ridge:0.01`") < text.index("`ridge:1`")
    assert "| `ridge:1` | 20.00 | 0.500 | 0.500 | 0.0123 | 0.0200 | 1.38x |" in text


def test_every_sweep_of_the_study_has_its_table():
    assert set(study_tables.SWEEPS) == {variant.sweep for variant in study_tables.VARIANTS} - {""}


def test_claims_stand_beside_each_other_model_by_model():
    text = study_tables.claims_section([results(), results() | {"model": "zoo:y"}])
    lines = text.splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines[:4]] == ["x", "y", "x", "y"]
    assert all("**not measured**" in line or "**does not apply**" in line for line in lines)
    lines = study_tables.verdicts_section([results(), results() | {"model": "zoo:y"}]).splitlines()
    assert lines[0] == "| claim | x | y |"
    assert lines[2].endswith("| does not apply | does not apply |")
    assert lines[7].endswith("| not measured | not measured |")


def test_claims_that_fail_say_why_below_the_verdicts():
    def of(model, weights):
        rows = [row("weight-2:4:refit-fp8", weights, 0.0), row("fp8:refit", 20.0, 0.0)]
        rows = [one | {"errors": {"layer_error": 0.0}} for one in rows]
        return results(*rows) | {"model": f"zoo:{model}"}

    lines = study_tables.verdicts_section([of("x", 20.1), of("y", 25.0)]).splitlines()
    [reason] = [line for line in lines if line.startswith("- ")]
    assert reason.startswith("- x, refitted 2:4 weights draw")
    assert reason.endswith(": both draw alike.")


def test_plots_appear_where_they_are(tmp_path):
    folder = tmp_path / study_tables.plots_of(SOURCE)
    folder.mkdir(parents=True)
    assert study_tables.plots_section(SOURCE, ON_SITE, root=tmp_path) == ""
    (folder / "plot-front.png").touch()
    shown = study_tables.plots_section(SOURCE, ON_SITE, root=tmp_path)
    assert shown.endswith("](../study/quality-x/plot-front.png)")
    assert study_tables.model_title(results()) == "x (Flux architecture)"


def test_labels_of_the_pareto_plot_do_not_cover_each_other():
    for file in sorted((study_tables.ROOT / study_tables.RESULTS).glob("quality-*.json")):
        figure = front(json.loads(file.read_text()))
        figure.draw_without_rendering()
        (axes,) = figure.axes
        notes = [note for note in axes.texts if note.get_text()]
        measured = {row["name"] for row in json.loads(file.read_text())["rows"]}
        shown = {label for name, label in LABELLED.items() if name in measured}
        assert {note.get_text() for note in notes} == shown
        boxes = [Text.get_window_extent(note) for note in notes]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        inside = axes.get_window_extent()
        assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in boxes)


def noise_row(recipe, kind, low, high, psnr, ms=None):
    return {"recipe": recipe, "kind": kind, "range": [low, high], "psnr": psnr, "modelled_ms": ms}


def test_the_plot_of_noise_levels_shows_ranges_bounds_and_time():
    rows = [
        noise_row("every-layer", "dense-below", 0.0, 1.0, 36.0, 50.0),
        noise_row("every-layer", "dense-below", 0.0, 0.0, 20.0, 40.0),
        noise_row("every-layer", "dense-below", 0.0, 0.5, 35.0, 45.0),
        noise_row("mix-90", "dense-below", 0.0, 0.0, 24.0, 42.0),
        noise_row("mix-90", "dense-below", 0.0, 1.0, 36.5, 50.0),
        noise_row("every-layer", "sparse-at", 0.5, 1.0, 34.0),
        noise_row("every-layer", "dense-at", 0.5, 1.0, 21.0),
        noise_row("every-layer", "best-dense", None, None, 99.0),
    ]
    ranges, bounds, times = by_noise_level({"rows": rows}).axes
    shown = {lines.get_label(): lines.get_segments()[0].tolist() for lines in ranges.collections}
    assert shown == {
        "sparse here, dense elsewhere": [[0.5, 34.0], [1.0, 34.0]],
        "dense here, sparse elsewhere": [[0.5, 21.0], [1.0, 21.0]],
    }
    by_bound, over_time = (
        {line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in (bounds, times)
    )
    assert by_bound["every layer sparse"] == [[0.0, 20.0], [0.5, 35.0], [1.0, 36.0]]
    assert over_time["90 % of the saving sparse"] == [[42.0, 24.0], [50.0, 36.5]]
    styles = {line.get_label(): line.get_linestyle() for line in bounds.lines}
    assert styles == {"every layer sparse": "-", "90 % of the saving sparse": "None"}


def test_the_plot_of_noise_levels_has_no_panel_of_time_where_none_is_known():
    rows = [noise_row("every-layer", "dense-below", 0, bound, 30.0 + bound) for bound in (0, 1)]
    figure = by_noise_level({"rows": rows})
    assert len(figure.axes) == 2
    assert by_noise_level({"rows": [noise_row("every-layer", "dense-at", 0.0, 0.5, 30.0)]}) is None


def quality_row(name, psnr, ms, pictures=3000):
    return {"name": name, "figures": {"psnr": {"mean": psnr}}, "modelled_ms": ms, "n": pictures}


def below(recipe, bound, psnr, ms, pictures=256):
    row = noise_row(recipe, "dense-below", 0, bound, psnr, ms)
    return row | {"name": f"{recipe}:{bound}", "pictures": pictures}


QUALITY = (
    quality_row("saving:auto-90%", 28.0, 50.0),
    quality_row("dense:other-seed", 32.7, 90.0),
    quality_row("recommended", 32.5, 49.0),
    quality_row("distilled:recommended", 32.96, 50.0),
    quality_row("drop:fp8-weights", 26.0, 50.0, 256),
)
LEVELS = (
    below("every-layer", 0, 25.0, 50.0),
    below("every-layer-distilled", 0, 29.5, 50.0),
    below("every-layer", 0.1, 34.0, 51.9),
    below("every-layer", 0.15, 36.0, 51.9, pictures=192),  # too few
    below("every-layer", 0.2, 38.0, 52.1),  # beyond 4 %
    below("mix-90", 0, 30.0, 53.0),
)


def picture_goals_of(root, model, quality, levels=()):
    """Goal -> what there is today, and what is next."""
    folder = root / study_tables.RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"noise-levels-{model}.json").write_text(json.dumps({"rows": levels}))
    (folder / f"quality-{model}.json").write_text(json.dumps({"model": f"zoo:{model}", "rows": quality}))
    text = picture_goals.goals_section(root, Place(Path("docs/results/goals.md")))
    rows = [line.removeprefix(f"| {model}, ").split(" | ") for line in text.splitlines()[2:]]
    return {goal: (today, following.removesuffix(" |")) for goal, today, following in rows}


EVERY = "every layer in sparse fp8"
CHEAP_STEPS = f"{EVERY}, last steps dense, at 4 % more modelled time: at least 33.0 dB"
TODAY = "`recommended`, distilled or not"


def test_goals_for_pictures_take_the_best_that_costs_little(tmp_path):
    found = picture_goals_of(tmp_path, "qwen-emoji", QUALITY, LEVELS)
    # Rounding does not hide what is missing.
    today, following = found[f"{TODAY}, in the modelled time of `saving:auto-90%`: at least 33.0 dB"]
    assert today == "32.96 dB (3,000 pictures)"
    assert "distillation" in following
    floor = found[f"{TODAY}, beside dense pictures of other noise: at least 32.7 dB"]
    assert floor == ("33.0 dB (3,000 pictures)", "reached")
    assert found[f"{EVERY}: at least 29.0 dB"] == ("29.5 dB (256 pictures)", "reached")
    assert found[CHEAP_STEPS] == ("34.0 dB (256 pictures)", "reached")


def test_rows_of_many_pictures_decide_where_there_are_such(tmp_path):
    measured = quality_row("distilled:fp8-weights+rotated+last-3", 32.0, 51.9)
    found = picture_goals_of(tmp_path, "flux-emoji", [*QUALITY, measured], LEVELS)
    assert found[CHEAP_STEPS][0] == "32.0 dB (3,000 pictures)"
    assert not any("other noise" in goal for goal in found)  # it knows its pictures by heart
    every = quality_row("distilled:fp8-weights+rotated", 28.0, 50.0)
    found = picture_goals_of(tmp_path, "flux-emoji", [*QUALITY, every], LEVELS)
    assert found[f"{EVERY}: at least 29.0 dB"][0] == "28.0 dB (3,000 pictures)"


def test_few_pictures_reach_no_goal(tmp_path):
    few = [below("every-layer", bound, psnr, 50.0, 192) for bound, psnr in ((0, 30.0), (0.1, 35.0))]
    quality = [row for row in QUALITY if not row["name"].startswith("drop")]
    quality.append(quality_row("drop:fp8-weights", 31.0, 50.0, 255))
    found = picture_goals_of(tmp_path, "flux-emoji", quality, few)
    assert found[f"{EVERY}: at least 29.0 dB"][0] == "31.0 dB (255 pictures)"
    assert {found[f"{EVERY}: at least 29.0 dB"][1], found[CHEAP_STEPS][1]} & {"reached"} == set()
    assert found[CHEAP_STEPS][0] == "35.0 dB (192 pictures)"


def test_clothing_has_a_goal_by_its_distance_to_real_pictures(tmp_path):
    def row(name, *by_seed):
        mean = sum(by_seed) / len(by_seed)
        return quality_row(name, None, 50.0) | {"figures": {"frechet": {"mean": mean, "by_seed": by_seed}}}

    dense = [row("dense", 1.5, 1.6), row("dense:other-seed", 1.5, 1.74)]
    goal = "`recommended`, Fréchet distance beside the largest of the dense model's seeds: at most 1.74"
    assert picture_goals_of(tmp_path, "flux-fashion", dense)[goal][0] == "not measured"
    own = row("recommended", 1.6, 1.8)
    assert picture_goals_of(tmp_path, "flux-fashion", [*dense, own]) == {
        goal: ("1.70 (3,000 pictures)", "reached")
    }
    found = picture_goals_of(tmp_path, "flux-fashion", [*dense, row("recommended", 1.7, 1.782)])
    assert found[goal][0] == "1.741 (3,000 pictures)"
