"""Modulation whose weights are in eight bits: the operator, the layers, and whole models."""

import copy
import json

import pytest
import torch
from helpers import MODELS, flux_call, in_dtype, output, relative_error, tiny_flux
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from quantizer_helpers import assert_same
from torch import nn
from torch.nn.functional import linear

import rtlynx
from rtlynx import Recipe, densify, load, save, sparsify
from rtlynx.cli.inspection import describe
from rtlynx.io.checkpoint import signed
from rtlynx.math.fp8 import E4M3, quantize_weight
from rtlynx.models import sparse_layers
from rtlynx.models.sparsify import extra_bytes
from rtlynx.nn.modulation import ModulationLinear, modulation
from rtlynx.ops.fp8_weights import linear_fp8_weights
from rtlynx.storage.files import CheckpointError

# Nothing but modulation is changed.
ALONE = Recipe.immediate(formats={"*": "dense"}, modulation="fp8")
LAYERS = {
    "flux": ["single_transformer_blocks.0.norm.linear"]
    + [f"transformer_blocks.0.{norm}.linear" for norm in ("norm1", "norm1_context")],
    "flux2": [f"double_stream_modulation_{of}.linear" for of in ("img", "txt")]
    + ["single_stream_modulation.linear"],
    "qwen": ["transformer_blocks.0.img_mod.1", "transformer_blocks.0.txt_mod.1"],
    "z-image": ["layers.0.adaLN_modulation.0", "noise_refiner.0.adaLN_modulation.0"],
}
SINGLE = LAYERS["flux"][0]


def rounded(model, names):
    """A copy of a dense `model` in which these weights are as e4m3 holds them."""
    twin = copy.deepcopy(model)
    for name in names:
        weight = twin.get_submodule(name).weight
        weight.data = quantize_weight(weight).dequantize().to(weight.dtype)
    return twin


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------- the operator


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    k=st.integers(1, 70),
    n=st.integers(1, 50),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    bias=st.sampled_from([None, torch.bfloat16, torch.float32]),
    silu=st.booleans(),
)
def test_the_operator_is_the_formula(rows, k, n, dtype, bias, silu):
    x, weight = (3 * normal(rows, k)).to(dtype), quantize_weight(normal(n, k, seed=1))
    b = None if bias is None else normal(n, seed=2).to(bias)
    y = linear_fp8_weights(x, *weight, b, silu)
    wide = x.double()
    if silu:
        wide = (wide / (1 + (-wide).exp())).to(dtype).double()
    terms = wide.unsqueeze(1) * weight.values.double() * weight.scale.double().unsqueeze(-1)
    expected = terms.sum(-1) + (0 if b is None else b.double())
    # The result is rounded, sums relative to their terms; SiLU may round to another neighbour of bfloat16.
    step, size = torch.finfo(dtype).eps, terms.abs().sum(-1) + (0 if b is None else b.double().abs())
    allowed = step * expected.abs() + (2**-18 + silu * step) * size
    assert y.dtype is dtype
    assert bool(((y.double() - expected).abs() <= allowed).all())


def test_shapes_and_refusals():
    x, weight = normal(2, 1, 40), quantize_weight(normal(24, 40))
    assert linear_fp8_weights(x, *weight).shape == (2, 1, 24)
    assert linear_fp8_weights(x[:0], *weight).shape == (0, 1, 24)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(linear_fp8_weights, (x, *weight, normal(24), True), test_utils=checks)
    with pytest.raises(ValueError, match=r"x is \(\.\.\., 40\) like weight"):
        linear_fp8_weights(x[..., :32], *weight)
    with pytest.raises(TypeError, match="weight is float8_e4m3fn"):
        linear_fp8_weights(x, weight.dequantize(), weight.scale)
    with pytest.raises(RuntimeError, match="have no gradient"):
        linear_fp8_weights(x.requires_grad_(), *weight)


# ------------------------------------------------------------------------------------------- the layers


def layer_of(k=48, n=30, dtype=torch.float32):
    torch.manual_seed(0)
    dense = nn.Linear(k, n).to(dtype)
    layer = ModulationLinear.from_linear(dense)
    layer.quantize()
    return dense, layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_the_rounded_one(dtype):
    dense, layer = layer_of(dtype=dtype)
    x = (2 * normal(3, 48)).to(dtype)
    weight = quantize_weight(dense.weight).dequantize().double()
    expected = linear(x.double(), weight, dense.bias.double())
    with torch.no_grad():
        y = layer(x)
    assert (layer.format.name, layer.weight.dtype, y.dtype) == ("fp8-weights", E4M3, dtype)
    assert relative_error(y, expected) < {torch.float32: 1e-6}.get(dtype, 3e-3)


def test_gradients_of_the_input_are_those_of_the_rounded_layer():
    dense, layer = layer_of()
    x = normal(3, 48).requires_grad_()
    (wanted,) = torch.autograd.grad(linear(x, quantize_weight(dense.weight).dequantize()).square().sum(), x)
    (found,) = torch.autograd.grad((layer(x) - layer.bias).square().sum(), x)
    assert relative_error(found, wanted) < 1e-5


def test_silu_in_front_is_taken_in_unless_something_is_around_it():
    layer, silu, x = layer_of()[1], nn.SiLU(), normal(2, 48)
    with torch.no_grad():
        expected = layer(silu(x))
        assert relative_error(modulation(silu, layer, x), expected) < 1e-6
        seen = []
        handle = silu.register_forward_hook(lambda _module, _args, y: seen.append(y))
        assert torch.equal(modulation(silu, layer, x), expected)
        handle.remove()
        layer.register_forward_hook(lambda _module, _args, y: 2 * y)
        assert torch.equal(modulation(silu, layer, x), 2 * expected)
    assert len(seen) == 1
    assert (
        relative_error(
            modulation(nn.GELU(), layer, x),
            2 * linear(nn.functional.gelu(x), quantize_weight(layer_of()[0].weight).dequantize(), layer.bias),
        )
        < 1e-5
    )


def test_casts_leave_eight_bits_alone():
    _, layer = layer_of()
    values, scale = layer.weight.view(torch.uint8).clone(), layer.weight_scale.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.weight.view(torch.uint8), values)
    assert torch.equal(layer.weight_scale, scale)
    assert layer.bias.dtype is torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(normal(2, 48)).dtype is torch.bfloat16  # as nn.Linear does


# ------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("name", LAYERS)
def test_these_layers_and_no_others(name):
    build, call = MODELS[name]
    dense = build()
    model = sparsify(copy.deepcopy(dense), ALONE)
    assert sorted(sparse_layers(model)) == sorted(LAYERS[name])
    assert all(type(layer) is ModulationLinear for layer in sparse_layers(model).values())
    y, unchanged = output(model, call()), output(dense, call())
    assert relative_error(y, output(rounded(dense, LAYERS[name]), call())) < 1e-5
    assert 1e-5 < relative_error(y, unchanged) < 0.1


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_beside_sparse_layers_in_bfloat16(name):
    build, call = MODELS[name]
    dense = build().bfloat16()
    arguments = in_dtype(call(), torch.bfloat16)
    recipe = Recipe.immediate(precision="fp8")
    alone = output(sparsify(rounded(dense, LAYERS[name]), recipe), arguments)
    both = sparsify(dense, Recipe.immediate(precision="fp8", modulation="fp8"))
    # (Rounded weights are rounded to bfloat16 once more.)
    assert relative_error(output(both, arguments), alone) < 0.05
    assert set(LAYERS[name]) < set(sparse_layers(both))


def test_skip_and_unknown_models():
    model = sparsify(tiny_flux(), Recipe.immediate(modulation="fp8", skip=("*.norm1*.linear",)))
    assert [name for name in sparse_layers(model) if "norm" in name] == [SINGLE]
    with pytest.raises(ValueError, match=r"skip pattern .* matches no layer"):
        sparsify(tiny_flux(), Recipe.immediate(skip=("*.norm1.linear",)))
    build, _ = MODELS["wan"]
    with pytest.raises(ValueError, match="modulation of the timestep is not known: use modulation='dense'"):
        sparsify(build(), Recipe.immediate(modulation="fp8"))
    with pytest.raises(ValueError, match="modulation is one of dense, fp8; got 'bf16'"):
        Recipe(modulation="bf16")


def test_dense_steps_keep_nothing_of_it():
    recipe = Recipe.immediate(precision="fp8", modulation="fp8", dense_last_steps=1)
    model = sparsify(tiny_flux(), recipe)
    layers = sparse_layers(model)
    assert layers[SINGLE].weight_dense is None
    assert layers["single_transformer_blocks.0.proj_out"].weight_dense is not None
    with rtlynx.schedule([0.5, 0.0]):
        assert output(model, flux_call(timestep=0.5)).isfinite().all()


def test_memory_is_told_beforehand():
    model = sparsify(tiny_flux().bfloat16(), ALONE)
    planned = describe(tiny_flux().bfloat16(), ALONE)
    assert [one["name"] for one in planned["modulation"]] == [
        name for name in sparse_layers(model) if name in LAYERS["flux"]
    ]
    assert not set(planned["other_layers"]) & set(LAYERS["flux"])
    assert planned["extra_bytes"] == extra_bytes(model) == describe(model)["extra_bytes"] < 0


def test_a_dense_model_comes_back_by_loading_it():
    with pytest.raises(RuntimeError, match="eight bits alone \\(modulation='fp8'\\): load the dense model"):
        densify(sparsify(tiny_flux(), ALONE))


def test_calibration_solves_for_the_others():
    model, recipe = tiny_flux(), Recipe(rank=None, ridge=0.01, precision="fp8", modulation="fp8")
    expected = quantize_weight(model.get_submodule(SINGLE).weight)
    calls = [flux_call(seed, timestep=1 - seed / 4) for seed in range(2)]
    report = rtlynx.calibrate(model, calls=calls, recipe=recipe, progress=False)
    layer = sparse_layers(model)[SINGLE]
    assert SINGLE not in report.solutions
    assert torch.equal(layer.weight.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(layer.weight_scale, expected.scale)
    assert sparse_layers(model)["single_transformer_blocks.0.proj_out"].refitted


def test_a_lora_acts_beside_it():
    torch.manual_seed(3)
    dense = rounded(tiny_flux(), LAYERS["flux"])
    model = sparsify(tiny_flux(), ALONE)
    config = LoraConfig(r=4, target_modules=["norm1.linear", "norm.linear"], init_lora_weights=False)
    for one in (model, dense):
        torch.manual_seed(5)
        one.add_adapter(config, "style")
    y = output(model, flux_call())
    assert relative_error(y, output(dense, flux_call())) < 1e-5
    model.disable_adapters()
    assert relative_error(output(model, flux_call()), y) > 1e-3
    model.enable_adapters()
    with pytest.raises((RuntimeError, ValueError), match="merge"):
        model.fuse_lora()


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("recipe", [ALONE, Recipe.immediate(precision="fp8", modulation="fp8")])
def test_saved_and_loaded(tmp_path, recipe):
    model = sparsify(tiny_flux(), recipe)
    save(model, tmp_path / "sparse")
    again = load(tiny_flux(), tmp_path / "sparse")
    assert torch.equal(output(again, flux_call()), output(model, flux_call()))
    assert type(sparse_layers(again)[SINGLE]) is ModulationLinear
    other = tiny_flux()
    with torch.no_grad():
        other.get_submodule(SINGLE).weight.mul_(2)
    with pytest.raises(CheckpointError, match="was made for other weights"):
        load(other, tmp_path / "sparse")


def test_saved_by_diffusers(tmp_path):
    model = sparsify(tiny_flux(), Recipe.immediate(precision="fp8", modulation="fp8"))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(sparse_layers(again)[SINGLE]) is ModulationLinear
    assert_same(again, model)


@pytest.mark.parametrize(
    "change", [{"rank": 3}, {"norm": "scale"}, {"precision": "bf16"}, {"refitted": True}], ids=str
)
def test_files_that_say_more_of_it_are_refused(tmp_path, change):
    save(sparsify(tiny_flux(), ALONE), tmp_path / "sparse")
    index = tmp_path / "sparse" / "rtlynx.json"
    body = json.loads(index.read_text())
    del body["sha256"]
    body["layers"][SINGLE] |= change
    index.write_text(json.dumps(signed(body)))
    model = tiny_flux()
    with pytest.raises(CheckpointError, match=f"{SINGLE} is not"):
        load(model, tmp_path / "sparse")
    assert not sparse_layers(model)
