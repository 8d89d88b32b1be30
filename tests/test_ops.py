"""The operators `rtlynx::compress`, `gemm` and `linear` on the CPU, and who is served by the kernels."""

import pytest
import torch
import torch._dynamo.testing
from formula_helpers import by_hand, slow_mask
from helpers import relative_error
from torch._subclasses import FakeTensorMode

from rtlynx import Pattern, norm_scale
from rtlynx.math.fp8 import quantize_weight
from rtlynx.math.tiles import compute_order, pack_a, unpack_lowrank
from rtlynx.ops import sparse_linear as ops
from rtlynx.ops.fp8_linear import fold_lowrank_b

K, N = 64, 24
PATTERNS = {
    "adjacent": (Pattern(), None),
    "strided": (Pattern(grouping="strided"), (K,)),
    "parts": (Pattern(grouping="strided", parts=(24, 40)), (24, 40)),
}


def normal(*shape, seed=0, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def layer(rank, k=K, n=N, bias=torch.float32):
    """Weight, bias and factors; the low-rank branch is a correction, not the bulk of the output."""
    lowrank_a, lowrank_b = (
        (normal(rank, k, seed=3, scale=k**-0.5), normal(n, rank, seed=4)) if rank else (None, None)
    )
    return normal(n, k, seed=1), None if bias is None else normal(n, seed=2).to(bias), lowrank_a, lowrank_b


def selection(x, name):
    pattern, widths = PATTERNS[name]
    return slow_mask(x, 2, 4, pattern.grouping, widths)


# ------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rank", [0, 5, 33])
@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32])
def test_linear_is_the_formula(name, norm, rank, bias):
    pattern = PATTERNS[name][0]
    weight, bias, lowrank_a, lowrank_b = layer(rank, bias=bias)
    x = normal(70, K, seed=5)
    arguments = (pattern.grouping, ops.pattern_parts(pattern, K), norm)
    y = ops.linear(x, compute_order(weight, pattern), bias, lowrank_a, lowrank_b, *arguments)
    assert y.dtype == torch.bfloat16
    expected = by_hand(
        x,
        weight,
        bias,
        mask=selection(x, name),
        norm="scale" if norm else "none",
        lowrank_a=lowrank_a,
        lowrank_b=lowrank_b,
    )
    assert relative_error(y, expected) < 2.5e-3


@pytest.mark.parametrize("name", PATTERNS)
def test_compress_is_the_packed_selection_the_scale_and_t(name):
    pattern = PATTERNS[name][0]
    lowrank_a = layer(40)[2]
    x = normal(3, 30, K) * torch.logspace(-30, 30, 30)[:, None].bfloat16()
    x[0, 3] = 0.0
    x[1, 4, 7] = float("nan")
    packed_a, scale, lowrank = ops.compress(
        x, lowrank_a, pattern.grouping, ops.pattern_parts(pattern, K), True
    )
    flat = x.reshape(-1, K)
    assert torch.equal(packed_a, pack_a(flat, pattern))
    expected = norm_scale(flat, selection(flat, name))[:, 0]
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)
    assert scale[3] == 1.0
    assert scale[34] == 1.0
    t = unpack_lowrank(lowrank, 90, 40)
    finite = [row for row in range(90) if row != 34]
    exact = (flat.double() @ lowrank_a.double().T / expected.double()[:, None])[finite]
    for row, exact_row in zip(t[finite], exact, strict=True):  # (each, as rows differ by 1e60)
        assert relative_error(row, exact_row) < 4e-3
    assert bool(t[34].isnan().all())
    assert torch.equal(
        ops.compress(x, None, pattern.grouping, ops.pattern_parts(pattern, K), False)[0], packed_a
    )


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rank", [0, 33])
def test_fp8_linear_is_the_formula_on_quantised_operands(name, norm, rank):
    pattern = PATTERNS[name][0]
    weight, bias, lowrank_a, lowrank_b = layer(rank)
    quantized = quantize_weight(weight)
    divided = None if lowrank_b is None else (lowrank_b / quantized.scale[:, None]).bfloat16()
    x = normal(70, K, seed=5) * torch.logspace(-3, 3, 70)[:, None].bfloat16()
    values = compute_order(quantized.values.view(torch.uint8), pattern).view(torch.float8_e4m3fn)
    arguments = (pattern.grouping, ops.pattern_parts(pattern, K), norm)
    y = ops.linear(x, values, bias, lowrank_a, divided, *arguments, quantized.scale)
    mask = selection(x, name)
    kept = x.double() * mask
    t = kept.float().abs().amax(-1, keepdim=True) * torch.tensor(
        1 / 448
    )  # ties are common: float32 as documented
    kept_fp8 = (kept.float() * (1 / t)).clamp(-448, 448).to(torch.float8_e4m3fn).double() * t.double()
    s = (x.double().norm(dim=-1) / kept.norm(dim=-1))[:, None] if norm else 1.0
    expected = s * (kept_fp8 @ quantized.dequantize().double().T) + bias.double()
    if rank:
        expected += x.double() @ lowrank_a.double().T @ lowrank_b.double().T
    for row, expected_row in zip(y, expected, strict=True):
        assert relative_error(row, expected_row) < 4e-3
    packed_a, scale, lowrank = ops.compress(x, lowrank_a, *arguments, "fp8-sparse")
    assert scale.shape == (70,)
    operands = (packed_a, scale, lowrank if rank else None, values, divided, bias, 70)
    assert torch.equal(ops.gemm(*operands, quantized.scale), y)


def test_fp8_tokens_of_zeros_and_of_nan_touch_no_other():
    weight, bias, lowrank_a, lowrank_b = layer(5)
    quantized = quantize_weight(weight)
    arguments = (bias, lowrank_a, (lowrank_b / quantized.scale[:, None]).bfloat16(), "adjacent", [], True)
    x = normal(70, K)
    clean = ops.linear(x, quantized.values, *arguments, quantized.scale)
    x[3], x[7, 5], x[9, 1] = 0.0, float("nan"), float("inf")
    y = ops.linear(x, quantized.values, *arguments, quantized.scale)
    assert torch.equal(y[3], bias.bfloat16())
    assert bool(y[[7, 9]].isnan().all())
    others = [row for row in range(70) if row not in (3, 7, 9)]
    assert torch.equal(y[others], clean[others])


def test_what_is_not_asked_for_is_empty():
    x = normal(5, K)
    _, scale, lowrank = ops.compress(x, None, "adjacent", [], False)
    assert (scale.shape, scale.dtype) == ((0,), torch.float32)
    assert (lowrank.shape, lowrank.dtype) == ((0,), torch.uint8)


@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 0, K), (2, 3, K), (2, 3, 4, K)])
def test_any_leading_dimensions(shape):
    weight, bias, lowrank_a, lowrank_b = layer(5)
    x = normal(*shape)
    y = ops.linear(x, weight, bias, lowrank_a, lowrank_b, "adjacent", [], True)
    assert y.shape == (*shape[:-1], N)
    packed_a, scale, lowrank = ops.compress(x, lowrank_a, "adjacent", [], True)
    rows = x.numel() // K
    assert torch.equal(y.reshape(rows, N), ops.gemm(packed_a, scale, lowrank, weight, lowrank_b, bias, rows))


def test_rows_of_any_stride():
    weight, bias, lowrank_a, lowrank_b = layer(5)
    for x in (normal(2, 9, K)[:, 4:], normal(2, 9, K).transpose(0, 1), normal(3, 2 * K)[:, 8 : 8 + K]):
        assert not x.is_contiguous()
        expected = ops.linear(x.contiguous(), weight, bias, lowrank_a, lowrank_b, "adjacent", [], True)
        assert torch.equal(ops.linear(x, weight, bias, lowrank_a, lowrank_b, "adjacent", [], True), expected)


@pytest.mark.parametrize("shared", [False, True], ids=["own-factors", "one-down-factor"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_a_joint_product_is_that_of_each_layer(shared, fp8):
    x = normal(70, K)
    ranks, sizes = ((16,) * 3 if shared else (5, 40, 16)), (8, 24, 20)
    layers = [layer(rank, n=n) for rank, n in zip(ranks, sizes, strict=True)]
    if shared:
        layers = [(weight, bias, layers[0][2], lowrank_b) for weight, bias, _, lowrank_b in layers]
    lowrank_a, first_ranks = layers[0][2], [0, 0, 0]
    if not shared:
        padded = [
            torch.nn.functional.pad(lowrank_a, (0, 0, 0, -len(lowrank_a) % 32))
            for _, _, lowrank_a, _ in layers[:-1]
        ]
        lowrank_a, first_ranks = torch.cat([*padded, layers[-1][2]]), [0, 32, 96]
    weights, biases, lowrank_as, lowrank_bs = (list(of) for of in zip(*layers, strict=True))
    scales = []
    if fp8:
        weights, scales = (list(of) for of in zip(*map(quantize_weight, weights), strict=True))
        lowrank_bs = [
            fold_lowrank_b(lowrank_b, scale) for lowrank_b, scale in zip(lowrank_bs, scales, strict=True)
        ]
    compressed = ops.compress(x, lowrank_a, "adjacent", [], True, "fp8-sparse" if fp8 else "bf16-sparse")
    y = ops.gemm_joint(*compressed, weights, lowrank_bs, biases, scales, first_ranks, 70)
    for i, part in enumerate(y.split(sizes, dim=1)):
        alone = (x, weights[i], biases[i], lowrank_as[i], lowrank_bs[i], "adjacent", [], True)
        assert torch.equal(part, ops.linear(*alone, scales[i] if fp8 else None))


# --------------------------------------------------------------------------------- as torch sees them


def sample_calls(rank=5, norm=True):
    weight, bias, lowrank_a, lowrank_b = layer(rank)
    x = normal(2, 35, K)
    packed_a, scale, lowrank = ops.compress(x, lowrank_a, "strided", [24, 40], norm)
    return {
        "compress": (x, lowrank_a, "strided", [24, 40], norm),
        "gemm": (packed_a, scale if norm else None, lowrank if rank else None, weight, lowrank_b, bias, 70),
        "gemm_joint": (
            *(packed_a, scale if norm else None, lowrank if rank else None),
            *([weight, weight], [lowrank_b, lowrank_b] if rank else [], [bias, bias], [], [0, 0], 70),
        ),
        "linear": (x, weight, bias, lowrank_a, lowrank_b, "strided", [24, 40], norm),
    }


def sample_calls_fp8(rank=5, norm=True):
    weight, bias, lowrank_a, lowrank_b = layer(rank)
    values, scale_of_weight = quantize_weight(weight)
    x = normal(2, 35, K)
    packed_a, scale, lowrank = ops.compress(x, lowrank_a, "strided", [24, 40], norm, "fp8-sparse")
    lowrank = lowrank if rank else None
    return {
        "compress": (x, lowrank_a, "strided", [24, 40], norm, "fp8-sparse"),
        "gemm": (packed_a, scale, lowrank, values, lowrank_b, bias, 70, scale_of_weight),
        "gemm_joint": (
            *(
                packed_a,
                scale,
                lowrank,
                [values, values],
                [lowrank_b, lowrank_b] if rank else [],
                [],
                [scale_of_weight] * 2,
            ),
            *([0, 0], 70),
        ),
        "linear": (x, values, bias, lowrank_a, lowrank_b, "strided", [24, 40], norm, scale_of_weight),
    }


CALLS = {"bf16": sample_calls, "fp8": sample_calls_fp8}


@pytest.mark.parametrize(("rank", "norm"), [(0, True), (5, False)])
@pytest.mark.parametrize("name", ["compress", "gemm", "gemm_joint", "linear"])
def test_opcheck(name, norm, rank):
    torch.library.opcheck(getattr(ops, name), sample_calls(rank, norm)[name])


# (test_schema compares arguments before and after by arithmetic that PyTorch lacks for float8.)
CHECKS_OF_FLOAT8 = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(("rank", "norm"), [(0, False), (5, True)])
@pytest.mark.parametrize("name", ["compress", "gemm", "gemm_joint", "linear"])
def test_opcheck_fp8(name, norm, rank):
    torch.library.opcheck(getattr(ops, name), sample_calls_fp8(rank, norm)[name], test_utils=CHECKS_OF_FLOAT8)


@pytest.mark.parametrize("name", ["compress", "gemm", "linear"])
@pytest.mark.parametrize("rank", [0, 33])
@pytest.mark.parametrize("precision", CALLS)
def test_shapes_alone_are_those_of_the_values(precision, name, rank):
    call = CALLS[precision](rank)[name]
    real = getattr(ops, name)(*call)
    with FakeTensorMode() as mode:
        fake = getattr(ops, name)(
            *(mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for one in call)
        )
    for one, other in zip(*((t if isinstance(t, tuple) else (t,)) for t in (real, fake)), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_one_compilation_serves_any_number_of_rows():
    weight, bias, lowrank_a, lowrank_b = layer(33)

    def both(x):
        packed_a, scale, lowrank = ops.compress(x, lowrank_a, "adjacent", [], True)
        y = ops.gemm(packed_a, scale, lowrank, weight, lowrank_b, bias, x.shape[0])
        return y + ops.linear(x, weight, bias, lowrank_a, lowrank_b, "adjacent", [], True)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, backend=counter, dynamic=True, fullgraph=True)
    for rows in (70, 64, 3, 129):
        x = normal(rows, K, seed=rows)
        assert torch.equal(compiled(x), both(x))
    assert counter.frame_count == 1


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": normal(3, K).float()}, TypeError, r"bfloat16 inputs and factors, got torch\.float32"),
        ({"x": normal(3, 2 * K)[:, ::2]}, ValueError, r"last stride of x is 1.*x\.contiguous"),
        ({"x": normal(3, 62)}, ValueError, "K a multiple of 4"),
        ({"grouping": "diagonal"}, ValueError, "grouping is 'adjacent' without parts, or 'strided'"),
        ({"grouping": "adjacent", "parts": [24, 40]}, ValueError, "grouping is 'adjacent' without parts"),
        ({"parts": [24, 44]}, ValueError, "parts are multiples of 4 that add up to K = 64"),
        ({"parts": [22, 42]}, ValueError, "parts are multiples of 4"),
        ({"lowrank_a": normal(5, 60)}, ValueError, r"lowrank_a is \(r, 64\)"),
        ({"lowrank_a": normal(0, K)}, ValueError, "r > 0"),
        ({"lowrank_a": normal(5, K).float()}, TypeError, "inputs and factors"),
    ],
)
def test_compress_says_what_is_wrong(changes, error, match):
    call = {"x": normal(3, K), "lowrank_a": None, "grouping": "strided", "parts": [24, 40], "norm": True}
    with pytest.raises(error, match=match):
        ops.compress(**{**call, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"rows": 140}, ValueError, "packed_a of 140 rows and 64 columns of torch.bfloat16 are 13824 bytes"),
        ({"scale": torch.ones(69)}, ValueError, "scale is .* = .70,. or empty"),
        ({"lowrank_b": None}, ValueError, "comes with lowrank_b"),
        ({"lowrank": None}, ValueError, "low-rank tiles of 70 rows and rank 5 are 8192 bytes, got none"),
        ({"lowrank_b": normal(N, 33)}, ValueError, "rank 33 are 16384 bytes"),
        ({"lowrank_b": normal(N - 1, 5)}, ValueError, r"lowrank_b is \(24, r\)"),
        ({"weight": normal(N, K).float()}, TypeError, r"weights of bfloat16, .* got torch\.float32"),
        ({"weight": normal(K)}, ValueError, r"weight is \(N, K\)"),
        ({"bias": torch.ones(N).double()}, TypeError, "bias is bfloat16 or float32"),
        ({"bias": torch.ones(N - 1)}, ValueError, r"bias is \(24,\)"),
    ],
)
def test_gemm_says_what_is_wrong(changes, error, match):
    names = ("packed_a", "scale", "lowrank", "weight", "lowrank_b", "bias", "rows")
    call = dict(zip(names, sample_calls()["gemm"], strict=True))
    with pytest.raises(error, match=match):
        ops.gemm(**{**call, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"weight_scale": None},
            TypeError,
            "got torch.float8_e4m3fn and torch.bfloat16 without weight_scale",
        ),
        ({"weight": normal(N, K)}, TypeError, "got torch.bfloat16 and torch.bfloat16 with weight_scale"),
        ({"weight_scale": torch.ones(N - 1)}, ValueError, r"weight_scale is float32 \(24,\)"),
        ({"weight_scale": torch.ones(N).double()}, ValueError, "weight_scale is float32"),
        ({"scale": None}, ValueError, "come with a scale"),
        ({"scale": torch.ones(0)}, ValueError, "scale is .* = .70,"),
        ({"rows": 140}, ValueError, "columns of torch.float8_e4m3fn are 15360 bytes"),
    ],
)
def test_fp8_gemm_says_what_is_wrong(changes, error, match):
    names = ("packed_a", "scale", "lowrank", "weight", "lowrank_b", "bias", "rows", "weight_scale")
    call = dict(zip(names, sample_calls_fp8()["gemm"], strict=True))
    with pytest.raises(error, match=match):
        ops.gemm(**{**call, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"weights": []}, ValueError, "1 to 4 layers, got 0"),
        ({"weights": [normal(N, K)] * 5}, ValueError, "1 to 4 layers, got 5"),
        (
            {"lowrank_bs": [normal(N, 5)]},
            ValueError,
            "lowrank_bs is empty or has one of each of 2 layers, got 1",
        ),
        ({"weights": [normal(20, K), normal(N, K)]}, ValueError, r"multiples of 8, .* got \[20, 24\]"),
        ({"weights": [normal(N, K), normal(N, 2 * K)]}, ValueError, r"read K = 64 columns, got \(24, 128\)"),
        ({"biases": [torch.ones(N), normal(N)]}, TypeError, "biases of one product are of one dtype"),
        ({"first_ranks": [0]}, ValueError, "first_ranks has one multiple of 32"),
        ({"first_ranks": [0, 16]}, ValueError, "first_ranks has one multiple of 32"),
        ({"first_ranks": [0, 32]}, ValueError, "rank 37 are 16384 bytes, got shape"),
    ],
)
def test_joint_gemm_says_what_is_wrong(changes, error, match):
    names = (
        *(
            "packed_a",
            "scale",
            "lowrank",
            "weights",
            "lowrank_bs",
            "biases",
            "weight_scales",
            "first_ranks",
            "rows",
        ),
    )
    call = dict(zip(names, sample_calls()["gemm_joint"], strict=True))
    with pytest.raises(error, match=match):
        ops.gemm_joint(**{**call, **changes})


def test_linear_says_what_is_wrong():
    x, weight, bias, lowrank_a, lowrank_b, *rest = sample_calls()["linear"]
    with pytest.raises(ValueError, match=r"weight is \(N, 64\) for x of shape"):
        ops.linear(x, weight[:, :60], bias, lowrank_a, lowrank_b, *rest)
    with pytest.raises(ValueError, match="lowrank_a and lowrank_b come together"):
        ops.linear(x, weight, bias, lowrank_a, None, *rest)
    with pytest.raises(ValueError, match=r"lowrank_a is \(r, K\) and lowrank_b \(N, r\)"):
        ops.linear(x, weight, bias, lowrank_a, lowrank_b[:, :4], *rest)


@pytest.mark.parametrize(("name", "index"), [("compress", 0), ("compress", 1), ("gemm", 3), ("linear", 2)])
def test_gradients_are_refused_not_lost(name, index):
    call = list(sample_calls()[name])
    call[index] = call[index].detach().requires_grad_()
    with pytest.raises(RuntimeError, match="have no gradient"):
        getattr(ops, name)(*call)
    with torch.no_grad():
        getattr(ops, name)(*call)
