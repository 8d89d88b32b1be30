"""What the tests of fused blocks share, here and on a card."""

import copy
from collections import Counter

import pytest
import torch
from helpers import in_dtype, output, relative_error

import rtlynx.nn.lora
import rtlynx.nn.packed_weight
import rtlynx.nn.prepared
import rtlynx.nn.prologue
import rtlynx.nn.sparse_linear
from rtlynx import Recipe
from rtlynx.cuda.sm90.prologues import IDENTITY
from rtlynx.math.fp8 import dequantize, quantize_tokens, quantize_weight
from rtlynx.models import make_plan, sparse_layers
from rtlynx.models.fusion import unfuse_blocks
from rtlynx.models.sparsify import apply_plan
from rtlynx.nn.prepared import PreparedInput, QuantizedInput
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


def check_loras(model, call):
    """Fused blocks do with LoRAs what peft does.

    Each layer that reads e4m3 gives the formula's sum of that. The model is as near to itself in float32 as
    with peft, whose LoRAs here read e4m3 where fused ones do: that rounding is part of their definition. It
    moves an output by 3 % of what LoRAs make of it, so no factor of peft's own error bounds it. (Over 20
    seeds of each of `MODELS`, dense fp8 and 2:4 weights: 0.99 times peft's error, at most 1.09.)

    Returns
    -------
    y : Tensor
    exact : Tensor, in float32, LoRAs of unrounded inputs
    peft_error : of peft's output to `exact`, its LoRAs as above
    layers : how many read a prepared input

    Raises
    ------
    AssertionError
        If a layer, which it names, or the model does not.
    """
    device = next(model.parameters()).device
    wrappers = {id(one.base_layer): name for name, one in model.named_modules() if hasattr(one, "base_layer")}
    rounded, seen, output_of = set(), set(), PreparedInput.output_of

    def checked(x, layer):
        y = output_of(x, layer)
        seen.add(id(layer))
        if isinstance(x, QuantizedInput) and id(layer) in wrappers:
            rounded.add(wrappers[id(layer)])
            expected = _in_float64(x, model.get_submodule(wrappers[id(layer)]))
            assert relative_error(y, expected) < 6e-3, wrappers[id(layer)]
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreparedInput, "output_of", checked)
        y = output(model, call)
    exact = output(copy.deepcopy(model).float(), in_dtype(call, torch.float32, device))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtlynx.nn.lora, "adapter_classes", [])
        peft_error = relative_error(output(_rounding(unfused(model), rounded), call), exact)
    assert relative_error(y, exact) < 1.4 * peft_error
    return y, exact, peft_error, len(seen)


def _in_float64(x, wrapper):
    """What `wrapper`'s layer and the LoRAs beside it make of the quantised input `x`."""
    read, layer = x.quantized.dequantize().double(), wrapper.base_layer
    y = read @ dequantize(layer.weight, layer.weight_scale).double().T
    for name in () if wrapper.disable_adapters else wrapper.active_adapters:
        if name in wrapper.lora_A:
            lowrank_a, lowrank_b = (part[name].weight.double() for part in (wrapper.lora_A, wrapper.lora_B))
            y = y + wrapper.scaling[name] * (read @ lowrank_a.T @ lowrank_b.T)
    return y if layer.bias is None else y + layer.bias.double()


def _rounding(model, names):
    """`model`, in which peft's LoRAs of the wrappers `names` read their inputs rounded to e4m3."""

    def rounded(_, args):
        return tuple(quantize_tokens(x).dequantize().to(x.dtype) for x in args)

    for name in names:
        for factor in model.get_submodule(name).lora_A.values():
            factor.register_forward_pre_hook(rounded)
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
