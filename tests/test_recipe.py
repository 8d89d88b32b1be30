"""What a user can choose: every contradiction refused, every value kept through JSON."""

import json
import math
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtlynx import Budget, Recipe

EVERYTHING = {
    "n": 4,
    "m": 8,
    "grouping": "strided",
    "tp_degree": 2,
    "norm": "paper",
    "rank": 0.05,
    "refit": False,
    "intercept": False,
    "rotate_values": False,
    "permute_hidden": False,
    "lowrank_solver": "trained",
    "lowrank_sharing": "own",
    "train_steps": 100,
    "ridge": 0.3,
    "balance": "tokens",
    "text_stream": "sparse",
    "text_rows": "dense",
    "dense_steps": 3,
    "dense_last_steps": 2,
    "dense_sigmas": [[0.0, 0.2]],
    "dense_precision": "fp8",
    "skip": ["*.to_v", "blocks.0.*"],
    "budget": {"error": 0.01, "speedup_share": None},
    "precision": "bf16",
    "drop": "activations",
    "formats": {},
    "score": "magnitude",
    "modulation": "fp8",
}
# What does not go together with the paper's formula and training.
IN_FP8 = {
    "norm": "scale",
    "lowrank_solver": "closed-form",
    "precision": "auto",
    "formats": {"*.to_v": "fp8-dense", "*.to_out.0": "dense", "*": "bf16-sparse"},
}
# What an intercept and rotated values need.
WITH_REFIT = {
    "refit": True,
    "norm": "none",
    "lowrank_solver": "closed-form",
    "text_rows": "sparse",
    "dense_steps": 0,
    "dense_last_steps": 0,
    "dense_sigmas": [],
    "grouping": "adjacent",
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 5}, "n <= m"),
        ({"n": 0}, "n <= m"),
        ({"n": "2"}, "whole numbers"),
        ({"n": 2.0}, "whole numbers"),
        ({"m": None}, "whole numbers"),
        ({"grouping": "blocked"}, "grouping is one of auto, adjacent, strided"),
        ({"tp_degree": 0}, "tp_degree is a whole number above 0"),
        ({"tp_degree": 2.0}, "tp_degree"),
        ({"norm": "l2"}, "norm is one of"),
        ({"norm": None}, "norm is one of"),
        ({"lowrank_solver": "adam"}, "lowrank_solver is one of"),
        ({"lowrank_sharing": []}, "lowrank_sharing is one of"),
        ({"balance": "none"}, "balance is one of"),
        ({"text_stream": True}, "text_stream is one of"),
        ({"text_rows": "keep"}, "text_rows is one of"),
        ({"refit": "yes"}, "refit is true or false"),
        ({"refit": 1}, "refit is true or false"),
        ({"intercept": 1}, "intercept is true or false"),
        ({"rotate_values": None}, "rotate_values is true or false"),
        ({"permute_hidden": 1}, "permute_hidden is true or false"),
        ({"rotate_values": True, "grouping": "strided"}, "strided groups span heads"),
        ({"intercept": True, "refit": False}, "intercept is refitted together with the weight"),
        ({"rank": 0}, "rank"),
        ({"rank": -1}, "rank"),
        ({"rank": 0.0}, "rank"),
        ({"rank": -0.5}, "rank"),
        ({"rank": 1.0}, "share is below 1"),
        ({"rank": 64.0}, "share is below 1"),
        ({"rank": "64"}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": math.nan}, "rank"),
        ({"ridge": 0}, "ridge"),
        ({"ridge": -0.1}, "ridge"),
        ({"ridge": "big"}, "ridge"),
        ({"ridge": math.inf}, "ridge"),
        ({"ridge": None}, "ridge"),
        ({"train_steps": 0}, "train_steps"),
        ({"train_steps": 1.5}, "train_steps"),
        ({"dense_steps": -1}, "dense_steps"),
        ({"dense_last_steps": -1}, "dense_last_steps"),
        ({"dense_sigmas": [0.1, 0.2]}, "dense_sigmas is a list of"),
        ({"dense_sigmas": [(0.2, 0.1)]}, "dense_sigmas is a list of"),
        ({"dense_sigmas": [(0.2, "x")]}, "dense_sigmas is a list of"),
        ({"dense_precision": "fp16"}, "dense_precision is one of bf16, fp8"),
        ({"dense_steps": 0.5}, "dense_steps"),
        ({"dense_steps": True}, "dense_steps"),
        ({"skip": "*.to_v"}, "skip is a list"),
        ({"skip": [1]}, "skip is a list"),
        ({"skip": 5}, "skip is a list"),
        ({"skip": None}, "skip is a list"),
        ({"budget": 0.5}, "budget"),
        ({"budget": {}}, "one limit"),
        ({"budget": {"error": 0.1, "speedup_share": 0.5}}, "one limit"),
        ({"budget": {"error": 0}}, "error is a number above 0"),
        ({"budget": {"error": "small"}}, "error is a number above 0"),
        ({"budget": {"speedup_share": 1.5}}, "speedup_share is a share"),
        ({"budget": {"speedup_share": 0}}, "speedup_share is a share"),
        ({"precision": "int8"}, "precision is one of bf16, fp8, auto"),
        ({"precision": None}, "precision is one of"),
        ({"formats": ["*"]}, "formats is a mapping"),
        ({"formats": {1: "dense"}}, "formats is a mapping"),
        (
            {"formats": {"*.to_v": "fp8"}},
            r"the format of '\*.to_v' is one of bf16-sparse, fp8-sparse, fp8-weight-sparse, fp8-dense, d",
        ),
        # contradictions
        ({"precision": "auto"}, "give a budget"),
        ({"precision": "fp8", "norm": "paper", "refit": False}, "fp8 layers know neither"),
        (
            {"formats": {"*": "fp8-dense"}, "lowrank_solver": "trained", "refit": False},
            "fp8 layers know neither",
        ),
        ({"refit": True, "norm": "scale"}, "norm compensation stays off"),
        ({"norm": "paper"}, "norm compensation stays off"),
        ({"lowrank_solver": "trained"}, "needs a rank and refit=False"),
        ({"lowrank_solver": "trained", "refit": False, "rank": None}, "needs a rank and refit=False"),
    ],
)
def test_values_that_make_no_sense_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        Recipe.from_dict(settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rnak": 4}, "unknown recipe key 'rnak'; did you mean 'rank'?"),
        ({"text_row": "dense"}, "did you mean 'text_rows'?"),
        ({"Grouping": "auto"}, "did you mean 'grouping'?"),
        ({"zzz": 1}, "unknown recipe key 'zzz'; known: balance, budget"),
        ({"budget": {"eror": 0.1}}, "unknown budget key 'eror'; did you mean 'error'?"),
        ({1: 2}, "unknown recipe key 1"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_known_one(settings, message):
    with pytest.raises(ValueError, match=r"unknown") as refused:
        Recipe.from_dict(settings)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"rank"', '{"rank": 0}', '{"rank": NaN}', "{'n': 2}"]
)
def test_json_that_is_no_recipe_is_refused(text):
    with pytest.raises(ValueError, match=r"recipe|rank"):
        Recipe.from_json(text)


@pytest.mark.parametrize("key", EVERYTHING)
def test_each_setting_survives_json(key):
    assert key in Recipe().to_dict()
    settings = {**EVERYTHING, **IN_FP8} if key in ("precision", "formats") else EVERYTHING
    if key == "drop":
        settings = {"drop": "auto", "precision": "auto", "rank": None, "budget": {"speedup_share": 0.5}}
    if key in ("intercept", "rotate_values", "permute_hidden"):
        settings = {**EVERYTHING, **WITH_REFIT, key: True}
    assert settings[key] != Recipe().to_dict()[key] or key == "score"  # (there is one)
    recipe = Recipe.from_dict(settings)
    assert json.loads(json.dumps(recipe.to_dict()))[key] == settings[key]


def test_round_trip():
    fp8 = Recipe.from_dict({**EVERYTHING, **IN_FP8})
    presets = (Recipe(), Recipe.recommended(), Recipe.immediate(), Recipe.dense_fp8(), Recipe.paper())
    for recipe in (*presets, Recipe.from_dict(EVERYTHING), fp8):
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert Recipe.from_json(json.dumps(recipe.to_dict())) == recipe
        assert hash(recipe) == hash(Recipe.from_dict(recipe.to_dict()))
    assert set(EVERYTHING) == set(Recipe().to_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop": "both"}, "drop is one of activations, weights, auto; got 'both'"),
        ({"drop": "weights"}, "drop='weights' is for layers in fp8, got precision='bf16'"),
        ({"drop": "auto", "precision": "fp8"}, "drop='auto' lets the budget choose, got precision='fp8'"),
        ({"drop": "weights", "precision": "fp8"}, "give rank=None, got rank='auto'"),
        ({"drop": "weights", "precision": "fp8", "rank": None, "n": 1}, "give n=2, got n=1"),
        ({"drop": "weights", "precision": "fp8", "rank": None, "n": 4, "m": 8}, "give n=2, got n=4"),
        ({"drop": "weights", "precision": "fp8", "rank": None, "refit": False}, "give refit=True, got"),
        ({"formats": {"*": "fp8-weight-sparse"}}, "give rank=None, got rank='auto'"),
    ],
)
def test_layers_that_drop_weights_need_what_calibration_finds(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**settings)
    assert Recipe(drop="weights", precision="fp8", rank=None).needs_calibration


@pytest.mark.parametrize(
    ("changes", "drop"),
    [
        ({}, "auto"),
        ({"precision": "fp8", "budget": None}, "weights"),
        ({"precision": "bf16"}, "activations"),
        ({"rank": 16}, "activations"),
        ({"refit": False}, "activations"),
        ({"m": 8, "n": 4}, "activations"),
        ({"drop": "activations"}, "activations"),
    ],
)
def test_what_the_recommended_recipe_drops(changes, drop):
    assert Recipe.recommended(**changes).drop == drop


def test_the_dictionary_is_not_changed_or_kept():
    settings = {"skip": ["a"], "budget": {"speedup_share": 0.5}, "formats": {"a": "dense"}}
    recipe = Recipe.from_dict(settings)
    settings["formats"]["b"] = "dense"
    assert recipe.formats == {"a": "dense"}
    settings["skip"].append("b")
    settings["budget"]["speedup_share"] = 0.1
    assert recipe.skip == ("a",)
    assert recipe.budget == Budget(speedup_share=0.5)
    assert Recipe(skip=["x", "y"]).skip == ("x", "y")


@pytest.mark.parametrize(
    ("rank", "k", "expected"),
    [
        (None, 3072, 0),
        (64, 3072, 64),
        (64, 32, 32),  # never above k
        (64 / 3072, 3072, 64),  # the paper's share
        (64 / 3072, 12288, 256),
        (64 / 3072, 15360, 320),
        (0.02, 256, 5),
        (0.02, 128, 4),  # a share gives at least four
        (0.001, 3072, 4),
        (0.02, 2, 2),
        (0.5, 100, 50),
        (1, 100, 1),
        ("auto", 256, 5),
        ("auto", 128, 4),
        ("auto", 3072, 61),
        ("auto", 12288, 64),  # what the kernels do at little cost
        ("auto", 2, 2),
    ],
)
def test_rank_of_a_layer(rank, k, expected):
    assert Recipe(rank=rank).rank_for(k) == expected


@given(st.one_of(st.integers(1, 2**20), st.floats(1e-6, 0.999)), st.integers(1, 20000))
@settings(max_examples=100, deadline=None)
def test_rank_is_always_possible(rank, k):
    assert 1 <= Recipe(rank=rank).rank_for(k) <= k


def test_default_is_the_one_that_draws_best():
    recipe = Recipe()
    assert (recipe.n, recipe.m, recipe.refit, recipe.text_stream) == (2, 4, True, "dense")
    assert recipe.rank_for(3072) > 0
    assert recipe.ridge == "auto"
    assert recipe.layer_norm == "none"


def test_the_recommended_recipe_has_no_branch_and_leaves_layers_dense():
    recipe = Recipe.recommended()
    assert (recipe.refit, recipe.rank, recipe.precision) == (True, None, "auto")
    assert recipe.budget == Budget(speedup_share=0.9)
    assert (recipe.rotate_values, recipe.intercept) == ("auto", True)
    assert (recipe.dense_sigmas, recipe.dense_precision) == ("auto", "fp8")
    assert recipe.needs_calibration


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"budget": Budget(error=0.01)},
        {"budget": None, "precision": "fp8"},
        {"dense_last_steps": 2},
        {"dense_sigmas": ()},
        {"dense_precision": "bf16"},
        {"refit": False},
        {"grouping": "strided"},
    ],
)
def test_the_recommended_recipe_leaves_out_what_changes_rule_out(changes):
    recipe = Recipe.recommended(**changes)
    assert {name: getattr(recipe, name) for name in changes} == changes
    assert recipe.intercept is recipe.refit
    assert recipe.rotate_values == ("auto" if recipe.grouping == "auto" else False)
    open_steps = {"refit", "grouping"} >= changes.keys()
    assert recipe.chooses_dense_steps is open_steps


def test_what_needs_what():
    assert not Recipe.immediate().needs_calibration
    assert Recipe.immediate().layer_norm == "scale"
    assert Recipe.immediate(norm="none").layer_norm == "none"
    assert Recipe.immediate(rank=4).needs_calibration
    assert Recipe.immediate(refit=True).needs_calibration
    assert Recipe.immediate(budget=Budget(speedup_share=0.5)).needs_calibration
    paper = Recipe.paper()
    assert (paper.layer_norm, paper.refit, paper.grouping, paper.lowrank_sharing) == (
        "scale",
        False,
        "adjacent",
        "own",
    )
    for fp8 in ({"precision": "fp8"}, {"formats": {"*": "fp8-dense"}}):
        assert not Recipe.immediate(**fp8).needs_calibration


def test_the_first_form_that_matches_counts():
    recipe = Recipe(formats={"blocks.0.*": "dense", "*.to_v": "fp8-dense"})
    assert recipe.fixed_format("blocks.0.to_v") == "dense"
    assert recipe.fixed_format("blocks.1.to_v") == "fp8-dense"
    assert recipe.fixed_format("blocks.1.to_q") is None


def test_former_names_are_read_and_warned_of():
    former = {"forms": {"*.to_v": "dense"}, "budget": {"saving": 0.5}}
    recipe = Recipe.from_dict(former)  # a file of an older version: nothing to warn of
    assert recipe == Recipe(formats={"*.to_v": "dense"}, budget=Budget(speedup_share=0.5))
    with pytest.warns(DeprecationWarning, match="Recipe.forms is called formats now"):
        assert Recipe(forms={"*.to_v": "dense"}).formats == {"*.to_v": "dense"}
    with pytest.warns(DeprecationWarning, match="Budget.saving is called speedup_share now"):
        assert Budget(saving=0.5) == Budget(speedup_share=0.5)
    with pytest.warns(DeprecationWarning, match="called formats now"):
        assert recipe.forms == recipe.formats
    with pytest.raises(ValueError, match="former name of formats: give one of them"):
        Recipe(forms={}, formats={})


def test_pickles_of_earlier_versions_keep_what_they_say():
    old = Budget(speedup_share=0.9)
    old.__dict__["saving"] = old.__dict__.pop("speedup_share")  # as version 0.1 pickled it
    assert pickle.loads(pickle.dumps(old)) == Budget(speedup_share=0.9)
    old = Recipe(formats={"*.to_v": "dense"})
    old.__dict__["forms"] = old.__dict__.pop("formats")
    assert pickle.loads(pickle.dumps(old)) == Recipe(formats={"*.to_v": "dense"})


def test_a_budget_is_no_bare_number():
    with pytest.raises(ValueError, match=r"budget is Budget\(error=x\) or .*, got 0.2"):
        Recipe(budget=0.2)


@pytest.mark.parametrize("steps", [2, 4, 10, 28])
def test_a_range_from_0_holds_for_the_last_of_several_steps(steps):
    """However few: nothing corrects its errors."""
    recipe = Recipe(dense_sigmas=((0.0, 0.05),), dense_precision="fp8")
    sigmas = [1 - step / steps for step in range(steps)]
    dense = [recipe.is_dense_step(step, steps, sigma) for step, sigma in enumerate(sigmas)]
    assert dense == [*[False] * (steps - 1), True]
    below = Recipe(dense_sigmas=((-1.0, 0.05),), dense_precision="fp8")
    assert [below.is_dense_step(step, steps, sigma) for step, sigma in enumerate(sigmas)] == dense
    above = Recipe(dense_sigmas=((0.01, 0.02),), dense_precision="fp8")
    assert not any(above.is_dense_step(step, steps, sigma) for step, sigma in enumerate(sigmas))


def test_a_single_step_is_dense_only_within_its_range():
    assert not Recipe(dense_sigmas=((0.0, 0.5),)).is_dense_step(0, 1, 1.0)
    assert Recipe(dense_sigmas=((0.0, 1.0),)).is_dense_step(0, 1, 1.0)
