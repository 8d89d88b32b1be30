"""Sparse models under diffusers' parallelism on two cards, over NCCL, give what one card gives."""

from functools import partial

import pytest
import torch

pytest.importorskip("diffusers")

from checkpoint_helpers import RIDGE, make
from helpers import MODELS, in_dtype, output, relative_error
from parallel_helpers import even, ring, run_together, tensor_parallel, ulysses
from process_helpers import PROCESSES

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
COMPILED = [(way, mode) for way in WAYS for mode in ("default", "reduce-overhead")]


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


def compiled(folder, parallelise, mode):
    """Qwen-Image in fp8, its blocks compiled: the outputs of three steps, and one of before."""
    model = MODELS["qwen"][0]().bfloat16().cuda()
    model.set_attention_backend("_native_cudnn")
    model = sparsify(parallelise(model), RECIPES["fp8"])
    call = in_dtype(MODELS["qwen"][1](), torch.bfloat16, "cuda")
    expected = output(model, call)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, mode=mode)
    # The first compiles, the second records a CUDA graph where there is one, the third replays it.
    return {"expected": expected, **{f"y{step}": output(model, call).clone() for step in range(3)}}


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
    ways = {**WAYS, "ulysses": even}
    cases |= {
        f"compiled-{way}-{mode}": partial(compiled, parallelise=ways[way], mode=mode)
        for way, mode in COMPILED
    }
    return run_together(folder, cases, "cuda")


@pytest.mark.parametrize(("way", "model", "recipe"), CASES)
def test_two_cards_give_what_one_gives(way, model, recipe, folder, results):
    expected = made(folder, alone, model, recipe)["y"].cpu()
    for theirs in results.tensors(f"{way}-{model}-{recipe}"):
        assert relative_error(theirs["y"], expected) < LIMIT


@pytest.mark.parametrize(("way", "mode"), COMPILED)
def test_compiled_blocks_on_two_cards_give_what_they_gave_before(way, mode, results):
    for theirs in results.tensors(f"compiled-{way}-{mode}"):
        for step in range(3):
            assert relative_error(theirs[f"y{step}"], theirs["expected"]) < LIMIT
