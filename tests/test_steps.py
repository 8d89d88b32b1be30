"""Dense first steps and dense text rows, told apart by the model's own call."""

import pytest
import torch
from helpers import (
    IMAGE_TOKENS,
    TEXT_TOKENS,
    TinyPipeline,
    by_hand,
    flux_call,
    output,
    relative_error,
    slow_mask,
    tiny_flux,
    tiny_qwen,
    tiny_z_image,
    watched,
    z_image_call,
)
from torch import nn

from rtlynx import CalibrationOptions, Recipe, calibrate, sparsify
from rtlynx.context import StepTracker
from rtlynx.models import sparse_layers

# ------------------------------------------------------------------------------------------ the tracker

# timesteps of consecutive calls -> step that each belongs to
SCHEDULES = {
    "one pass a step": ([1.0, 0.75, 0.5, 0.25], [0, 1, 2, 3]),
    "two passes a step": ([1.0, 1.0, 0.75, 0.75, 0.5, 0.5], [0, 0, 1, 1, 2, 2]),
    "three passes a step": ([1.0] * 3 + [0.5] * 3, [0] * 3 + [1] * 3),
    "two pictures": ([1.0, 0.5, 1.0, 0.5], [0, 1, 0, 1]),
    "two pictures with guidance": ([1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 0.5, 0.5], [0, 0, 1, 1] * 2),
    "aborted, then a new picture": ([1.0, 0.75, 0.5, 1.0, 0.75], [0, 1, 2, 0, 1]),
    "aborted in the first step": ([1.0, 1.0, 0.5], [0, 0, 1]),
    "another number of steps": ([1.0, 0.5, 1.0, 0.9, 0.8], [0, 1, 0, 1, 2]),
    "from an image, at a later start": ([1.0, 0.5, 0.6, 0.3], [0, 1, 0, 1]),
    "pictures of one step": ([1.0, 1.0, 1.0], [0, 0, 0]),
    "uneven steps": ([1000.0, 999.0, 3.5, 0.0], [0, 1, 2, 3]),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("form", ["float", "scalar", "batch", "half"])
@pytest.mark.parametrize("descending", [True, False])
def test_steps_of_a_schedule(name, form, descending):
    timesteps, expected = SCHEDULES[name]
    if form == "half" and name == "uneven steps":
        timesteps = [1.0, 0.875, 0.5, 0.0]
    tracker = StepTracker(descending)
    make = {
        "float": lambda t: t,
        "scalar": torch.tensor,
        "batch": lambda t: torch.full((3,), t),
        "half": lambda t: torch.full((2,), t, dtype=torch.bfloat16),
    }[form]
    assert [tracker.update(make(t if descending else -t)) for t in timesteps] == expected


def test_a_training_batch_is_no_sampling_step():
    tracker = StepTracker()
    assert [tracker.update(t) for t in (1.0, 0.5)] == [0, 1]
    assert tracker.update(torch.tensor([0.9, 0.1])) == -1
    assert tracker.update(torch.tensor([])) == -1
    assert tracker.update(0.25) == 2


# ------------------------------------------------------------------------------------ dense first steps


def is_dense(model, reference, call):
    """Whether the model ran densely (it must differ from dense otherwise)."""
    return torch.equal(output(model, call), output(reference, call))


def test_dense_first_steps_of_flux():
    reference = tiny_flux()
    model = sparsify(tiny_flux(), Recipe.immediate(dense_steps=2))
    plain = sparsify(tiny_flux())
    ran_dense = []
    for timestep in (1.0, 1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 1.0, 0.8, 0.6):
        call = flux_call(timestep=timestep)
        ran_dense.append(is_dense(model, reference, call))
        if not ran_dense[-1]:
            assert torch.equal(output(model, call), output(plain, call))
    assert ran_dense == [True] * 4 + [False] * 3 + [True, True, False]


def test_dense_first_steps_of_a_batch_and_positional_arguments():
    reference = tiny_flux()
    model = sparsify(tiny_flux(), Recipe.immediate(dense_steps=1))
    names = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids"]
    for timestep, dense in ((1.0, True), (0.5, False), (1.0, True)):
        call = flux_call(batch=3, timestep=timestep)
        with torch.no_grad():
            y = model(*(call[name] for name in names), return_dict=False)[0]
        assert torch.equal(y, output(reference, call)) == dense


def test_dense_first_steps_of_z_image_whose_timestep_rises():
    reference = tiny_z_image()
    model = sparsify(tiny_z_image(), Recipe.immediate(dense_steps=1))
    calls = [z_image_call(timestep=t, batch=2) for t in (0.0, 0.3, 0.6, 0.0, 0.3)]
    assert [is_dense(model, reference, call) for call in calls] == [True, False, False, True, False]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_dense_first_steps_while_a_pipeline_samples_two_pictures(guidance):
    model = sparsify(tiny_flux(), Recipe.immediate(dense_steps=2))
    states = []
    model.register_forward_hook(lambda *_: states.append(model._rtlynx.context.dense_step))
    pipeline = TinyPipeline(model)
    settings = {"num_inference_steps": 4, "guidance_scale": guidance}
    for seed in range(2):
        pipeline(["a cat"], [torch.Generator().manual_seed(seed)], **settings)
    passes = 1 if guidance == 1.0 else 2
    assert states == ([True] * 2 * passes + [False] * 2 * passes) * 2
    pipeline.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        pipeline(["a cat"], [torch.Generator().manual_seed(2)], **settings)
    pipeline(["a cat"], [torch.Generator().manual_seed(2)], **settings)
    assert states[-4 * passes :] == [True] * 2 * passes + [False] * 2 * passes


def test_no_timestep_is_an_error_that_says_so():
    model = sparsify(nn.Sequential(nn.Linear(8, 8)), Recipe.immediate(dense_steps=1))
    with pytest.raises(ValueError, match="dense_steps needs the model's 'timestep' argument"):
        model(torch.randn(2, 8))


# --------------------------------------------------------------------------------------- dense text rows


def expected_rows(layer, x, text):
    """What one layer should give: `text` rows dense with the original weight, the others sparse."""
    widths = layer.pattern.widths(x.shape[-1])
    mask = slow_mask(x, grouping=layer.pattern.grouping, widths=widths)
    y = by_hand(
        x,
        layer.weight,
        layer.bias,
        mask=mask,
        norm=layer.norm,
        down=layer.lowrank_down,
        up=layer.lowrank_up,
    )
    original = layer.weight if layer.weight_dense is None else layer.weight_dense
    if text is not None:
        dense = by_hand(x, original, layer.bias, mask=torch.ones_like(mask))
        y[:, text] = dense[:, text]
    return y


def check_layers(model, call, text, joint):
    layers = sparse_layers(model)
    assert {name for name, layer in layers.items() if layer.text_rows_dense} == joint
    with watched(model, layers) as seen:
        output(model, call)
    for name, layer in layers.items():
        ((x, y),) = seen[name]
        expected = expected_rows(layer, x, text if name in joint else None)
        assert relative_error(y, expected) < 1e-5, name
        if name in joint:
            assert relative_error(y[:, text], expected_rows(layer, x, None)[:, text]) > 1e-3, name


FLUX_JOINT = {
    f"single_transformer_blocks.0.{name}"
    for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
}
Z_JOINT = {
    f"layers.0.{name}"
    for name in (
        *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
    )
}


@pytest.mark.parametrize("batch", [1, 3])
def test_text_rows_of_flux_single_blocks(batch):
    model = sparsify(tiny_flux(), Recipe.immediate(text_rows="dense"))
    check_layers(model, flux_call(batch=batch), slice(0, TEXT_TOKENS), FLUX_JOINT)


@pytest.mark.parametrize(("side", "batch"), [(16, 1), (12, 1), (12, 2)])
def test_text_rows_of_z_image_layers(side, batch):
    model = sparsify(tiny_z_image(), Recipe.immediate(text_rows="dense"))
    assert (side // 2) ** 2 <= IMAGE_TOKENS  # 64, or 36 that are padded to 64: the caption starts there
    check_layers(model, z_image_call(side=side, batch=batch), slice(IMAGE_TOKENS, None), Z_JOINT)


def test_text_rows_follow_the_length_of_the_prompt():
    model = sparsify(tiny_flux(), Recipe.immediate(text_rows="dense"))
    for length in (8, 20, 3):
        call = flux_call()
        call["encoder_hidden_states"] = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(1))
        call["txt_ids"] = torch.zeros(length, 3)
        check_layers(model, call, slice(0, length), FLUX_JOINT)


@pytest.mark.parametrize("rank", [None, 4])
def test_text_rows_beside_a_refit_use_the_original_weight(rank):
    reference = tiny_flux()
    model = tiny_flux()
    recipe = Recipe(rank=rank, ridge=0.1, text_rows="dense", dense_steps=1)
    calls = [flux_call(seed) for seed in range(3)]
    calibrate(model, calls=calls, recipe=recipe, options=CalibrationOptions(heldout=0.0), progress=False)
    for name, layer in sparse_layers(model).items():
        assert torch.equal(layer.weight_dense, reference.get_submodule(name).weight)
        assert not torch.equal(layer.weight, layer.weight_dense)
    assert is_dense(model, reference, flux_call(7, timestep=1.0))
    check_layers(model, flux_call(7), slice(0, TEXT_TOKENS), FLUX_JOINT)


def test_a_dense_step_without_a_refit_leaves_out_the_low_rank_branch():
    reference, model = tiny_flux(), tiny_flux()
    recipe = Recipe.paper(rank=4, ridge=0.1, dense_steps=1)
    calibrate(
        model,
        calls=[flux_call(0), flux_call(1)],
        recipe=recipe,
        options=CalibrationOptions(heldout=0.0),
        progress=False,
    )
    assert is_dense(model, reference, flux_call(timestep=1.0))
    assert not is_dense(model, reference, flux_call(timestep=0.5))


def test_text_rows_where_the_architecture_has_no_joint_blocks():
    model = sparsify(tiny_qwen(), Recipe.immediate(text_rows="dense"))
    assert not any(layer.text_rows_dense for layer in sparse_layers(model).values())


def test_z_image_pictures_of_different_sizes_are_refused_with_dense_text_rows():
    model = sparsify(tiny_z_image(), Recipe.immediate(text_rows="dense"))
    call = z_image_call(batch=2)
    call["x"][1] = torch.randn(4, 1, 24, 24)
    with pytest.raises(ValueError, match="one size"):
        output(model, call)
