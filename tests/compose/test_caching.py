"""Caches that skip blocks between steps: what they skip and draw is as if formulas were the sparse layers."""

import copy

import pytest
import torch
from compose_helpers import sparse_flux, with_formulas
from diffusers import FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from helpers import flux_call, output, relative_error, tiny_flux

from rtlynx import Recipe, schedule, sparsify

STEPS = 6
CLOSE = 3e-4  # the last bit of an input decides between entries that are nearly a tie
DEPTH = {"num_layers": 2, "num_single_layers": 2}


def sample(model, guidance=False):
    """Velocities of each step of one picture, and how often the last attention ran."""
    last, ran = model.single_transformer_blocks[-1].attn.to_q, []
    handle = last.register_forward_hook(lambda *_: ran.append(1))
    x, velocities = flux_call()["hidden_states"], []
    for step in range(STEPS):
        velocity = 0.0
        for name, weight in (("cond", 2.0), ("uncond", -1.0)) if guidance else (("cond", 1.0),):
            arguments = {**flux_call(seed=int(weight), timestep=1 - step / STEPS), "hidden_states": x}
            about = {"step_index": step, "sigma": 1 - step / STEPS, "num_inference_steps": STEPS}
            timesteps = [1 - i / STEPS for i in range(STEPS)]
            with schedule(timesteps), model.cache_context(name, **about):
                velocity = velocity + weight * output(model, arguments)
        x = x - velocity / STEPS
        velocities.append(velocity)
    handle.remove()
    return torch.stack(velocities), len(ran)


def first_block(model):
    model.enable_cache(FirstBlockCacheConfig(threshold=0.7))


def taylor_seer(model):
    config = TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, max_order=1, taylor_factors_dtype=torch.float32
    )
    model.enable_cache(config)


def mag(model):
    ratios = torch.ones(STEPS)
    model.enable_cache(MagCacheConfig(threshold=0.5, num_inference_steps=STEPS, mag_ratios=ratios))


def sea(model):
    def latents(_module, _args, call):
        return [call["hidden_states"][0].T.reshape(16, 1, 8, 8)]

    model.enable_cache(SeaCacheConfig(threshold=0.7, raw_vision_callback=latents))


def db_cache(model):
    cache_dit = pytest.importorskip("cache_dit")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        residual_diff_threshold=0.7,
        num_inference_steps=STEPS,
    )
    cache_dit.enable_cache(model, cache_config=config)


CACHES = {
    "first block": first_block,
    "TaylorSeer": taylor_seer,
    "MagCache": mag,
    "SeaCache": sea,
    "cache-dit": db_cache,
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["immediate", "refit"])
def test_a_cache_skips_and_draws_what_it_does_with_formulas(kind, cache):
    model = sparse_flux(kind, **DEPTH)
    twin, plain = with_formulas(model), copy.deepcopy(model)
    for one in (model, twin):
        CACHES[cache](one)
    drawn, ran = sample(model)
    expected, expected_ran = sample(twin)
    assert 0 < ran == expected_ran < STEPS
    assert relative_error(drawn, expected) < CLOSE
    assert relative_error(drawn, sample(plain)[0]) > 10 * CLOSE  # or nothing was skipped


def test_guidance_passes_have_caches_of_their_own():
    model = sparse_flux(**DEPTH)
    twin = with_formulas(model)
    for one in (model, twin):
        first_block(one)
    drawn, ran = sample(model, guidance=True)
    expected, expected_ran = sample(twin, guidance=True)
    assert 0 < ran == expected_ran < 2 * STEPS
    assert relative_error(drawn, expected) < CLOSE


def test_dense_steps_stay_dense_beside_a_cache():
    model = sparsify(tiny_flux(**DEPTH), Recipe.immediate(dense_steps=1))
    dense = tiny_flux(**DEPTH)
    for one in (model, dense):
        first_block(one)
    for _ in range(2):  # the second picture begins densely too
        drawn, expected = sample(model)[0], sample(dense)[0]
        assert torch.equal(drawn[0], expected[0])
        assert not torch.equal(drawn[1:], expected[1:])
        for one in (model, dense):
            one.disable_cache()
            first_block(one)


def test_without_the_cache_the_output_is_as_before():
    model = sparse_flux(**DEPTH)
    before, _ = sample(model)
    first_block(model)
    sample(model)
    model.disable_cache()
    assert torch.equal(sample(model)[0], before)
