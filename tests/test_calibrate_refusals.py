"""Bad input to calibration: one clear error, and the model as it was. And what a budget leaves dense."""

import re
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing
from calibration_helpers import (
    JOINT,
    PROMPTS,
    RIDGE,
    SINGLE,
    assert_dense,
    assert_same,
    calls,
    run,
    sample,
    solution,
)
from helpers import flux_call, output, tiny_flux
from pipeline_helpers import TinyPipeline

import rtlynx.calibration.run
from rtlynx import (
    Budget,
    CalibrationError,
    CalibrationOptions,
    Recipe,
    calibrate,
    sparsify,
)
from rtlynx.calibration.budget import inputs_of
from rtlynx.calibration.moments import Moments
from rtlynx.calibration.prices import LEAST_WIDTH, packaged_prices
from rtlynx.calibration.solve import solve_layers
from rtlynx.models import sparse_layers, state_of

# ------------------------------------------------------------------------------------------- bad input


def poisoned(value, where="hidden_states", index=2):
    data = calls(4)
    data[index][where][0, 3] = value
    return data


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sequential", [False, True])
def test_non_finite_data_names_the_layer_and_leaves_a_dense_model(value, sequential):
    model = tiny_flux()
    with pytest.raises(
        CalibrationError, match=r"NaN or Inf: input of transformer_blocks\.0\.attn\.to_q, batch"
    ):
        run(model, data=poisoned(value), options=CalibrationOptions(sequential=sequential))
    assert_dense(model)


def test_non_finite_data_leaves_a_sparse_model_as_it_was():
    recipe = Recipe.immediate(n=1, dense_steps=1)
    model = sparsify(tiny_flux(), recipe)
    output(model, flux_call(timestep=1.0))
    reference = sparsify(tiny_flux(), recipe)
    output(reference, flux_call(timestep=1.0))
    with pytest.raises(CalibrationError):
        run(model, data=poisoned(float("nan")))
    assert state_of(model).plan.recipe == recipe
    assert len(sparse_layers(model)) == 11
    assert {layer.pattern.n for layer in sparse_layers(model).values()} == {1}
    output(model, flux_call(timestep=1.0))
    assert torch.equal(output(model, flux_call()), output(reference, flux_call()))


def test_moments_that_overflow_name_the_layers_and_leave_the_model():
    model = tiny_flux()
    block, width = model.transformer_blocks[0], model.inner_dim
    with (
        torch.no_grad()
    ):  # its readers undo this scale, so that nothing but squares of what they read overflows
        block.norm1.linear.bias[width : 2 * width] = 1e20
        for reader in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
            reader.weight *= 1e-20
    names = ", ".join(f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v"))
    message = f"the calibration moments are not finite: leave {names} dense (skip)"
    with pytest.raises(CalibrationError, match=re.escape(message)):
        run(model)
    assert state_of(model) is None
    assert not sparse_layers(model)
    run(model, replace(JOINT, skip=("*.attn.to_?",)))


def test_moments_that_are_indefinite_say_by_how_much():
    k = 8
    matrix, mean = torch.eye(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    weight = torch.randn(4, k, generator=torch.Generator().manual_seed(0))
    matrix[0, 0] = -1.0  # the mean diagonal is 0.75
    moments = Moments(matrix, matrix, matrix, mean, mean)
    with pytest.raises(CalibrationError, match=r"indefinite by more than 0\.11 of their mean diagonal"):
        solve_layers(moments, [weight], rank=0, refit=True, ridge=RIDGE)
    assert solve_layers(moments, [weight], rank=0, refit=True, ridge=2.0)[0].weight is not None


@pytest.mark.parametrize("prompts", [[], None, ()])
def test_no_prompts(prompts):
    pipeline = TinyPipeline(tiny_flux())
    with pytest.raises(ValueError, match="no prompts"):
        sample(pipeline, prompts=prompts)
    assert_dense(pipeline.transformer)


def test_other_bad_input_leaves_the_model():
    pipeline = TinyPipeline(tiny_flux())
    for arguments, error, message in (
        ({"prompts": ["a", 3]}, ValueError, "prompts are a list of strings"),
        ({"calls": []}, ValueError, "no calls"),
        ({"prompts": ["one"]}, ValueError, "held-out prompts"),  # ridge="auto" with nothing to choose it on
    ):
        with pytest.raises(error, match=message):
            calibrate(pipeline, progress=False, **arguments)
        assert_dense(pipeline.transformer)
    with pytest.raises(TypeError, match="bare module has no prompts"):
        calibrate(tiny_flux(), PROMPTS, progress=False)


def test_one_string_is_no_list_of_prompts():
    pipeline = TinyPipeline(tiny_flux())
    with pytest.raises(ValueError, match="list of strings"):
        sample(pipeline, prompts="a cat")
    assert pipeline.batches == []


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"steps_per_prompt": 0}, {"heldout": 1.0}, {"heldout": -0.1}, {"memory_gb": 0.0}],
)
def test_options_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        CalibrationOptions(**settings)


def test_an_immediate_sparse_model_is_calibrated_as_if_it_were_dense():
    model, _ = run(sparsify(tiny_flux(), Recipe.immediate(n=1, grouping="strided", dense_steps=2)))
    dense, _ = run()
    assert_same(solution(model), solution(dense))
    assert len(model._forward_pre_hooks) == len(dense._forward_pre_hooks)  # dense_steps has one more
    assert torch.equal(output(model, flux_call(5)), output(dense, flux_call(5)))


def test_a_calibrated_model_is_refused_and_unchanged():
    model, _ = run()
    expected = solution(model)
    with pytest.raises(ValueError, match="calibrated already"):
        run(model)
    assert_same(solution(model), expected)


def test_blocks_that_do_not_run_stay_dense_with_a_reason():
    model = tiny_flux(num_single_layers=2)
    dead = model.single_transformer_blocks[1]
    live = list(model.single_transformer_blocks[:1])
    forward = type(model).forward

    class Skipping(type(model)):
        def forward(self, *args, **kwargs):
            every = self.single_transformer_blocks
            self.single_transformer_blocks = torch.nn.ModuleList(live)
            try:
                return forward(self, *args, **kwargs)
            finally:
                self.single_transformer_blocks = every

    model.__class__ = Skipping
    _, report = run(model, data=calls(3))
    assert not any(isinstance(m, rtlynx.SparseLinear) for m in dead.modules())
    reasons = {name: r for name, r in report.dense.items() if name.startswith("single_transformer_blocks.1.")}
    assert len(reasons) == 5
    assert set(reasons.values()) == {"did not run in calibration"}


# ---------------------------------------------------------------------------------------------- budget


def measured_error(model, data):
    """Relative squared error of the model's output against dense."""
    pairs = [(output(model, call).double(), output(tiny_flux(), call).double()) for call in data]
    return float(sum((y - r).square().sum() for y, r in pairs) / sum(r.square().sum() for _, r in pairs))


def test_budget_by_error():
    full, _ = run()
    heldout = [calls()[7]]
    limit = 0.3 * measured_error(full, heldout)
    model, report = run(recipe=Recipe(rank=4, ridge=RIDGE, budget=Budget(error=limit)))
    assert 0 < len(sparse_layers(model)) < 11
    assert measured_error(model, heldout) <= limit
    assert report.choice.error == pytest.approx(measured_error(model, heldout), rel=1e-3)
    assert set(report.choice.sparse) == set(sparse_layers(model)) == set(report.solutions)
    left = {name: reason for name, reason in report.dense.items() if reason.startswith("budget: ")}
    assert set(left) == set(sparse_layers(full)) - set(sparse_layers(model))
    assert len(report.costs) == 6
    # The layers of an input alone: everything else dense, their own solutions in place.
    cost = report.costs[0]
    assert len(cost.layers) == 3
    alone = tiny_flux()
    for name in cost.layers:
        alone.set_submodule(name, full.get_submodule(name))
    assert cost.error == pytest.approx(measured_error(alone, heldout), rel=1e-3)


def test_a_generous_error_budget_changes_nothing():
    model, report = run(recipe=Recipe(rank=4, ridge=RIDGE, budget=Budget(error=10.0)))
    assert_same(solution(model), solution(run()[0]))
    assert report.choice.speedup_share == pytest.approx(1.0)


def saved_us(layers, tokens):
    """What 2:4 saves at full size: 24 times as wide, 57 times as long, by the laws of the prices file."""
    wide, m = 24, tokens * 4096 / 72
    dense, sparse = (packaged_prices().products[name] for name in ("dense", "bf16-sparse"))
    compress = packaged_prices().preparations["bf16-sparse"]
    k = layers[0].in_features * wide
    us = compress.launch_us + m * k * 1e-9 * (
        1e3 * compress.input_us + compress.width_us * k + compress.lowrank_us * 4
    )
    for layer in layers:
        n = layer.out_features * wide
        us += sparse.launch_us - dense.launch_us + m * k * n * 1e-9 * (sparse.work_us - dense.work_us)
        us += m * n * 1e-6 * (sparse.output_us + sparse.lowrank_us * 4e-3 - dense.output_us)
    return -us


@pytest.mark.parametrize("share", [0.25, 0.6, 1.0])
def test_budget_by_saving(share):
    full, _ = run()
    readers = inputs_of(state_of(full).plan.sparse)
    savings = {key: saved_us(layers, 72 if key.startswith(SINGLE) else 64) for key, layers in readers.items()}
    model, report = run(recipe=Recipe(rank=4, ridge=RIDGE, budget=Budget(speedup_share=share)))
    for cost in report.costs:
        assert cost.saving == pytest.approx(savings[cost.name])
        assert cost.layers == tuple(layer.name for layer in readers[cost.name])
    sparse = {layer.candidate.reads for layer in state_of(model).plan.sparse}
    reached = sum(savings[key] for key in sparse) / sum(savings.values())
    assert report.choice.speedup_share == pytest.approx(reached)
    assert reached >= share - 1e-9


class OneInput(torch.nn.Module):
    """A model of the generic rule, whose layers read one tensor, each for itself."""

    def __init__(self, width, outputs):
        super().__init__()
        made = (torch.nn.Linear(width, n, bias=False) for n in outputs)
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(layer) for layer in made)

    def forward(self, x, return_dict=True):
        return (torch.cat([block(x) for block in self.blocks], dim=-1),)


def calibrate_one_input(width, outputs, share):
    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(1, 8, width, generator=generator)} for _ in range(2)]
    recipe = Recipe(rank=None, ridge=RIDGE, precision="fp8", budget=Budget(speedup_share=share))
    return run(OneInput(width, outputs), recipe, data=data)


def test_where_nothing_saves_time_calibration_says_so():
    """Eight tokens of a model that is wide enough to be priced as it is."""
    with pytest.raises(CalibrationError, match="no layer takes less time in another format, at 8 tokens"):
        calibrate_one_input(LEAST_WIDTH, [256], 0.9)


def test_a_layer_that_would_be_slower_stays_dense():
    """As wide as FLUX.1, 4 of 64 outputs are 192: compressing costs more than their whole dense product."""
    model, report = calibrate_one_input(64, [256, 4], 1.0)
    saving = {cost.name: cost.saving for cost in report.costs}
    assert saving["blocks.0.0"] > 0 > saving["blocks.1.0"]
    assert set(sparse_layers(model)) == {"blocks.0.0"}
    assert report.dense == {"blocks.1.0": "saves nothing"}
    assert report.choice.speedup_share == pytest.approx(1.0)
