"""Variants of a step: what their names say, and what calibration chose for them."""

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import rtlynx_zoo as zoo
import torch
from helpers import tiny_flux, tiny_qwen, tiny_z_image
from rtlynx_zoo.prompts import ASSETS

from rtlynx import Recipe
from rtlynx.io.checkpoint import read_index
from rtlynx.models import make_plan, sparse_layers
from rtlynx.timing import step, step_variants

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import sizes
import step as step_script


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_what_is_measured_as_ours_is_the_recommended_recipe(precision):
    model = tiny_flux(num_layers=2, num_single_layers=4)
    whole = {layer.name for layer in make_plan(model, Recipe(rank=None)).sparse}
    step_variants.recommended(precision)(model)
    layers = sparse_layers(model)
    halved = {
        name
        for name, layer in layers.items()
        if layer.pattern.n < layer.pattern.m or layer.format.weight_sparse
    }
    work = {name: model.get_submodule(name).weight.numel() for name in whole}
    share = sum(work[name] for name in halved) / sum(work.values())
    if precision == "bf16":
        assert 0.85 < share < 1
        assert all("out" in name for name in whole - halved)
    else:  # dense steps take the place of dense layers
        assert 0.75 < share < 1
    assert {layer.rank for layer in layers.values()} == {0}
    assert {layer.precision for layer in layers.values()} == {precision}
    if precision == "fp8":  # text and what is spared: nothing dropped, in eight bits
        assert whole - halved <= set(layers)
        assert sum("add" in name or "context" in name for name in layers) == 12


def test_what_is_dense_in_fp8_is_what_the_box_s_recommended_solution_has():
    found = read_index(ASSETS / "solutions" / "recommended")
    choice = step_variants.CHOICES[step_variants.FLUX]
    inputs = step_variants.inputs_by_roles(make_plan(zoo.load().transformer, Recipe(rank=None)).sparse)
    for roles, readers in inputs.items():
        dense = [not any(found["layers"][name].get("weight_sparse") for name in some) for some in readers]
        wanted = choice.shares.get(roles, {}).get("fp8-dense", 0.0)
        assert sum(dense) / len(dense) == pytest.approx(wanted), roles
    assert found["recipe"]["dense_sigmas"] == [[0.0, pytest.approx(choice.dense_below, abs=1e-3)]]


@pytest.mark.parametrize("name", ["qwen", "z-image"])
def test_what_other_models_choose_is_what_the_study_s_recommended_row_has(name):
    study = Path(__file__).parent.parent / "studies" / "results" / f"quality-{name}-emoji.json"
    document = json.loads(study.read_text())
    (row,) = (row for row in document["rows"] if row["name"] == "recommended")
    choice = step_variants.CHOICES[type({"qwen": tiny_qwen, "z-image": tiny_z_image}[name]()).__name__]
    for role, forms in row["forms_by_role"].items():
        shares = {form: count / sum(forms.values()) for form, count in forms.items()}
        shares.pop("fp8-weight-sparse", None)
        assert choice.shares.get(role, {}) == pytest.approx(shares), role
    sigmas = row["recipe"]["dense_sigmas"]
    assert sigmas == (
        [] if choice.dense_below is None else [[0.0, pytest.approx(choice.dense_below, abs=1e-3)]]
    )


def test_dense_fp8_is_every_layer_in_eight_bits():
    model = tiny_flux()
    step_variants.dense_fp8(model)
    formats = {
        (layer.precision, layer.pattern.n == layer.pattern.m) for layer in sparse_layers(model).values()
    }
    assert formats == {("fp8", True)}


def test_spared_layers_hold_their_share_and_lie_evenly():
    model = tiny_flux(num_layers=2, num_single_layers=20)
    layers = make_plan(model, Recipe(rank=None)).sparse
    names = spread_out(layers, 0.15)
    work = {layer.name: layer.in_features * layer.out_features for layer in layers}
    assert sum(work[name] for name in names) / sum(work.values()) == pytest.approx(0.15, abs=0.03)
    places = [int(name.split(".")[1]) for name in names if name.startswith("single")]
    assert max(b - a for a, b in itertools.pairwise(places)) <= 4
    outputs = {layer.name for layer in layers if layer.candidate.role in ("attention-out", "single-out")}
    assert set(names) <= outputs
    assert outputs < set(spread_out(layers, 0.5))


def spread_out(layers, share):
    """Layers that hold `share` of all work, outputs first."""
    shares = step_variants.output_shares(layers, share)
    return list(step_variants.spread_out(layers, {role: {"dense": one} for role, one in shares.items()}))


def test_formats_of_one_role_are_spread_over_different_layers():
    layers = make_plan(tiny_flux(num_single_layers=12), Recipe(rank=None)).sparse
    shares = {"single-out": {"fp8-dense": 1 / 2, "fp8-sparse": 1 / 4}}
    found = step_variants.spread_out(layers, shares)
    assert Counter(found.values()) == {"fp8-dense": 6, "fp8-sparse": 3}
    assert all(name.endswith("proj_out") for name in found)


def test_layers_that_read_one_input_get_one_format():
    layers = make_plan(tiny_flux(num_single_layers=4), Recipe(rank=None)).sparse
    found = step_variants.spread_out(layers, {"attention-in + mlp-up": {"fp8-dense": 1 / 2}})
    places = Counter(name.split(".")[1] for name in found)
    assert places == {"1": 4, "3": 4}
    assert {name.split(".")[0] for name in found} == {"single_transformer_blocks"}


def test_designs_are_what_their_names_say(monkeypatch):
    monkeypatch.setattr(step_variants, "normals", lambda seed: torch.randn)
    changes = {variant.name.partition(" (")[2]: variant.form.change for variant in step_variants.DESIGNS}
    model = tiny_flux()
    changes["every layer, text rows dense)"](model)
    layers = sparse_layers(model)
    assert {name for name, layer in layers.items() if layer.text_rows_dense} == {
        name for name in layers if name.startswith("single")
    }
    assert {layer.rank for layer in layers.values()} == {0}
    model = tiny_flux()
    step_variants.every_layer("fp8")(model)
    layers = sparse_layers(model)
    text = [layer for name, layer in layers.items() if "add" in name or "context" in name]
    assert len(text) == 6
    assert {layer.rank for layer in text} == {0}
    assert {layer.rank for layer in layers.values() if layer not in text} == {step_variants.RANK}
    assert {layer.norm for layer in layers.values()} == {"none"}  # as beside a refitted weight
    attention = model.transformer_blocks[0].attn
    assert torch.equal(attention.to_q.lowrank_a, attention.to_v.lowrank_a)


# ---------------------------------------------------------------------------------------- names


def test_variants_are_taken_by_name_each_once_and_in_their_own_order():
    names = [variant.name for variant in step_variants.VARIANTS + step_variants.DESIGNS]
    assert len(set(names)) == len(names)
    assert [one.name for one in step_variants.named(names[::-1])] == names
    assert step_variants.named(None) == list(step_variants.VARIANTS)


def test_unknown_names_are_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(step, "build", lambda *rest: pytest.fail("a model was made"))
    known = step_variants.RECOMMENDED
    with pytest.raises(ValueError, match='no variant is called "rtlynx fp8-2:4"; there are') as refused:
        step.run("flux1-dev", None, seconds=1.0, variants=[known, step_variants.MIXED])
    assert f'"{known}"' in str(refused.value)


def test_the_script_of_steps_says_which_variants_there_are(monkeypatch, capsys):
    lora = step_variants.RECOMMENDED + step_variants.WITH_LORA  # has a comma
    monkeypatch.setattr(sys, "argv", ["step.py", "--model", "flux1-dev", "--variants", lora, "fastest"])
    with pytest.raises(SystemExit):
        step_script.main()
    said = capsys.readouterr().err
    assert 'error: no variant is called "fastest"; there are ' in said
    assert f'"{lora}"' in said


def test_sizes_are_measured_of_variants_that_there_are():
    assert len(step_variants.named(sizes.VARIANTS)) == len(sizes.VARIANTS)
