"""`SparseLinear` against its formula in float64, and as the `nn.Linear` that other libraries expect."""

import copy
import gc
import pickle
import weakref

import pytest
import safetensors.torch
import torch
from helpers import by_hand, relative_error, slow_mask
from torch import nn

from rtlynx import Pattern, SparseLinear
from rtlynx.kernels import ops

K, N, RANK = 32, 24, 5
PATTERNS = {
    "adjacent": (Pattern(), None),
    "strided": (Pattern(grouping="strided"), (K,)),
    "parts": (Pattern(grouping="strided", parts=(8, 24)), (8, 24)),
    "4:8": (Pattern(4, 8), None),
}


def linear(bias=True, k=K, n=N, seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias, **kwargs)


def tokens(*shape, seed=1):
    return torch.randn(*(shape or (6, K)), generator=torch.Generator().manual_seed(seed))


def factors(seed=2):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, K, generator=gen) / 8, torch.randn(N, RANK, generator=gen)


def mask_for(x, name):
    pattern, widths = PATTERNS[name]
    return slow_mask(x, pattern.n, pattern.m, pattern.grouping, widths)


@pytest.fixture
def count_compress(monkeypatch):
    """Counts selections: one weak reference to the kept entries for each."""
    kept = []
    original = ops.compress

    def counted(*args):
        result = original(*args)
        kept.append(weakref.ref(result.kept))
        return result

    monkeypatch.setattr(ops, "compress", counted)
    return kept


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
    down, up = factors() if lowrank else (None, None)
    if lowrank:
        layer.set_lowrank(down, up)
    if refit:
        weight = tokens(N, K, seed=3) / 6
        layer.set_refit(weight)
    x = tokens()
    expected = by_hand(x, weight, dense.bias, mask=mask_for(x, grouping), norm=norm, down=down, up=up)
    assert relative_error(layer(x), expected) < 1e-6
    assert layer.rank == (RANK if lowrank else 0)


def test_scale_multiplies_the_sparse_product_only():
    layer = SparseLinear.from_linear(linear(), norm="scale")
    layer.set_lowrank(*factors())
    x = torch.ones(1, K)  # half of the energy goes: s = sqrt(2)
    kept = torch.tensor([1.0, 1.0, 0.0, 0.0] * (K // 4))
    sparse = 2**0.5 * (layer.weight @ kept)
    expected = sparse + layer.lowrank_up @ (layer.lowrank_down @ x[0]) + layer.bias
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
    assert layer.lowrank_down.dtype == dtype
    x = tokens().to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    mask = slow_mask(x)
    expected = by_hand(
        x, layer.weight, layer.bias, mask=mask, norm=norm, down=layer.lowrank_down, up=layer.lowrank_up
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
        down=layer.lowrank_down,
        up=layer.lowrank_up,
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
        down=layer.lowrank_down,
        up=layer.lowrank_up,
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
            twin.lowrank_up.zero_()
        twin.context.dense_step = True
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
    assert not layer.lowrank_up.requires_grad  # trained exactly where the weight is
    layer.register_forward_hook(lambda *_: calls.append(2))
    dense(tokens())
    assert calls == [1, 1]  # a hook on the new layer is not one on the old
    assert "lowrank_up" not in dense._parameters


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
    for ask in (layer.to_linear, layer.original_weight):
        with pytest.raises(RuntimeError, match="refitted without keeping its original weight"):
            ask()
    layer.context.dense_step = True
    with pytest.raises(RuntimeError, match="refitted without keeping its original weight"):
        layer(tokens())


def test_refitting_twice_keeps_the_first_original():
    layer = SparseLinear.from_linear(linear())
    original = layer.weight.detach().clone()
    layer.set_refit(torch.zeros(N, K), keep_dense=True)
    layer.set_refit(torch.ones(N, K), keep_dense=True)
    assert torch.equal(layer.original_weight(), original)


def test_solutions_of_another_shape_are_refused():
    layer = SparseLinear.from_linear(linear())
    down, up = factors()
    for bad in ((down.T, up), (down, up.T), (down[:, :-4], up), (down[:2], up), (down[:0], up[:, :0])):
        with pytest.raises(ValueError, match="low-rank factors"):
            layer.set_lowrank(*bad)
    with pytest.raises(ValueError, match="refitted weight"):
        layer.set_refit(torch.zeros(K, N))
    assert (layer.rank, layer.refitted) == (0, False)


# -------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("norm", ["none", "scale"])
@pytest.mark.parametrize("grouping", ["adjacent", "strided"])
def test_gradients_are_those_of_the_formula_with_a_fixed_mask(norm, grouping):
    layer = SparseLinear.from_linear(linear(), pattern=PATTERNS[grouping][0], norm=norm)
    layer.set_lowrank(*factors())
    x = tokens(2, 3, K).requires_grad_()
    upstream = tokens(2, 3, N, seed=5)
    layer(x).backward(upstream)

    names = ["weight", "bias", "lowrank_down", "lowrank_up"]
    own = {name: getattr(layer, name).detach().double().requires_grad_() for name in names}
    x64 = x.detach().double().requires_grad_()
    kept = x64 * mask_for(x, grouping)
    if norm == "scale":
        kept = kept * x64.norm(dim=-1, keepdim=True) / kept.norm(dim=-1, keepdim=True)
    low = x64 @ own["lowrank_down"].T @ own["lowrank_up"].T
    (kept @ own["weight"].T + low + own["bias"]).backward(upstream.double())
    assert relative_error(x.grad, x64.grad) < 1e-5
    for name in names:
        assert relative_error(getattr(layer, name).grad, own[name].grad) < 1e-5, name


def test_gradcheck_in_double_precision():
    layer = SparseLinear.from_linear(linear(k=8, n=4).double(), norm="none")
    down, up = factors()
    layer.set_lowrank(down[:2, :8], up[:4, :2])
    x = torch.linspace(1, 2, 16).reshape(2, 8)[:, torch.randperm(8)].double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_gradient_reaches_the_input_of_a_frozen_layer():
    layer = SparseLinear.from_linear(linear()).requires_grad_(False)
    x = tokens().requires_grad_()
    layer(x).sum().backward()
    assert bool(x.grad.any())


def test_training_a_peft_adapter():
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(
        SparseLinear.from_linear(linear(n=K)), nn.GELU(), SparseLinear.from_linear(linear())
    )
    model[0].set_lowrank(factors()[0], tokens(K, RANK))
    x = tokens()
    expected = model(x)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"]))
    torch.testing.assert_close(peft(x), expected)  # a fresh adapter adds nothing
    adapter = {name: p for name, p in peft.named_parameters() if "lora_" in name}
    assert len(adapter) == 4
    assert {name for name, p in peft.named_parameters() if p.requires_grad} == set(adapter)
    before = {name: p.detach().clone() for name, p in adapter.items()}
    optimiser = torch.optim.SGD(adapter.values(), lr=0.1)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = peft(x).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    for name, p in adapter.items():  # down-projections move from the second step on: up starts at zero
        assert bool(p.grad.any()), name
        assert not torch.equal(p, before[name]), name
    assert losses[2] < losses[0]


# ------------------------------------------------------------------------------------- shared selection


def readers(count=3):
    layers = [SparseLinear.from_linear(linear(seed=i)) for i in range(count)]
    for layer in layers[1:]:
        layer.shared_input = layers[0].shared_input
    return layers


def alone(layer):
    return copy.deepcopy(layer)


def test_layers_that_read_one_tensor_select_once(count_compress):
    layers = readers()
    x = tokens()
    with torch.no_grad():
        shared = [layer(x) for layer in layers]
        assert len(count_compress) == 1
        for layer, y in zip(layers, shared, strict=True):
            assert torch.equal(y, alone(layer)(x))


def test_other_settings_are_not_served_from_memory():
    layers = readers(4)
    layers[1].pattern = Pattern(grouping="strided")
    layers[2].norm = "none"
    layers[3].pattern = Pattern(1, 4)
    x = tokens()
    with torch.no_grad():
        for layer in (*layers, *reversed(layers)):
            assert torch.equal(layer(x), alone(layer)(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(layer(x), alone(layer)(x))


def test_changes_to_the_tensor_between_layers_are_noticed():
    first, second, third = readers()
    x = tokens()
    with torch.no_grad():
        first(x)
        x.mul_(torch.linspace(3, -3, K))
        assert torch.equal(second(x), alone(second)(x))
        x[0].neg_()[:4] = 9.0  # through a view
        assert torch.equal(third(x), alone(third)(x))
        assert torch.equal(first(x.clone()), alone(first)(x))


def test_gradients_survive_a_look_without_them():
    first, second, _ = readers()
    x = tokens().requires_grad_()
    with torch.no_grad():
        first(x)
    y = second(x)
    y.sum().backward()
    assert bool(x.grad.any())
    x.grad = None
    first(x).sum().backward()
    assert bool(x.grad.any())
    with torch.no_grad():
        assert not first(x).requires_grad


def test_each_reader_gets_its_gradient_to_the_shared_input():
    layers = readers()
    x, z = tokens().requires_grad_(), tokens().requires_grad_()
    sum(layer(x).sum() for layer in layers).backward()
    sum(alone(layer)(z).sum() for layer in layers).backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_memory_dies_with_the_tensor(count_compress):
    layer = readers(1)[0]
    x = tokens()
    with torch.no_grad():
        layer(x)
    gone = weakref.ref(x)
    (kept,) = count_compress
    gc.disable()  # no cycle may be needed
    try:
        del x
        assert gone() is None
        assert kept() is None
    finally:
        gc.enable()


def test_inference_mode():
    layers = readers()
    x = tokens()
    expected = [layer(x) for layer in layers]
    with torch.inference_mode():
        inside = x * 1
        for layer, y in zip(layers, expected, strict=True):
            assert torch.equal(layer(inside), y)
            assert torch.equal(layer(x), y)
        inside.neg_()  # has no version that could tell
        assert torch.equal(layers[1](inside), alone(layers[1])(-x))
    x.requires_grad_()
    layers[0](x).sum().backward()  # nothing of inference mode is left in the memory
    assert bool(x.grad.any())


# ------------------------------------------------------------------------------------------ compilation


@pytest.mark.parametrize("norm", ["none", "scale"])
def test_compiles_into_one_graph(norm):
    layers = readers()
    for layer in layers:
        layer.norm = norm
        layer.set_lowrank(*factors())
    model = nn.ModuleList(layers)

    def qkv(x):
        return torch.cat([layer(x) for layer in model], dim=-1)

    torch._dynamo.reset()
    compiled = torch.compile(qkv, backend="eager", fullgraph=True)
    for x in (tokens(), tokens(seed=6)):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), qkv(x))
    x = tokens().requires_grad_()
    compiled(x).sum().backward()
    assert bool(x.grad.any())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grouping", PATTERNS)
def test_cuda_matches_the_formula(grouping, dtype):
    layer = SparseLinear.from_linear(linear().to("cuda", dtype), pattern=PATTERNS[grouping][0])
    layer.set_lowrank(*factors())
    x = tokens().to(dtype)
    expected = by_hand(
        x,
        layer.weight.cpu(),
        layer.bias.cpu(),
        mask=mask_for(x, grouping),
        norm="scale",
        down=layer.lowrank_down.cpu(),
        up=layer.lowrank_up.cpu(),
    )
    limit = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert relative_error(layer(x.cuda()).cpu(), expected) < limit
