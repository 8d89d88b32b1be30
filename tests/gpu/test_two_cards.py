"""Sparse models under diffusers' parallelism on two cards, over NCCL, give what one card gives."""

from functools import partial

import pytest
import torch

pytest.importorskip("diffusers")

from checkpoint_helpers import RIDGE, make
from helpers import MODELS, in_dtype, output, relative_error
from parallel_helpers import PROCESSES, ring, run_together, tensor_parallel, ulysses

from rtlynx import Recipe, load, save, sparsify

CARDS = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CARDS.count((9, 0)) < PROCESSES, reason=f"needs {PROCESSES} Hopper cards"),
]
LIMIT = 3e-2  # bfloat16 in another order, which turns near ties of entries
RECIPES = {
    "norm": Recipe.immediate(tp_degree=2),
    "refit": Recipe(rank=4, ridge=RIDGE, tp_degree=2),
    "fp8": Recipe.immediate(tp_degree=2, precision="fp8"),
}
WAYS = {"tensor": tensor_parallel, "ulysses": ulysses, "ring": ring}
CASES = [(way, model, recipe) for way in WAYS for model in ("flux", "qwen") for recipe in RECIPES]


def alone(model):
    return model


def made(folder, parallelise, model, recipe):
    """On the current card in bfloat16: made parallel, then sparse; its output for the model's usual call."""
    build, call = MODELS[model]
    changed = build().bfloat16().cuda()
    changed.set_attention_backend("_native_cudnn")  # ring attention needs the log-sum-exp
    changed = parallelise(changed)
    if RECIPES[recipe].needs_calibration:
        load(changed, folder / f"{model}-{recipe}")
    else:
        sparsify(changed, RECIPES[recipe])
    return {"y": output(changed, in_dtype(call(), torch.bfloat16, "cuda"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    for model in ("flux", "qwen"):
        for name, recipe in RECIPES.items():
            if recipe.needs_calibration:
                save(make(recipe, *MODELS[model]), folder / f"{model}-{name}")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    cases = {
        "-".join(case): partial(made, parallelise=WAYS[case[0]], model=case[1], recipe=case[2])
        for case in CASES
    }
    return run_together(folder, cases, "cuda")


@pytest.mark.parametrize(("way", "model", "recipe"), CASES)
def test_two_cards_give_what_one_gives(way, model, recipe, folder, results):
    expected = made(folder, alone, model, recipe)["y"].cpu()
    for theirs in results.tensors(f"{way}-{model}-{recipe}"):
        assert relative_error(theirs["y"], expected) < LIMIT
