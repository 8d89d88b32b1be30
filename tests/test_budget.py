"""Which format a layer gets: the greedy rule on costs made up here, and the whole of it on a tiny FLUX."""

import itertools
import json
from pathlib import Path

import pytest
from calibration_helpers import RIDGE, calls, run
from helpers import flux_call, output, tiny_flux
from hypothesis import given, settings
from hypothesis import strategies as st

from rtlynx import Budget, CalibrationOptions, Recipe, load, save
from rtlynx.calibration.budget import PRODUCT_TIME, LayerCost, choose, flops_saved
from rtlynx.models import sparse_layers
from rtlynx.models.plan import make_plan

FORMAT_NAMES = ("bf16-sparse", "fp8-dense", "fp8-sparse")
AUTO = {"rank": 4, "ridge": RIDGE, "precision": "auto"}


def costs_of(table):
    return [LayerCost(name, error, saving, format) for name, format, error, saving in table]


def adds_up(costs):
    """A model in which errors add up."""
    errors = {(cost.name, cost.format): cost.error for cost in costs}
    return lambda formats: sum(errors[item] for item in formats.items())


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
    assert set(choice.sparse) | set(choice.dense) == {cost.name for cost in costs}
    assert not set(choice.sparse) & set(choice.dense)
    by_form = {(cost.name, cost.format): cost.saving for cost in costs}
    assert all(by_form[item] > 0 for item in choice.formats.items())


@given(tables, st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_enough_is_saved(table, share):
    costs = costs_of(table)
    choice = choose(costs, Budget(saving=share), adds_up(costs))
    by_form = {(cost.name, cost.format): cost.saving for cost in costs}
    names = {cost.name for cost in costs}
    possible = sum(max(0, *(by_form.get((name, format), 0) for format in FORMAT_NAMES)) for name in names)
    reached = sum(by_form[item] for item in choice.formats.items())
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
        choice = choose(costs, Budget(saving=share), adds_up(costs))
        picked = [by_form[item] for item in choice.formats.items()]
        saving, error = sum(cost.saving for cost in picked), sum(cost.error for cost in picked)
        assert error <= min(e for s, e in every if s >= saving) + 1e-9


def test_a_layer_climbs_from_form_to_form():
    table = [
        ("a", "bf16-sparse", 0.4, 50.0),  # above the line from dense to fp8-dense
        ("a", "fp8-dense", 0.1, 50.0),
        ("a", "fp8-sparse", 0.9, 75.0),
        ("b", "fp8-dense", 0.2, 50.0),
        ("b", "fp8-sparse", 0.32, 75.0),
    ]
    costs = costs_of(table)
    found = [choose(costs, Budget(error=limit), adds_up(costs)).formats for limit in (0.15, 0.31, 0.45, 1.3)]
    assert found == [
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
        return plain(formats) * len(formats) ** 2

    choice = choose(costs, Budget(error=0.35), measure)
    assert seen == [{"a": "fp8-sparse", "b": "fp8-dense"}, {"a": "fp8-sparse"}]
    assert choice.formats == {"a": "fp8-sparse"}
    assert choice.dense == {"b": "budget: errors together exceed it"}
    assert choice.error == pytest.approx(0.2)


def test_what_is_fixed_uses_up_the_error():
    costs = costs_of([("a", "fp8-dense", 0.1, 50.0), ("b", "fp8-dense", 0.1, 40.0)])
    errors = {"a": 0.1, "b": 0.1, "fixed": 0.15}

    def measure(formats):
        return sum(errors[name] for name in formats)

    choice = choose(costs, Budget(error=0.3), measure, {"fixed": "fp8-sparse"})
    assert choice.formats == {"a": "fp8-dense"}
    assert choice.error == pytest.approx(0.25)


# ------------------------------------------------------------------------------------------- the model


def test_modelled_time_of_each_form():
    layer = make_plan(tiny_flux(), Recipe(rank=4, precision="fp8")).sparse[0]
    product, lowrank = 2 * 100 * 128 * 128, 2 * 100 * 4 * (128 + 128 / 3)
    saved = {format: flops_saved(layer.in_format(format), 100, 3) for format in FORMAT_NAMES}
    assert saved["bf16-sparse"] == pytest.approx(product * (1 - PRODUCT_TIME["bf16-sparse"]) - lowrank)
    assert saved["fp8-dense"] == pytest.approx(product * (1 - PRODUCT_TIME["fp8-dense"]))
    assert saved["fp8-sparse"] == pytest.approx(product * (1 - PRODUCT_TIME["fp8-sparse"]) - lowrank)
    quarter = make_plan(tiny_flux(), Recipe(n=1, rank=4)).sparse[0]
    saved = flops_saved(quarter, 100, 3)
    assert saved == pytest.approx(product * (1 - PRODUCT_TIME["bf16-sparse"] / 2) - lowrank)


def test_times_are_those_of_the_results():
    results = Path(__file__).parent.parent / "benchmarks" / "results"
    bf16, fp8 = (
        json.loads((results / f"linear-{dtype}-h100.json").read_text())["geomean"]
        for dtype in ("bf16", "fp8")
    )
    measured = {
        "dense": 1.0,
        "bf16-sparse": 1 / bf16["gemm_vs_cublas"],
        "fp8-dense": fp8["gemm_vs_cublas_fp8"] / fp8["gemm_vs_cublas_bf16"],
        "fp8-sparse": 1 / fp8["gemm_vs_cublas_bf16"],
    }
    assert pytest.approx(measured, abs=0.02) == PRODUCT_TIME


def measured_error(model, data):
    pairs = [(output(model, call).double(), output(tiny_flux(), call).double()) for call in data]
    return float(sum((y - r).square().sum() for y, r in pairs) / sum(r.square().sum() for _, r in pairs))


def test_auto_chooses_among_all_forms_and_keeps_to_the_error(tmp_path):
    heldout = [calls()[7]]
    full, _ = run(recipe=Recipe(rank=4, ridge=RIDGE, precision="fp8"))
    limit = 0.5 * measured_error(full, heldout)
    model, report = run(recipe=Recipe(**AUTO, budget=Budget(error=limit)))
    layers = sparse_layers(model)
    assert len(report.costs) == 2 * 11 + 6  # and the text stream: in eight bits or not
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
    # a layer alone in its format
    cost = next(cost for cost in report.costs if report.choice.formats.get(cost.name) == cost.format)
    alone = tiny_flux()
    alone.set_submodule(cost.name, model.get_submodule(cost.name))
    assert cost.error == pytest.approx(measured_error(alone, heldout), rel=1e-3)
    save(model, tmp_path / "auto")
    again = load(tiny_flux(), tmp_path / "auto")
    assert bool((output(again, flux_call(5)) == output(model, flux_call(5))).all())


def test_auto_saves_more_than_any_one_precision_at_the_same_error():
    full, _ = run(recipe=Recipe(rank=4, ridge=RIDGE))
    limit = 0.5 * measured_error(full, [calls()[7]])
    flops = {}
    for precision in ("bf16", "fp8", "auto"):
        _, report = run(recipe=Recipe(**{**AUTO, "precision": precision}, budget=Budget(error=limit)))
        saving = {(cost.name, cost.format): cost.saving for cost in report.costs}
        flops[precision] = sum(saving[item] for item in report.choice.formats.items())
    assert flops["auto"] > flops["fp8"] > flops["bf16"]


def test_forms_by_hand_are_not_up_for_choice():
    name = "transformer_blocks.0.attn.to_q"
    recipe = Recipe(**AUTO, formats={name: "bf16-sparse"}, budget=Budget(speedup_share=0.5))
    model, report = run(recipe=recipe, data=calls(4))
    assert sparse_layers(model)[name].precision == "bf16"
    assert name not in {cost.name for cost in report.costs}
    assert name in report.solutions


def test_auto_is_not_sequential():
    recipe = Recipe(**AUTO, budget=Budget(speedup_share=0.5))
    model = tiny_flux()
    with pytest.raises(ValueError, match="calibrate one-shot"):
        run(model, recipe=recipe, options=CalibrationOptions(sequential=True), data=calls(3))
    assert not sparse_layers(model)
