"""How calibration calls pipelines: the steps that really run, the arguments that each takes, and refusals."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from calibration_helpers import (
    JOINT,
    PROMPTS,
    REFIT,
    assert_dense,
    calls,
    per_token_flux,
    run,
    sample,
)
from helpers import IMAGE_TOKENS, TEXT_TOKENS, tiny_flux
from pipeline_helpers import TinyPipeline

from rtlynx import CalibrationError, CalibrationOptions, Recipe, calibrate, sparsify
from rtlynx.evaluate import compare
from rtlynx.evaluate.activations import activation_energy_kept
from rtlynx.evaluate.sampling import sample_and_record, sample_pictures
from rtlynx.models import sparse_layers


class Scheduled:
    """A pipeline with a schedule of its own: its transformer is called at `times` if given."""

    def __init__(self, transformer=None, times=None, passes=1):
        self.transformer = tiny_flux() if transformer is None else transformer
        self.times, self.passes, self.ran = times, passes, []

    def run(self, prompt, generator, times):
        self.ran.append(list(prompt))
        noise = [torch.randn(IMAGE_TOKENS, 16, generator=one) for one in generator]
        x = torch.stack(noise)
        for t in times:
            for _ in range(self.passes):
                t = torch.as_tensor(t)
                x = x - 0.1 * self.call(x, t if t.dim() else t.expand(len(prompt)))
        return x

    def call(self, x, timestep):
        return self.transformer(
            hidden_states=x,
            encoder_hidden_states=torch.ones(len(x), TEXT_TOKENS, 64),
            pooled_projections=torch.ones(len(x), 32),
            timestep=timestep,
            img_ids=torch.zeros(IMAGE_TOKENS, 3),
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def __call__(self, image=None, prompt=None, generator=None, num_inference_steps=6, sigmas=None,
                 timesteps=None, strength=1.0, output_type="pil"):  # fmt: skip
        times = self.times or sigmas or timesteps
        if times is None:
            steps = max(1, int(num_inference_steps * strength))
            times = [strength * (1 - i / steps) for i in range(steps)]
        elif callable(times):
            times = times(len(self.ran))
        return self.run(prompt, generator, times)


def options(**changes):
    return CalibrationOptions(**{"batch_size": 4, "steps_per_prompt": 4, **changes})


def times_of(recorded):
    return [[round(float(call["timestep"].max()), 4) for call in batch] for batch in recorded]


# ------------------------------------------------------------------------------------ steps that really ran


@pytest.mark.parametrize(
    "settings",
    [
        {"num_inference_steps": 4},
        {"sigmas": [1.0, 0.75, 0.5, 0.25]},
        {"timesteps": [1.0, 0.75, 0.5, 0.25]},
        {"sigmas": [1.0, 0.75, 0.5, 0.25], "num_inference_steps": 50},
    ],
)
def test_each_of_few_steps_is_recorded_however_they_are_asked_for(recorded, settings):
    sample(Scheduled(), REFIT, options(pipeline_kwargs=settings))
    assert times_of(recorded) == [[1.0, 0.75, 0.5, 0.25]] * 3


@pytest.mark.parametrize(
    ("dense", "expected"),
    [
        ({"dense_steps": 1}, [0.75, 0.5, 0.25]),
        ({"dense_last_steps": 2}, [1.0, 0.75]),
        ({"dense_sigmas": ((0.4, 0.6),)}, [1.0, 0.75, 0.25]),
    ],
)
def test_steps_that_run_dense_are_not_recorded(recorded, dense, expected):
    settings = {"num_inference_steps": 4}
    sample(TinyPipeline(tiny_flux()), replace(REFIT, **dense), options(pipeline_kwargs=settings))
    assert times_of(recorded) == [expected] * 3


def test_a_recipe_that_runs_every_step_dense_is_refused(recorded):
    with pytest.raises(CalibrationError, match="all steps of a picture run dense"):
        sample(
            TinyPipeline(tiny_flux()),
            replace(REFIT, dense_last_steps=4),
            options(pipeline_kwargs={"num_inference_steps": 4}),
        )
    assert not recorded


def test_steps_below_strength_are_those_recorded(recorded):
    sample(Scheduled(), REFIT, options(pipeline_kwargs={"num_inference_steps": 10, "strength": 0.4}))
    assert times_of(recorded) == [[0.4, 0.3, 0.2, 0.1]] * 3


def test_batches_may_run_other_numbers_of_steps(recorded):
    counts = [6, 3, 12]
    ran = [[1 - i / count for i in range(count)] for count in counts]
    sample(Scheduled(times=lambda batch: ran[batch]), REFIT, options())
    for times, whole in zip(times_of(recorded), ran, strict=True):
        assert len(times) == min(4, len(whole))
        places = [min(range(len(whole)), key=lambda i: abs(whole[i] - time)) for time in times]
        gaps = {b - a for a, b in itertools.pairwise(places)}
        assert max(gaps) - min(gaps) <= 1  # evenly spread over the whole of it
        assert places[0] <= len(whole) // 4
        assert places[-1] >= len(whole) - 1 - len(whole) // 4


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("passes", [2, 3])
def test_guidance_passes_stay_together_in_any_direction(recorded, rising, passes):
    times = sorted([i / 10 for i in range(1, 9)], reverse=not rising)
    sample(Scheduled(times=times, passes=passes), REFIT, options(steps_per_prompt=2))
    for batch in times_of(recorded):
        assert len(batch) == 2 * passes
        assert len(set(batch[:passes])) == len(set(batch[passes:])) == 1
        assert abs(times.index(batch[0]) - times.index(batch[-1])) == 4


def test_a_schedule_that_goes_back_has_as_many_steps_as_it_takes(recorded):
    times = [1.0, 0.6, 1.0, 0.6, 0.2]  # as pipelines that renoise do
    sample(Scheduled(times=times), REFIT, options(steps_per_prompt=5))
    assert times_of(recorded) == [times] * 3


def first_frame_clean(t, batch):
    values = torch.full((batch, IMAGE_TOKENS), t)
    values[:, :8] = 0.0
    return values


def test_a_timestep_for_each_token_is_recorded(recorded):
    class Video(Scheduled):
        def call(self, x, timestep):
            return super().call(x, first_frame_clean(float(timestep[0]), len(x)))

    pipeline = Video(per_token_flux(), times=[0.9, 0.7, 0.5, 0.3, 0.1], passes=2)
    sample(pipeline, REFIT, options(steps_per_prompt=5))
    assert times_of(recorded) == [[t for t in pipeline.times for _ in range(2)]] * 3
    assert recorded[0][0]["timestep"].shape == (4, IMAGE_TOKENS)
    assert len(sparse_layers(pipeline.transformer)) == 11


def test_a_noise_level_that_moves_over_the_tokens_counts_as_steps(recorded):
    class Rolling(Scheduled):  # each token is at one of the same few levels, at another one in each step
        def call(self, x, timestep):
            levels = torch.linspace(0.1, 1, IMAGE_TOKENS).roll(round(float(timestep[0]) * 100))
            return super().call(x, levels.expand(len(x), -1))

    sample(Rolling(per_token_flux(), times=[0.01, 0.02, 0.03]), REFIT, options())
    assert [len(batch) for batch in recorded] == [3, 3, 3]


def test_pictures_at_timesteps_of_their_own_are_recorded(recorded):
    class Mixed(Scheduled):
        def call(self, x, timestep):
            return super().call(x, timestep * torch.linspace(0.5, 1, len(x)))

    sample(Mixed(times=[0.9, 0.6, 0.3], passes=2), REFIT, options())
    assert [len(batch) for batch in recorded] == [6, 6, 6]


# -------------------------------------------------------------------------------------- an empty recording


def test_a_pipeline_that_draws_with_another_model_is_an_error():
    class Other(Scheduled):
        def __init__(self):
            super().__init__()
            self.other = tiny_flux()

        def call(self, x, timestep):
            own, self.transformer = self.transformer, self.other
            try:
                return super().call(x, timestep)
            finally:
                self.transformer = own

    pipeline = Other()
    with pytest.raises(CalibrationError, match=r"0 calls of its transformer \(FluxTransformer2DModel\)"):
        sample(pipeline, REFIT)
    assert_dense(pipeline.transformer)
    with pytest.raises(ValueError, match="0 calls"):
        sample_and_record(Other(), PROMPTS[:2])
    with pytest.raises(ValueError, match="no layer of FluxTransformer2DModel ran"):
        activation_energy_kept(Other(), PROMPTS[:1])


def test_no_calls_are_an_error():
    with pytest.raises(CalibrationError, match="no calls"):
        calibrate(tiny_flux(), calls=iter(()), progress=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [([3], "call 0 is"), ([{}], "call 0 does not fit"), ([*calls(1), {"hidden": 1}], "call 1 does not fit")],
)
def test_calls_that_are_none_are_an_error(data, message):
    model = tiny_flux()
    with pytest.raises(ValueError, match=message):
        run(model, REFIT, data=data)
    assert_dense(model)


def test_prompts_and_calls_are_not_both_taken():
    with pytest.raises(ValueError, match="not both"):
        calibrate(Scheduled(), PROMPTS, calls=calls(2), progress=False)


def test_no_layer_to_solve_is_an_error_before_any_work():
    pipeline = Scheduled()
    with pytest.raises(CalibrationError, match=r"no layer is left to calibrate: .*11 skipped by"):
        sample(pipeline, Recipe(rank=4, skip=("*",), ridge=0.1, precision="bf16"))
    assert pipeline.ran == []
    assert_dense(pipeline.transformer)


def test_no_layer_that_ran_is_an_error():
    model = tiny_flux()

    class Hollow(type(model)):
        def forward(self, hidden_states, encoder_hidden_states=None, pooled_projections=None, timestep=None,
                    img_ids=None, txt_ids=None, return_dict=True):  # fmt: skip
            return (self.x_embedder(hidden_states),)

    model.__class__ = Hollow
    with pytest.raises(CalibrationError, match=r"no layer is left to calibrate: .*did not run"):
        run(model, REFIT)


def test_a_ridge_to_choose_without_held_out_prompts_is_refused_before_sampling():
    for prompts, settings in ((PROMPTS, {"heldout": 0.0}), (["one"] * 8, {}), (["one"], {})):
        pipeline = Scheduled()
        with pytest.raises(ValueError, match="held-out prompts"):
            sample(pipeline, Recipe(rank=4), options(**settings), prompts)
        assert pipeline.ran == []


# ----------------------------------------------------------------------------------- how pipelines are called


class Plain(Scheduled):
    """Takes neither an output type nor a generator."""

    def __call__(self, prompt):
        noise = [torch.Generator().manual_seed(int(torch.randint(1 << 30, ()))) for _ in prompt]
        return self.run(prompt, noise, [1.0, 0.5])


class Anything(TinyPipeline):
    """Takes whatever it is given."""

    def __call__(self, **kwargs):
        return super().__call__(**kwargs)


class Around(TinyPipeline):
    def __call__(self, *args, **kwargs):
        assert not args
        return super().__call__(**kwargs)


@pytest.mark.parametrize("kind", [Scheduled, Plain, Anything, Around])
def test_prompts_go_by_name_whatever_else_a_pipeline_takes(kind):
    pipeline = kind(tiny_flux())
    sample(pipeline, REFIT, options())
    ran = pipeline.ran if isinstance(pipeline, Scheduled) else pipeline.batches
    assert sorted(prompt for batch in ran for prompt in batch) == sorted(PROMPTS)
    assert len(sparse_layers(pipeline.transformer)) == 11


def test_without_a_generator_the_seed_still_decides():
    drawn, pipeline = [], Plain()
    for seed in (0, 0, 1):
        torch.rand(7)  # whatever came before
        state = torch.random.get_rng_state()
        drawn.append(sample_pictures(pipeline, PROMPTS[:2], seed=seed, batch_size=2))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_pictures_of_a_pipeline_without_an_output_type():
    class Numpy(Scheduled):
        def __call__(self, prompt, generator):
            self.run(prompt, generator, [1.0])
            return (np.full((len(prompt), 4, 5, 3), 51, dtype=np.uint8),)

    pictures = sample_pictures(Numpy(), PROMPTS[:3], batch_size=2)
    assert pictures.shape == (3, 3, 4, 5)
    assert torch.allclose(pictures, torch.tensor(0.2))


class Labels(Scheduled):
    def __call__(self, class_labels, guidance_scale=4.0, generator=None, num_inference_steps=50):
        raise AssertionError("must not be sampled")


class NeedsImage(Scheduled):
    def __call__(self, prompt, image, generator=None):
        raise AssertionError("must not be sampled")


class Strict(Scheduled):
    def __call__(self, prompt, generator=None, num_inference_steps=4, output_type="pil"):
        raise AssertionError("must not be sampled")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Labels, {}, r"Labels takes no prompt \(but class_labels.*calls="),
        (NeedsImage, {}, "NeedsImage needs 'image'"),
        (Strict, {"num_inference_step": 4}, "'num_inference_step'; did you mean 'num_inference_steps'"),
        (Strict, {"sigmas": [1.0]}, "unknown pipeline_kwargs key 'sigmas'"),
        (Strict, {"generator": None}, "cannot hold 'generator': noise comes from `seed`"),
        (Strict, {"prompt": "a"}, "cannot hold 'prompt'"),
    ],
)  # fmt: skip
def test_what_a_pipeline_cannot_be_given_is_refused_before_sampling(kind, settings, message):
    pipeline = kind()
    with pytest.raises(ValueError, match=message):
        sample(pipeline, REFIT, options(pipeline_kwargs=settings))
    assert_dense(pipeline.transformer)
    for draw in (sample_pictures, sample_and_record, activation_energy_kept):
        with pytest.raises(ValueError, match=message):
            draw(kind(), PROMPTS[:1], pipeline_kwargs=settings)
    with pytest.raises(ValueError, match=message):
        compare(kind(), kind(sparsify(tiny_flux())), PROMPTS[:1], pipeline_kwargs=settings, progress=False)


def test_what_is_no_pipeline_is_refused():
    holder = type("Holder", (), {"transformer": tiny_flux()})()
    with pytest.raises(TypeError, match="a Holder cannot draw prompts"):
        sample(holder, REFIT)


class Pictures(Scheduled):
    """Scheduled, and draws pictures."""

    def run(self, prompt, generator, times):
        return (
            super()
            .run(prompt, generator, times)
            .reshape(len(prompt), 1, 32, 32)
            .expand(-1, 3, -1, -1)
            .sigmoid()
        )


@pytest.mark.parametrize(
    ("settings", "ran"), [({"sigmas": [1.0, 0.5, 0.2]}, 3), ({"num_inference_steps": 10, "strength": 0.5}, 5)]
)
def test_compare_counts_the_steps_that_ran(settings, ran):
    pair = Pictures(), Pictures(sparsify(tiny_flux()))
    figures = compare(*pair, PROMPTS[:2], pipeline_kwargs=settings, progress=False)
    assert figures["steps"] == ran
    assert figures["layer_error"] > 0


# --------------------------------------------------------------------------------------- options and prompts


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": True}, {"batch_size": 2.5}, {"batch_size": float("nan")}, {"batch_size": "8"},
        {"batch_size": None}, {"steps_per_prompt": 1.0}, {"steps_per_prompt": True}, {"heldout": True},
        {"heldout": False}, {"heldout": float("nan")}, {"heldout": "0.1"}, {"seed": -1}, {"seed": 1.5},
        {"seed": True}, {"seed": 2**64}, {"sequential": "no"}, {"sequential": 1}, {"sequential": None},
        {"memory_gb": float("inf")}, {"memory_gb": float("nan")}, {"memory_gb": True}, {"memory_gb": "4"},
        {"folder": 3}, {"folder": ""}, {"folder": True}, {"pipeline_kwargs": [1]}, {"pipeline_kwargs": None},
        {"pipeline_kwargs": {1: 2}},
    ],
)  # fmt: skip
def test_options_of_other_types_are_refused_saying_what_is_expected(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"^{name} is .*, got {re.escape(repr(value))}$"):
        CalibrationOptions(**settings)


def test_empty_and_repeated_prompts_are_prompts_and_copies_are_held_out_together():
    prompts = ["", "a", "b", "", "c", "a", "d", "d"]
    pipeline = Scheduled()
    sample(pipeline, JOINT, options(batch_size=1, heldout=0.4), prompts)
    assert sorted(prompt for (prompt,) in pipeline.ran) == sorted(prompts)
    held = pipeline.ran[-4:]  # two of five distinct prompts, with their copies, come last
    fit = pipeline.ran[:-4]
    assert not {prompt for (prompt,) in held} & {prompt for (prompt,) in fit}
