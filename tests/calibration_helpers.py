"""What the tests of calibration share: recipes, calls of a tiny FLUX, and what came out."""

import torch
from diffusers import FluxTransformer2DModel
from helpers import (
    flux_call,
    output,
    relative_error,
    tiny_flux,
    watched,
)

from rtlynx import (
    CalibrationOptions,
    Recipe,
    calibrate,
)
from rtlynx.models import sparse_layers, state_of

RIDGE = 0.1
REFIT = Recipe(rank=None, ridge=RIDGE)
JOINT = Recipe(rank=4, ridge=RIDGE)
PAPER = Recipe.paper(rank=4, ridge=RIDGE)
ALL_FIT = CalibrationOptions(heldout=0.0)
SINGLE = "single_transformer_blocks.0"
UNSEEN = [
    REFIT,
    JOINT,
    Recipe(),
    Recipe.paper(rank=4, ridge=RIDGE, balance="tokens"),  # the error below counts each token once
    Recipe.immediate(rank=8, norm="none", balance="tokens"),
]
PROMPTS = [f"a drawing of animal number {i}" for i in range(8)]


class PerToken(FluxTransformer2DModel):
    """A transformer that takes a timestep for each token or picture, as those of image-to-video do."""

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids,
                return_dict=True):  # fmt: skip
        whole = timestep.flatten(1).amax(1) if timestep.dim() > 1 else timestep
        return super().forward(
            hidden_states, encoder_hidden_states, pooled_projections, whole, img_ids, txt_ids,
            return_dict=return_dict,
        )  # fmt: skip


def per_token_flux():
    model = tiny_flux()
    model.__class__ = PerToken
    return model


def calls(count=8, first=0):
    return [flux_call(first + i, timestep=1 - (i % 4) / 4) for i in range(count)]


def run(model=None, recipe=JOINT, options=None, data=None):
    model = tiny_flux() if model is None else model
    report = calibrate(
        model, calls=data or calls(), recipe=recipe, options=options or CalibrationOptions(), progress=False
    )
    return model, report


def sample(pipeline, recipe=JOINT, options=None, prompts=PROMPTS):
    return calibrate(pipeline, prompts, recipe=recipe, options=options, progress=False)


def solution(model):
    """Everything that calibration put into a model, by name."""
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, layer in sparse_layers(model).items()
        for key, tensor in layer.state_dict().items()
    }


def assert_same(ours, theirs, rtol=0.0):
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        if rtol:
            assert relative_error(tensor, theirs[name]) < rtol, name
        else:
            assert torch.equal(tensor, theirs[name]), name


def layer_errors(model, reference, data):
    """||Y - Y'||² / ||X W^T||² of each sparse layer on the dense model's own activations."""
    layers = sparse_layers(model)
    with watched(reference, layers) as seen:
        for call in data:
            output(reference, call)
    errors = {}
    for name, layer in layers.items():
        with torch.no_grad():
            missed = sum((layer(x) - y).double().square().sum() for x, y in seen[name])
            energy = sum(
                (y if layer.bias is None else y - layer.bias).double().square().sum() for _, y in seen[name]
            )
        errors[name] = float(missed / energy)
    return errors


def assert_dense(model):
    assert state_of(model) is None
    before, after = tiny_flux().state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
