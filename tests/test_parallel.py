"""Sparse models under diffusers' parallelism: two processes over gloo give what one process gives.

All cases of two processes run first, in one go; each test compares one of them with a model of one process.
"""

import copy
from functools import partial

import pytest
import torch
from checkpoint_helpers import RIDGE, make
from helpers import MODELS, flux_call, output, relative_error, tiny_flux
from parallel_helpers import LIMIT, assert_close, message, ring, run_together, tensor_parallel, ulysses
from peft import LoraConfig, inject_adapter_in_model
from process_helpers import PROCESSES
from torch import nn

import rtlynx.nn.sparse_linear
from rtlynx import (
    Pattern,
    Recipe,
    calibrate,
    densify,
    load,
    nm_mask,
    norm_scale,
    save,
    sparsify,
)
from rtlynx.math.fp8 import quantize_tokens
from rtlynx.models import sparse_layers

PAPER = {"refit": False, "ridge": RIDGE}
RECIPES = {
    "norm": Recipe.immediate(tp_degree=2),
    "all-strided": Recipe.immediate(tp_degree=2, grouping="strided", text_stream="sparse", norm="paper"),
    "adjacent": Recipe.immediate(grouping="adjacent"),
    "low-rank": Recipe(rank=4, tp_degree=4, **PAPER),
    "refit": Recipe(rank=0.05, ridge=RIDGE, tp_degree=2),
    "kept": Recipe(rank=4, ridge=RIDGE, tp_degree=2, text_rows="dense", dense_steps=1),
    "rotated": Recipe(rank=None, ridge=RIDGE, tp_degree=2, rotate_values=True, intercept=True),
    "intercept-kept": Recipe(rank=None, ridge=RIDGE, tp_degree=2, intercept=True, dense_steps=1),
    "rotated-norm": Recipe.immediate(tp_degree=2, rotate_values=True),
    "permuted": Recipe(rank=None, ridge=RIDGE, tp_degree=4, permute_hidden=True, rotate_values=True),
    "permuted-norm": Recipe.immediate(tp_degree=2, permute_hidden=True),
    "fp8": Recipe.immediate(tp_degree=2, precision="fp8"),
    "fp8-refit": Recipe(rank=0.05, ridge=RIDGE, tp_degree=2, precision="fp8"),
    "fp8-dense": Recipe.immediate(tp_degree=2, formats={"*": "fp8-dense"}),
}
UNDONE = ("norm", "rotated-norm", "permuted-norm")
OF_OTHERS = {"flux2": ("all-strided", "refit", "rotated", "kept"), "qwen": ("norm", "refit", "rotated")}
PAIRS = [("flux", recipe) for recipe in RECIPES]
PAIRS += [(model, recipe) for model, recipes in OF_OTHERS.items() for recipe in recipes]
# Layers see some of the tokens, whole: what differs by recipe is what a call tells them of text and steps.
ULYSSES = [
    ("flux", recipe) for recipe in ("norm", "refit", "kept", "intercept-kept", "fp8-refit", "permuted")
]
ULYSSES += [("flux2", "kept"), ("qwen", "rotated")]
ROWS = ("to_out.0", "to_add_out", "net.2", "proj_out")  # row-parallel
EIGHT_BITS = [recipe for recipe in RECIPES if recipe.startswith("fp8")]


# One step of a picture, then the next: with `dense_steps` they differ.
STEPS = (1.0, 0.5)


def steps(model, call, **changes):
    return torch.stack([output(model, {**call(timestep=t), **changes}) for t in STEPS])


# ---------------------------------------------------------------------- what two processes run together


def sparse_after(parallelise, folder, model, recipe):
    """Made parallel, then sparse, from a checkpoint where there was something to calibrate."""
    build, call = MODELS[model]
    changed = parallelise(build())
    if RECIPES[recipe].needs_calibration:
        load(changed, folder / f"{model}-{recipe}")
    else:
        sparsify(changed, RECIPES[recipe])
    return changed, call


def by(parallelise, model, recipe, folder):
    changed, call = sparse_after(parallelise, folder, model, recipe)
    return {"y": steps(changed, call)}


def ulysses_odd(folder):
    changed, _ = sparse_after(ulysses, folder, "flux", "kept")
    return {"y": torch.stack([output(changed, odd_call(t)) for t in STEPS])}


def ulysses_before(folder):
    """Made sparse first: context parallelism does not mind."""
    return {"y": steps(ulysses(sparsify(tiny_flux(), RECIPES["norm"])), flux_call)}


def odd_call(timestep=0.5):
    """31 image tokens a process, 4 and 3 text tokens, and a batch, so that slices are not contiguous.

    (Over gloo, diffusers cannot gather pictures of different lengths.)
    """
    call = flux_call(batch=2, timestep=timestep)
    for name, count in (("hidden_states", 62), ("encoder_hidden_states", 7)):
        call[name] = call[name][:, :count]
    for name, count in (("img_ids", 62), ("txt_ids", 7)):
        call[name] = call[name][:count]
    return call


def tp_undone(recipe, folder):
    before = output(tensor_parallel(tiny_flux()), flux_call())
    model, _ = sparse_after(tensor_parallel, folder, "flux", recipe)
    return {"before": before, "after": output(densify(model), flux_call())}


def tp_shapes(folder):
    """What a process holds of a low-rank model, and how often an input is compressed."""
    model, call = sparse_after(tensor_parallel, folder, "flux", "refit")
    count = [0]
    original = rtlynx.nn.backends.reference.compress

    def counted(*args):
        count[0] += 1
        return original(*args)

    rtlynx.nn.backends.reference.compress = counted
    try:
        output(model, call())
    finally:
        rtlynx.nn.backends.reference.compress = original
    held = {"compressed": torch.tensor(count[0])}
    for name, layer in sparse_layers(model).items():
        for key, tensor in layer.state_dict().items():
            held[f"{name}.{key}"] = torch.tensor(tensor.shape)
    return held


def tp_crossing_groups(folder):
    model = tensor_parallel(tiny_flux())
    said = message(lambda: sparsify(model, Recipe.immediate()))
    assert not sparse_layers(model)
    return said


def tp_crossing_checkpoint(folder):
    model = tensor_parallel(tiny_flux())
    said = message(lambda: load(model, folder / "flux-one-part"))
    assert not sparse_layers(model)
    return said


def tp_crossing_permutation(folder):
    model = tensor_parallel(tiny_flux())
    said = message(lambda: load(model, folder / "flux-permuted-whole"))
    assert not sparse_layers(model)
    return said


def tp_other_weights(folder):
    return message(lambda: load(tensor_parallel(tiny_flux(seed=1)), folder / "flux-refit"))


def tp_too_late(folder):
    return message(lambda: tensor_parallel(sparsify(tiny_flux(), RECIPES["norm"])))


def tp_adapter(folder):
    model, _ = sparse_after(tensor_parallel, folder, "flux", "rotated")
    return message(lambda: inject_adapter_in_model(LoraConfig(target_modules=["to_v"]), model))


def tp_save(folder):
    return message(lambda: save(sparsify(tensor_parallel(tiny_flux()), RECIPES["norm"]), folder / "never"))


def calibrated(parallelise, folder):
    model = parallelise(tiny_flux())
    return message(lambda: calibrate(model, calls=[flux_call()], recipe=Recipe()))


def unknown_text(folder):
    """A plan of the user's own that leaves the text whole."""
    from diffusers import ContextParallelConfig

    model, whole = tiny_flux(), dict(tiny_flux()._cp_plan)
    whole[""] = {key: value for key, value in whole[""].items() if key in ("hidden_states", "img_ids")}
    config = ContextParallelConfig(ulysses_degree=PROCESSES, ulysses_anything=True)
    model.enable_parallelism(config=config, cp_plan=whole)
    sparsify(model, Recipe.immediate(text_rows="dense"))
    return message(lambda: output(model, flux_call()))


CASES = {
    **{f"tp-{m}-{r}": partial(by, tensor_parallel, m, r) for m, r in PAIRS if (m, r) != ("flux2", "kept")},
    **{f"ulysses-{m}-{r}": partial(by, ulysses, m, r) for m, r in ULYSSES},
    "ring": partial(by, ring, "flux", "kept"),
    "ulysses-odd": ulysses_odd,
    "ulysses-before": ulysses_before,
    **{f"tp-undone-{recipe}": partial(tp_undone, recipe) for recipe in UNDONE},
    "tp-shapes": tp_shapes,
    "tp-crossing-groups": tp_crossing_groups,
    "tp-crossing-checkpoint": tp_crossing_checkpoint,
    "tp-crossing-permutation": tp_crossing_permutation,
    "tp-other-weights": tp_other_weights,
    "tp-too-late": tp_too_late,
    "tp-adapter": tp_adapter,
    "tp-save": tp_save,
    "tp-calibrate": partial(calibrated, tensor_parallel),
    "ulysses-calibrate": partial(calibrated, ulysses),
    "unknown-text": unknown_text,
}


@pytest.fixture(scope="module")
def models():
    """(model, recipe) -> the sparse model of one process, calibrated where the recipe says so."""
    made = {(m, r): make(RECIPES[r], *MODELS[m]) for m, r in PAIRS}
    made["flux", "one-part"] = make(Recipe(rank=None, ridge=RIDGE))
    made["flux", "permuted-whole"] = make(Recipe.immediate(grouping="adjacent", permute_hidden=True))
    return made


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    for (model, recipe), made in models.items():
        save(made, folder / f"{model}-{recipe}")
    return run_together(folder, CASES)


# ------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("model", "recipe"), [pair for pair in PAIRS if pair[1] not in (*EIGHT_BITS, "kept", "intercept-kept")]
)
def test_tensor_parallel_is_one_process(results, models, model, recipe):
    assert_close(results.tensors(f"tp-{model}-{recipe}"), steps(models[model, recipe], MODELS[model][1]))


@pytest.mark.parametrize("recipe", ["kept", "intercept-kept"])
def test_tensor_parallel_dense_steps_and_rows(results, models, recipe):
    expected = steps(models["flux", recipe], flux_call)
    assert relative_error(expected[0], output(tiny_flux(), flux_call(timestep=STEPS[0]))) < LIMIT
    assert_close(results.tensors(f"tp-flux-{recipe}"), expected)


@pytest.mark.parametrize(("model", "recipe"), ULYSSES)
def test_ulysses_is_one_process(results, models, model, recipe):
    assert_close(results.tensors(f"ulysses-{model}-{recipe}"), steps(models[model, recipe], MODELS[model][1]))


def test_ring_is_one_process(results, models):
    assert_close(results.tensors("ring"), steps(models["flux", "kept"], flux_call))


def test_ulysses_of_odd_counts_and_batches(results, models):
    expected = torch.stack([output(models["flux", "kept"], odd_call(t)) for t in STEPS])
    assert_close(results.tensors("ulysses-odd"), expected)


def test_ulysses_of_a_sparse_model(results, models):
    assert_close(results.tensors("ulysses-before"), steps(models["flux", "norm"], flux_call))


def columns_of(name, layer):
    """The input channels of each process: halves, for proj_out of attention and MLP each by itself."""
    k, d = layer.in_features, layer.out_features
    if name.endswith("proj_out"):
        m = (k - d) // 2
        return [[*range(d // 2), *range(d, d + m)], [*range(d // 2, d), *range(d + m, k)]]
    return [range(k // 2), range(k // 2, k)]


class ByShards(nn.Module):
    """A row-parallel fp8 layer from its definition: each shard has token scales of its own, s is common."""

    def __init__(self, layer, shards):
        super().__init__()
        self.layer, self.shards = layer, shards

    def forward(self, x):
        of, pattern = self.layer, self.layer.pattern
        mask = nm_mask(x, pattern.n, pattern.m, pattern.grouping, pattern.parts)
        scale = norm_scale(x, mask).double() if of.norm == "scale" else 1.0
        y = torch.zeros(())
        for columns in self.shards:
            values, token = quantize_tokens(x[..., columns], mask[..., columns])
            y = y + scale * token * (values.double() @ of.weight[:, columns].double().T)
        y = y * of.weight_scale + of.bias
        if of.rank:
            y = y + x.double() @ of.lowrank_a.double().T @ of.lowrank_b.double().T
        return y.to(x.dtype)


@pytest.mark.parametrize("recipe", EIGHT_BITS)
def test_tensor_parallel_fp8(results, models, recipe):
    """Quantised by shard; not further from the unquantised model than one process is."""
    one = models["flux", recipe]
    sharded = copy.deepcopy(one)
    for name, layer in sparse_layers(sharded).items():
        if name.endswith(ROWS):
            sharded.set_submodule(name, ByShards(layer, columns_of(name, layer)))
    found = results.tensors(f"tp-flux-{recipe}")
    assert_close(found, steps(sharded, flux_call))
    plain = {"fp8": "norm", "fp8-refit": "refit"}.get(recipe)
    exact = steps(tiny_flux() if plain is None else models["flux", plain], flux_call)
    error = relative_error(steps(one, flux_call), exact)
    assert 1e-4 < relative_error(found[0]["y"], exact) < 1.1 * error


def test_shards_hold_their_part_alone(results, models):
    """Factors are cut beside the weight, biases are added once, and q, k, v read one compressed input."""
    held = results.tensors("tp-shapes")
    layers = sparse_layers(models["flux", "refit"])
    for name, layer in layers.items():
        n, k, r = layer.out_features, layer.in_features, layer.rank
        row = name.endswith(ROWS)
        shapes = (
            {"weight": [n, k // 2], "lowrank_a": [r, k // 2], "lowrank_b": [n, r]}
            if row
            else {"weight": [n // 2, k], "lowrank_a": [r, k], "lowrank_b": [n // 2, r]}
        )
        for process in range(PROCESSES):
            for key, shape in shapes.items():
                assert held[process][f"{name}.{key}"].tolist() == shape, (name, key)
            assert (f"{name}.bias" in held[process]) is (not row or process == 0)
    inputs = {"double qkv", "double out", "up", "down", "single in", "single out"}
    assert [one["compressed"].item() for one in held] == [len(inputs)] * PROCESSES


def test_densify_gives_the_sharded_model_back(results):
    for theirs in (one for recipe in UNDONE for one in results.tensors(f"tp-undone-{recipe}")):
        assert torch.equal(theirs["before"], theirs["after"])
        assert relative_error(theirs["before"], output(tiny_flux(), flux_call())) < LIMIT


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("tp-crossing-groups", "ValueError: .*to_out.0: its strided groups reach over 2 .*tp_degree=2"),
        ("tp-crossing-checkpoint", "ValueError: .*to_out.0: its strided groups reach over 2 .*tp_degree=2"),
        ("tp-crossing-permutation", "ValueError: .*net.2 were permuted .* across 2 .*tp_degree=2"),
        ("tp-other-weights", "CheckpointError: .*other weights"),
        ("tp-too-late", "RuntimeError: .*enable tensor parallelism first"),
        ("tp-adapter", "RuntimeError: .*were rotated .*: the layer is spread over GPUs"),
        ("tp-save", "ValueError: .*spread over several processes: save it before"),
        ("tp-calibrate", "ValueError: .*spread over several processes: calibrate before"),
        ("ulysses-calibrate", "ValueError: .*spread over several processes: calibrate before"),
        ("unknown-text", "ValueError: where the text rows .*text_rows='sparse'"),
    ],
)
def test_refusals(results, case, words):
    results.check_refusal(case, words)


def test_tp_degree_keeps_groups_inside_shards():
    """One process's own view of the same: no group of a layer of four shards crosses a quarter."""
    layers = sparse_layers(sparsify(tiny_flux(), Recipe.immediate(tp_degree=4)))
    assert layers["transformer_blocks.0.attn.to_out.0"].pattern == Pattern(grouping="strided", parts=4)
    proj_out = layers["single_transformer_blocks.0.proj_out"]
    assert proj_out.pattern.widths(proj_out.in_features) == (32,) * 4 + (128,) * 4
