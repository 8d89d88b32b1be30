"""The last steps of a picture dense, and original weights kept in e4m3."""

import copy
import threading

import pytest
import torch
from checkpoint_helpers import RECIPES, make
from helpers import flux_call, output, relative_error, tiny_flux
from pipeline_helpers import TinyPipeline

from rtlynx import Pattern, Recipe, SparseLinear, densify, schedule, set_dense_steps, sparsify
from rtlynx.math.fp8 import E4M3
from rtlynx.models import sparse_layers
from rtlynx.models.sparsify import extra_bytes

TIMESTEPS = [1.0, 0.75, 0.5, 0.25]
IN_FP8 = {"precision": "fp8", "dense_last_steps": 1, "dense_precision": "fp8"}
CALL = flux_call(timestep=TIMESTEPS[-1])
LAYER = "single_transformer_blocks.0.proj_mlp"


def steps_of(model):
    """A letter for each of TIMESTEPS: D where `model` runs dense, s where it drops activations."""
    reference, ran = tiny_flux(), ""
    with schedule(TIMESTEPS):
        for t in TIMESTEPS:
            call = flux_call(timestep=t)
            ran += "D" if torch.equal(output(model, call), output(reference, call)) else "s"
    return ran


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(0, 1, "sssD"), (1, 2, "DsDD"), (0, 4, "DDDD"), (3, 3, "DDDD"), (0, 9, "DDDD")],
)
def test_which_steps_run_dense(first, last, expected):
    model = sparsify(tiny_flux(), Recipe.immediate(dense_steps=first, dense_last_steps=last))
    assert steps_of(model) == expected


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(0, 0.25)], "sssD"),  # the upper end belongs to the range, the lower does not
        ([(0.25, 0.75)], "sDDs"),
        ([(0.9, 1), (0.2, 0.3)], "DssD"),
        ([(0.3, 0.4)], "ssss"),
        ([], "ssss"),
    ],
)
def test_dense_steps_by_noise_level(ranges, expected):
    chosen_before = sparsify(tiny_flux(), Recipe.immediate(dense_sigmas=ranges or [(-1, 0)]))
    chosen_after = sparsify(tiny_flux(), Recipe.immediate(dense_last_steps=2))
    assert set_dense_steps(chosen_after, dense_sigmas=ranges) is chosen_after
    assert steps_of(chosen_before) == expected
    assert steps_of(chosen_after) == expected


@pytest.mark.parametrize("steps", [4, 10])
def test_a_pipeline_tells_the_noise_level(steps):
    """Ranges hold whatever the number of steps: those of all sigmas above 0.5 and below are all steps."""

    def draw(model):
        return TinyPipeline(model)(["a cat"], [torch.Generator().manual_seed(1)], num_inference_steps=steps)

    model, reference = sparsify(tiny_flux(), Recipe.immediate(dense_sigmas=[(0, 1)])), draw(tiny_flux())
    assert torch.equal(draw(model), reference)
    assert not torch.equal(draw(set_dense_steps(model, dense_sigmas=[(0, 0.5)])), reference)
    assert torch.equal(draw(set_dense_steps(model, dense_sigmas=[(0.5, 1), (0, 0.5)])), reference)


def test_dense_steps_are_chosen_anew_only_where_originals_are_kept():
    for model in (tiny_flux(), sparsify(tiny_flux(), Recipe.immediate())):
        with pytest.raises(ValueError, match="keeps no original weights for dense steps"):
            set_dense_steps(model, dense_last_steps=1)
    model = sparsify(tiny_flux(), Recipe.immediate(dense_last_steps=1))
    with pytest.raises(ValueError, match="dense_sigmas is a list of"):
        set_dense_steps(model, dense_sigmas=[(0.5, 0.1)])


def test_an_unknown_noise_level_is_said():
    model = sparsify(tiny_flux(), Recipe.immediate(dense_sigmas=[(0, 0.5)]))
    with schedule([0.5, 1.0]), pytest.raises(RuntimeError, match=r"schedule\(timesteps, sigmas\)"):
        model(**flux_call(timestep=1.0))
    with pytest.raises(RuntimeError, match=r"dense_sigmas=\(\(0.0, 0.5\),\)"):
        model(**flux_call(timestep=1.0))


def test_the_upper_end_of_a_range_holds_for_float32_too():
    model, reference = sparsify(tiny_flux(), Recipe.immediate(dense_sigmas=[(0, 0.3)])), tiny_flux()
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.2])  # float32(0.3) is above 0.3
    with schedule(sigmas):
        for sigma in sigmas:
            call = flux_call(timestep=float(sigma))
            dense = torch.equal(output(model, call), output(reference, call))
            assert dense == (float(sigma) < 0.5)


@pytest.mark.parametrize("changed", [{"dense_last_steps": 1}, {}])
def test_steps_by_number_need_no_noise_levels(changed):
    model, reference = sparsify(tiny_flux(), Recipe.immediate(dense_steps=1)), tiny_flux()
    set_dense_steps(model, **changed)
    with schedule([900, 500]):  # which say none
        for t, dense in ((900, False), (500, bool(changed))):
            call = flux_call(timestep=t)
            assert torch.equal(output(model, call), output(reference, call)) == dense


def test_dense_steps_may_be_changed_while_another_thread_draws():
    model, stop, failures = sparsify(tiny_flux(), Recipe.immediate(dense_steps=1)), threading.Event(), []

    def change():
        while not stop.is_set():
            set_dense_steps(model, dense_sigmas=[(0, 0.5)])
            set_dense_steps(model, dense_steps=2)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        with schedule(TIMESTEPS):
            for _ in range(15):
                output(model, CALL)
    except Exception as error:
        failures.append(error)
    finally:
        stop.set()
        thread.join()
    assert not failures
    with pytest.raises(RuntimeError, match="no call is under way"):
        sparse_layers(model)[LAYER](torch.ones(2, sparse_layers(model)[LAYER].in_features))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_pipeline_tells_which_steps_are_the_last(steps):
    def draw(model):
        return TinyPipeline(model)(["a cat"], [torch.Generator().manual_seed(1)], num_inference_steps=steps)

    model = sparsify(tiny_flux(), Recipe.immediate(dense_last_steps=1))
    assert torch.equal(draw(model), draw(tiny_flux())) == (steps == 1)


def test_dense_steps_multiply_the_original_weight_in_e4m3():
    reference, model = tiny_flux(), sparsify(tiny_flux(), Recipe.immediate(**IN_FP8))
    layer, original = sparse_layers(model)[LAYER], reference.get_submodule(LAYER)
    twin = SparseLinear.from_linear(original, pattern=Pattern(1, 1), norm="none")
    twin.quantize()
    assert layer.weight_dense.dtype is E4M3
    call = flux_call(timestep=TIMESTEPS[-1])
    seen = []
    layer.register_forward_hook(lambda _layer, x, y: seen.append((x[0], y)))
    with schedule(TIMESTEPS):
        drawn = output(model, call)
    ((x, y),) = seen
    assert torch.equal(y, twin(x))
    assert 1e-4 < relative_error(y, original(x)) < 0.1
    assert 1e-4 < relative_error(drawn, output(reference, call)) < 0.1


def test_layers_that_are_dense_fp8_keep_nothing_beside():
    model = make(RECIPES["dense steps and rows in fp8"])
    for name, layer in sparse_layers(model).items():
        kept = not name.endswith("to_q") and "add_" not in name and layer.format.sparse
        assert (layer.weight_dense is not None) == kept, name
        assert layer.depends_on_call == kept, name


def test_memory_is_half_of_that_of_bf16():
    sizes = {}
    for precision in ("bf16", "fp8"):
        recipe = Recipe.immediate(**IN_FP8 | {"dense_precision": precision})
        sizes[precision] = extra_bytes(sparsify(tiny_flux().bfloat16(), recipe))
    layers = sparse_layers(sparsify(tiny_flux(), Recipe.immediate(precision="fp8"))).values()
    sparse = [layer for layer in layers if layer.format.sparse]
    # Dense fp8 layers keep an original beside them in bf16 alone.
    saved = sum(2 * layer.weight.numel() for layer in layers)
    spent = sum(layer.weight.numel() + 4 * layer.out_features for layer in sparse)
    assert sizes["bf16"] - sizes["fp8"] == saved - spent


def test_weights_that_did_not_change_are_rounded_for_dense_steps_too():
    reference, model = tiny_flux(), sparsify(tiny_flux(), Recipe.immediate(**IN_FP8 | {"precision": "bf16"}))
    layer = sparse_layers(model)[LAYER]
    assert layer.weight_dense.dtype is E4M3
    with schedule(TIMESTEPS):
        error = relative_error(output(model, CALL), output(reference, CALL))
    assert 1e-4 < error < 0.1
    assert torch.equal(output(densify(model), CALL), output(reference, CALL))  # they are there


def test_no_gradient_is_lost_in_silence():
    model = sparsify(tiny_flux(), Recipe.immediate(**IN_FP8 | {"precision": "bf16"}))
    call = {**CALL, "hidden_states": CALL["hidden_states"].clone().requires_grad_()}
    with schedule(TIMESTEPS), pytest.raises(RuntimeError, match=r"dense_precision='fp8'.*pass no gradient"):
        model(**call)


def test_making_it_dense_again_is_refused():
    model = sparsify(tiny_flux(), Recipe.immediate(**IN_FP8))
    with pytest.raises(RuntimeError, match=r"in eight bits alone.*load the dense model again"):
        densify(model)


def test_a_cast_leaves_kept_weights_alone():
    model = sparsify(tiny_flux(), Recipe.immediate(**IN_FP8))
    layer = sparse_layers(model)[LAYER]
    values, scale = layer.weight_dense.clone(), layer.weight_dense_scale.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.weight_dense.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(layer.weight_dense_scale, scale)
    assert layer.compute_dtype is torch.bfloat16


def test_state_dicts_of_another_precision_are_refused():
    recipe = Recipe.immediate(dense_last_steps=1, precision="fp8")
    model, other = sparsify(tiny_flux(), recipe), sparsify(tiny_flux(1), Recipe.immediate(**IN_FP8))
    with pytest.raises(RuntimeError, match="weight_dense"):
        model.load_state_dict(other.state_dict())
    same = sparsify(tiny_flux(), Recipe.immediate(**IN_FP8))
    same.load_state_dict(other.state_dict())
    call = flux_call(timestep=TIMESTEPS[-1])
    with schedule(TIMESTEPS):
        assert torch.equal(output(same, call), output(copy.deepcopy(other), call))
