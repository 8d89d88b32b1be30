"""Which calls of a model are one sampling step, and layers that no token reaches."""

import copy
import inspect

import pytest
import torch
from calibration_helpers import REFIT, PerToken, run, sample
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import IMAGE_TOKENS, TEXT_TOKENS, tiny_flux
from torch import nn

from rtlynx import CalibrationError, CalibrationOptions, Recipe
from rtlynx.models import sparse_layers

OPTIONS = CalibrationOptions(batch_size=4, steps_per_prompt=1)


class Level(PerToken):
    """Takes its timestep under a name that nothing knows."""

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, level, img_ids, txt_ids,
                return_dict=True):  # fmt: skip
        return super().forward(
            hidden_states, encoder_hidden_states, pooled_projections, level, img_ids, txt_ids,
            return_dict=return_dict,
        )  # fmt: skip


def renamed_flux():
    model = tiny_flux()
    model.__class__ = Level
    return model


class Stepping:
    """A pipeline with a scheduler of diffusers; `levels` makes what each pass gives the model at `t`."""

    def __init__(self, transformer, name="level", levels=None, copied=False, passes=2):
        self.transformer, self.name, self.copied, self.passes = transformer, name, copied, passes
        self.levels = levels or (lambda t, _pass, batch: t.expand(batch))
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def step(self, scheduler, velocity, t, x):
        assert "generator" in inspect.signature(scheduler.step).parameters  # as pipelines look
        return scheduler.step(velocity, t, x).prev_sample

    @torch.no_grad()
    def __call__(self, prompt, generator, num_inference_steps=4):
        scheduler = copy.deepcopy(self.scheduler) if self.copied else self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        x = torch.stack([torch.randn(IMAGE_TOKENS, 16, generator=one) for one in generator])
        for t in scheduler.timesteps:
            for number in range(self.passes):
                level = self.levels(t / 1000, number, len(prompt))
                velocity = self.transformer(
                    hidden_states=x,
                    encoder_hidden_states=torch.full((len(x), TEXT_TOKENS, 64), float(number)),
                    pooled_projections=torch.ones(len(x), 32),
                    img_ids=torch.zeros(IMAGE_TOKENS, 3),
                    txt_ids=torch.zeros(TEXT_TOKENS, 3),
                    return_dict=False,
                    **{self.name: level},
                )[0]
            x = self.step(scheduler, velocity, t, x)
        return x


def passes_apart(t, number, batch):
    """Each guidance pass has noise levels of its own, token by token, and they rise."""
    return (1 - t + number / 100) * torch.linspace(0.5, 1, IMAGE_TOKENS).expand(batch, -1)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("levels", [None, passes_apart])
def test_a_step_is_what_lies_between_two_steps_of_the_scheduler(recorded, levels, copied):
    pipeline = Stepping(renamed_flux(), levels=levels, copied=copied)
    sample(pipeline, REFIT, OPTIONS)
    assert [len(batch) for batch in recorded] == [2, 2, 2]  # both passes of one step
    for first, second in recorded:
        assert torch.equal(first["hidden_states"], second["hidden_states"])
        assert float(first["encoder_hidden_states"].max()) == 0
        assert float(second["encoder_hidden_states"].min()) == 1
    assert "step" not in vars(pipeline.scheduler)
    assert len(sparse_layers(pipeline.transformer)) == 11


def test_every_step_of_the_scheduler_counts_also_at_one_timestep(recorded):
    pipeline = Stepping(renamed_flux(), levels=lambda t, number, batch: torch.full((batch,), 0.5))
    sample(pipeline, REFIT, CalibrationOptions(batch_size=4, steps_per_prompt=9))
    assert [len(batch) for batch in recorded] == [8, 8, 8]


def test_steps_that_nothing_tells_apart_are_refused():
    class Silent(Stepping):
        def step(self, _scheduler, velocity, _t, x):
            return x - velocity / 4

    with pytest.raises(CalibrationError, match=r"which calls of Level belong to one sampling step .*calls="):
        sample(Silent(renamed_flux()), REFIT, OPTIONS)


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        ({"dense_last_steps": 1}, "does not tell which step"),
        ({"dense_sigmas": ((0, 0.3),)}, "call the model"),
    ],
)
def test_dense_steps_where_the_step_is_not_known_are_refused_before_solving(dense, message):
    pipeline = Stepping(tiny_flux(), name="timestep")  # not diffusers' own, and without rtlynx.schedule
    with pytest.raises(CalibrationError, match=message):
        sample(pipeline, Recipe(rank=None, ridge=0.1, **dense), OPTIONS)
    assert not sparse_layers(pipeline.transformer)


# ----------------------------------------------------------------------------- layers that no token reaches


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.up(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(32, 32)
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x, choice):
        x = x + self.proj(x)
        for number, expert in enumerate(self.experts):
            rows = choice == number
            x = x.index_put((rows,), expert(x[rows]))  # also where there are no rows
        return x


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, choice, return_dict=True):
        for block in self.blocks:
            x = block(x, choice)
        return (x,)


def routed(*experts):
    """Eight calls, whose tokens go to `experts` in turn; every eighth call is held out."""
    made = []
    for number in range(8):
        torch.manual_seed(number)
        choice = torch.tensor(experts)[torch.arange(64) % len(experts)].reshape(1, 64)
        made.append({"x": torch.randn(1, 64, 32), "choice": choice})
    return made


@pytest.mark.parametrize(
    ("recipe", "sequential"),
    [(REFIT, False), (REFIT, True), (Recipe(rank=4, ridge=0.1, precision="fp8"), False),
     (Recipe.recommended(), False)],
)  # fmt: skip
def test_layers_that_no_token_reaches_stay_dense_with_that_reason(recipe, sequential):
    options = CalibrationOptions(sequential=sequential)
    model, report = run(Experts(), recipe, options, routed(0, 2))
    unseen = {f"blocks.{block}.experts.1.{name}" for block in range(2) for name in ("up", "down")}
    for name in unseen:
        assert report.dense[name] == "no token reached it in calibration"
        assert isinstance(model.get_submodule(name), nn.Linear)
    assert {"blocks.0.experts.0.up", "blocks.1.proj"} <= set(sparse_layers(model)) | {
        name for name, reason in report.dense.items() if "budget" in reason
    }
    assert not unseen & set(sparse_layers(model))
    (call,) = routed(0, 1, 2)[:1]
    with torch.no_grad():
        assert model(**call)[0].isfinite().all()  # a token may reach it later


def test_experts_that_only_held_out_tokens_reach_stay_dense():
    calls = [*routed(0, 2)[:7], *routed(1)[:1]]
    _, report = run(Experts(), REFIT, CalibrationOptions(heldout=0.125), calls)
    assert report.dense["blocks.0.experts.1.up"] == "no token reached it in calibration"


def test_a_ridge_is_not_chosen_for_experts_that_no_held_out_token_reaches():
    calls = [*routed(0, 1)[:7], *routed(0, 2)[:1]]
    model, report = run(Experts(), Recipe(rank=None), CalibrationOptions(heldout=0.125), calls)
    assert report.dense["blocks.1.experts.1.up"] == "no token of a held-out prompt reached it in calibration"
    assert report.dense["blocks.1.experts.2.up"] == "no token reached it in calibration"
    assert "blocks.1.experts.0.up" in sparse_layers(model)


def test_experts_that_the_first_call_does_not_reach_are_solved():
    calls = [*routed(0)[:1], *routed(1, 2)[:6], *routed(0, 1, 2)[:1]]
    _, report = run(Experts(), REFIT, CalibrationOptions(heldout=0.125), calls)
    assert len(report.solutions) == 14


def test_no_layer_that_any_token_reaches_is_an_error():
    class Hollow(Experts):
        def forward(self, x, choice, return_dict=True):
            return super().forward(x[:0], choice[:0])

    with pytest.raises(CalibrationError, match=r"no layer is left to calibrate: .*no token reached it"):
        run(Hollow(), REFIT, None, routed(0))
