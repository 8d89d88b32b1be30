"""A model changes whole or not at all: whatever ends sparsify, calibrate, load or densify half way."""

import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from calibration_helpers import ALL_FIT, JOINT, calls, run
from helpers import flux_call, output, tiny_flux, tiny_qwen, tiny_z_image

import rtlynx
from rtlynx import Budget, Recipe
from rtlynx.models import sparse_layers

PACKAGE = rtlynx.__path__[0]


class Interrupt(BaseException):
    """Ctrl-C, told apart from one of a user."""


@contextmanager
def interrupted_at(place):
    """Raise at the `place`-th line that runs inside the library; yields the count of lines."""
    seen = [0]

    def trace(frame, event, _arg):
        if not frame.f_code.co_filename.startswith(PACKAGE) or "transaction" in frame.f_code.co_filename:
            return None
        if event == "line":
            seen[0] += 1
            if seen[0] == place:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)


def held(model):
    """Everything that the modules of a model hold, by identity."""
    found = []
    for name, module in model.named_modules():
        for key, value in sorted(vars(module).items()):
            content = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else None
            found.append((name, id(module), key, id(value), content))
    return found


def immediate(model, folder):
    rtlynx.sparsify(model, Recipe.immediate(precision="fp8", text_rows="dense", dense_steps=1))


def calibrate(model, folder):
    rtlynx.calibrate(model, calls=calls(2), recipe=JOINT, options=ALL_FIT, progress=False)


def calibrate_with_budget(model, folder):
    recipe = Recipe(rank=None, ridge=0.1, budget=Budget(speedup_share=0.5))
    rtlynx.calibrate(model, calls=calls(2), recipe=recipe, options=ALL_FIT, progress=False)


def load(model, folder):
    rtlynx.load(model, folder)


def densify(model, folder):
    rtlynx.densify(model)


short_flux = partial(tiny_flux, num_layers=0)  # calibrated ten times, under a trace

ACTIONS = {
    "sparsify": (immediate, tiny_flux),
    "calibrate": (calibrate, short_flux),
    "calibrate what is sparse": (calibrate, lambda: rtlynx.sparsify(short_flux())),
    "calibrate with a budget": (calibrate_with_budget, short_flux),
    "load": (load, tiny_flux),
    "densify": (densify, lambda: rtlynx.sparsify(tiny_flux(), Recipe.immediate(text_rows="dense"))),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "lynx"
    rtlynx.save(run(recipe=JOINT, options=ALL_FIT)[0], path)
    return path


@pytest.mark.parametrize("name", ACTIONS)
def test_an_interruption_anywhere_leaves_the_model_as_it_was(name, folder):
    act, make = ACTIONS[name]
    act(make(), folder)  # fills caches, so that the next ones run the same lines
    model = make()
    with interrupted_at(0) as lines:
        act(model, folder)
    total, places = lines[0], 4 if "calibrate" in name else 24
    model = make()
    before = held(model)
    for place in sorted({1 + total * i // places for i in range(places)} | {total - 4 - i for i in range(6)}):
        with pytest.raises(Interrupt), interrupted_at(place):
            act(model, folder)
        assert held(model) == before, f"line {place} of {total}"
    act(model, folder)  # goes through as if nothing had been


@pytest.mark.parametrize("name", ["sparsify", "calibrate", "load", "densify"])
def test_inference_mode_around_it_changes_nothing(name, folder):
    act, make = ACTIONS[name]
    model, expected = make(), make()
    act(expected, folder)
    with torch.inference_mode():
        act(model, folder)
    with rtlynx.schedule([0.5]):
        assert torch.equal(output(model, flux_call()), output(expected, flux_call()))
    assert not any(parameter.is_inference() for parameter in model.parameters())
    if sparse_layers(model):
        rtlynx.save(model, folder.parent / f"from-{name}")


@pytest.mark.parametrize("make", [tiny_flux, tiny_qwen, tiny_z_image])
def test_memory_that_runs_out_leaves_the_model_as_it_was(make, monkeypatch):
    model = make()
    before, made = held(model), []
    real = rtlynx.SparseLinear._become_sparse

    def run_out(self, *settings):
        made.append(1)
        if len(made) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, *settings)

    monkeypatch.setattr(rtlynx.SparseLinear, "_become_sparse", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        rtlynx.sparsify(model)
    assert held(model) == before
