"""A quantised `SparseLinear`: its formula, and that nothing done to a module destroys eight-bit values."""

import copy
import io
import warnings

import pytest
import safetensors.torch
import torch
from formula_helpers import by_hand
from helpers import relative_error, tiny_flux
from linear_helpers import PATTERNS, RANK, K, N, assert_original_is_missed, factors, linear, mask_for, tokens
from peft import LoraConfig, get_peft_model
from torch import nn

from rtlynx import Pattern, Recipe, SparseLinear, sparsify
from rtlynx.math.fp8 import dequantize, quantize_tokens, quantize_weight
from rtlynx.nn.call import calling
from rtlynx.nn.input_cache import SharedInput
from rtlynx.ops import dispatch as choice
from rtlynx.ops.fp8_linear import Fp8Parameters

EVERYTHING = Pattern(1, 1)


def quantised(pattern=None, norm="none", lowrank=False, bias=True, dtype=torch.float32, **settings):
    layer = SparseLinear.from_linear(linear(bias).to(dtype), pattern=pattern or Pattern(), norm=norm)
    if lowrank:
        layer.set_lowrank(*factors())
    layer.quantize(**settings)
    return layer.requires_grad_(False)


def seen(x, mask):
    """What eight bits leave of the kept entries of `x`, in float64."""
    return quantize_tokens(torch.where(mask, x, 0)).dequantize().double()


def bits(tensor):
    return tensor.view(torch.uint8)


# ----------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("grouping", PATTERNS)
@pytest.mark.parametrize("norm", ["none", "scale"])
@pytest.mark.parametrize("lowrank", [False, True])
@pytest.mark.parametrize("refit", [False, True])
def test_output_is_the_formula(grouping, norm, lowrank, refit):
    dense = linear()
    layer = SparseLinear.from_linear(dense, pattern=PATTERNS[grouping][0], norm=norm)
    weight = dense.weight
    lowrank_a, lowrank_b = factors() if lowrank else (None, None)
    if lowrank:
        layer.set_lowrank(lowrank_a, lowrank_b)
    if refit:
        weight = tokens(N, K, seed=3) / 6
        layer.set_refit(weight)
    layer.quantize()
    assert (layer.precision, layer.refitted, layer.rank) == ("fp8", refit, RANK if lowrank else 0)
    x = tokens()
    mask = mask_for(x, grouping)
    w = quantize_weight(weight).dequantize()
    s = 1.0
    if norm == "scale":
        s = (
            x.double().square().sum(-1, keepdim=True) / (x.double() * mask).square().sum(-1, keepdim=True)
        ).sqrt()
    expected = seen(x, mask) * s @ w.double().T + dense.bias.double()
    if lowrank:
        expected = expected + x.double() @ lowrank_a.double().T @ lowrank_b.double().T
    assert relative_error(layer(x), expected) < 1e-6
    unquantised = by_hand(
        x, weight, dense.bias, mask=mask, norm=norm, lowrank_a=lowrank_a, lowrank_b=lowrank_b
    )
    assert 1e-3 < relative_error(layer(x), unquantised) < 0.05


@pytest.mark.parametrize("lowrank", [False, True])
def test_pattern_one_to_one_is_dense_fp8(lowrank):
    layer = quantised(EVERYTHING, norm="scale", lowrank=lowrank)
    x = tokens(2, 3, K)
    w = dequantize(layer.weight, layer.weight_scale).double()
    expected = seen(x, torch.ones_like(x, dtype=torch.bool)) @ w.T + layer.bias.double()
    if lowrank:
        expected += x.double() @ layer.lowrank_a.double().T @ layer.lowrank_b.double().T
    assert relative_error(layer(x), expected) < 1e-6


def test_moments_choose_the_scales():
    x = tokens(300, K) * torch.linspace(0.05, 3, K)
    mask = mask_for(x, "adjacent")
    gram = (x * mask).double().T @ (x * mask).double()
    plain, searched = quantised(), quantised(gram=gram)
    expected = quantize_weight(linear().weight, gram)
    assert torch.equal(searched.weight_scale, expected.scale)
    assert not torch.equal(searched.weight_scale, plain.weight_scale)
    exact = by_hand(x, linear().weight, linear().bias, mask=mask)
    assert relative_error(searched(x), exact) < relative_error(plain(x), exact)


@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 0, K), (2, 3, K), (2, 3, 4, K)])
@pytest.mark.parametrize("pattern", [Pattern(), EVERYTHING])
def test_any_leading_dimensions(shape, pattern):
    layer = quantised(pattern, norm="scale", lowrank=True)
    x = tokens(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], N)
    flat = torch.cat([layer(row[None]) for row in x.reshape(-1, K)]) if x.numel() else y.reshape(-1, N)
    torch.testing.assert_close(y.reshape(-1, N), flat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer = quantised(norm="scale", lowrank=True, dtype=dtype)
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    x = tokens().to(dtype)
    exact = quantised(norm="scale", lowrank=True, dtype=dtype).float()(x.float())
    y = layer(x)
    assert y.dtype == dtype
    assert relative_error(y, exact) < 6e-3  # three roundings to bfloat16


@pytest.mark.parametrize("pattern", [Pattern(), EVERYTHING])
def test_compiles_into_one_graph(pattern):
    layer, x = quantised(pattern, norm="scale", lowrank=True), tokens()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_autocast_selects_on_what_the_product_sees():
    layer = quantised(norm="scale", lowrank=True)
    x = tokens()
    x[:, 1] = x[:, 0] * (1 + 1e-4)  # larger in float32, a tie in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pattern", [Pattern(), EVERYTHING])
def test_output_is_never_finite_where_the_input_was_not(bad, pattern):
    x = tokens()
    x[2, 5] = bad
    y = quantised(pattern, norm="scale")(x)
    assert not bool(torch.isfinite(y[2]).any())
    assert bool(torch.isfinite(y[[0, 1, 3, 4, 5]]).all())


def test_layers_that_read_one_tensor_quantise_it_once(monkeypatch):
    layers = [quantised(norm="scale", lowrank=True) for _ in range(3)]
    x = tokens()
    expected = [layer(x) for layer in layers]
    shared = SharedInput()
    for layer in layers:
        layer.shared_input = shared
    calls = []
    original = quantize_tokens
    monkeypatch.setattr("rtlynx.ops.fp8_linear.quantize_tokens", lambda *a: calls.append(1) or original(*a))
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))
    assert calls == [1]
    other = SparseLinear.from_linear(linear(), norm="scale")
    other.shared_input = shared
    torch.testing.assert_close(other(x), SparseLinear.from_linear(linear(), norm="scale")(x))


@pytest.mark.parametrize("form", [{"norm": "scale"}, {"pattern": Pattern(1, 1)}])
def test_text_rows_and_dense_steps_use_the_original_weight(form):
    dense = linear()
    layer = quantised(keep_dense=True, **form)
    assert torch.equal(layer.weight_dense, dense.weight)
    x = tokens(2, 9, K)
    everything = layer(x)
    layer.text_rows_dense = True
    with calling(text_rows=(0, 4)):
        y = layer(x)
    torch.testing.assert_close(y[:, :4], dense(x[:, :4]))
    torch.testing.assert_close(y[:, 4:], everything[:, 4:])
    with calling(text_rows=(3, 5)):
        y = layer(x)
    torch.testing.assert_close(y[:, 3:5], dense(x[:, 3:5]))
    torch.testing.assert_close(y[:, :3], everything[:, :3])
    torch.testing.assert_close(y[:, 5:], everything[:, 5:])
    with calling(dense=True):
        assert torch.equal(layer(x), dense(x))


def test_without_its_original_weight_it_says_so():
    assert_original_is_missed(quantised(), "quantised")


# ------------------------------------------------------------------------------------ a module's fates


def test_to_linear_gives_back_the_original():
    dense = linear()
    plain = quantised(lowrank=True, keep_dense=True).to_linear()
    assert type(plain) is nn.Linear
    assert torch.equal(plain(tokens()), dense(tokens()))
    assert list(plain.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "to", "to, a device", "float"])
def test_casts_leave_the_eight_bit_weight_and_its_scale_alone(cast):
    layer = quantised(lowrank=True, keep_dense=True)
    before = copy.deepcopy(layer)
    arguments = {"to": [torch.bfloat16], "to, a device": ["cpu", torch.bfloat16]}.get(cast, [])
    getattr(layer, cast.partition(",")[0])(*arguments)
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(bits(layer.weight), bits(before.weight))
    assert torch.equal(layer.weight_scale, before.weight_scale)
    assert layer.weight_scale.dtype == torch.float32
    dtype = {"half": torch.float16, "double": torch.float64, "float": torch.float32}.get(cast, torch.bfloat16)
    assert {t.dtype for t in (layer.bias, layer.lowrank_b, layer.weight_dense)} == {dtype}
    x = tokens().to(dtype)
    assert relative_error(layer(x), before(x.float())) < 2e-2


def test_a_cast_of_the_whole_model_too():
    model = nn.Sequential(nn.Linear(K, K), quantised(), nn.LayerNorm(N))
    before = bits(model[1].weight).clone()
    model.to(torch.bfloat16)
    assert torch.equal(bits(model[1].weight), before)
    assert model[1].bias.dtype == model[0].weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(tokens().bfloat16()).dtype == torch.bfloat16
    model.to("meta", torch.float32)
    assert (model[1].weight.device.type, model[1].weight.dtype) == ("meta", torch.float8_e4m3fn)
    assert (model[1].weight_scale.device.type, model[1].bias.dtype) == ("meta", torch.float32)


def test_copies_are_independent():
    layer = quantised(PATTERNS["parts"][0], norm="scale", lowrank=True)
    x = tokens()
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)  # (pickle alone cannot hold eight-bit tensors)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), expected)
        twin.weight_scale.zero_()
        assert torch.equal(layer(x), expected)


def test_state_dict_round_trip(tmp_path):
    layer = quantised(norm="scale", lowrank=True, keep_dense=True)
    names = ["bias", "lowrank_a", "lowrank_b", "weight", "weight_dense", "weight_scale"]
    assert sorted(layer.state_dict()) == names
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = SparseLinear.from_linear(linear(seed=7), norm="scale")
    other.set_lowrank(*(t + 1 for t in factors()))
    other.quantize(keep_dense=True)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(tokens()), layer(tokens()))


def test_weights_of_another_precision_are_not_loaded():
    layer, plain = quantised(), SparseLinear.from_linear(linear())
    before = bits(layer.weight).clone()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"weight is torch.float32, and the layer is quantised"):
            layer.load_state_dict(plain.state_dict(), strict=strict)
        with pytest.raises(RuntimeError, match=r"weight is torch.float8_e4m3fn, and the layer is not quant"):
            plain.load_state_dict(layer.state_dict(), strict=strict)
    assert torch.equal(bits(layer.weight), before)
    assert torch.equal(plain.weight, linear().weight)


def test_factors_given_after_quantising_are_not_cast_to_eight_bits():
    before, after = quantised(lowrank=True, dtype=torch.bfloat16), quantised(dtype=torch.bfloat16)
    after.set_lowrank(*factors())
    assert after.lowrank_a.dtype == torch.bfloat16
    x = tokens().bfloat16()
    assert torch.equal(after(x), before(x))
    bare = quantised(bias=False)
    bare.set_lowrank(*(t.half() for t in factors()))
    assert bare.lowrank_b.dtype == torch.float16


def test_adapters_go_on_top_and_are_not_merged_into_eight_bits():
    model = nn.Sequential(quantised(norm="scale"))
    x = tokens()
    before, plain = bits(model[0].weight).clone(), model(x)
    get_peft_model(model, LoraConfig(target_modules=["0"], r=4, init_lora_weights=False))
    adapter = model[0]
    delta = adapter.get_delta_weight("default")
    with torch.no_grad():
        torch.testing.assert_close(adapter(x), plain + x @ delta.T, rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match="adapters are not merged into this model"):
            adapter.merge()
    assert torch.equal(bits(adapter.base_layer.weight), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_loaded_by_diffusers_is_not_cast_to_eight_bits(dtype):
    name = "transformer_blocks.0.attn.to_q"
    lowrank_a, lowrank_b = tokens(4, 128) / 30, tokens(128, 4)
    state = {f"transformer.{name}.lora_A.weight": lowrank_a, f"transformer.{name}.lora_B.weight": lowrank_b}
    model = sparsify(tiny_flux().to(dtype), Recipe.immediate(precision="fp8"))
    model.load_lora_adapter(state, prefix="transformer")
    adapter = model.get_submodule(name)
    assert adapter.base_layer.precision == "fp8"
    assert {p.dtype for p in [*adapter.lora_A.parameters(), *adapter.lora_B.parameters()]} == {dtype}
    x = tokens(3, 128).to(dtype)
    with torch.no_grad():
        delta = adapter(x) - adapter.base_layer(x)
    assert relative_error(delta, x.float() @ lowrank_a.T @ lowrank_b.T) < (
        1e-4 if dtype == torch.float32 else 3e-2
    )


def test_repr_says_fp8():
    assert "fp8, 2:4 adjacent" in repr(quantised())
    assert "fp8" not in repr(SparseLinear.from_linear(linear()))


def test_gradients_are_refused_and_not_lost():
    layer = quantised(lowrank=True)
    x = tokens().requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (6, N)
    assert not layer.weight.requires_grad
    layer.bias.requires_grad_()
    layer(tokens()).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((N,), 6.0))


# -------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_quantised_is_refused():
    layer = quantised()
    with pytest.raises(RuntimeError, match="quantised already"):
        layer.quantize()
    with pytest.raises(RuntimeError, match="refit its weight first"):
        layer.set_refit(torch.zeros(N, K))
    with pytest.raises(ValueError, match="paper's printed formula"):
        SparseLinear.from_linear(linear(), norm="paper").quantize()
    misfit = SparseLinear.from_linear(linear(k=6))
    with pytest.raises(RuntimeError, match="6 entries do not split"):
        misfit.quantize()
    refitted = SparseLinear.from_linear(linear())
    refitted.set_refit(torch.zeros(N, K))
    with pytest.raises(RuntimeError, match="refitted without keeping"):
        refitted.quantize(keep_dense=True)
    assert {one.precision for one in (misfit, refitted)} == {"bf16"}
    broken = linear()
    with torch.no_grad():
        broken.weight[4, 3] = float("nan")
    with pytest.raises(ValueError, match="output channel 4"):
        SparseLinear.from_linear(broken).quantize()


@pytest.mark.parametrize("bad", ["dtype", "shape", "scale"])
def test_quantised_weights_of_another_kind_are_refused(bad):
    layer = SparseLinear.from_linear(linear())
    weight = quantize_weight(linear().weight)
    weight = {
        "dtype": weight._replace(values=weight.values.float()),
        "shape": weight._replace(values=weight.values.T),
        "scale": weight._replace(scale=weight.scale[:3]),
    }[bad]
    with pytest.raises(ValueError, match="a quantised weight here is"):
        layer.set_quantized(weight)
    assert layer.precision == "bf16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capability": (8, 0)}, "compute capability 8.9"),
        ({"dtype": torch.float16}, "bfloat16 inputs"),
        ({"bias": torch.zeros(N)}, "bfloat16 inputs, biases"),
        ({"n": N}, "multiples of 16"),
        ({"bias": torch.zeros(N, dtype=torch.bfloat16, requires_grad=True)}, "gradients are asked for"),
        ({}, None),
    ],
)
def test_what_pytorchs_scaled_product_serves(monkeypatch, changes, message):
    class OnCuda:
        is_cuda, dtype = True, changes.get("dtype", torch.bfloat16)

        def numel(self):
            return K

        def get_device(self):
            return 0

    capability = changes.get("capability", (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(choice, "_said", set())
    weight = quantize_weight(tokens(changes.get("n", 2 * N), K))
    of = Fp8Parameters(*weight, changes.get("bias"), None, None)
    with warnings.catch_warnings(record=True) as said:
        assert choice.scaled_mm_supports(OnCuda(), of) == (message is None)
        assert choice.scaled_mm_supports(OnCuda(), of) == (message is None)
    assert [message in str(one.message) for one in said] == ([] if message is None else [True])
    assert not choice.scaled_mm_supports(tokens().bfloat16(), of)  # on no card
