"""`SparseLinear`: gradients, one selection for layers that read one tensor, compilation."""

import copy
import gc
import weakref

import pytest
import torch
from formula_helpers import by_hand
from helpers import relative_error
from linear_helpers import PATTERNS, RANK, K, N, factors, linear, mask_for, tokens
from torch import nn

from rtlynx import Pattern, SparseLinear
from rtlynx.math import reference
from rtlynx.nn.input_cache import SharedInput


@pytest.fixture
def count_compress(monkeypatch):
    """Counts selections: one weak reference to the kept entries for each."""
    kept = []
    original = reference.compress

    def counted(*args):
        result = original(*args)
        kept.append(weakref.ref(result.kept))
        return result

    monkeypatch.setattr(reference, "compress", counted)
    return kept


# -------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("norm", ["none", "scale"])
@pytest.mark.parametrize("grouping", ["adjacent", "strided"])
def test_gradients_are_those_of_the_formula_with_a_fixed_mask(norm, grouping):
    layer = SparseLinear.from_linear(linear(), pattern=PATTERNS[grouping][0], norm=norm)
    layer.set_lowrank(*factors())
    x = tokens(2, 3, K).requires_grad_()
    upstream = tokens(2, 3, N, seed=5)
    layer(x).backward(upstream)

    names = ["weight", "bias", "lowrank_a", "lowrank_b"]
    own = {name: getattr(layer, name).detach().double().requires_grad_() for name in names}
    x64 = x.detach().double().requires_grad_()
    kept = x64 * mask_for(x, grouping)
    if norm == "scale":
        kept = kept * x64.norm(dim=-1, keepdim=True) / kept.norm(dim=-1, keepdim=True)
    low = x64 @ own["lowrank_a"].T @ own["lowrank_b"].T
    (kept @ own["weight"].T + low + own["bias"]).backward(upstream.double())
    assert relative_error(x.grad, x64.grad) < 1e-5
    for name in names:
        assert relative_error(getattr(layer, name).grad, own[name].grad) < 1e-5, name


def test_gradcheck_in_double_precision():
    layer = SparseLinear.from_linear(linear(k=8, n=4).double(), norm="none")
    lowrank_a, lowrank_b = factors()
    layer.set_lowrank(lowrank_a[:2, :8], lowrank_b[:4, :2])
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
    for name, p in adapter.items():  # down-projections move from the second step on: lowrank_b starts at zero
        assert bool(p.grad.any()), name
        assert not torch.equal(p, before[name]), name
    assert losses[2] < losses[0]


# ------------------------------------------------------------------------------------- shared selection


def readers(count=3):
    layers = [SparseLinear.from_linear(linear(seed=i)) for i in range(count)]
    shared = SharedInput()
    for layer in layers:
        layer.shared_input = shared
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
        lowrank_a=layer.lowrank_a.cpu(),
        lowrank_b=layer.lowrank_b.cpu(),
    )
    limit = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert relative_error(layer(x.cuda()).cpu(), expected) < limit
