"""The figure of the layers: what it shows is what was measured, and it can be read."""

import itertools
import random

import pytest
import torch
from calibration_helpers import run
from diffusers import FluxTransformer2DModel
from helpers import copy_of, tiny_flux, tiny_qwen, tiny_z_image
from matplotlib.text import Text

from rtlynx import CalibrationReport, Recipe, load, save, sparsify
from rtlynx.calibration.budget import InputCost, inputs_of
from rtlynx.calibration.prices import ModelPrices
from rtlynx.evaluate import plot_layers, save_plot
from rtlynx.evaluate.layer_plots import layer_points
from rtlynx.math.fp8 import E4M3
from rtlynx.models.plan import make_plan
from rtlynx.models.sparsify import apply_plan, state_of
from rtlynx.nn.solution import Solution, stored_shapes

ERROR, OUTPUT_ERROR, SAVED = (
    "error of the layer's output",
    "error at the model's output",
    "modelled time saved, % of all layers' time",
)


def calibrated():
    """A tiny FLUX whose budget chose among formats, and the report."""
    recipe = Recipe.recommended(ridge=0.1, skip=["transformer_blocks.0.ff.net.2"])
    return copy_of("plotted", lambda: run(recipe=recipe))


def columns(figure):
    """Title of each column -> (colour, value) of the markers of each of its panels."""
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    rows = len(figure.axes) // len(titles)
    below = len(titles) == 1 or figure.axes[1].get_title() == ""  # columns are below each other
    found = {title: [] for title in titles}
    for number, axes in enumerate(figure.axes):
        title = titles[number // rows if below else number % len(titles)]
        markers = [line for line in axes.lines if line.get_linestyle() == "None"]
        found[title].append([(one.get_color(), float(y)) for one in markers for y in one.get_ydata()])
    return found


def notes(figure):
    return figure.get_supxlabel()


def test_markers_are_where_calibration_measured_and_the_budget_decided():
    model, report = calibrated()
    drawn = columns(plot_layers(model, report))
    assert list(drawn) == [ERROR, OUTPUT_ERROR, SAVED]
    plan, points = layer_points(model, report)
    by_name = {point.name: point for point in points}
    dense = set(report.dense)
    assert "transformer_blocks.0.ff.net.2" in dense
    assert {name for name, point in by_name.items() if point.format == "dense"} == dense
    assert {n: p.format for n, p in by_name.items() if n not in dense} == dict(report.choice.formats)
    costs = {(layer, cost.format): cost.error for cost in report.costs for layer in cost.layers}
    for title, expected in (
        (ERROR, [one.error for one in report.solutions.values()]),
        (OUTPUT_ERROR, [costs[item] for item in report.choice.formats.items()]),
        (SAVED, [100 * point.saved for point in points if point.format != "dense"]),
    ):
        grey = "#6b6b6b"
        shown = [value for panel in drawn[title] for colour, value in panel if colour != grey]
        assert sorted(shown) == pytest.approx(sorted(expected))
        assert sum(colour == grey for panel in drawn[title] for colour, _ in panel) == len(dense)
    assert {point.depth for point in points} == {0, 1}
    assert len(plan.layers) == len(points)


def test_a_checkpoint_shows_the_errors_of_its_layers_and_says_what_it_lacks(tmp_path):
    model, report = calibrated()
    save(model, tmp_path / "lynx")
    loaded = load(tiny_flux(), tmp_path / "lynx")
    figure = plot_layers(loaded)
    assert list(columns(figure)) == [ERROR, SAVED]
    assert columns(figure)[ERROR] == columns(plot_layers(model, report))[ERROR]
    assert "No error at the model's output: only the report" in notes(figure)


def test_a_plan_without_calibration_shows_time_alone_and_says_why():
    figure = plot_layers(tiny_flux())
    assert list(columns(figure)) == [SAVED]
    assert "No errors: calibration measures them" in notes(figure)
    assert "The budget has not decided yet" in notes(figure)
    model = sparsify(tiny_flux())
    assert "The budget" not in notes(plot_layers(model))


@pytest.mark.parametrize("build", [tiny_flux, tiny_qwen, tiny_z_image])
def test_time_saved_is_that_of_the_formats(build):
    for precision in ("bf16", "fp8"):
        plan, points = layer_points(build(), recipe=Recipe.immediate(precision=precision), tokens=(4096, 512))
        tokens = {"image": 4096, "text": 512, "joint": 4608}
        counts = {layer.name: tokens[layer.candidate.stream] for layer in plan.layers}
        prices, inputs = ModelPrices(plan, counts), inputs_of(plan.layers).values()
        dense = sum(prices.us([layer.dense("")]) for layers in inputs for layer in layers)
        now = sum(prices.us(layers) for layers in inputs)
        assert sum(point.saved for point in points) == pytest.approx(1 - now / dense)
        assert all((point.saved == 0) == (point.format == "dense") for point in points)
        assert {point.format for point in points} > {f"{precision}-sparse"}
    plot_layers(build())


def test_text_layers_count_by_their_tokens():
    def text_share(tokens):
        _, points = layer_points(tiny_flux(), tokens=tokens)
        return sum(point.saved for point in points if point.stream == "text")

    assert 0 < text_share((4096, 1)) < 1e-2 < text_share((4096, 512)) < text_share((64, 512))


def test_what_does_not_belong_together_is_refused():
    model, report = calibrated()
    with pytest.raises(ValueError, match="has its own recipe"):
        plot_layers(model, recipe=Recipe())
    with pytest.raises(ValueError, match="give the model that was calibrated"):
        plot_layers(tiny_flux(), report)
    with pytest.raises(ValueError, match="report is of another model"):
        plot_layers(sparsify(tiny_qwen()), report)
    for tokens in ((1,), (0, 5), (1.5, 2), (True, 2)):
        with pytest.raises(ValueError, match="two whole numbers above 0"):
            plot_layers(model, tokens=tokens)


def test_a_plot_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    figure = plot_layers(tiny_flux())
    file = tmp_path / "layers.svg"
    save_plot(figure, file)
    first = file.read_bytes()
    save_plot(figure, file)
    assert file.read_bytes() == first  # no date, no random ids
    monkeypatch.setattr(figure, "savefig", lambda path, **_: path.write_text("<svg") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_plot(figure, file)
    assert file.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["layers.svg"]
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FileExistsError, match="is not a file"):
        save_plot(figure, tmp_path / "folder.png")


def flux_dev():
    """FLUX.1-dev without weights, as a calibration with random costs would leave it, and its report."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    draw = random.Random(0)
    plan = make_plan(model, Recipe.recommended(dense_sigmas=()))
    inputs = list(inputs_of(plan.sparse).values())
    for readers in inputs:
        format = draw.choice(("fp8-sparse", "fp8-dense"))
        plan = plan.in_formats({one.name: format for one in readers})
    dense = [one for readers in inputs if draw.random() < 0.1 for one in readers]
    plan = plan.leave_dense({one.name: "budget" for one in dense})
    by_name = {layer.name: layer for layer in plan.sparse}
    dtypes = {"weight": E4M3, "weight_scale": torch.float32}

    def solution(layer):
        kinds = {"quantized": True, "refitted": True, "intercept": False}
        shapes = stored_shapes(layer.in_features, layer.out_features, 0, **kinds)
        found = {k: torch.empty(shape, dtype=dtypes[k], device="meta") for k, shape in shapes.items()}
        return Solution(**found, refitted=True, error=10 ** draw.uniform(-4, -1))

    solutions = {name: solution(layer) for name, layer in by_name.items()}
    apply_plan(
        model,
        plan,
        lambda name, layer: solutions[name].install(layer, keep_dense=False),
        base=dict.fromkeys(by_name, "0" * 16),
    )
    state_of(model).errors = {name: one.error for name, one in solutions.items()}
    costs = [
        InputCost(key, tuple(one.name for one in of), of[0].format.name, 10 ** draw.uniform(-6, -2), 100.0)
        for key, of in inputs_of(by_name.values()).items()
    ]
    return model, CalibrationReport(solutions, {}, tuple(costs))


def overlaps(figure):
    """Drawn texts that overlap by more than the space around their letters, or leave the page."""
    drawn = []
    figure.draw_without_rendering()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", lambda text, _renderer: drawn.append(text))
        figure.draw_without_rendering()
    shown = [text for text in dict.fromkeys(drawn) if text.get_visible() and text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    assert len(boxes) > 10
    page = figure.bbox.padded(1)
    cut = [text for text, box in boxes if not (page.contains(*box.min) and page.contains(*box.max))]
    return cut + [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


def test_a_model_of_57_blocks_stays_readable():
    model, report = flux_dev()
    figure = plot_layers(model, report)
    drawn = columns(figure)
    assert list(drawn) == [ERROR, OUTPUT_ERROR, SAVED]
    for panels in drawn.values():
        assert len(panels) == 5
        assert sum(map(len, panels)) == 19 * 12 + 38 * 5
    assert "0 to 18 transformer_blocks, 19 to 56 single_transformer_blocks" in notes(figure)
    width, height = figure.get_size_inches()
    assert width <= 10  # letters of 8.5 points on a page that wide
    assert height < 16
    assert overlaps(figure) == []


def test_small_models_stay_readable():
    model, report = calibrated()
    assert overlaps(plot_layers(model, report)) == []
    figure = plot_layers(tiny_flux())
    assert overlaps(figure) == []
    figure.set_size_inches(4, 4)
    assert overlaps(figure)  # the check sees what it is for


def test_layers_outside_blocks_are_shown():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    figure = plot_layers(sparsify(model))
    assert "0 to 1 of the model" in notes(figure)
    assert sum(map(len, columns(figure)[SAVED])) == 2


def test_a_layer_without_error_is_at_the_lower_edge():
    model, report = calibrated()
    name = next(iter(report.solutions))
    state_of(model).errors = {**state_of(model).errors, name: 0.0}
    drawn = [value for panel in columns(plot_layers(model, report))[ERROR] for _, value in panel]
    assert drawn.count(0.04) == 1 + len(report.dense)
