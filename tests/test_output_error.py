"""The error that a budget counts: of what guidance makes of both passes, over steps from noise to picture."""

import pytest
import torch
from guidance_helpers import FLUX, doubled, two_passes
from torch import nn

from rtlynx.calibration.calls import CallStore
from rtlynx.calibration.output_error import OutputError, judged_calls


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


def passes(seed, in_one_call, null_comes_first):
    pair = two_passes(seed, timestep=1 - seed / 4)
    pair = pair[::-1] if null_comes_first else pair
    return [doubled(*pair)] if in_one_call else pair


@pytest.mark.parametrize("in_one_call", [True, False])
@pytest.mark.parametrize("null_comes_first", [True, False])
@pytest.mark.parametrize(("with_text", "without"), [(0.1, 0.1), (0.1, -0.1), (0.1, 0.0), (0.0, 0.1)])
def test_guidance_enlarges_what_moves_one_pass_alone(in_one_call, null_comes_first, with_text, without):
    model, g = Doubles(), 3.0
    calls = [call for seed in range(3) for call in passes(seed, in_one_call, null_comes_first)]
    error = OutputError(model, calls, FLUX, g)
    model.with_text, model.without = with_text, without
    squares = [call["hidden_states"].square().mean() for call in calls]
    clean = float(sum(squares) / len(squares))  # without an error guidance gives what both passes give
    expected = 0.1 * (with_text**2 + without**2) + 0.2 * (g * with_text - (g - 1) * without) ** 2
    assert error() == pytest.approx(expected / (0.1 * 2 * clean + 0.2 * clean), rel=1e-4)


def test_without_a_known_scale_each_call_counts_for_itself():
    model, calls = Doubles(), [call for seed in range(3) for call in passes(seed, False, False)]
    error = OutputError(model, calls, FLUX, None)
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
