"""Dense first steps and dense text rows, told apart by the model's own call."""

from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from formula_helpers import by_hand, slow_mask
from helpers import (
    IMAGE_TOKENS,
    TEXT_TOKENS,
    flux_call,
    output,
    relative_error,
    tiny_flux,
    tiny_qwen,
    tiny_z_image,
    watched,
    z_image_call,
)
from pipeline_helpers import TinyPipeline
from torch import nn

from rtlynx import CalibrationOptions, Recipe, calibrate, schedule, sparsify
from rtlynx.models import sparse_layers
from rtlynx.nn.call import Step, calling, current_call, step_of

# ---------------------------------------------------------------------------------- which step a call is

# timesteps of a schedule, timesteps of calls -> step that each belongs to
SCHEDULES = {
    "one pass a step": ([1.0, 0.75, 0.5], [1.0, 0.75, 0.5], [0, 1, 2]),
    "guidance": ([1.0, 0.75, 0.5], [1.0, 1.0, 0.75, 0.75, 0.5, 0.5], [0, 0, 1, 1, 2, 2]),
    "calls out of order": ([1.0, 0.75, 0.5], [0.5, 1.0, 0.75], [2, 0, 1]),
    "a scheduler of second order": (
        [1.0, 0.75, 0.75, 0.5, 0.5],
        [1.0, 0.75, 0.75, 0.5, 0.5],
        [0, 1, 1, 2, 2],
    ),
    "from an image, at a later start": ([0.25, 0.2, 0.1], [0.25, 0.2, 0.1], [0, 1, 2]),
    "one step": ([1.0], [1.0, 1.0], [0, 0]),
    "integers to zero": ([1000, 999, 3, 0], [1000, 999, 3, 0], [0, 1, 2, 3]),
    "rounded by the model's dtype": ([0.9731, 0.4117], [0.9722, 0.4121], [0, 1]),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("form", ["float", "scalar", "batch"])
@pytest.mark.parametrize("rising", [False, True])
def test_steps_of_a_schedule(name, form, rising):
    timesteps, calls, expected = SCHEDULES[name]
    sign = -1.0 if rising else 1.0
    make = {"float": float, "scalar": torch.tensor, "batch": lambda t: torch.full((3,), float(t))}[form]
    with schedule([sign * t for t in timesteps]):
        found = [step_of(make(sign * t)) for t in calls]
        assert [step.index for step in found] == expected
        assert {step.count for step in found} == {len([t for t, _ in groupby(timesteps)])}
    with schedule(torch.tensor([sign * t for t in timesteps])):
        assert step_of(make(sign * calls[-1])).index == found[-1].index


def test_without_a_schedule_no_step_is_known():
    assert step_of(0.5) is None
    with schedule([1.0]), schedule([0.5, 0.25]):  # the inner one counts
        assert step_of(0.25) == Step(1, 2, 0.25)
    assert step_of(0.5) is None


@pytest.mark.parametrize("timestep", [0.6, float("nan"), torch.tensor([1.0, 0.5]), torch.tensor([])])
def test_timesteps_that_are_no_step_of_the_schedule_are_refused(timestep):
    with schedule([1.0, 0.5]), pytest.raises(ValueError, match="timestep"):
        step_of(timestep)


@pytest.mark.parametrize(
    ("timesteps", "sigmas", "expected"),
    [
        ([0.9, 0.5], None, 0.5),  # the timesteps themselves
        ([0.1, 0.5], [0.9, 0.5], 0.5),  # of a model whose time rises
        ([0.1, 0.5], None, None),
        ([900.0, 500.0], None, None),
        ([900, 700, 700, 500], [0.9, 0.8, 0.7, 0.5], 0.5),
        ([0.5], None, None),  # falls or rises?
    ],
)
def test_noise_level_of_a_step(timesteps, sigmas, expected):
    with schedule(timesteps, sigmas):
        assert step_of(timesteps[-1]).sigma == expected


def test_sigmas_that_do_not_fit_the_schedule_are_refused():
    with pytest.raises(ValueError, match="got 1 for 2"), schedule([1.0, 0.5], [1.0]):
        pass
    with pytest.raises(ValueError, match="between 0 and 1, got 500 to 1000"), schedule([1, 0.5], [1000, 500]):
        pass


def test_an_empty_schedule_is_refused():
    with pytest.raises(ValueError, match="at least one timestep"), schedule([]):
        pass


# ------------------------------------------------------------------------------------ dense first steps


def is_dense(model, reference, call):
    """Whether the model ran densely (it must differ from dense otherwise)."""
    return torch.equal(output(model, call), output(reference, call))


def dense_where(model, reference, timesteps, make=flux_call):
    """D for each step that ran dense, s for the others."""
    with schedule(timesteps):
        ran = [is_dense(model, reference, make(timestep=t)) for t in timesteps]
    return "".join("D" if dense else "s" for dense in ran)


def test_dense_first_steps_of_flux():
    reference = tiny_flux()
    model = sparsify(tiny_flux(), Recipe.immediate(dense_steps=2))
    plain = sparsify(tiny_flux())
    ran_dense = []
    with schedule([1.0, 0.8, 0.6, 0.4]):
        for timestep in (1.0, 1.0, 0.8, 0.8, 0.6, 0.6, 0.4):
            call = flux_call(timestep=timestep)
            ran_dense.append(is_dense(model, reference, call))
            if not ran_dense[-1]:
                assert torch.equal(output(model, call), output(plain, call))
    assert ran_dense == [True] * 4 + [False] * 3


@pytest.mark.parametrize(
    "pictures",
    [
        [[1.0, 0.75, 0.5, 0.25], [1.0, 0.75, 0.5, 0.25]],
        [[1.0, 0.75, 0.5, 0.25], [0.25, 0.2, 0.1]],  # image to image begins where the last one ended
        [[1.0, 0.75, 0.5, 0.25], [0.2, 0.15, 0.1]],
        [[1.0, 0.75], [0.6, 0.4, 0.2]],
    ],
)
def test_one_picture_after_another(pictures):
    model, reference = sparsify(tiny_flux(), Recipe.immediate(dense_steps=2)), tiny_flux()
    for timesteps in pictures:
        assert dense_where(model, reference, timesteps) == "DDss"[: len(timesteps)]


def test_requests_that_take_turns_on_one_model():
    model, reference = sparsify(tiny_flux(), Recipe.immediate(dense_steps=2)), tiny_flux()

    def picture(timesteps):
        for t in timesteps:
            with schedule(timesteps):
                dense = is_dense(model, reference, flux_call(timestep=t))
            yield "D" if dense else "s"

    first, second = picture([1.0, 0.75, 0.5, 0.25]), picture([0.5, 0.4, 0.3, 0.2])
    order = [next(one) for one in (first, first, second, first, second, second, first, second)]
    assert order == ["D", "D", "D", "s", "D", "s", "s", "s"]


def test_a_call_that_could_be_any_step_is_an_error():
    model = sparsify(tiny_flux(), Recipe.immediate(dense_steps=2))
    with pytest.raises(RuntimeError, match=r"does not tell which step it is.*rtlynx\.schedule"):
        model(**flux_call(timestep=1.0))
    model.train()  # is not sampling
    expected = sparsify(tiny_flux()).train()(**flux_call(), return_dict=False)[0]
    assert torch.equal(model(**flux_call(), return_dict=False)[0], expected)


def test_layers_that_depend_on_the_call_cannot_be_called_without_one():
    for recipe in (Recipe.immediate(dense_steps=1), Recipe.immediate(text_rows="dense")):
        model = sparsify(tiny_flux(), recipe)
        layer = model.single_transformer_blocks[0].proj_out
        x = torch.randn(1, 72, layer.in_features)
        with pytest.raises(RuntimeError, match="call the model, not its layers"):
            layer(x)
        with pytest.raises(RuntimeError, match="call the model, not its layers"):
            model.forward(**flux_call())
        with calling(), torch.no_grad():
            assert layer(x).shape == (1, 72, layer.out_features)


def test_dense_first_steps_of_a_batch_and_positional_arguments():
    reference = tiny_flux()
    model = sparsify(tiny_flux(), Recipe.immediate(dense_steps=1))
    names = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids"]
    for timestep, dense in ((1.0, True), (0.5, False), (1.0, True)):
        call = flux_call(batch=3, timestep=timestep)
        with torch.no_grad(), schedule([1.0, 0.5]):
            y = model(*(call[name] for name in names), return_dict=False)[0]
        assert torch.equal(y, output(reference, call)) == dense


def test_dense_first_steps_of_z_image_whose_timestep_rises():
    model = sparsify(tiny_z_image(), Recipe.immediate(dense_steps=1))
    assert dense_where(model, tiny_z_image(), [0.0, 0.3, 0.6], make=z_image_call) == "Dss"


class DiffusersPipeline(TinyPipeline, DiffusionPipeline):
    """Goes through `timesteps` by `t`, as diffusers' pipelines do, and tells its transformer nothing else."""

    @torch.no_grad()
    def __call__(self, timesteps, seeds=(0,), stop_after=None):
        latents = []
        for seed in seeds:
            call = flux_call(seed)
            for i, t in enumerate(timesteps):
                if i == stop_after:
                    raise KeyboardInterrupt
                call["timestep"] = (t / 1000).expand(1)
                call["hidden_states"] = call["hidden_states"] + self.transformer(**call, return_dict=False)[0]
            latents.append(call["hidden_states"])
        return latents


def test_a_diffusers_pipeline_tells_the_step_by_its_own_loop():
    transformer = sparsify(tiny_flux(), Recipe.immediate(dense_steps=2))
    pipeline, states = DiffusersPipeline(transformer), []
    transformer.register_forward_hook(lambda *_: states.append("Ds"[not current_call().dense]), prepend=True)
    text_to_image, image_to_image = torch.tensor([1000.0, 750.0, 500.0]), torch.tensor([500.0, 300.0, 200.0])
    for timesteps in (text_to_image, image_to_image, text_to_image):
        pipeline(timesteps)
    assert "".join(states) == "DDs" * 3
    with pytest.raises(KeyboardInterrupt):
        pipeline(text_to_image, stop_after=1)
    states.clear()
    pipeline(image_to_image)
    assert "".join(states) == "DDs"


class WithComprehension(DiffusersPipeline):
    """As ControlNet pipelines, whose loop's `timesteps` a comprehension reads too."""

    @torch.no_grad()
    def __call__(self, timesteps):
        shares = [i / len(timesteps) for i in range(len(timesteps))]
        for _, t in zip(shares, timesteps, strict=True):
            self.transformer(**{**flux_call(), "timestep": (t / 1000).expand(1)})


class WithCurrentTimestep(DiffusersPipeline):
    """As DiTPipeline, which calls the current timestep `timesteps`."""

    @torch.no_grad()
    def __call__(self, timesteps):
        self.scheduler = SimpleNamespace(timesteps=timesteps)
        for t in self.scheduler.timesteps:
            timesteps = t
            timesteps = timesteps[None].expand(2)
            self.transformer(**{**flux_call(), "timestep": timesteps[:1] / 1000})


@pytest.mark.parametrize("kind", [WithComprehension, WithCurrentTimestep])
def test_pipelines_that_name_things_otherwise(kind):
    transformer, states = sparsify(tiny_flux(), Recipe.immediate(dense_steps=2)), []
    transformer.register_forward_hook(lambda *_: states.append("Ds"[not current_call().dense]), prepend=True)
    kind(transformer)(torch.tensor([1000.0, 750.0, 500.0]))
    assert "".join(states) == "DDs"


def test_no_timestep_is_an_error_that_says_so():
    model = sparsify(nn.Sequential(nn.Linear(8, 8)), Recipe.immediate(dense_steps=1))
    with pytest.raises(ValueError, match="dense steps need the model's 'timestep' argument"):
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
        lowrank_a=layer.lowrank_a,
        lowrank_b=layer.lowrank_b,
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
    with schedule([1.0, 0.5]):
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
    assert dense_where(model, reference, [1.0, 0.5]) == "Ds"


def test_text_rows_where_the_architecture_has_no_joint_blocks():
    model = sparsify(tiny_qwen(), Recipe.immediate(text_rows="dense"))
    assert not any(layer.text_rows_dense for layer in sparse_layers(model).values())


def test_z_image_pictures_of_different_sizes_are_refused_with_dense_text_rows():
    model = sparsify(tiny_z_image(), Recipe.immediate(text_rows="dense"))
    call = z_image_call(batch=2)
    call["x"][1] = torch.randn(4, 1, 24, 24)
    with pytest.raises(ValueError, match="one size"):
        output(model, call)
