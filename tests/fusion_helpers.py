"""What the tests of fused blocks share, here and on a card."""

import copy

import torch

from rtlynx.models import sparse_layers
from rtlynx.models.fusion import unfuse_blocks


def unfused(model):
    """A copy of `model` whose blocks run layer by layer."""
    model = copy.deepcopy(model)
    unfuse_blocks(model)
    return model


def give_factors(model, rank, shared=True):
    """Low-rank branches: layers that read one tensor share A, or do not."""
    generator = torch.Generator().manual_seed(3)
    lowrank_as = {}
    for name, layer in sparse_layers(model).items():
        key = layer.shared_input if shared else name
        lowrank_a = torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5
        lowrank_b = 0.1 * torch.randn(layer.out_features, rank, generator=generator)
        layer.set_lowrank(lowrank_as.setdefault(key, lowrank_a).bfloat16(), lowrank_b.bfloat16())
