"""Norms in front of fused layers that are not those a model usually has: served, or left to themselves."""

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from fusion_helpers import RECIPES, unfused
from helpers import MODELS, in_dtype, output, relative_error
from torch import nn

from rtlynx import sparsify

LAYERNORMS, RMSNORMS = (nn.LayerNorm, FP32LayerNorm), (nn.RMSNorm, RMSNorm)


class ScalingRMSNorm(RMSNorm):
    """What is derived from a known norm may compute anything."""

    def forward(self, x):
        return super().forward(x) * 8


class ScalingLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 8


class Foreign:
    """Norms of other libraries by the same names, without what ours reads of them."""

    class RMSNorm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.normalized_shape = (width,)

        def forward(self, x):
            return nn.functional.rms_norm(x, self.normalized_shape) * 8

    class LayerNorm(RMSNorm):
        def forward(self, x):
            return nn.functional.layer_norm(x, self.normalized_shape) * 8


def hooked(norm, width):
    norm.register_forward_hook(lambda module, args, y: y * 8)
    return norm


# Made of a norm of a block and its width.
VARIANTS = {
    "with weight and bias": lambda old, width: (
        type(old)(width, eps=1e-6, elementwise_affine=True)
        if isinstance(old, LAYERNORMS)
        else RMSNorm(width, eps=1e-6, bias=True)
    ),
    "with a weight": lambda old, width: (
        type(old)(width, eps=1e-6, bias=False) if isinstance(old, LAYERNORMS) else RMSNorm(width, eps=1e-6)
    ),
    "without": lambda old, width: (
        type(old)(width, eps=1e-6, elementwise_affine=False)
        if isinstance(old, LAYERNORMS)
        else RMSNorm(width, 1e-6, elementwise_affine=False)
    ),
    "of the other kind": lambda old, width: (
        nn.RMSNorm(width, eps=1e-6) if isinstance(old, LAYERNORMS) else nn.LayerNorm(width)
    ),
    "of PyTorch without eps": lambda old, width: nn.RMSNorm(width),
    "that computes in float32": lambda old, width: (
        FP32LayerNorm(width, eps=1e-6) if isinstance(old, LAYERNORMS) else RMSNorm(width, 1e-6)
    ),
    "derived": lambda old, width: (
        ScalingLayerNorm(width, elementwise_affine=False)
        if isinstance(old, LAYERNORMS)
        else ScalingRMSNorm(width, 1e-6, elementwise_affine=False)
    ),
    "of another library": lambda old, width: (
        Foreign.LayerNorm(width) if isinstance(old, LAYERNORMS) else Foreign.RMSNorm(width)
    ),
    "hooked": hooked,
}


def replace_norms(model, variant):
    """Norms in front of layers of fused blocks, not of heads, by `variant`; how many."""
    generator, count = torch.Generator().manual_seed(7), 0
    for name, norm in list(model.named_modules()):
        inside = name.count(".") >= 2 and ".attn" not in name and ".attention." not in name
        if not inside or not isinstance(norm, (*LAYERNORMS, *RMSNORMS)):
            continue
        (width,) = getattr(norm, "normalized_shape", None) or norm.dim
        new = VARIANTS[variant](norm, width)
        for parameter in new.parameters():
            parameter.data.normal_(8.0, 4.0, generator=generator)
        model.set_submodule(name, new.to(torch.bfloat16))
        count += 1
    return count


@torch.no_grad()
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["flux", "qwen", "wan", "ltx2", "z-image"])
def test_a_fused_block_computes_what_its_norms_do(name, variant):
    make, call = MODELS[name]
    model, call = make().bfloat16(), in_dtype(call(), torch.bfloat16)
    sparsify(model, RECIPES["whole"])
    before = output(model, call)
    assert replace_norms(model, variant) >= 2
    expected = output(unfused(model), call)
    effect = relative_error(before, expected)
    assert effect > 0.2 or variant == "without"
    # (Weights that are far from 1 sharpen attention, and what roundings to e4m3 do with it.)
    assert relative_error(output(model, call), expected) < max(0.15 * effect, 2e-2)
