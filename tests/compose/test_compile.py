"""torch.compile on sparse models: one graph for all steps and prompt lengths, and what takes another."""

import copy
from functools import partial

import pytest
import torch
from compose_helpers import adapter, refit, sparse_flux
from helpers import flux_call, output, tiny_flux
from torch._dynamo.utils import counters

from rtlynx import Recipe, schedule, sparsify
from rtlynx.models import sparse_layers

TIMESTEPS = (1.0, 0.8, 0.6)
LENGTHS = (8, 20, 13)
OTHER_BASES = Recipe(rank=None, ridge=0.1, rotate_values=True, permute_hidden=True)


def call(timestep, length):
    """A FLUX call with a prompt of `length` tokens."""
    arguments = flux_call(timestep=timestep)
    gen = torch.Generator().manual_seed(length)
    text = torch.randn(1, length, 64, generator=gen)
    return {**arguments, "encoder_hidden_states": text, "txt_ids": torch.zeros(length, 3)}


def graphs(model, calls, how, backend="eager", dynamic=True):
    """Number of graphs after each of `calls`, whose outputs must be those of `model` uncompiled."""
    torch._dynamo.reset()
    counters.clear()
    twin = copy.deepcopy(model)
    settings = {"fullgraph": True, "backend": backend, "dynamic": dynamic}
    if how == "model":
        run = torch.compile(model, **settings)
    elif how == "in place":
        model.compile(**settings)
        run = model
    else:
        model.compile_repeated_blocks(**settings)
        run = model
    numbers = []
    for arguments in calls:
        torch.testing.assert_close(output(run, arguments), output(twin, arguments))
        numbers.append(counters["stats"]["unique_graphs"])
    return numbers


CALLS = [call(timestep, length) for timestep, length in zip(TIMESTEPS, LENGTHS, strict=True)]


@pytest.mark.parametrize(
    "build",
    [
        partial(refit, Recipe(rank=4, ridge=0.1, rotate_values=True, intercept=True), num_layers=0),
        partial(sparse_flux, "fp8", num_single_layers=0),
    ],
)
def test_the_whole_model_is_one_graph_for_all_steps_and_lengths(build):
    assert graphs(build(), CALLS, "model") == [1, 1, 1]


def test_a_backend_that_traces_through_autograd():
    model = sparse_flux("refit", num_layers=0)
    assert graphs(model, CALLS[:1], "blocks", "aot_eager", dynamic=False) == [1]


def test_lengths_left_to_torch_take_a_second_graph_and_no_third():
    assert graphs(sparse_flux(num_layers=0), CALLS, "in place", dynamic=None) == [1, 2, 2]


def test_repeated_blocks_compile_as_often_as_those_of_a_dense_model():
    # One graph for each class of blocks and layout of its inputs (the first block of a class reads another).
    depth = {"num_layers": 0, "num_single_layers": 3}
    sparse = graphs(sparse_flux("fp8", **depth), CALLS[:2], "blocks")
    assert sparse == graphs(tiny_flux(**depth), CALLS[:2], "blocks")
    assert sparse[0] == sparse[-1] < 3


def test_dense_steps_take_a_second_graph():
    recipe = Recipe.immediate(dense_steps=1)
    model = sparsify(tiny_flux(num_layers=0), recipe)
    calls = [call(timestep, 8) for timestep in (1.0, 1.0, 0.8, 0.6, 1.0, 0.8)]
    with schedule(TIMESTEPS):
        assert graphs(model, calls, "blocks") == [1, 1, 2, 2, 2, 2]


def test_dense_text_rows_take_one_graph_for_all_lengths():
    model = refit(Recipe(rank=4, ridge=0.1, text_rows="dense"), num_layers=0)
    assert graphs(model, CALLS, "model") == [1, 1, 1]


def test_an_adapter_swapped_into_a_compiled_model_takes_no_other_graph():
    """Beside layers of another basis, and (queries, keys) of their own."""
    model = refit(OTHER_BASES, num_layers=0)
    names = list(sparse_layers(model))
    model.enable_lora_hotswap(target_rank=4)
    model.load_lora_adapter(adapter(model, names, seed=1)[0], adapter_name="style")
    torch._dynamo.reset()
    counters.clear()
    model.compile(fullgraph=True, backend="eager")
    first = output(model, flux_call())
    model.load_lora_adapter(adapter(model, names, 2, rank=2)[0], adapter_name="style", hotswap=True)
    second = output(model, flux_call())
    assert counters["stats"]["unique_graphs"] == 1
    plain = refit(OTHER_BASES, num_layers=0)
    plain.load_lora_adapter(adapter(plain, names, 2, rank=2)[0])
    torch.testing.assert_close(second, output(plain, flux_call()))
    assert not torch.allclose(first, second)
