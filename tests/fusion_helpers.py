"""What the tests of fused blocks share, here and on a card."""

import copy
from collections import Counter

import torch

import rtlynx.nn.packed_weight
import rtlynx.nn.prepared
import rtlynx.nn.prologue
import rtlynx.nn.sparse_linear
from rtlynx import Recipe
from rtlynx.cuda.sm90.prologues import IDENTITY
from rtlynx.math.fp8 import quantize_weight
from rtlynx.models import make_plan, sparse_layers
from rtlynx.models.fusion import unfuse_blocks
from rtlynx.models.sparsify import apply_plan
from rtlynx.ops import sparse_linear as ops
from rtlynx.ops.dispatch import wants_gradient
from rtlynx.ops.prologues import COMPRESS, QUANTIZE

RECIPES = {
    "bf16": Recipe.immediate(),
    "fp8": Recipe.immediate(precision="fp8"),
    "whole": Recipe.dense_fp8(),
    "mixed": Recipe.immediate(precision="fp8", formats={"*.to_k": "fp8-dense"}),
}


def serve(monkeypatch):
    """All bfloat16 calls without gradients are served, on this CPU too, by the kernels' reference."""

    def serves(x, *others):
        tensors = [one for one in others if isinstance(one, torch.Tensor)]
        return x.dtype == torch.bfloat16 and not wants_gradient(x, *tensors)

    monkeypatch.setattr(rtlynx.nn.sparse_linear, "kernels_support", serves)
    monkeypatch.setattr(rtlynx.nn.prologue, "quantizer_supports", lambda k, *tensors: serves(*tensors))
    monkeypatch.setattr(rtlynx.nn.prologue, "scaled_mm_supports", serves)
    monkeypatch.setattr(
        rtlynx.nn.packed_weight, "weight_sparse_supports", lambda weight, k: not weight.is_meta
    )


def count_calls(monkeypatch):
    """Counts prologues and products, by name, from now on."""
    count = Counter()
    whole = rtlynx.nn.prepared.prologue_linear

    def both(x, others, numbers, name, *args):  # (calls `COMPRESS` here, which counts itself)
        count.update(["gemm_joint", *(["compress"] if name == IDENTITY.name else [])])
        return whole(x, others, numbers, name, *args)

    monkeypatch.setattr(rtlynx.nn.prepared, "prologue_linear", both)

    def watch(module, name):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))

    def counted(name, original):
        def call(*args):
            count[name] += 1
            return original(*args)

        return call

    for kind, table in (("compress", COMPRESS), ("quantize", QUANTIZE)):
        for name, original in table.items():
            monkeypatch.setitem(table, name, counted(f"{name}_{kind}", original))
    for name in ("compress", "gemm", "gemm_joint", "linear"):
        watch(ops, name)
    return count


def drop_weights(model):
    """Layers of `model` in fp8-weight-sparse, the two largest of four weights kept; text in dense fp8."""
    plan = make_plan(model, Recipe(rank=None, precision="fp8", drop="weights"))
    chosen = {layer.name for layer in plan.sparse if layer.weight_sparse}

    def prepare(name, layer):
        if name in chosen:
            groups = layer.weight.detach().float().unflatten(-1, (-1, 4))
            kept = groups.abs().topk(2).indices
            weight = torch.zeros_like(groups).scatter_(-1, kept, groups.gather(-1, kept)).flatten(-2)
            layer.set_quantized(quantize_weight(weight), refitted=True, sparse=True)

    apply_plan(model, plan, prepare)
    return model


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
