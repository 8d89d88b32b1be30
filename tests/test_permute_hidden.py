"""`Recipe.permute_hidden`: the dense model stays as it is, and what MLPs drop costs less."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibration_helpers import ALL_FIT, RIDGE, assert_same, calls, run, solution
from checkpoint_helpers import make
from diffusers import FluxTransformer2DModel
from helpers import (
    MODELS,
    copy_of,
    flux_call,
    in_dtype,
    output,
    relative_error,
    tiny_flux,
    tiny_z_image,
    watched,
)
from mutations import signed
from process_helpers import in_two_processes
from safetensors.torch import load_file, save_file

import rtlynx.calibration.reparameterize
from rtlynx import Budget, CalibrationOptions, CheckpointError, Recipe, calibrate, densify, load, save
from rtlynx.cli.inspection import describe
from rtlynx.math.selection import Pattern, nm_mask, to_groups
from rtlynx.models import sparse_layers, state_of
from rtlynx.models.plan import make_plan
from rtlynx.models.reparameterize import hidden_groups, reparameterize
from rtlynx.models.sparsify import comparable

REFIT = Recipe(rank=None, ridge=RIDGE)
PERMUTED = replace(REFIT, permute_hidden=True)
IMMEDIATE = Recipe.immediate(permute_hidden=True)
BOTH = Recipe(rank=None, ridge=RIDGE, permute_hidden=True, rotate_values=True, intercept=True)
DOWN, SINGLE = "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_out"
# down projection -> its up projections, written out from the architectures
MLPS = {
    "flux": {
        DOWN: ["transformer_blocks.0.ff.net.0.proj"],
        "transformer_blocks.0.ff_context.net.2": ["transformer_blocks.0.ff_context.net.0.proj"],
        SINGLE: ["single_transformer_blocks.0.proj_mlp"],
    },
    "sd3": {
        f"transformer_blocks.{mlp}.net.2": [f"transformer_blocks.{mlp}.net.0.proj"]
        for mlp in ("0.ff", "0.ff_context", "1.ff")
    },
    "qwen": {
        f"transformer_blocks.0.{mlp}.net.2": [f"transformer_blocks.0.{mlp}.net.0.proj"]
        for mlp in ("img_mlp", "txt_mlp")
    },
    "ltx": {DOWN: ["transformer_blocks.0.ff.net.0.proj"]},
    "ltx2": {
        f"transformer_blocks.0.{mlp}.net.2": [f"transformer_blocks.0.{mlp}.net.0.proj"]
        for mlp in ("ff", "audio_ff")
    },
    "wan": {"blocks.0.ffn.net.2": ["blocks.0.ffn.net.0.proj"]},
    "z-image": {
        f"{block}.0.feed_forward.w2": [f"{block}.0.feed_forward.{up}" for up in ("w1", "w3")]
        for block in ("noise_refiner", "context_refiner", "layers")
    },
}
MLPS["chroma"] = MLPS["flux"]


def orders(model):
    plan, bases = state_of(model).plan, state_of(model).reparameterization.bases
    return {one.name: bases[one.name] for one in plan.permuted}


def shuffled(model, **changes):
    """A dense model with randomly permuted hidden features, and the plan."""
    plan = make_plan(model, Recipe.immediate(permute_hidden=True, text_stream="sparse", **changes))
    gen = torch.Generator().manual_seed(5)
    found = {one.name: torch.randperm(one.width, generator=gen) for one in plan.permuted}
    return plan, found, reparameterize(model, plan.permuted, found)


def structured(build):
    """A tiny model whose hidden features differ in strength, strong ones beside each other."""

    def make_it():
        model = build()
        plan = make_plan(model, Recipe.immediate(permute_hidden=True, text_stream="sparse"))
        with torch.no_grad():
            for one in plan.permuted:
                strength = 4.0 ** torch.linspace(1, -1, one.width)
                for name in one.makers[-1:]:  # (of a gated MLP: the layer that no activation follows)
                    layer = model.get_submodule(name)
                    layer.weight.mul_(strength[:, None])
                    if layer.bias is not None:
                        layer.bias.mul_(strength)
        return model

    return copy_of(("structured", build), make_it)


# ---------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", MLPS)
def test_a_permuted_model_computes_the_same(name):
    build, call = MODELS[name]
    call, dense, model = in_dtype(call(3), torch.float64), build().double(), build().double()
    plan, found, _ = shuffled(model)
    assert not plan.unpermuted
    assert {one.name: list(one.makers) for one in plan.permuted} == MLPS[name]
    before, after = dense.state_dict(), model.state_dict()
    for one in plan.permuted:
        order = found[one.name]
        for kind in (f"{up}.{kind}" for up in one.makers for kind in ("weight", "bias")):
            assert kind not in before or torch.equal(after.pop(kind), before.pop(kind)[order])
        was, now = before.pop(f"{one.name}.weight"), after.pop(f"{one.name}.weight")
        first = was.shape[1] - len(order)
        assert torch.equal(now[:, :first], was[:, :first])
        assert torch.equal(now[:, first:], was[:, first:][:, order])
    assert all(torch.equal(after[key], one) for key, one in before.items())
    assert relative_error(output(model, call), output(dense, call)) < 1e-12


@pytest.mark.parametrize(("name", "rotate"), [("flux", True), ("qwen", False), ("z-image", True)])
def test_error_of_down_projections_is_lower(name, rotate):
    build, call = MODELS[name]
    data = [call(seed, timestep=1 - (seed % 4) / 4) for seed in range(8)]
    recipe = replace(REFIT, rotate_values=rotate, text_stream="sparse")
    reports = [
        calibrate(structured(build), calls=data, recipe=one, progress=False)
        for one in (recipe, replace(recipe, permute_hidden=True))
    ]
    assert not reports[1].unpermuted
    for down in MLPS[name]:
        without, permuted = (one.solutions[down].error for one in reports)
        assert permuted < 0.9 * without, (down, permuted, without)


def dropped(model, recipe, layer, data):
    """Share of the energy at the output of one layer that its selection drops, features uncorrelated."""
    plan = make_plan(model, recipe).layer(layer)
    columns = model.get_submodule(layer).weight.detach().norm(dim=0)
    with watched(model, [layer]) as seen:
        for call in data:
            output(model, call)
    x = torch.cat([x.flatten(0, -2) for x, _ in seen[layer]])
    pattern = plan.pattern
    mask = nm_mask(x, pattern.n, pattern.m, pattern.grouping, pattern.parts)
    z = (x * columns).square()
    return float((z * ~mask).sum() / z.sum())


@pytest.mark.parametrize("changes", [{}, {"grouping": "strided"}, {"tp_degree": 2}])
def test_strided_groups_and_shards_are_served_too(changes):
    """By default a single block's hidden features have strided groups, unless its values are rotated."""
    recipe, data = Recipe.immediate(permute_hidden=True, **changes), calls(4)
    model = structured(tiny_flux)
    before = {name: dropped(model, recipe, name, data) for name in (DOWN, SINGLE)}
    report = calibrate(model, calls=data, recipe=recipe, progress=False, options=ALL_FIT)
    assert not [name for name in report.unpermuted if "context" not in name]
    assert orders(model).keys() == before.keys()
    twin = comparable(structured(tiny_flux), model)
    for name, was in before.items():
        assert dropped(twin, recipe, name, data) < 0.9 * was, name
    shards = changes.get("tp_degree", 1)
    for order in orders(model).values():
        parts = order.reshape(shards, -1).sort().values
        assert torch.equal(parts.flatten().long(), torch.arange(len(order)))


@pytest.mark.parametrize(
    ("pattern", "first", "shards", "fits"),
    [
        (Pattern(), 8, 1, True),
        (Pattern(), 8, 2, True),
        (Pattern(), 8, 8, False),  # three features a shard
        (Pattern(), 6, 1, False),  # a group of both
        (Pattern(1, 2), 6, 13, True),
        (Pattern(1, 2), 6, 26, False),
        (Pattern(2, 4, "strided", (8, 24)), 8, 1, True),
        (Pattern(2, 4, "strided", (8, 24)), 8, 2, False),
        (Pattern(2, 4, "strided", (4, 4, 12, 12)), 8, 2, True),
        (Pattern(2, 4, "strided"), 8, 1, False),
    ],
)
def test_groups_of_hidden_features(pattern, first, shards, fits):
    down = next(one for one in make_plan(tiny_flux(), IMMEDIATE).permuted if one.name == DOWN)
    found = hidden_groups(replace(down, width=32 - first, first=first), pattern, shards)
    assert (found is not None) is fits
    if fits:
        whole = {tuple(group) for group in to_groups(torch.arange(32), pattern).tolist()}
        for number, groups in enumerate(found):
            size = (32 - first) // shards
            assert sorted(groups.flatten().tolist()) == list(range(number * size, (number + 1) * size))
            assert {tuple(group) for group in (groups + first).tolist()} <= whole


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (replace(PERMUTED, skip=("*.net.2", "*.proj_out")), "no layer that reads it drops"),
        (replace(PERMUTED, formats={"*": "fp8-dense"}), "no layer that reads it drops"),
        (replace(PERMUTED, tp_degree=256, grouping="adjacent"), "groups of 4 inside 256 shards"),
    ],
)
def test_mlps_that_gain_nothing_are_left_alone(recipe, reason):
    plan = make_plan(tiny_flux(), recipe)
    assert not plan.permuted
    assert plan.unpermuted.keys() == MLPS["flux"].keys()
    assert all(reason in plan.unpermuted[name] for name in (DOWN, SINGLE))


class Doubled(torch.nn.GELU):
    """Another activation."""


def test_other_activations_and_hooks_are_left_alone_and_said_why():
    model = tiny_flux()
    model.single_transformer_blocks[0].act_mlp = Doubled()
    model.transformer_blocks[0].ff.net[0].register_forward_hook(lambda *_: None)
    plan = make_plan(model, replace(PERMUTED, text_stream="sparse"))
    assert [one.name for one in plan.permuted] == ["transformer_blocks.0.ff_context.net.2"]
    assert all("not known to compute feature by feature" in said for said in plan.unpermuted.values())


def test_hidden_features_that_do_not_split_are_left_alone():
    plan = make_plan(tiny_z_image(dim=128), PERMUTED)
    assert not plan.permuted
    assert len(plan.unpermuted) == 3


def test_a_model_without_known_mlps_is_refused():
    model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(8, 8)]))
    with pytest.raises(ValueError, match="MLPs is not known: use permute_hidden=False"):
        make_plan(model, PERMUTED)


# ----------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("balance", ["kinds", "tokens"])
def test_kinds_of_tokens_weigh_as_the_recipe_says(monkeypatch, balance):
    """Of the single block, 64 image tokens and 8 of text in each call."""
    seen = []

    def watch(energies, *_, **__):
        seen.append(energies)
        return torch.arange(energies.shape[1])

    monkeypatch.setattr(rtlynx.calibration.reparameterize, "grouping_permutation", watch)
    data, dense = calls(2), tiny_flux()
    recipe = replace(PERMUTED, balance=balance, grouping="adjacent", skip=("*.net.2",))
    run(recipe=recipe, data=data, options=ALL_FIT)
    with watched(dense, [SINGLE]) as inputs:
        for call in data:
            output(dense, call)
    hidden = torch.cat([x for x, _ in inputs[SINGLE]])[..., 128:]
    energies = (hidden * dense.get_submodule(SINGLE).weight[:, 128:].norm(dim=0)).square()
    image, text = energies[:, 8:].flatten(0, 1).sum(0), energies[:, :8].flatten(0, 1).sum(0)
    share = {"kinds": (1 / (2 * 128), 1 / (2 * 16)), "tokens": (1 / 144, 1 / 144)}[balance]
    (found,) = seen
    assert found.shape[0] == 144
    assert relative_error(found.sum(0), share[0] * image + share[1] * text) < 1e-5


def test_values_are_rotated_as_without_permuted_features():
    both, report = run(recipe=BOTH, data=calls(4))
    rotated, _ = run(recipe=replace(BOTH, permute_hidden=False), data=calls(4))
    bases = state_of(both).reparameterization.bases
    for name, matrix in state_of(rotated).reparameterization.bases.items():
        assert torch.equal(bases[name], matrix)
    assert orders(both).keys() == {DOWN, SINGLE}
    assert report.unpermuted.keys() == {"transformer_blocks.0.ff_context.net.2"}
    assert (
        relative_error(output(comparable(tiny_flux(), both), flux_call()), output(tiny_flux(), flux_call()))
        < 1e-5
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": Budget(speedup_share=0.6), "precision": "auto"},
        {"precision": "fp8", "dense_last_steps": 1, "dense_precision": "fp8"},
    ],
)
def test_with_what_is_recommended(tmp_path, changes):
    model = make(replace(BOTH, **changes))
    error = relative_error(output(model, flux_call(3)), output(tiny_flux(), flux_call(3)))
    assert error < 0.2
    save(model, tmp_path)
    assert torch.equal(output(load(tiny_flux(), tmp_path), flux_call(3)), output(model, flux_call(3)))


def test_a_resumed_calibration_takes_the_order_that_it_found(tmp_path, monkeypatch):
    options = CalibrationOptions(folder=tmp_path)
    first, _ = run(recipe=BOTH, options=options)

    def never(*_, **__):
        raise AssertionError("the order was found before")

    monkeypatch.setattr(rtlynx.calibration.reparameterize, "grouping_permutation", never)
    again, _ = run(recipe=BOTH, options=options)
    assert_same(solution(again), solution(first))
    assert all(torch.equal(orders(again)[name], one) for name, one in orders(first).items())


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, _ = run(recipe=PERMUTED, data=calls(6))
    save_file({**solution(model), **orders(model)}, Path(folder) / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_find_one_order(tmp_path):
    in_two_processes(_one_of_two, str(tmp_path))
    ours, theirs = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert_same(ours, theirs)
    assert not torch.equal(ours[DOWN], torch.arange(512, dtype=torch.int32))


# ----------------------------------------------------------------------------------------------- files


DENSE_CALLS = replace(BOTH, dense_steps=2, text_rows="dense")


@pytest.mark.parametrize("recipe", [IMMEDIATE, DENSE_CALLS], ids=["immediate", "dense steps and rows"])
def test_densify_gives_the_original_weights_back(recipe):
    model, planned = make(recipe), describe(tiny_flux(), recipe)
    assert describe(model)["extra_bytes"] == planned["extra_bytes"]
    before, after = tiny_flux().state_dict(), densify(model).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any("rtlynx_reparameterized" in vars(module) for module in model.modules())


def test_dense_steps_and_rows_run_on_permuted_originals():
    first = flux_call(timestep=1.0)
    assert relative_error(output(make(DENSE_CALLS), first), output(tiny_flux(), first)) < 1e-5


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("flux", PERMUTED), ("flux", DENSE_CALLS), ("flux", IMMEDIATE), ("qwen", BOTH), ("z-image", IMMEDIATE)],
)
def test_a_saved_model_is_loaded_onto_its_base(tmp_path, name, recipe):
    build, call = MODELS[name]
    model = make(recipe, build, call)
    save(model, tmp_path)
    loaded = load(build(), tmp_path)
    assert torch.equal(output(loaded, call(7)), output(model, call(7)))
    assert all(torch.equal(orders(loaded)[down], order) for down, order in orders(model).items())
    save(loaded, tmp_path / "again")
    first, again = (json.loads((path / "rtlynx.json").read_text()) for path in (tmp_path, tmp_path / "again"))
    assert first["version"] == 7
    assert first["permutations"].keys() == orders(model).keys()
    assert again["base_tensors"] == first["base_tensors"]
    with pytest.raises(CheckpointError, match="differs from its base model"):
        load(build(seed=1), tmp_path)


def test_a_whole_model_is_loaded_by_diffusers_and_saved_by_it_alone(tmp_path):
    model = make(PERMUTED)
    model.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(output(loaded, flux_call(7)), output(model, flux_call(7)))
    with pytest.raises(
        ValueError, match=r"from_pretrained, whose files hold .* permuted weights.* use save_pretrained"
    ):
        save(loaded, tmp_path / "two")
    with pytest.raises(ValueError, match="from_pretrained, whose files"):
        comparable(tiny_flux(), loaded)


KEY = f"{DOWN}.hidden_permutation"


@pytest.mark.parametrize(
    ("edit_index", "edit_tensors", "match"),
    [
        (lambda index: index["permutations"].update({DOWN: [64]}), None, "another architecture: it permutes"),
        (
            lambda index: index["permutations"].update({"proj": [4]}),
            None,
            "another architecture: it permutes",
        ),
        (lambda index: index["permutations"].update({DOWN: [4, 4]}), None, "how many hidden features"),
        (lambda index: index["permutations"].update({DOWN: 1 << 40}), None, "how many hidden features"),
        (lambda index: index["permutations"].pop(DOWN), None, "which rtlynx.json does not know"),
        (None, lambda tensors: tensors.pop(KEY), "lacks the tensor"),
        (None, lambda tensors: tensors[KEY].zero_(), "each from 0 to 511 once"),
        (None, lambda tensors: tensors[KEY].sub_(1), "each from 0 to 511 once"),
        (None, lambda tensors: tensors.update({KEY: tensors[KEY].float()}), "of torch.int32 numbers"),
        (None, lambda tensors: tensors.update({KEY: tensors[KEY][:8].clone()}), r"should be \(512,\)"),
    ],
)
def test_damaged_permutations_are_refused(tmp_path, edit_index, edit_tensors, match):
    save(make(PERMUTED), tmp_path)
    index, path = json.loads((tmp_path / "rtlynx.json").read_text()), tmp_path / "rtlynx.safetensors"
    if edit_tensors is not None:
        tensors = load_file(path)
        edit_tensors(tensors)
        save_file(tensors, path)
        index["tensors_sha256"] = rtlynx.io.checkpoint.sha256_of(path)
    if edit_index is not None:
        edit_index(index)
    (tmp_path / "rtlynx.json").write_text(json.dumps(signed(index)))
    model = tiny_flux()
    with pytest.raises(CheckpointError, match=match):
        load(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_flux().parameters(), strict=True))
    assert not sparse_layers(model)
