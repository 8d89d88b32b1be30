"""LoRAs of peft in fused blocks: in the layers' own products. Kernels run as their reference."""

import copy

import pytest
import torch
import torch._dynamo.testing
from compose_helpers import adapter, refit
from fusion_helpers import RECIPES as SHARED
from fusion_helpers import check_loras, drop_weights, give_factors, serve, unfused
from helpers import MODELS, flux_call, in_dtype, output, relative_error, tiny_flux
from peft import LoraConfig
from torch import nn

from rtlynx import Recipe, densify, schedule, sparsify
from rtlynx.models import sparse_layers
from rtlynx.models.plan import ARCHITECTURES
from rtlynx.nn.prepared import QuantizedInput
from rtlynx.nn.prologue import adaln, read

RECIPES = {**SHARED, "adjacent": Recipe.immediate(grouping="adjacent")}
OTHERS = [name for name in MODELS if name != "flux"]


@pytest.fixture(autouse=True)
def _served(monkeypatch):
    serve(monkeypatch)


def model_and_call(name="flux", recipe="bf16", **changes):
    make, call = MODELS[name]
    model = make(**changes).bfloat16()
    model = drop_weights(model) if recipe == "weights" else sparsify(model, RECIPES[recipe])
    return model, in_dtype(call(), torch.bfloat16)


def names_of(model):
    return [name.removesuffix(".base_layer") for name in sparse_layers(model)]


def load(model, adapter_name="style", seed=0, rank=4, names=None, size=3.0, **kwargs):
    """A LoRA that changes outputs by more than roundings do."""
    state, _ = adapter(model, names or names_of(model), seed, rank)
    state = {key: value * size if "lora_A" in key else value for key, value in state.items()}
    model.load_lora_adapter(state, adapter_name=adapter_name, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "recipe", "rank"),
    [
        *(("flux", recipe, rank) for recipe in RECIPES for rank in (0, 4)),
        # (Text beside 2:4 weights is in dense fp8.)
        *((name, recipe, 4) for name in OTHERS for recipe in ("fp8", "weights")),
    ],
)
def test_several_loras_are_in_the_products_of_fused_blocks(name, recipe, rank, calls):
    model, call = model_and_call(name, recipe)
    if rank:
        give_factors(model, rank)
    before = output(model, call)
    without = calls.copy()
    load(model, "first", 1, 4)
    load(model, "second", 2, 5)
    model.set_adapters(["first", "second"], [1.0, -0.75])
    calls.clear()
    y = output(model, call)
    fused = {one: count for one, count in calls.items() if not one.endswith("_quantize")}
    expected = {one: count for one, count in without.items() if not one.endswith("_quantize")}
    # What was one operator for a layer that reads alone is a pair.
    alone = expected.pop("linear", 0)
    assert fused.pop("linear", 0) == 0
    assert fused.pop("compress", 0) == expected.pop("compress", 0) + alone
    assert fused.pop("gemm_joint", 0) == expected.pop("gemm_joint", 0) + alone
    assert fused == expected
    checked, exact, *_ = check_loras(model, call)
    assert torch.equal(checked, y)
    assert relative_error(y, exact) < 0.25 * relative_error(before, exact)


def test_every_architecture_with_fused_blocks_is_tested_here():
    """The table of models says so of each."""
    tested = {type(make()).__name__ for make, _ in MODELS.values()}
    assert tested == {name for name, one in ARCHITECTURES.items() if one.fused}


def chain_of(attn, norm, tokens=37):
    gen = torch.Generator().manual_seed(5)
    x, shift, scale = (
        torch.randn(*s, generator=gen).bfloat16() for s in ((1, tokens, 128), (1, 128), (1, 128))
    )
    return adaln(norm, x, shift, scale)


def read_of(x, layer):
    """The prologue's result as the layer's LoRAs read it, in float64."""
    for part in getattr(x, "parts", (x,)):
        if isinstance(part, QuantizedInput) and any(reader is layer for reader in part.readers):
            return part.quantized.dequantize().double()
    return None


@torch.no_grad()
@pytest.mark.parametrize(
    ("recipe", "own"), [("bf16", 0), ("fp8", 0), ("fp8", 4), ("whole", 0), ("mixed", 4), ("weights", 0)]
)
@pytest.mark.parametrize("ranks", [(0, 5, 0), (31, 2, 40), (33, 0, 64), (8, 8, 8)])
def test_each_reader_gets_its_own_loras_of_its_input(ranks, recipe, own):
    """Of any ranks: where factors begin and end between tiles of T, and beside readers without any."""
    model, _ = model_and_call(recipe=recipe)
    if own and recipe in ("bf16", "fp8"):
        give_factors(model, own)
    attn = model.transformer_blocks[0].attn
    layers = {name: getattr(attn, name) for name in ("to_q", "to_k", "to_v")}
    prologue = chain_of(attn, model.transformer_blocks[0].norm1.norm)
    plain = {name: layer(read(prologue, *layers.values())).double() for name, layer in layers.items()}
    for name, rank in zip(layers, ranks, strict=True):
        if rank:
            load(model, f"style_{name}", rank, rank, [f"transformer_blocks.0.attn.{name}"])
    model.set_adapters(list(model.peft_config), -1.5)
    wrappers = [getattr(attn, name) for name in layers]
    x, dense = read(prologue, *wrappers), prologue.dense().double()
    assert not isinstance(x, torch.Tensor)
    for name, wrapper, rank in zip(layers, wrappers, ranks, strict=True):
        y = wrapper(x).double()
        if not rank:
            assert relative_error(y, plain[name]) < 6e-3, name
            continue
        one = f"style_{name}"
        factors = [getattr(wrapper, part)[one].weight.double().T for part in ("lora_A", "lora_B")]
        of_dense = -1.5 * dense @ factors[0] @ factors[1]
        assert of_dense.norm() > 0.1 * plain[name].norm()
        quantized = read_of(x, wrapper.base_layer)
        added = of_dense if quantized is None else -1.5 * quantized @ factors[0] @ factors[1]
        assert relative_error(y, plain[name] + added) < 6e-3, name
        # What e4m3 costs the LoRA, where it reads that: about what it costs the layer itself.
        assert relative_error(added, of_dense) < 0.05, name


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["bf16", "fp8", "whole", "weights"])
def test_a_layer_that_reads_alone_takes_any_tensor(recipe, calls):
    model, _ = model_and_call(recipe=recipe)
    load(model)
    wrapper = model.transformer_blocks[0].attn.to_out[0]
    whole = torch.randn(3, 128, 5).bfloat16().mT
    for x in (whole, whole[1], whole[1, :1], whole[2, 4]):
        calls.clear()
        y = wrapper(x)
        sparse = recipe in ("bf16", "fp8")
        if sparse:
            assert (calls["compress"], calls["gemm_joint"]) == (1, 1)
        else:
            assert calls["identity_quantize"] == 1
        one = wrapper.lora_A["style"].weight.double(), wrapper.lora_B["style"].weight.double()
        expected = wrapper.base_layer(x).double() + x.double() @ one[0].T @ one[1].T
        assert y.shape == expected.shape
        assert relative_error(y.double(), expected) < (6e-3 if sparse else 4e-2)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["bf16", "mixed", "weights"])
def test_weights_switches_and_unloading_act_at_once(recipe):
    model, call = model_and_call(recipe=recipe)
    before = output(model, call)
    load(model, "first", 1)
    load(model, "second", 2, 7)
    outputs = {}
    for names, weights in (
        (("first",), [1.0]),
        (("second",), [1.0]),
        (("first", "second"), [1.0, -1.0]),
        (("first",), [-2.0]),
    ):
        model.set_adapters(list(names), weights)
        outputs[names, *weights], *_ = check_loras(model, call)
    assert len({one.sum().item() for one in outputs.values()}) == len(outputs)
    model.set_adapters(["first", "second"], [0.0, 0.0])
    assert relative_error(output(model, call), before) < 5e-3
    model.disable_lora()
    assert relative_error(output(model, call), before) < 5e-3
    model.enable_lora()
    model.set_adapters("second")
    assert torch.equal(output(model, call), outputs[("second",), 1.0])
    model.delete_adapters("first")
    assert torch.equal(output(model, call), outputs[("second",), 1.0])
    model.unload_lora()
    assert torch.equal(output(model, call), before)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["bf16", "fp8", "whole", "weights"])
def test_a_factor_written_in_place_is_seen_however_it_was_written(recipe):
    model, call = model_and_call(recipe=recipe)
    load(model)
    output(model, call)
    fresh, _ = model_and_call(recipe=recipe)
    load(fresh, seed=9)
    for (name, one), (other, new) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert name == other
        if "lora" in name:
            one.data.copy_(new.data)  # without a version
    assert torch.equal(output(model, call), output(fresh, call))


@torch.no_grad()
@pytest.mark.parametrize(("recipe", "rank"), [("fp8", 6), ("weights", 3)])
def test_hot_swapped_in_compiled_blocks_nothing_is_compiled_again(recipe, rank):
    model, call = model_and_call(recipe=recipe, num_layers=0)
    model.enable_lora_hotswap(target_rank=6)
    load(model, seed=1, rank=6)
    output(model, call)  # (here weights are packed when they are first read, on a card before)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    first = output(model, call)
    frames = counter.frame_count
    load(model, seed=2, rank=rank, size=-6.0, hotswap=True)
    y = output(model, call)
    assert counter.frame_count == frames
    fresh, _ = model_and_call(recipe=recipe, num_layers=0)
    load(fresh, seed=2, rank=rank, size=-6.0)
    expected = output(fresh, call)
    assert relative_error(y, expected) < 5e-3 < 0.1 * relative_error(first, expected)


@torch.no_grad()
def test_compiled_it_follows_weights_and_switches():
    model, call = model_and_call(recipe="mixed", num_layers=0)
    load(model, "first", 1)
    load(model, "second", 2)
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    for weights in ([1.0, -0.5], [2.0, 0.0], [-0.3, 1.7], [0.4, -1.1]):
        for one in (model, twin):
            one.set_adapters(["first", "second"], weights)
        assert relative_error(output(model, call), output(twin, call)) < 1e-6
    frames = counter.frame_count
    for weights in ([0.7, 0.9], [1.0, -0.5]):  # weights are variables of the graph by now
        for one in (model, twin):
            one.set_adapters(["first", "second"], weights)
        assert relative_error(output(model, call), output(twin, call)) < 1e-6
    assert counter.frame_count == frames
    for one in (model, twin):
        one.set_adapters("second")
    assert relative_error(output(model, call), output(twin, call)) < 1e-6
    for one in (model, twin):
        one.disable_lora()
    assert relative_error(output(model, call), output(twin, call)) < 1e-6


@torch.no_grad()
def test_beside_layers_of_another_basis_it_is_turned(calls):
    recipe = Recipe(rank=None, ridge=0.1, rotate_values=True, permute_hidden=True)
    model = refit(recipe).bfloat16()
    call = in_dtype(flux_call(), torch.bfloat16)
    before = output(model, call)
    load(model)
    calls.clear()
    y, exact, *_ = check_loras(model, call)
    assert calls["adaln_compress"]
    assert relative_error(y, exact) < 0.25 * relative_error(before, exact)


@torch.no_grad()
def test_dense_steps_in_eight_bits_have_it(calls):
    recipe = Recipe.immediate(precision="fp8", dense_last_steps=1, dense_precision="fp8")
    model = sparsify(tiny_flux().bfloat16(), recipe)
    load(model)
    for timestep in (1.0, 0.5):
        call = in_dtype(flux_call(timestep=timestep), torch.bfloat16)
        with schedule([1.0, 0.5]):
            calls.clear()
            y = output(model, call)
            assert bool(calls["adaln_compress"]) is (timestep == 1.0)
            assert relative_error(y, output(unfused(model), call)) < 5e-2


# ---------------------------------------------------------------------------- what stays with peft


def no_prologue(calls):
    return not any(name.endswith(("_compress", "_quantize")) for name in calls)


UNLIKE = {
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", UNLIKE)
def test_adapters_of_other_kinds_keep_the_forward_of_peft(kind, calls):
    model, call = model_and_call()
    names = ["to_q", "add_q_proj", "net.0.proj", "net.2", "proj_mlp", "proj_out"]
    config = LoraConfig(r=4, target_modules=names, init_lora_weights=False, **UNLIKE[kind])
    model.add_adapter(config)
    model.train(kind == "dropout")
    calls.clear()
    torch.manual_seed(0)
    y = output(model, call)
    assert no_prologue(calls)
    torch.manual_seed(0)
    assert torch.equal(y, output(unfused(model), call))
    if kind == "dropout":
        calls.clear()
        check_loras(model.eval(), call)
        assert not no_prologue(calls)


def test_a_lora_that_is_trained_gets_its_gradient(calls):
    model, call = model_and_call()
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    model(**call, return_dict=False)[0].float().square().sum().backward()
    trained = [one for name, one in model.named_parameters() if "lora" in name]
    assert trained
    assert all(one.grad is not None and one.grad.abs().max() > 0 for one in trained)


@torch.no_grad()
def test_a_merged_lora_reads_the_selected_input(calls):
    model, call = model_and_call(recipe="adjacent")
    load(model)
    model.fuse_lora()
    calls.clear()
    assert torch.equal(output(model, call), output(unfused(model), call))
    assert no_prologue(calls)
    model.unfuse_lora()
    check_loras(model, call)
    assert not no_prologue(calls)


@torch.no_grad()
@pytest.mark.parametrize("where", ["", ".base_layer", ".lora_A.style", ".lora_B.style"])
def test_whoever_hooks_a_wrapper_its_layer_or_a_factor_sees_tensors(where, calls):
    model, call = model_and_call()
    load(model)
    expected = output(unfused(model), call)
    seen = []
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        for name, module in block.named_modules():
            if name.endswith(f"attn.to_q{where}"):
                module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    calls.clear()
    y = output(model, call)
    assert len(seen) == 2
    assert all(isinstance(one, torch.Tensor) for one in seen)
    assert relative_error(y, expected) < 2e-2


@torch.no_grad()
def test_a_mixed_batch_keeps_the_forward_of_peft():
    model, _ = model_and_call()
    load(model, "first", 1)
    load(model, "second", 2)
    wrapper = model.transformer_blocks[0].attn.to_out[0]
    x = torch.randn(3, 5, 128).bfloat16()
    rows = wrapper(x, adapter_names=["first", "second", "__base__"])
    for row, name in zip(rows, ("first", "second"), strict=False):
        model.set_adapters(name)
        assert relative_error(row, wrapper(x)[("first", "second").index(name)]) < 1e-2
    assert relative_error(rows[2], wrapper.base_layer(x)[2]) < 1e-2


@torch.no_grad()
def test_densify_leaves_plain_wrappers():
    model, call = model_and_call()
    load(model)
    output(model, call)
    densify(model)
    fresh = tiny_flux().bfloat16()
    state_names = names_of(sparsify(tiny_flux()))
    load(fresh, names=state_names)
    assert torch.equal(output(model, call), output(fresh, call))


@torch.no_grad()
def test_a_wrapper_beside_a_dense_layer_reads_tensors():
    model, call = model_and_call()
    load(model, names=["x_embedder", "transformer_blocks.0.norm1.linear"])
    assert isinstance(model.x_embedder.base_layer, nn.Linear)
    check_loras(model, call)
