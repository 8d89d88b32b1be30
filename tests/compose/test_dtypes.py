"""Dtypes, autocast, gradient checkpointing and copies of sparse models."""

import copy
import io

import pytest
import torch
from compose_helpers import refit, sparse_flux, with_formulas
from helpers import flux_call, in_dtype, output, relative_error

from rtlynx import Recipe, schedule
from rtlynx.models import sparse_layers

# Roundings of inputs decide between entries that are nearly a tie: the error of a dtype, several times over.
LIMITS = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
KINDS = ["immediate", "strided", "refit", "fp8"]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype):
    model = sparse_flux(kind)
    expected = output(model, flux_call())
    model.to(dtype)
    for layer in sparse_layers(model).values():
        own = [*layer.parameters(), *layer.buffers()]
        kept = {torch.float8_e4m3fn, torch.float32} if kind == "fp8" else set()
        assert {tensor.dtype for tensor in own} == {dtype} | kept
    drawn = output(model, in_dtype(flux_call(), dtype))
    assert drawn.dtype == dtype
    assert relative_error(drawn, expected) < LIMITS[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_in_double_precision(kind):
    model = sparse_flux(kind)
    before = output(model, flux_call())
    model.to(torch.float64)
    model.to(torch.float32)
    assert torch.equal(output(model, flux_call()), before)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_of_a_float32_model(kind):
    model = sparse_flux(kind)
    expected = output(model, flux_call())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = output(model, flux_call())
    assert drawn.dtype == torch.bfloat16
    assert 1e-5 < relative_error(drawn, expected) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_without_gradients_changes_nothing(kind):
    model = sparse_flux(kind)
    before = output(model, flux_call())
    model.enable_gradient_checkpointing()
    assert torch.equal(output(model, flux_call()), before)
    model.disable_gradient_checkpointing()
    assert torch.equal(output(model, flux_call()), before)


@pytest.mark.parametrize("kind", ["immediate", "refit"])
def test_gradient_checkpointing_gives_the_gradients_that_it_saves(kind):
    model, plain = sparse_flux(kind), sparse_flux(kind)
    model.enable_gradient_checkpointing()
    for one in (model, plain):
        one.train()
        one.requires_grad_(True)
        one(**flux_call(), return_dict=False)[0].square().mean().backward()
    others = dict(plain.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if others[name].grad is not None:
            torch.testing.assert_close(parameter.grad, others[name].grad)
            compared += "attn.to_q" in name
    assert compared >= 2


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [copy.deepcopy, saved_and_loaded])
def test_copies_draw_the_same_and_are_independent(kind, how):
    model = sparse_flux(kind)
    before = output(model, flux_call())
    twin = how(model)
    assert torch.equal(output(twin, flux_call()), before)
    for layer in sparse_layers(twin).values():
        layer.bias.data.add_(1.0)
    assert torch.equal(output(model, flux_call()), before)
    assert not torch.equal(output(twin, flux_call()), before)


def test_copies_have_dense_steps_too():
    model = refit(Recipe(rank=4, ridge=0.1, dense_steps=1))
    twin = copy.deepcopy(model)
    with schedule([1.0, 0.5]):
        for timestep in (1.0, 0.5):
            call = flux_call(timestep=timestep)
            assert torch.equal(output(twin, call), output(model, call))


def test_the_formula_of_these_tests_is_the_model():
    model = sparse_flux("refit")
    assert relative_error(output(model, flux_call()), output(with_formulas(model), flux_call())) < 3e-4
