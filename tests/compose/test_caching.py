"""Caches that skip blocks between steps: what they skip and draw is as if formulas were the sparse layers."""

import copy

import pytest
import torch
from compose_helpers import sparse_flux, with_formulas
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from helpers import TEXT_TOKENS, flux_call, output, relative_error, tiny_flux

from rtlynx import Recipe, sparsify

STEPS = 6
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
            with model.cache_context(name):
                velocity = velocity + weight * output(model, arguments)
        x = x - velocity / STEPS
        velocities.append(velocity)
    handle.remove()
    return torch.stack(velocities), len(ran)


def first_block(model):
    model.enable_cache(FirstBlockCacheConfig(threshold=0.3))


def taylor_seer(model):
    config = TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, max_order=1)
    model.enable_cache(config)


def mag(model):
    ratios = torch.ones(STEPS)
    model.enable_cache(MagCacheConfig(threshold=0.5, num_inference_steps=STEPS, mag_ratios=ratios))


def db_cache(model):
    cache_dit = pytest.importorskip("cache_dit")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        residual_diff_threshold=0.3,
        num_inference_steps=STEPS,
    )
    cache_dit.enable_cache(model, cache_config=config)


CACHES = {"first block": first_block, "TaylorSeer": taylor_seer, "MagCache": mag, "cache-dit": db_cache}


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
    assert relative_error(drawn, expected) < 1e-5
    assert relative_error(drawn, sample(plain)[0]) > 1e-6  # or nothing was skipped
