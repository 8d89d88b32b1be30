"""Which format a layer gets: the greedy rule on costs made up here, and the whole of it on a tiny FLUX."""

import itertools

import pytest
from calibration_helpers import RIDGE, calls, run
from helpers import (
    flux_call,
    output,
    qwen_call,
    tiny_flux,
    tiny_qwen,
    tiny_wan,
    tiny_z_image,
    wan_call,
    z_image_call,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rtlynx import Budget, CalibrationOptions, Recipe, load, save
from rtlynx.calibration.budget import InputCost, choose, inputs_of
from rtlynx.calibration.output_error import OutputError
from rtlynx.calibration.prices import ModelPrices
from rtlynx.models import sparse_layers, state_of
from rtlynx.models.plan import make_plan

FORMAT_NAMES = ("bf16-sparse", "fp8-dense", "fp8-sparse")
AUTO = {"rank": 4, "ridge": RIDGE, "precision": "auto"}


def costs_of(table):
    """Each input has two readers, called after it."""
    return [InputCost(name, readers(name), format, error, saving) for name, format, error, saving in table]


def readers(name):
    return f"{name}.q", f"{name}.k"


def adds_up(costs):
    """A model in which errors add up."""
    errors = {(layer, cost.format): cost.error / 2 for cost in costs for layer in cost.layers}
    return lambda formats: sum(errors[item] for item in formats.items())


def by_input(choice):
    """Input -> the format of its readers, which is one."""
    found = {}
    for layer, format in choice.formats.items():
        assert found.setdefault(layer[:-2], format) == format
    assert set(choice.formats) == {layer for name in found for layer in readers(name)}
    return found


numbers = st.integers(0, 1000)
tables = st.lists(st.tuples(numbers, numbers), min_size=3, max_size=12).map(
    lambda points: [
        (f"layer {i // 3}", FORMAT_NAMES[i % 3], error / 1000, saving - 50)
        for i, (error, saving) in enumerate(points)
    ]
)


@given(tables, st.floats(0.001, 3))
@settings(max_examples=200, deadline=None)
def test_the_error_stays_within_its_limit(table, limit):
    costs = costs_of(table)
    choice = choose(costs, Budget(error=limit), adds_up(costs))
    assert choice.error <= limit
    assert choice.error == pytest.approx(adds_up(costs)(choice.formats))
    assert set(choice.sparse) | set(choice.dense) == {layer for cost in costs for layer in cost.layers}
    assert not set(choice.sparse) & set(choice.dense)
    by_form = {(cost.name, cost.format): cost.saving for cost in costs}
    assert all(by_form[item] > 0 for item in by_input(choice).items())


@given(tables, st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_enough_is_saved(table, share):
    costs = costs_of(table)
    choice = choose(costs, Budget(speedup_share=share), adds_up(costs))
    by_form = {(cost.name, cost.format): cost.saving for cost in costs}
    names = {cost.name for cost in costs}
    possible = sum(max(0, *(by_form.get((name, format), 0) for format in FORMAT_NAMES)) for name in names)
    reached = sum(by_form[item] for item in by_input(choice).items())
    assert reached >= share * possible * (1 - 1e-6)
    if possible:
        assert choice.speedup_share == pytest.approx(reached / possible)


@given(tables)
@settings(max_examples=100, deadline=None)
def test_no_other_choice_saves_as_much_with_less_error_at_the_steps_of_the_rule(table):
    """Greedy along convex hulls is optimal wherever it stops: compared with every combination."""
    costs = costs_of(table[:9])
    options = {}
    for cost in costs:
        options.setdefault(cost.name, [(0.0, 0.0)]).append((cost.saving, cost.error))
    every = [
        (sum(s for s, _ in picked), sum(e for _, e in picked))
        for picked in itertools.product(*options.values())
    ]
    by_form = {(cost.name, cost.format): cost for cost in costs}
    for share in (0.2, 0.5, 0.8, 1.0):
        choice = choose(costs, Budget(speedup_share=share), adds_up(costs))
        picked = [by_form[item] for item in by_input(choice).items()]
        saving, error = sum(cost.saving for cost in picked), sum(cost.error for cost in picked)
        assert error <= min(e for s, e in every if s >= saving) + 1e-9


def test_an_input_climbs_from_format_to_format():
    table = [
        ("a", "bf16-sparse", 0.4, 50.0),  # above the line from dense to fp8-dense
        ("a", "fp8-dense", 0.1, 50.0),
        ("a", "fp8-sparse", 0.9, 75.0),
        ("b", "fp8-dense", 0.2, 50.0),
        ("b", "fp8-sparse", 0.32, 75.0),
    ]
    costs = costs_of(table)
    choices = [choose(costs, Budget(error=limit), adds_up(costs)) for limit in (0.15, 0.31, 0.45, 1.3)]
    assert [by_input(choice) for choice in choices] == [
        {"a": "fp8-dense"},
        {"a": "fp8-dense", "b": "fp8-dense"},
        {"a": "fp8-dense", "b": "fp8-sparse"},
        {"a": "fp8-sparse", "b": "fp8-sparse"},
    ]


def test_errors_that_grow_together_take_steps_back_one_by_one():
    costs = costs_of(
        [("a", "fp8-dense", 0.1, 50.0), ("a", "fp8-sparse", 0.2, 75.0), ("b", "fp8-dense", 0.1, 9.0)]
    )
    plain = adds_up(costs)
    seen = []

    def measure(formats):
        seen.append(dict(formats))
        return plain(formats) * (len(formats) / 2) ** 2

    choice = choose(costs, Budget(error=0.35), measure)
    a, b = dict.fromkeys(readers("a"), "fp8-sparse"), dict.fromkeys(readers("b"), "fp8-dense")
    assert seen == [{**a, **b}, a]
    assert choice.formats == a
    assert choice.dense == dict.fromkeys(readers("b"), "budget: errors together exceed it")
    assert choice.error == pytest.approx(0.2)


def test_what_is_fixed_uses_up_the_error():
    costs = costs_of([("a", "fp8-dense", 0.1, 50.0), ("b", "fp8-dense", 0.1, 40.0)])
    plain = adds_up(costs)

    def measure(formats):
        others = {name: format for name, format in formats.items() if name != "fixed"}
        return 0.15 * ("fixed" in formats) + plain(others)

    choice = choose(costs, Budget(error=0.3), measure, {"fixed": "fp8-sparse"})
    assert by_input(choice) == {"a": "fp8-dense"}
    assert choice.error == pytest.approx(0.25)


# ------------------------------------------------------------------------------------------- the model


def measured_error(model, data):
    pairs = [(output(model, call).double(), output(tiny_flux(), call).double()) for call in data]
    return float(sum((y - r).square().sum() for y, r in pairs) / sum(r.square().sum() for _, r in pairs))


def test_auto_chooses_among_all_forms_and_keeps_to_the_error(tmp_path):
    heldout = [calls()[7]]
    full, _ = run(recipe=Recipe(rank=4, ridge=RIDGE, precision="fp8"))
    limit = 0.5 * measured_error(full, heldout)
    model, report = run(recipe=Recipe(**AUTO, budget=Budget(error=limit)))
    layers = sparse_layers(model)
    assert len(report.costs) == 2 * 6 + 4  # and the text stream: in eight bits or not
    assert {layer.precision for layer in layers.values()} == {"fp8"}
    kinds = {report.choice.formats[name] for name in layers}
    text = {format for name, format in report.choice.formats.items() if ".ff_context." in name}
    assert text <= {"fp8-dense"}
    assert kinds == {"fp8-dense", "fp8-sparse"}
    for name, layer in layers.items():
        assert (layer.pattern.n == layer.pattern.m) == (report.choice.formats[name] == "fp8-dense")
        assert layer.rank == (0 if report.choice.formats[name] == "fp8-dense" else 4)
    assert measured_error(model, heldout) <= limit
    assert report.choice.error == pytest.approx(measured_error(model, heldout), rel=1e-3)
    assert set(report.solutions) == set(layers)
    # the readers of an input alone in its format
    cost = max(
        (cost for cost in report.costs if report.choice.formats.get(cost.layers[0]) == cost.format),
        key=lambda cost: len(cost.layers),
    )
    assert len(cost.layers) > 2
    alone = tiny_flux()
    for name in cost.layers:
        alone.set_submodule(name, model.get_submodule(name))
    assert cost.error == pytest.approx(measured_error(alone, heldout), rel=1e-3)
    save(model, tmp_path / "auto")
    again = load(tiny_flux(), tmp_path / "auto")
    assert bool((output(again, flux_call(5)) == output(model, flux_call(5))).all())


def test_auto_saves_more_than_any_one_precision_at_the_same_error():
    full, _ = run(recipe=Recipe(rank=4, ridge=RIDGE))
    limit = 0.5 * measured_error(full, [calls()[7]])
    saved = {}
    for precision in ("bf16", "fp8", "auto"):
        _, report = run(recipe=Recipe(**{**AUTO, "precision": precision}, budget=Budget(error=limit)))
        formats = report.choice.formats
        taken = [cost for cost in report.costs if formats.get(cost.layers[0]) == cost.format]
        saved[precision] = sum(cost.saving for cost in taken)
    assert saved["auto"] > saved["fp8"] > saved["bf16"]


def test_forms_by_hand_are_not_up_for_choice():
    name = "transformer_blocks.0.attn.to_q"
    recipe = Recipe(**AUTO, formats={name: "bf16-sparse"}, budget=Budget(speedup_share=0.5))
    model, report = run(recipe=recipe, data=calls(4))
    assert sparse_layers(model)[name].precision == "bf16"
    assert name not in {layer for cost in report.costs for layer in cost.layers}
    assert name in report.solutions
    # k and v are priced beside q, whose preparation they cannot share.
    plan = make_plan(tiny_flux(), recipe)
    q, k, v = inputs_of(plan.layers)["transformer_blocks.0.attention"]
    prices = ModelPrices(plan, report.tokens)
    found = [cost for cost in report.costs if cost.name == k.candidate.reads]
    assert [cost.format for cost in found] == ["fp8-dense", "fp8-sparse"]
    for cost in found:
        assert cost.layers == (k.name, v.name)
        dense, changed = [k.dense(""), v.dense("")], [one.in_format(cost.format) for one in (k, v)]
        assert cost.saving == pytest.approx(prices.us([q, *dense]) - prices.us([q, *changed]))
        assert prices.us([q, *changed]) == pytest.approx(prices.us([q]) + prices.us(changed))


@pytest.mark.parametrize("build", [tiny_flux, tiny_qwen, tiny_wan, tiny_z_image])
def test_readers_of_an_input_share_a_format(build):
    calls_of = {tiny_flux: flux_call, tiny_qwen: qwen_call, tiny_wan: wan_call, tiny_z_image: z_image_call}
    call = calls_of[build]
    recipe = Recipe.recommended(ridge=RIDGE, budget=Budget(speedup_share=0.7))
    model, report = run(build(), recipe, data=[call(seed) for seed in range(2)])
    layers = state_of(model).plan.layers
    formats = {key: {one.format.name for one in of} for key, of in inputs_of(layers).items()}
    assert all(len(found) == 1 for found in formats.values()), formats
    assert len(report.costs) > len(formats)  # there was something to choose
    assert {cost.name for cost in report.costs} == set(formats)
    assert report.choice.speedup_share >= 0.7 * (1 - 1e-9)


@pytest.mark.parametrize(("precision", "options"), [("bf16", 6), ("auto", 2 * 6 + 4)])
def test_each_input_is_measured_once_in_each_format(precision, options, monkeypatch):
    passes, measured = [], OutputError._outputs
    monkeypatch.setattr(OutputError, "_outputs", lambda self: passes.append(self) or measured(self))
    recipe = Recipe(**{**AUTO, "precision": precision}, budget=Budget(speedup_share=0.5))
    run(recipe=recipe, data=calls(4))
    # The dense outputs, each input in each format, and the choice as a whole.
    assert len(passes) == 1 + options + 1


def test_auto_is_not_sequential():
    recipe = Recipe(**AUTO, budget=Budget(speedup_share=0.5))
    model = tiny_flux()
    with pytest.raises(ValueError, match="calibrate one-shot"):
        run(model, recipe=recipe, options=CalibrationOptions(sequential=True), data=calls(3))
    assert not sparse_layers(model)
