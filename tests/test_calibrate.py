"""Calibration end to end on a tiny FLUX: what it solves, how it samples, one process or two."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from calibration_helpers import (
    ALL_FIT,
    JOINT,
    PAPER,
    PROMPTS,
    REFIT,
    RIDGE,
    SINGLE,
    UNSEEN,
    assert_same,
    calls,
    layer_errors,
    run,
    sample,
    solution,
)
from formula_helpers import slow_mask
from helpers import TEXT_TOKENS, output, relative_error, tiny_flux, tiny_z_image, watched, z_image_call
from pipeline_helpers import TinyPipeline
from process_helpers import in_two_processes
from safetensors.torch import load_file, save_file

import rtlynx.calibration.run
from rtlynx import (
    CalibrationOptions,
    Recipe,
    nm_mask,
    sparsify,
)
from rtlynx.calibration.calls import CallStore
from rtlynx.calibration.moments import RunningMoments
from rtlynx.calibration.progress import ProgressBar
from rtlynx.calibration.solve import solve_lowrank
from rtlynx.calibration.train import train_lowrank
from rtlynx.math.selection import Pattern, select
from rtlynx.models import sparse_layers
from rtlynx.models.sparsify import state_of

# ---------------------------------------------------------------------------------------- what it solves


@pytest.mark.parametrize("recipe", UNSEEN)
def test_error_on_unseen_calls_is_lower_than_without(recipe):
    reference, unseen = tiny_flux(), calls(3, first=100)
    immediate = sparsify(tiny_flux(), Recipe.immediate(norm=recipe.layer_norm, grouping=recipe.grouping))
    model, report = run(recipe=recipe)
    before, after = layer_errors(immediate, reference, unseen), layer_errors(model, reference, unseen)
    assert set(after) == set(before) == set(report.solutions)
    for name in after:
        assert after[name] < before[name], name
    assert sum(after.values()) < (0.8 if recipe.refit else 0.97) * sum(before.values())


def test_reported_errors_are_those_of_the_held_out_calls():
    model, report = run(recipe=JOINT)  # of eight calls the last is held out
    before = layer_errors(sparsify(tiny_flux(), Recipe.immediate(norm="none")), tiny_flux(), [calls()[7]])
    after = layer_errors(model, tiny_flux(), [calls()[7]])
    for name, found in report.solutions.items():
        if not name.startswith(SINGLE):  # where text and image are balanced, see below
            assert found.error_before == pytest.approx(before[name], rel=1e-3)
            assert found.error == pytest.approx(after[name], rel=1e-3)
        assert found.ridge == RIDGE


def ridge_regression(xs, weights_of, original, pattern, ridge):
    """W' by least squares on stacked tokens, from the definition: no moments, no closed form.

    minimises sum_t w_t ||s_t W'^T - x_t W^T||² + lam ||W' - W||², the w_t adding up to 1.
    """
    x = torch.cat([one.reshape(-1, one.shape[-1]) for one in xs]).double()
    root = torch.cat([one.reshape(-1, 1) for one in weights_of]).double().sqrt()
    widths = pattern.widths(x.shape[-1])
    s = x * slow_mask(x.float(), grouping=pattern.grouping, widths=widths)
    w = original.detach().double()
    lam = ridge * ((root * s).square().sum(0)).mean()
    eye = torch.eye(x.shape[-1], dtype=torch.float64) * lam.sqrt()
    left = torch.cat((root * s, eye))
    right = torch.cat((root * (x @ w.T), eye @ w.T))
    return torch.linalg.lstsq(left, right).solution.T


@pytest.mark.parametrize("balance", ["kinds", "tokens"])
def test_refit_is_the_least_squares_solution_with_balanced_kinds_of_tokens(balance):
    reference, data = tiny_flux(), calls(4)
    model, _ = run(recipe=Recipe(rank=None, ridge=RIDGE, balance=balance), options=ALL_FIT, data=data)
    names = ["transformer_blocks.0.attn.to_out.0", f"{SINGLE}.attn.to_k"]
    with watched(reference, names) as seen:
        for call in data:
            output(reference, call)
    for name in names:
        xs = [x for x, _ in seen[name]]
        rows, count = xs[0].shape[1], len(xs)
        one = torch.full((1, rows, 1), 1 / (rows * count))
        if balance == "kinds" and name.startswith(SINGLE):
            one[:, :TEXT_TOKENS] = 0.5 / (TEXT_TOKENS * count)
            one[:, TEXT_TOKENS:] = 0.5 / ((rows - TEXT_TOKENS) * count)
        layer = model.get_submodule(name)
        original = reference.get_submodule(name).weight
        expected = ridge_regression(xs, [one] * count, original, layer.pattern, RIDGE)
        assert relative_error(layer.weight - original, expected - original) < 2e-3, name


def test_dense_text_rows_are_no_business_of_the_solver():
    reference, data = tiny_flux(), calls(4)
    recipe = Recipe(rank=None, ridge=RIDGE, text_rows="dense")
    model, report = run(recipe=recipe, options=ALL_FIT, data=data)
    name = f"{SINGLE}.attn.to_v"
    with watched(reference, [name]) as seen:
        for call in data:
            output(reference, call)
    xs = [x[:, TEXT_TOKENS:] for x, _ in seen[name]]
    weight = torch.full((*xs[0].shape[:2], 1), 1 / (xs[0].shape[1] * len(xs)))
    layer, original = model.get_submodule(name), reference.get_submodule(name).weight
    expected = ridge_regression(xs, [weight] * len(xs), original, layer.pattern, RIDGE)
    assert relative_error(layer.weight - original, expected - original) < 2e-3
    joint = [layer for name, layer in sparse_layers(model).items() if name.startswith(SINGLE)]
    kept = sum(layer.in_features * layer.out_features * 4 for layer in joint)
    assert report.extra_bytes == kept


def test_parameters_are_contiguous_so_that_safetensors_can_save_them(tmp_path):
    model, _ = run(data=calls(3))
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    save_file(model.state_dict(), tmp_path / "model.safetensors")


def test_readers_of_one_tensor_share_their_down_factor_or_do_not():
    for recipe, shared in ((JOINT, True), (PAPER, False)):
        model, _ = run(recipe=recipe, data=calls(3))
        q, k = (model.get_submodule(f"{SINGLE}.{name}") for name in ("attn.to_q", "proj_mlp"))
        assert q.rank == k.rank == 4
        assert torch.equal(q.lowrank_a, k.lowrank_a) == shared


def test_default_rank_and_extra_bytes():
    model, report = run(recipe=Recipe(ridge=RIDGE), data=calls(3))
    layers = sparse_layers(model)
    assert layers["transformer_blocks.0.attn.to_q"].rank == 4  # 2 % of 128, but at least 4
    assert layers[f"{SINGLE}.proj_out"].rank == 13  # 2 % of 640
    factors = sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers.values())
    assert report.extra_bytes == 4 * factors
    assert set(report.dense.values()) == {"text stream"}


def test_without_a_recipe_the_recommended_one_is_applied():
    model = tiny_flux()
    with pytest.warns(RuntimeWarning, match="no step runs dense"):  # calls alone draw no pictures
        report = rtlynx.calibrate(model, calls=calls(8), progress=False)
    assert state_of(model).plan.recipe == replace(Recipe.recommended(), dense_sigmas=())
    assert report.choice is not None
    assert report.choice.speedup_share >= 0.9
    halved = [cost for cost in report.costs if cost.format == "fp8-sparse"]
    worst = max(halved, key=lambda cost: cost.error / cost.saving)
    assert report.choice.formats.get(worst.name) != "fp8-sparse"
    assert {layer.rank for layer in sparse_layers(model).values()} == {0}


def test_sequential_mode_sees_the_sparse_blocks_before():
    reference, data = tiny_flux(), calls(4)
    options = CalibrationOptions(heldout=0.0, sequential=True)
    recipe = Recipe(rank=None, ridge=RIDGE, balance="tokens")
    model, _ = run(recipe=recipe, options=options, data=data)
    oneshot, _ = run(recipe=recipe, options=ALL_FIT, data=data)
    first, second = "transformer_blocks.0.attn.to_q", f"{SINGLE}.proj_out"
    assert torch.equal(model.get_submodule(first).weight, oneshot.get_submodule(first).weight)
    assert not torch.equal(model.get_submodule(second).weight, oneshot.get_submodule(second).weight)

    # The double block sparse, the single block dense: what the single block's layers were solved on.
    hybrid, _ = run(recipe=recipe, options=options, data=data)
    hybrid.single_transformer_blocks = reference.single_transformer_blocks
    with watched(hybrid, [second]) as seen:
        for call in data:
            output(hybrid, call)
    xs = [x for x, _ in seen[second]]
    weight = torch.full((*xs[0].shape[:2], 1), 1 / (xs[0].shape[1] * len(xs)))
    layer, original = model.get_submodule(second), reference.get_submodule(second).weight
    expected = ridge_regression(xs, [weight] * len(xs), original, layer.pattern, RIDGE)
    assert relative_error(layer.weight - original, expected - original) < 2e-3


@pytest.mark.parametrize("recipe", [JOINT, Recipe.paper(rank=4, lowrank_solver="trained", train_steps=5)])
def test_block_by_block_gives_what_all_at_once_gives(recipe):
    whole, _ = run(recipe=recipe)
    by_block, _ = run(recipe=recipe, options=CalibrationOptions(memory_gb=1e-9))
    assert_same(solution(by_block), solution(whole))


def test_z_image_is_calibrated_and_its_odd_width_stays_dense():
    reference, model = tiny_z_image(dim=128), tiny_z_image(dim=128)
    data = [z_image_call(i, timestep=i / 4) for i in range(4)]
    _, report = run(model, JOINT, ALL_FIT, data)
    assert len(sparse_layers(model)) == 12  # the noise refiner's and the layer's, but for two w2
    assert "341" in report.dense["layers.0.feed_forward.w2"]
    immediate = sparsify(tiny_z_image(dim=128), Recipe.immediate(norm="none"))
    unseen = [z_image_call(50)]
    before, after = layer_errors(immediate, reference, unseen), layer_errors(model, reference, unseen)
    assert sum(after.values()) < sum(before.values())


def test_trained_low_rank_approaches_the_closed_form_and_never_beats_it():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(400, 24, generator=gen) @ torch.randn(24, 24, generator=gen) / 5
    w = torch.randn(10, 24, generator=gen)
    s = select(x, nm_mask(x))
    target = (x - s) @ w.T

    def error(lowrank_a, lowrank_b):
        return float((x.double() @ lowrank_a.double().T @ lowrank_b.double().T - target).square().sum())

    moments = RunningMoments(24, dtype=torch.float64)
    moments.add(x, s)
    closed = error(*solve_lowrank(moments.mean(), w, 3, 1e-9))
    start = float(target.square().sum())
    few = error(*train_lowrank(x, w, Pattern(), "none", rank=3, steps=50))
    many = error(*train_lowrank(x, w, Pattern(), "none", rank=3, steps=1500))
    assert closed <= many * (1 + 1e-9)
    assert many < few < start
    assert many - closed < 0.05 * (start - closed)


def test_trained_low_rank_in_the_model():
    trained, report = run(
        recipe=Recipe.paper(rank=4, lowrank_solver="trained", train_steps=300), data=calls(4)
    )
    errors = layer_errors(trained, tiny_flux(), calls(4))
    immediate = layer_errors(
        sparsify(tiny_flux(), Recipe.immediate(grouping="adjacent")), tiny_flux(), calls(4)
    )
    closed = layer_errors(run(recipe=PAPER, data=calls(4))[0], tiny_flux(), calls(4))
    assert sum(closed.values()) < 1.1 * sum(errors.values()) < 1.1 * sum(immediate.values())
    assert {s.ridge for s in report.solutions.values()} == {None}
    assert not any(layer.refitted for layer in sparse_layers(trained).values())


# ---------------------------------------------------------------------------------- sampling a pipeline


def test_a_pipeline_is_sampled_once_for_every_prompt_and_left_as_it_was():
    pipeline = TinyPipeline(tiny_flux())
    sample(pipeline, options=CalibrationOptions(batch_size=3))
    assert sorted(prompt for batch in pipeline.batches for prompt in batch) == sorted(PROMPTS)
    assert max(map(len, pipeline.batches)) == 3
    assert ["a drawing of animal number 7"] in pipeline.batches  # the held-out one, on its own
    assert pipeline._progress_bar_config == {"leave": False}
    assert len(sparse_layers(pipeline.transformer)) == 11
    hooks = [h for m in pipeline.transformer.modules() for h in (*m._forward_pre_hooks, *m._forward_hooks)]
    assert len(hooks) == len(sparsify(tiny_flux())._forward_pre_hooks)


def test_result_does_not_depend_on_the_batch_size():
    models = [tiny_flux(), tiny_flux()]
    for model, size in zip(models, (1, 7), strict=True):
        options = CalibrationOptions(batch_size=size, steps_per_prompt=4)
        sample(TinyPipeline(model), REFIT, options)
    # Rounding differs with the batch, and where two entries nearly tie it decides which one is kept.
    assert_same(solution(models[0]), solution(models[1]), rtol=2e-3)


def test_recorded_steps_are_spread_and_guidance_passes_kept(monkeypatch):
    kept = []
    original = CallStore.put

    def spy(store, batch, calls):
        kept.append(calls)
        original(store, batch, calls)

    monkeypatch.setattr(CallStore, "put", spy)
    options = CalibrationOptions(
        batch_size=2,
        steps_per_prompt=2,
        pipeline_kwargs={"num_inference_steps": 8, "guidance_scale": 3.0},
    )
    sample(TinyPipeline(tiny_flux()), REFIT, options)
    seen = set()
    for recorded in kept:
        timesteps = [float(call["timestep"][0]) for call in recorded]
        assert len(timesteps) == 4  # two steps, two passes
        assert timesteps[0] == timesteps[1] > timesteps[2] == timesteps[3]
        assert timesteps[0] - timesteps[2] == pytest.approx(0.5)  # evenly spread
        seen.update(timesteps)
    assert len(seen) > 4  # other batches record other steps


def test_seed_decides():
    first, again, other = tiny_flux(), tiny_flux(), tiny_flux()
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        sample(TinyPipeline(model), REFIT, CalibrationOptions(seed=seed))
    assert_same(solution(first), solution(again))
    name = f"{SINGLE}.proj_out.weight"
    assert not torch.equal(solution(first)[name], solution(other)[name])


@pytest.mark.parametrize(("forced", "shown"), [("", False), ("1", True)])
def test_progress_is_shown_on_terminals_alone(capsys, monkeypatch, forced, shown):
    monkeypatch.setenv("FORCE_COLOR", forced)  # by which rich takes a pipe for a terminal
    for asked in (True, False):
        with ProgressBar("drawing", 2, show=asked) as advance:
            advance(2)
        said = capsys.readouterr()
        assert ("drawing" in said.err) == (shown and asked)
        assert not said.out


# ------------------------------------------------------------------------------------------ two processes


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, recipe in (("joint", JOINT), ("auto", Recipe(rank=0.05, refit=False, balance="tokens"))):
        model, report = run(recipe=recipe, data=calls(9))
        tensors = solution(model)
        tensors["errors"] = torch.tensor([one.error for one in report.solutions.values()])
        save_file(tensors, Path(folder) / f"{name}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_match_one(tmp_path):
    in_two_processes(_one_of_two, str(tmp_path))
    for name, recipe in (("joint", JOINT), ("auto", Recipe(rank=0.05, refit=False, balance="tokens"))):
        ours, theirs = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2))
        assert_same(ours, theirs)  # both end with the same model
        model, report = run(recipe=recipe, data=calls(9))
        errors = [one.error for one in report.solutions.values()]
        assert ours.pop("errors").tolist() == pytest.approx(errors, rel=1e-3)
        for key, tensor in solution(model).items():
            if "lowrank" not in key:  # the sign of a factor is free; their product is not
                assert relative_error(ours[key], tensor) < 1e-3, key
        for layer_name, layer in sparse_layers(model).items():
            product = ours[f"{layer_name}.lowrank_b"] @ ours[f"{layer_name}.lowrank_a"]
            assert relative_error(product, layer.lowrank_b @ layer.lowrank_a) < 2e-2, layer_name
        assert not math.isnan(sum(errors))
