"""`SparseLinear` through the operators that the kernels serve, here in their CPU implementation."""

import copy
import gc
import pickle
import weakref
from collections import Counter

import pytest
import torch
import torch._dynamo.testing
from formula_helpers import by_hand, slow_mask
from helpers import flux_call, relative_error, tiny_flux
from kernel_layer_helpers import LIMIT, PATTERNS, RANK, K, N, formula, normal, sparse
from torch import nn

import rtlynx.nn.sparse_linear
from rtlynx import Pattern, Recipe, sparsify
from rtlynx.models import sparse_layers
from rtlynx.nn.backends import REFERENCE, REFERENCE_FP8, Reference
from rtlynx.nn.call import calling
from rtlynx.nn.input_cache import SharedInput
from rtlynx.ops import dispatch as choice


@pytest.fixture(autouse=True)
def _served(monkeypatch):
    """All bfloat16 calls without gradients are served, on this CPU too."""
    monkeypatch.setattr(
        rtlynx.nn.sparse_linear,
        "kernels_support",
        lambda x, *_: x.dtype == torch.bfloat16 and not torch.is_grad_enabled(),
    )
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of each operator."""
    count = Counter()
    for name in ("compress", "gemm", "linear"):
        original = getattr(rtlynx.nn.backends.ops, name)

        def counted(*args, name=name, original=original):
            count[name] += 1
            return original(*args)

        monkeypatch.setattr(rtlynx.nn.backends.ops, name, counted)
    return count


# --------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("norm", ["none", "scale"])
@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_output_is_the_formula(name, norm, rank, bias, single, calls):
    layer = sparse(name, norm, rank, bias=bias)
    layer.shared_input = SharedInput(single=single)
    x = normal(2, 33, K)
    y = layer(x)
    assert y.shape == (2, 33, N)
    assert relative_error(y, formula(layer, x, name)) < LIMIT
    assert calls == ({"linear": 1} if single else {"compress": 1, "gemm": 1})


def test_an_input_whose_entries_are_not_neighbours():
    layer = sparse()
    x = normal(K, 40).T
    assert relative_error(layer(x), formula(layer, x)) < LIMIT


def test_gradients_take_the_differentiable_path(calls):
    layer = sparse()
    x = normal(70, K).requires_grad_()
    with torch.enable_grad():
        layer(x).sum().backward()
    assert bool(x.grad.any())
    assert not calls


def test_dense_steps_use_no_kernel(calls):
    layer = sparse("strided")
    layer.dense_steps = True
    x = normal(70, K)
    with calling(dense=True):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not calls


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("norm", ["none", "scale"])
@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("single", [False, True])
def test_a_quantised_layer_gives_what_plain_pytorch_gives(name, norm, rank, single, calls):
    layer = sparse(name, norm, rank)
    layer.quantize()
    layer.shared_input = SharedInput(single=single)
    x = normal(2, 35, K)
    y = layer(x)
    assert calls == ({"linear": 1} if single else {"compress": 1, "gemm": 1})
    layer.backend = REFERENCE_FP8
    assert relative_error(y, layer(x)) < 1e-3
    assert calls.total() <= 2


def test_changes_of_a_quantised_layers_factors_are_noticed(calls):
    layer = sparse("strided")
    layer.quantize()
    x = normal(70, K)
    layer(x)
    folded = layer._folded_lowrank_b.kept
    layer(x)
    assert layer._folded_lowrank_b.kept is folded
    layer.lowrank_b.mul_(-3)
    by_kernels = layer(x)
    layer.backend = REFERENCE_FP8
    assert relative_error(by_kernels, layer(x)) < 1e-3


def test_autocast_is_served_what_the_product_sees(calls):
    layer = sparse()
    x = normal(70, K).float() * 1.001
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert calls == {"linear": 1}
    assert torch.equal(y, layer(x.bfloat16()))


@pytest.mark.parametrize("rows", [(0, 8), (32, None), (10, 20), (0, None), (0, 0), (40, 40)])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
def test_dense_text_rows(rows, single, kernels, calls):
    layer = sparse("strided")
    layer.backend = None if kernels else REFERENCE
    layer.shared_input = SharedInput(single=single)
    x = normal(2, 40, K)
    whole = layer(x)
    layer.text_rows_dense = True
    calls.clear()
    with calling(text_rows=rows):
        y = layer(x)
    start, stop, _ = slice(*rows).indices(40)
    dense = nn.functional.linear(x, layer.weight, layer.bias)
    for row in range(40):
        assert relative_error(y[:, row], (dense if start <= row < stop else whole)[:, row]) < LIMIT
    if start >= stop:
        assert calls.total() == kernels  # the product of what is remembered, or both in one
    else:
        assert calls.total() == kernels * ((start > 0) + (stop < 40)) * (1 if single else 2)


# ------------------------------------------------------------------------------------- shared inputs


def readers(*ranks):
    layers = [sparse(rank=rank, seed=i) for i, rank in enumerate(ranks)]
    shared = SharedInput()
    for layer in layers:
        layer.shared_input = shared
    return layers


def alone(layer):
    return copy.deepcopy(layer)


def test_layers_that_read_one_tensor_compress_once(calls):
    layers = readers(0, 0, 0)
    x = normal(70, K)
    outputs = [layer(x) for layer in layers]
    assert calls == {"compress": 1, "gemm": 3}
    for layer, y in zip(layers, outputs, strict=True):
        assert torch.equal(y, alone(layer)(x))


@pytest.mark.parametrize("how", ["one parameter", "equal parameters"])
def test_one_a_is_applied_once_and_others_are_not_confused(calls, how):
    layers = readers(5, 5, 7)
    lowrank_a = layers[0].lowrank_a
    layers[1].lowrank_a = lowrank_a if how == "one parameter" else nn.Parameter(lowrank_a.clone())

    def right(x, compressions):
        calls.clear()
        outputs = [layer(x) for layer in layers]
        assert calls == {"compress": compressions, "gemm": 3}
        return all(torch.equal(y, alone(layer)(x)) for layer, y in zip(layers, outputs, strict=True))

    assert right(normal(70, K), 2)
    x = normal(70, K, seed=1)
    assert right(x, 2)
    layers[2].lowrank_a.mul_(2)
    assert torch.equal(layers[2](x), alone(layers[2])(x))
    layers[1].load_state_dict({**layers[1].state_dict(), "lowrank_a": -lowrank_a})
    assert right(normal(70, K, seed=2), 2 if how == "one parameter" else 3)
    layers[0].load_state_dict({**layers[0].state_dict(), "lowrank_a": layers[1].lowrank_a})
    assert right(normal(70, K, seed=3), 2)


def test_other_settings_are_not_served_from_memory():
    layers = readers(0, 0, 0, 0)
    layers[1].pattern = Pattern(grouping="strided")
    layers[2].norm = "none"
    layers[3].text_rows_dense = True
    x = normal(70, K)
    with calling(text_rows=(0, 8)):
        for layer in (*layers, *reversed(layers)):
            assert torch.equal(layer(x), alone(layer)(x))
            with torch.enable_grad():
                assert relative_error(layer(x), alone(layer)(x)) < LIMIT


def test_changes_to_the_tensor_between_layers_are_noticed():
    first, second = readers(0, 0)
    x = normal(70, K)
    first(x)
    x.mul_(torch.linspace(3, -3, K).bfloat16())
    assert torch.equal(second(x), alone(second)(x))


def test_memory_dies_with_the_tensor():
    (layer,) = readers(RANK)
    x = normal(70, K)
    layer(x)
    blocks = weakref.ref(layer.shared_input._entry[3][0][0])
    gc.disable()  # no cycle may be needed
    try:
        del x
        assert blocks() is None
    finally:
        gc.enable()


def test_inference_mode_remembers_nothing():
    layer = sparse("strided")
    x = normal(70, K)
    expected = layer(x)
    with torch.inference_mode():
        inside = x * 1
        assert torch.equal(layer(inside), expected)
        inside.neg_()
        assert torch.equal(layer(inside), alone(layer)(-x))
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)


# ---------------------------------------------------------------------- the weight in compute order


@pytest.mark.parametrize("name", ["strided", "parts"])
def test_every_change_of_the_weight_is_noticed(name):
    layer, x = sparse(name), normal(70, K)
    other = sparse(name, seed=9)

    def right():
        return relative_error(layer(x), formula(layer, x, name)) < LIMIT

    assert right()
    layer.weight.mul_(torch.linspace(-2, 2, K).bfloat16())
    assert right()
    layer.weight = nn.Parameter(normal(N, K, seed=4))
    assert right()
    layer.set_refit(normal(N, K, seed=5), keep_dense=True)
    assert right()
    layer.load_state_dict({**layer.state_dict(), **other.state_dict()})
    assert right()
    layer.weight.data = normal(N, K, seed=6)
    assert right()
    layer.float()
    layer.to(torch.bfloat16)
    assert right()


def test_a_change_of_pattern_is_noticed():
    layer, x = sparse("strided"), normal(70, K)
    layer(x)
    layer.pattern = PATTERNS["parts"][0]
    assert relative_error(layer(x), formula(layer, x, "parts")) < LIMIT


def test_the_weight_is_put_in_order_once(monkeypatch):
    made = []
    original = rtlynx.nn.sparse_linear.compute_order
    monkeypatch.setattr(
        rtlynx.nn.sparse_linear, "compute_order", lambda *args: made.append(1) or original(*args)
    )
    layer, adjacent = sparse("strided"), sparse("adjacent")
    for seed in range(3):
        x = normal(70, K, seed=seed)
        layer(x)
        adjacent(x)
    layer.text_rows_dense = True
    for state in ({"text_rows": (0, 8)}, {"dense": True}, {}):
        with calling(**state):
            layer(x)
    assert len(made) == 1


def test_the_copy_is_private():
    layer, x = sparse("strided"), normal(70, K)
    before = list(layer.state_dict())
    expected = layer(x)
    ordered = weakref.ref(layer._packed_weight.kept)
    assert list(layer.state_dict()) == before
    assert "_packed_weight" not in vars(layer.to_linear())
    twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for twin in twins:
        assert twin._packed_weight._entry is None
        assert torch.equal(twin(x), expected)
    layer.to("cpu")  # a move, if not a far one
    assert ordered() is None


def test_an_adapter_is_merged_where_the_weight_has_no_copy():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    x = normal(70, K)
    peft = get_peft_model(nn.Sequential(sparse("adjacent")), config)
    unmerged = peft(x)
    peft.merge_adapter()
    layer = peft.base_model.model[0].base_layer
    assert relative_error(peft(x), formula(layer, x, "adjacent")) < LIMIT
    peft.unmerge_adapter()
    assert relative_error(peft(x), unmerged) < 1e-2
    strided = get_peft_model(nn.Sequential(sparse("strided")), config)
    expected = strided(x)
    with pytest.raises(RuntimeError, match="in the order of strided groups"):
        strided.merge_adapter()
    with pytest.raises(RuntimeError, match="in the order of strided groups"):
        strided.base_model.model[0].merge()
    assert torch.equal(strided(x), expected)


@pytest.mark.parametrize("how", ["parametrize", "weight_norm"])
def test_a_weight_that_is_computed(how):
    layer, x = sparse("strided", rank=0), normal(70, K)
    layer(x)
    if how == "weight_norm":
        nn.utils.weight_norm(layer)
        layer.weight_g.mul_(2)
    else:

        class Double(nn.Module):
            def forward(self, weight):
                return weight * 2

        nn.utils.parametrize.register_parametrization(layer, "weight", Double())
    y = layer(x)
    expected = by_hand(x, layer.weight, layer.bias, mask=slow_mask(x, 2, 4, "strided", (K,)), norm="scale")
    assert relative_error(y, expected) < LIMIT


# ------------------------------------------------------------------------------------- compilation


@pytest.fixture
def whole_decision(monkeypatch):
    """What decides on a card decides here: all of it but the question whether there is one."""
    monkeypatch.setattr(choice, "_cards", {-1: None})
    monkeypatch.setattr(choice, "_said", set())

    def decide(x, *others):
        reason = choice.unsupported_reason(x, *others)
        if reason is not None:
            choice._say_once(reason)
        return reason is None

    monkeypatch.setattr(rtlynx.nn.sparse_linear, "kernels_support", decide)


@pytest.mark.usefixtures("whole_decision")
def test_what_is_not_served_compiles_too_and_says_why():
    layer = sparse()
    layer.norm = "paper"
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x), backend="aot_eager", fullgraph=True)
    x = normal(8, K)
    with pytest.warns(RuntimeWarning, match="printed formula"):
        y = compiled(x)
    assert torch.equal(y, layer(x))


@pytest.mark.usefixtures("whole_decision")
@pytest.mark.parametrize("name", PATTERNS)
def test_compiles_into_one_graph_for_any_number_of_rows(name):
    layers = nn.ModuleList([sparse(name, seed=0), sparse(name, rank=0, seed=1)])
    layers[1].shared_input = SharedInput(single=True)

    def both(x):
        return torch.cat([layer(x) for layer in layers], dim=-1)

    both(normal(2, 70, K))  # makes what compiled code reads; on a card `prepare` has
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, backend=counter, fullgraph=True, dynamic=True)
    for rows in (70, 90, 130):
        x = normal(2, rows, K, seed=rows)
        assert torch.equal(compiled(x), both(x))
    assert counter.frame_count == 1
    layers[0].weight.data += normal(N, K, seed=3)
    assert torch.equal(compiled(x), both(x))


# ------------------------------------------------------------------------------------- whole models


def test_layers_alone_on_their_input_remember_nothing():
    model = sparsify(tiny_flux())
    single = {name: layer.shared_input.single for name, layer in sparse_layers(model).items()}
    assert not single["transformer_blocks.0.attn.to_q"]
    assert single["transformer_blocks.0.attn.to_out.0"]
    assert not single["single_transformer_blocks.0.proj_mlp"]
    assert single["single_transformer_blocks.0.proj_out"]


def test_a_model_runs_through_the_kernels(calls):
    model = sparsify(tiny_flux().bfloat16(), Recipe.immediate(text_rows="dense"))
    call = {k: v.bfloat16() if v.is_floating_point() else v for k, v in flux_call().items()}
    y = model(**call, return_dict=False)[0]
    assert calls["linear"]
    # q, k, v and mlp of the single block, whose text rows are dense; what others read is fused
    assert calls["compress"] == 1
    assert calls["gemm"] == 4
    with torch.enable_grad():
        assert relative_error(y, model(**call, return_dict=False)[0]) < 3e-2


def test_backends_of_one_class_do_not_share_what_they_prepared():
    class Scaled(Reference):
        def __init__(self, factor):
            self.factor = factor

        def prepare(self, layer, x):
            return super().prepare(layer, self.factor * x)

    first, second = readers(0, 0)
    first.backend, second.backend = Scaled(1.0), Scaled(3.0)
    x = normal(70, K)
    first(x)
    assert torch.equal(second(x), second(x.clone()))


def test_compiled_code_notices_a_state_dict_that_is_loaded():
    layer, other = sparse("strided"), sparse("strided", seed=1)
    torch._dynamo.reset()
    compiled, x = torch.compile(layer, backend="eager", fullgraph=True), normal(70, K)
    compiled(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(compiled(x), other(x))


def test_factors_made_in_inference_mode_are_joined():
    layers = readers(5, 5)
    with torch.inference_mode():
        lowrank_as = [layer.lowrank_a.clone() for layer in layers]
    joined, starts = SharedInput().factor(lowrank_as)
    assert joined.shape[0] > 5
    assert starts[0] == 0 < starts[1]


def test_data_parallel_copies_are_refused():
    with pytest.raises(RuntimeError, match="one process a card"):
        sparse()._replicate_for_data_parallel()
