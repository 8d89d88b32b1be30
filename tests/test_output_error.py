"""The error that a budget counts: of what guidance makes of both passes, over steps from noise to picture."""

import pytest
import torch
from guidance_helpers import FLUX, doubled, two_passes
from torch import nn

from rtlynx.calibration.calls import CallStore
from rtlynx.calibration.output_error import Guidance, OutputError, judged_calls, null_comes_first


class Doubles(nn.Module):
    """Gives what it is asked for, and `error` more where there is a text or where there is none."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.with_text = self.without = 0.0

    def forward(self, hidden_states, encoder_hidden_states, return_dict=False, **_):
        has_text = encoder_hidden_states.flatten(1).any(1).float()
        error = has_text * self.with_text + (1 - has_text) * self.without
        return (hidden_states + error[:, None, None],)


def passes(seed, in_one_call, null_first):
    pair = two_passes(seed, timestep=1 - seed / 4)
    pair = pair[::-1] if null_first else pair
    return [doubled(*pair)] if in_one_call else pair


@pytest.mark.parametrize("in_one_call", [True, False])
@pytest.mark.parametrize("null_first", [True, False])
@pytest.mark.parametrize(("with_text", "without"), [(0.1, 0.1), (0.1, -0.1), (0.1, 0.0), (0.0, 0.1)])
def test_guidance_enlarges_what_moves_one_pass_alone(in_one_call, null_first, with_text, without):
    model, g = Doubles(), 3.0
    calls = [call for seed in range(3) for call in passes(seed, in_one_call, null_first)]
    error = OutputError(model, calls, FLUX, Guidance(g, null_first))
    model.with_text, model.without = with_text, without
    squares = [call["hidden_states"].square().mean() for call in calls]
    clean = float(sum(squares) / len(squares))  # without an error guidance gives what both passes give
    expected = 0.1 * (with_text**2 + without**2) + 0.2 * (g * with_text - (g - 1) * without) ** 2
    assert error() == pytest.approx(expected / (0.1 * 2 * clean + 0.2 * clean), rel=1e-4)


def test_without_a_known_scale_each_call_counts_for_itself():
    model, calls = Doubles(), [call for seed in range(3) for call in passes(seed, False, False)]
    error = OutputError(model, calls, FLUX)
    model.with_text, model.without = 0.2, -0.1
    clean = sum(float(call["hidden_states"].square().mean()) for call in calls)
    assert error() == pytest.approx((3 * 0.2**2 + 3 * 0.1**2) / clean, rel=1e-4)


@pytest.mark.parametrize("batches", [1, 2, 4, 9])
def test_judged_steps_reach_from_noise_to_picture(batches):
    store = CallStore()
    for batch in range(batches):
        store.put(batch, [one for step in range(8) for one in two_passes(timestep=1 - step / 8)])
    found = judged_calls(store, list(range(batches)), FLUX)
    assert len(found) == 8  # both passes of four steps
    levels = [float(call["timestep"][0]) for call in found[::2]]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] >= 0.75
    assert levels[-1] <= 0.25


@pytest.mark.parametrize("in_one_call", [True, False])
@pytest.mark.parametrize("null_first", [True, False])
def test_prompts_of_all_batches_tell_the_null_pass(in_one_call, null_first):
    store = CallStore()
    for batch in range(3):
        store.put(batch, list(passes(batch, in_one_call, null_first)))
    assert null_comes_first(store, [0, 1, 2], FLUX) is null_first


def test_of_one_prompt_the_null_pass_is_where_most_pipelines_have_it():
    store = CallStore()
    store.put(0, list(two_passes()))
    store.put(1, [doubled(*two_passes()[::-1])])
    assert not null_comes_first(store, [0], FLUX)
    assert null_comes_first(store, [1], FLUX)


class TimestepFirst(Doubles):
    def forward(self, t, x, y, return_dict=False):
        return super().forward(x, y)


@pytest.mark.parametrize("t", [0.5, torch.tensor(0.5)])
def test_the_state_is_the_first_argument_that_is_by_picture(t):
    model, g = TimestepFirst(), 3.0
    x, y = torch.ones(2, 4, 8), torch.ones(2, 3, 8)
    error = OutputError(
        model, [{"t": t, "x": x, "y": y}, {"t": t, "x": x, "y": 0 * y}], FLUX, Guidance(g, False)
    )
    model.with_text, model.without = 0.1, 0.0
    assert error() == pytest.approx((0.1 + 0.2 * g**2) * 0.1**2 / (0.1 * 2 + 0.2), rel=1e-4)


def test_outputs_that_are_not_by_picture_count_as_they_are():
    model = Doubles()
    model.forward = lambda input_ids, scale, return_dict=False: ([scale * 2.0 + model.with_text],)
    calls = [{"input_ids": torch.arange(n), "scale": torch.ones(6)} for n in (5, 3)]
    error = OutputError(model, calls, FLUX, Guidance(3.0, False))
    model.with_text = 0.2
    assert error() == pytest.approx(0.2**2 / 4, rel=1e-4)
