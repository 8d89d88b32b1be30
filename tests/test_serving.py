"""One sparse model that many requests share: in threads, in turn, interrupted, nested."""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from calibration_helpers import ALL_FIT, run
from helpers import flux_call, output, tiny_flux, tiny_z_image, z_image_call

from rtlynx import Recipe, schedule, sparsify

THREADS = 8
LENGTHS = (3, 8, 20, 40)
TIMESTEPS = (1.0, 0.75, 0.5, 0.25)


def request(seed, length, timestep):
    gen = torch.Generator().manual_seed(1000 + seed)
    text = torch.randn(1, length, 64, generator=gen)
    call = flux_call(seed, timestep=timestep)
    return {**call, "encoder_hidden_states": text, "txt_ids": torch.zeros(length, 3)}


def draw(model, call):
    with schedule(TIMESTEPS):
        return output(model, call)


@pytest.fixture
def frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


RECIPES = {
    "text rows": Recipe.immediate(text_rows="dense"),
    "dense steps": Recipe.immediate(dense_steps=2, precision="fp8"),
    "both, refitted": Recipe(rank=4, ridge=0.1, text_rows="dense", dense_steps=1),
}


@pytest.mark.parametrize("name", RECIPES)
def test_threads_draw_what_they_draw_alone(name, frequent_switches):
    recipe, model = RECIPES[name], tiny_flux(num_layers=1, num_single_layers=3)
    model = run(model, recipe, ALL_FIT)[0] if recipe.needs_calibration else sparsify(model, recipe)
    calls = [request(i, LENGTHS[i % 4], TIMESTEPS[i // 4 % 4]) for i in range(16)]
    alone = [draw(model, call) for call in calls]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(partial(draw, model), calls * 3))
    wrong = sum(not torch.equal(y, alone[i % 16]) for i, y in enumerate(together))
    assert wrong == 0, f"{wrong} of {len(together)} outputs differ"


def test_threads_with_models_of_several_recipes(frequent_switches):
    models = [sparsify(tiny_flux(i), recipe) for i, recipe in enumerate(list(RECIPES.values())[:2])]
    models.append(sparsify(tiny_z_image(), Recipe.immediate(text_rows="dense")))
    jobs = []
    for i in range(12):
        jobs += [(models[kind], request(i, LENGTHS[i % 4], TIMESTEPS[i % 4])) for kind in (0, 1)]
        jobs.append((models[2], z_image_call(i, timestep=TIMESTEPS[i % 4])))
    alone = [draw(*job) for job in jobs]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda job: draw(*job), jobs * 2))
    assert all(torch.equal(y, alone[i % len(jobs)]) for i, y in enumerate(together))


def test_a_model_called_within_another_one_leaves_its_state_alone():
    recipe = Recipe.immediate(text_rows="dense")
    outer, inner = sparsify(tiny_flux(0), recipe), sparsify(tiny_flux(1), recipe)
    call, other = request(0, 8, 0.5), request(1, 40, 0.5)
    expected = output(outer, call)

    def call_the_other(*_):
        output(inner, other)

    outer.single_transformer_blocks[0].register_forward_pre_hook(call_the_other)
    assert torch.equal(output(outer, call), expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_aborted_call_leaves_nothing_behind(error):
    def abort(*_):
        raise error

    model = sparsify(tiny_flux(), Recipe.immediate(text_rows="dense"))
    expected = output(model, request(0, 8, 0.5))
    hook = model.single_transformer_blocks[0].attn.register_forward_pre_hook(abort)
    for _ in range(3):
        with pytest.raises(error):
            output(model, request(1, 40, 0.5))
    hook.remove()
    assert torch.equal(output(model, request(0, 8, 0.5)), expected)
