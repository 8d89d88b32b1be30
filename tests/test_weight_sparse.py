"""Products by a 2:4-sparse weight: packing, the operator and layers over it, on the CPU."""

from types import SimpleNamespace

import pytest
import torch
from fusion_helpers import serve
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rtlynx.nn.sparse_linear
from rtlynx import Pattern, SparseLinear
from rtlynx.cuda.sm90 import gemm
from rtlynx.math.formats import FP8_DENSE, FP8_SPARSE, FP8_WEIGHT_SPARSE
from rtlynx.math.fp8 import E4M3, quantize_tokens, quantize_weight
from rtlynx.math.tiles import pack_lowrank, pack_weight, packed_a_bytes, unpack_a
from rtlynx.nn.prepared import QuantizedInput
from rtlynx.nn.prologue import activated, read
from rtlynx.nn.tensor_parallel import Shard, TensorParallelLinear
from rtlynx.ops import dispatch as choice
from rtlynx.ops import fp8_linear as fp8
from rtlynx.ops.weight_sparse import gemm_weight_sparse

K, N, ROWS = 144, 40, 21


def two_of_four(n=N, k=K, seed=0):
    """A weight with 0 to 2 nonzero entries in each group, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * k**-0.5
    places = torch.rand(n, k // 4, 4, generator=generator).argsort(-1)
    counts = torch.randint(0, 3, (n, k // 4, 1), generator=generator)
    return torch.where((places < counts).flatten(1), weight, 0.0)


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def layer_of(format=FP8_WEIGHT_SPARSE, seed=0, n=N):
    torch.manual_seed(seed)
    linear = nn.Linear(K, n).bfloat16()
    with torch.no_grad():
        linear.weight.copy_(two_of_four(n, seed=seed))
    layer = SparseLinear.from_linear(linear, pattern=Pattern(1, 1), norm="none").requires_grad_(False)
    layer.quantize()
    layer.format = format
    return layer


# -------------------------------------------------------------------------------------------- packing


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 140), groups=st.integers(1, 70), seed=st.integers(0, 99))
def test_what_is_packed_is_unpacked(n, groups, seed):
    values = quantize_weight(two_of_four(n, groups * 4, seed)).values
    packed = pack_weight(values)
    assert packed.shape == (packed_a_bytes(n, groups * 4, FP8_SPARSE),)
    assert torch.equal(unpack_a(packed, n, groups * 4, FP8_SPARSE).float(), values.float())


def test_any_two_places_and_fewer():
    """All eleven ways to have at most two, and zeros of both signs. (Unpacking refuses bad pairs.)"""
    ways = [bits for bits in range(16) if bits.bit_count() <= 2]
    entries = [[1.5 + i if bits >> i & 1 else (-0.0 if i % 2 else 0.0) for i in range(4)] for bits in ways]
    values = torch.tensor(entries).flatten().expand(3, -1).to(E4M3)
    assert torch.equal(unpack_a(pack_weight(values), *values.shape, FP8_SPARSE).float(), values.float())


def test_rows_packed_in_pieces_are_as_packed_at_once():
    values = quantize_weight(two_of_four(1100, 16)).values  # (more than are packed at one time)
    pieces = [pack_weight(values[:1024]), pack_weight(values[1024:])]
    assert torch.equal(pack_weight(values), torch.cat(pieces))


def test_what_is_no_weight_to_pack_is_refused():
    three = torch.tensor([[0.0, 1, 2, 3]]).to(E4M3)
    with pytest.raises(ValueError, match="at most two nonzero entries in every four"):
        pack_weight(three)
    for wrong in (torch.zeros(4, 8), torch.zeros(4, 6).to(E4M3), torch.zeros(8).to(E4M3)):
        with pytest.raises(ValueError, match="a packed weight is"):
            pack_weight(wrong)


# ----------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(ROWS, K), (2, 5, K), (1, K), (0, K)])
def test_the_operator_is_the_formula(shape, bias):
    weight, x = quantize_weight(two_of_four()), quantize_tokens(tokens(*shape))
    b = None if bias is None else tokens(N, seed=2).to(bias)
    y = gemm_weight_sparse(*x, [pack_weight(weight.values)], [weight.scale], [b], [], [])
    expected = (x.values.double() * x.scale.double()) @ weight.dequantize().double().T
    expected = expected if b is None else expected + b.double()
    assert (y.dtype, y.shape) == (torch.bfloat16, expected.shape)
    if y.numel():
        assert relative_error(y, expected) < 2.5e-3


def test_a_gradient_is_refused():
    weight, x = quantize_weight(two_of_four()), quantize_tokens(tokens(ROWS, K))
    bias = torch.zeros(N, requires_grad=True)
    with pytest.raises(RuntimeError, match="have no gradient"):
        gemm_weight_sparse(*x, [pack_weight(weight.values)], [weight.scale], [bias], [], [])


def several(widths, ranks, biases, rows=ROWS):
    """The lists of several layers; ranks of 0 have no factors."""
    lists = [], [], [], [], []
    for i, (n, rank, bias) in enumerate(zip(widths, ranks, biases, strict=True)):
        weight = quantize_weight(two_of_four(n, seed=i))
        t = tokens(rows, rank, seed=20 + i) if rank else None
        b = pack_lowrank(tokens(n, rank, seed=30 + i)) if rank else None
        of = pack_weight(weight.values), weight.scale, tokens(n, seed=10 + i) if bias else None, t, b
        for together, one in zip(lists, of, strict=True):
            together.append(one)
    return lists


@settings(deadline=None, max_examples=30)
@given(
    layers=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0, 5, 40]), st.booleans()), max_size=3),
    last=st.integers(1, 70),
)
def test_layers_together_are_each_alone_beside_each_other(layers, last):
    eighths, ranks, biases = zip(*layers, (0, 5, True), strict=True)
    lists = several([*(8 * n for n in eighths[:-1]), last], ranks, biases)
    x = quantize_tokens(tokens(3, 7, K))
    alone = [gemm_weight_sparse(*x, *([one] for one in of)) for of in zip(*lists, strict=True)]
    assert torch.equal(gemm_weight_sparse(*x, *lists), torch.cat(alone, dim=-1))


def test_layers_that_cannot_lie_beside_each_other_are_refused():
    x = quantize_tokens(tokens(ROWS, K))
    packed, scales, biases, lowranks, packed_bs = several([16, 20, 8], [0, 0, 0], [True] * 3)
    with pytest.raises(ValueError, match=r"outputs in multiples of 8, all but the last, got \[16, 20, 8\]"):
        gemm_weight_sparse(*x, packed, scales, biases, lowranks, packed_bs)
    with pytest.raises(ValueError, match="one product serves 1 to 4 layers, got 5 weight_scales"):
        gemm_weight_sparse(*x, packed[:1] * 5, scales[:1] * 5, [], [], [])
    with pytest.raises(ValueError, match="packed_weights are as many as weight_scales, got 1"):
        gemm_weight_sparse(*x, packed[:1], scales[:1] * 2, [], [], [])
    with pytest.raises(TypeError, match="biases of one product are of one dtype"):
        gemm_weight_sparse(*x, packed[:1] * 2, scales[:1] * 2, [biases[0], biases[0].float()], [], [])


def test_the_operator_is_one_to_torch():
    x = quantize_tokens(tokens(ROWS, K))
    arguments = (*x, *several([16, 12], [5, 0], [False, True]))
    tests = "test_faketensor", "test_aot_dispatch_dynamic"  # (that of the schema multiplies e4m3)
    torch.library.opcheck(gemm_weight_sparse, arguments, test_utils=tests)


@pytest.mark.parametrize("rows", [1, 513, 4099])
@pytest.mark.parametrize("widths", [(8,), (100,), (3072, 3072, 3072), (3072, 8, 0, 100)])
def test_the_plan_has_channels_in_rows_and_tokens_in_columns(monkeypatch, rows, widths):
    monkeypatch.setattr(gemm, "multiprocessors", lambda device: 132)
    count = len(widths)
    of = gemm.GemmShape(rows, 256, widths, (0,) * count, (0,) * count, 0, transposed=True)
    plan = gemm.plan_gemm(of, FP8_SPARSE, 0)
    names = ("rows", "columns", "k_blocks", "total_rank_blocks", "num_m_tiles", "num_n_tiles")
    shape = dict(zip(names, memoryview(plan.shape).cast("i")[: len(names)].tolist(), strict=True))
    assert shape["rows"] == rows
    assert shape["columns"] == -(-sum(widths) // 8) * 8
    assert (shape["k_blocks"], shape["num_n_tiles"]) == (2, -(-rows // plan.config.block_n))
    column = tile = 0
    table = memoryview(plan.layers).cast("i").tolist()
    for i, (width, first) in enumerate(zip(widths, plan.first_columns, strict=True)):
        assert first == column
        column, tile = column + width, tile + -(-width // 256)
        assert table[4 * i : 4 * i + 2] == [column, tile]  # (the last end as it is, no multiple of 8)
    assert tile == shape["num_m_tiles"]


# ------------------------------------------------------------------------------------------------ layers


def test_elsewhere_a_layer_is_dense_fp8_to_the_bit():
    x = tokens(2, 9, K)
    ours, dense = layer_of(), layer_of(FP8_DENSE)
    assert torch.equal(ours(x), dense(x))
    assert ours.kept_copies() == []


@pytest.fixture
def served(monkeypatch):
    """Layers are served by the operator's reference, as on a Hopper card; lists what it multiplies."""
    calls = []

    def counted(*args):
        calls.append([c.shape[0] for c in args[3]])
        return gemm_weight_sparse(*args)

    serve(monkeypatch)
    monkeypatch.setattr(fp8, "scaled_mm_supports", lambda x, of: True)
    monkeypatch.setattr(fp8, "gemm_weight_sparse", counted)
    return calls


def test_a_layer_multiplies_by_the_operator(served):
    layer, x = layer_of(), tokens(2, 9, K)
    with torch.no_grad():
        y = layer(x.transpose(0, 1).contiguous().transpose(0, 1))  # (rows that do not lie in order)
        expected = layer_of(FP8_DENSE, seed=0)
        assert (
            relative_error(
                y, fp8.linear_fp8(x, fp8.compress_fp8(x, Pattern(1, 1), "none"), expected.fp8_parameters())
            )
            < 3e-3
        )
    assert served == [[N]]
    (packed,) = layer.kept_copies()  # (nothing prepared the layer)
    assert torch.equal(unpack_a(packed, N, K, FP8_SPARSE).float(), layer.weight.float())


def test_the_packed_copy_follows_the_weight(served):
    layer, other, x = layer_of(), layer_of(seed=5), tokens(9, K)
    with torch.no_grad():
        layer(x)
        assert "packed" not in " ".join(layer.state_dict())
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
        layer.train()
        assert layer.kept_copies() == []


def test_layers_of_both_formats_read_one_quantised_input(served, monkeypatch):
    products = []

    def scaled_mm(a, b, *, scale_a, scale_b, bias, **_):
        products.append(b.shape[1])
        y = (a.float() * scale_a) @ (b.float() * scale_b)
        return (y if bias is None else y + bias).bfloat16()

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    gelu, x = nn.GELU(approximate="tanh"), tokens(2, 9, K)
    layers = [layer_of(), layer_of(FP8_DENSE, seed=1, n=32), layer_of(seed=2, n=56)]
    with torch.no_grad():
        given = read(activated(gelu, x), *layers)
        assert isinstance(given, QuantizedInput)
        for layer in layers:
            expected = fp8.linear_fp8(
                gelu(x), fp8.compress_fp8(gelu(x), Pattern(1, 1), "none"), layer.fp8_parameters()
            )
            assert relative_error(layer(given), expected) < 4e-3
    assert (served, products) == ([[N, 56]], [32])


@pytest.mark.parametrize(
    ("widths", "products"),
    [
        ([8, 16, 24, 32, 40], [[8, 16, 24, 32], [40]]),  # more than one product takes
        ([8, 12, 16, 20], [[8, 12], [16, 20]]),  # Y of what is behind 12 columns would not be aligned
    ],
)
@torch.no_grad()
def test_layers_go_together_as_far_as_one_product_serves_them(served, widths, products):
    gelu, x = nn.GELU(approximate="tanh"), tokens(2, 9, K)
    layers = [layer_of(seed=i, n=n) for i, n in enumerate(widths)]
    given = read(activated(gelu, x), *layers)
    outputs = [layer(given) for layer in reversed(layers)]
    assert sorted(served) == products
    for layer, y in zip(reversed(layers), outputs, strict=True):
        assert torch.equal(y, layer(read(activated(gelu, x), layer)))


@torch.no_grad()
def test_compiled_code_multiplies_them_together(served):
    gelu, x = nn.GELU(approximate="tanh"), tokens(2, 9, K)
    layers = [layer_of(seed=i, n=n) for i, n in enumerate((40, 48, 20))]

    def block(x):
        given = read(activated(gelu, x), *layers)
        return [layer(given) for layer in layers]

    expected = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert all(map(torch.equal, compiled(x), expected))
    assert served == [[40, 48, 20]] * 3


def test_a_call_that_runs_dense_takes_the_original(served):
    layer, x = layer_of(), tokens(2, 9, K)
    layer.dense_steps = True
    layer.weight_dense, layer.weight_dense_scale = quantize_weight(tokens(N, K, seed=9))
    original = layer.weight_dense.float() * layer.weight_dense_scale[:, None]
    gelu, dense = nn.GELU(approximate="tanh"), []
    for running_dense in (True, False):
        with torch.no_grad(), rtlynx.nn.call.calling(dense=running_dense):
            given = read(activated(gelu, x), layer)
            dense.append(given.parameters[0])
    assert torch.equal(dense[0].weight.float() * dense[0].scale[:, None], original)
    assert dense[0].packed is None
    assert dense[1].packed is not None
    assert dense[1].weight is None


def test_layers_of_both_formats_quantise_a_shared_tensor_once(monkeypatch):
    layers, x = [layer_of(), layer_of(FP8_DENSE, seed=1)], tokens(2, 9, K)
    layers[1].shared_input = layers[0].shared_input = rtlynx.nn.sparse_linear.SharedInput()
    count = []
    monkeypatch.setattr(fp8, "quantize_tokens", lambda x: count.append(1) or quantize_tokens(x))
    with torch.no_grad():
        for layer in layers:
            layer(x)
    assert len(count) == 1


def test_which_weights_the_kernel_serves(monkeypatch):
    monkeypatch.setattr(choice, "_cards", {0: None})
    weight = SimpleNamespace(is_cuda=True, get_device=lambda: 0)  # on a card that there is not
    assert choice.weight_sparse_supports(weight, 144)
    assert not choice.weight_sparse_supports(weight, 136)
    assert not choice.weight_sparse_supports(layer_of().weight, 144)
    monkeypatch.setattr(choice, "_cards", {0: "an older card"})
    assert not choice.weight_sparse_supports(weight, 144)


def test_shards_that_would_cut_groups_are_refused():
    linear = nn.Linear(24, N).bfloat16()
    layer = TensorParallelLinear.from_linear(linear, pattern=Pattern(1, 1), norm="none")
    layer.quantize()
    layer.format = FP8_WEIGHT_SPARSE
    mesh = SimpleNamespace(size=lambda: 4, get_local_rank=lambda: 1)
    with pytest.raises(ValueError, match="would cut the groups of four neighbouring weights"):
        layer.take_shard(Shard(1, (24,), mesh), linear)
    assert layer.weight.shape == (N, 24)
