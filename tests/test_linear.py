"""`SparseLinear` against its formula in float64, and as the `nn.Linear` that other libraries expect."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
from formula_helpers import by_hand, slow_mask
from helpers import relative_error
from linear_helpers import PATTERNS, RANK, K, N, assert_original_is_missed, factors, linear, mask_for, tokens
from torch import nn

from rtlynx import Pattern, SparseLinear

# ----------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("grouping", PATTERNS)
@pytest.mark.parametrize("norm", ["none", "scale", "paper"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lowrank", [False, True])
@pytest.mark.parametrize("refit", [False, True])
def test_output_is_the_formula(grouping, norm, bias, lowrank, refit):
    dense = linear(bias)
    layer = SparseLinear.from_linear(dense, pattern=PATTERNS[grouping][0], norm=norm)
    weight = dense.weight
    lowrank_a, lowrank_b = factors() if lowrank else (None, None)
    if lowrank:
        layer.set_lowrank(lowrank_a, lowrank_b)
    if refit:
        weight = tokens(N, K, seed=3) / 6
        layer.set_refit(weight)
    x = tokens()
    expected = by_hand(
        x, weight, dense.bias, mask=mask_for(x, grouping), norm=norm, lowrank_a=lowrank_a, lowrank_b=lowrank_b
    )
    assert relative_error(layer(x), expected) < 1e-6
    assert layer.rank == (RANK if lowrank else 0)


def test_scale_multiplies_the_sparse_product_only():
    layer = SparseLinear.from_linear(linear(), norm="scale")
    layer.set_lowrank(*factors())
    x = torch.ones(1, K)  # half of the energy goes: s = sqrt(2)
    kept = torch.tensor([1.0, 1.0, 0.0, 0.0] * (K // 4))
    sparse = 2**0.5 * (layer.weight @ kept)
    expected = sparse + layer.lowrank_b @ (layer.lowrank_a @ x[0]) + layer.bias
    torch.testing.assert_close(layer(x)[0], expected)


def test_tokens_of_zeros_give_the_bias():
    for norm in ("none", "scale", "paper"):
        layer = SparseLinear.from_linear(linear(), norm=norm)
        assert torch.equal(layer(torch.zeros(2, K)), layer.bias.expand(2, N))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", ["none", "scale", "paper"])
def test_output_is_never_finite_where_the_input_was_not(bad, norm):
    x = tokens()
    x[2, 5] = bad
    y = SparseLinear.from_linear(linear(), norm=norm)(x)
    assert not bool(torch.isfinite(y[2]).any())
    assert bool(torch.isfinite(y[[0, 1, 3, 4, 5]]).all())


@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 0, K), (7, K), (2, 3, K), (2, 3, 4, K)])
def test_any_leading_dimensions(shape):
    layer = SparseLinear.from_linear(linear())
    layer.set_lowrank(*factors())
    x = tokens(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], N)
    flat = torch.cat([layer(row[None]) for row in x.reshape(-1, K)]) if x.numel() else y.reshape(-1, N)
    torch.testing.assert_close(y.reshape(-1, N), flat)


def test_non_contiguous_input():
    layer = SparseLinear.from_linear(linear(), pattern=PATTERNS["strided"][0])
    whole = tokens(2, 9, K)
    for x in (whole[:, 4:], whole.transpose(0, 1), tokens(2, K, 9).transpose(1, 2), tokens(3, 2 * K)[:, ::2]):
        assert not x.is_contiguous()
        torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("norm", ["none", "scale"])
def test_half_precision(dtype, limit, norm):
    layer = SparseLinear.from_linear(linear().to(dtype), norm=norm)
    layer.set_lowrank(*factors())
    assert layer.lowrank_a.dtype == dtype
    x = tokens().to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    mask = slow_mask(x)
    expected = by_hand(
        x,
        layer.weight,
        layer.bias,
        mask=mask,
        norm=norm,
        lowrank_a=layer.lowrank_a,
        lowrank_b=layer.lowrank_b,
    )
    assert relative_error(y, expected) < limit


def test_to_moves_everything_and_keeps_the_pattern():
    layer = SparseLinear.from_linear(linear(), pattern=PATTERNS["parts"][0], norm="none")
    layer.set_lowrank(*factors())
    layer.set_refit(tokens(N, K, seed=3), keep_dense=True)
    assert layer.to(torch.float64) is layer
    assert {t.dtype for t in [*layer.parameters(), layer.weight_dense]} == {torch.float64}
    x = tokens().double()
    expected = by_hand(
        x,
        layer.weight,
        layer.bias,
        mask=mask_for(x, "parts"),
        lowrank_a=layer.lowrank_a,
        lowrank_b=layer.lowrank_b,
    )
    assert relative_error(layer(x), expected) < 1e-14


@pytest.mark.parametrize("norm", ["none", "scale"])
def test_autocast_selects_on_what_the_product_sees(norm):
    layer = SparseLinear.from_linear(linear(), norm=norm)
    layer.set_lowrank(*factors())
    x = tokens()
    x[:, 1] = x[:, 0] * (1 + 1e-4)  # larger in float32, a tie in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        inside = layer(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, inside)
    expected = by_hand(
        x,
        layer.weight,
        layer.bias,
        mask=slow_mask(x.to(torch.bfloat16)),
        norm=norm,
        lowrank_a=layer.lowrank_a,
        lowrank_b=layer.lowrank_b,
    )
    assert relative_error(y, expected) < 1e-2
    assert layer(x).dtype == torch.float32  # nothing of autocast is remembered


# ------------------------------------------------------------------------------------------ stays dense


@pytest.mark.parametrize("k", [6, 341, 1])
def test_inputs_that_do_not_split_stay_dense_with_a_reason(k):
    dense = linear(k=k)
    layer = SparseLinear.from_linear(dense)
    assert f"{k} entries do not split into groups of 4" in layer.dense_reason
    assert layer.dense_reason in repr(layer)
    x = tokens(5, k)
    assert torch.equal(layer(x), dense(x))


@pytest.mark.parametrize("grouping", ["adjacent", "strided"])
@pytest.mark.parametrize("norm", ["none", "scale", "paper"])
@pytest.mark.parametrize("bias", [True, False])
def test_keeping_everything_equals_dense_exactly(grouping, norm, bias):
    dense = linear(bias)
    layer = SparseLinear.from_linear(dense, pattern=Pattern(4, 4, grouping), norm=norm)
    x = tokens(2, 5, K)
    assert torch.equal(layer(x), dense(x))


# -------------------------------------------------------------------------------- an ordinary nn.Linear


@pytest.mark.parametrize("grouping", PATTERNS)
def test_state_dict_is_a_plain_linears_in_natural_order(grouping):
    dense = linear()
    layer = SparseLinear.from_linear(dense, pattern=PATTERNS[grouping][0])
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]
    fresh = linear(seed=9)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.weight, dense.weight)
    other = SparseLinear.from_linear(linear(seed=8), pattern=PATTERNS[grouping][0])
    other.load_state_dict(dense.state_dict())
    assert torch.equal(other(tokens()), layer(tokens()))
    layer.set_refit(torch.zeros(N, K))
    assert torch.equal(layer.state_dict()["weight"], torch.zeros(N, K))
    assert bool(dense.weight.any())  # the layer that it came from is not touched


def test_constructor_is_nn_linears():
    torch.manual_seed(0)
    plain = nn.Linear(K, N)
    torch.manual_seed(0)
    layer = SparseLinear(K, N)
    assert torch.equal(layer.weight, plain.weight)
    assert layer.norm == "scale"
    assert SparseLinear(K, N, bias=False, dtype=torch.float64).weight.dtype == torch.float64
    with pytest.raises(ValueError, match="norm is"):
        SparseLinear(K, N, norm="l2")


def test_factor_names_do_not_look_like_an_adapter():
    layer = SparseLinear.from_linear(linear())
    layer.set_lowrank(*factors())
    layer.set_refit(layer.weight + 1, keep_dense=True)
    assert not [name for name in layer.state_dict() if "lora_" in name]


def test_safetensors_round_trip(tmp_path):
    layer = SparseLinear.from_linear(linear(), pattern=PATTERNS["strided"][0])
    layer.set_lowrank(*(t.T.contiguous().T for t in factors()))  # any strides, as a solver may return them
    layer.set_refit(tokens(K, N, seed=3).T, keep_dense=True)
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = SparseLinear.from_linear(linear(seed=7), pattern=PATTERNS["strided"][0])
    other.set_lowrank(*(t + 1 for t in factors()))
    other.set_refit(torch.zeros(N, K), keep_dense=True)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(tokens()), layer(tokens()))


def test_deepcopy_and_pickle_are_independent():
    layer = SparseLinear.from_linear(linear(), pattern=PATTERNS["parts"][0])
    layer.set_lowrank(*factors())
    x = tokens()
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.weight.zero_()
            twin.lowrank_b.zero_()
        twin.dense_steps = True
        assert torch.equal(layer(x), expected)


def test_from_linear_shares_parameters_and_keeps_hooks_mode_and_attributes():
    dense = linear().eval()
    dense.weight.requires_grad_(False)
    dense.note = "mine"
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    layer = SparseLinear.from_linear(dense)
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert not layer.training
    assert layer.note == "mine"
    layer(tokens())
    assert calls == [1]
    layer.set_lowrank(*factors())
    assert not layer.lowrank_b.requires_grad  # trained exactly where the weight is
    layer.register_forward_hook(lambda *_: calls.append(2))
    dense(tokens())
    assert calls == [1, 1]  # a hook on the new layer is not one on the old
    assert "lowrank_b" not in dense._parameters


def test_what_is_no_plain_linear_is_refused():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    for module in (Noisy(K, N), nn.Conv1d(K, N, 1), SparseLinear(K, N)):
        with pytest.raises(TypeError, match=type(module).__name__):
            SparseLinear.from_linear(module)
    hooked = linear()
    hooked.forward = lambda x: x
    with pytest.raises(TypeError, match="forward has been replaced"):
        SparseLinear.from_linear(hooked)


@pytest.mark.parametrize("keep", [False, True])
def test_to_linear_gives_back_the_original(keep):
    dense = linear()
    original = dense.weight.detach().clone()
    layer = SparseLinear.from_linear(dense, pattern=PATTERNS["strided"][0])
    layer.set_lowrank(*factors())
    if keep:
        layer.set_refit(tokens(N, K, seed=3), keep_dense=True)
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, original)
    assert torch.equal(plain(tokens()), dense(tokens()))
    assert list(plain.state_dict()) == ["weight", "bias"]
    assert layer.rank == RANK  # the sparse layer is as it was


def test_a_refit_without_its_original_says_so():
    layer = SparseLinear.from_linear(linear())
    layer.set_refit(torch.zeros(N, K))
    assert_original_is_missed(layer, "refitted")


def test_refitting_twice_keeps_the_first_original():
    layer = SparseLinear.from_linear(linear())
    original = layer.weight.detach().clone()
    layer.set_refit(torch.zeros(N, K), keep_dense=True)
    layer.set_refit(torch.ones(N, K), keep_dense=True)
    assert torch.equal(layer.original_weight(), original)


def test_solutions_of_another_shape_are_refused():
    layer = SparseLinear.from_linear(linear())
    lowrank_a, lowrank_b = factors()
    for bad in (
        (lowrank_a.T, lowrank_b),
        (lowrank_a, lowrank_b.T),
        (lowrank_a[:, :-4], lowrank_b),
        (lowrank_a[:2], lowrank_b),
        (lowrank_a[:0], lowrank_b[:, :0]),
    ):
        with pytest.raises(ValueError, match="low-rank factors"):
            layer.set_lowrank(*bad)
    with pytest.raises(ValueError, match="refitted weight"):
        layer.set_refit(torch.zeros(K, N))
    assert (layer.rank, layer.refitted) == (0, False)
