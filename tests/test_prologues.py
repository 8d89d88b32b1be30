"""The operators that compress the result of a prologue, on the CPU."""

import math

import pytest
import torch
import torch._dynamo.testing
from helpers import relative_error
from prologue_helpers import (
    ANY_AXES,
    MODULATED,
    NAMES,
    K,
    by_formula,
    is_tokens,
    laid_out_otherwise,
    make_inputs,
    misaligned,
    normal,
    read_bound,
)
from torch._subclasses import FakeTensorMode

from rtlynx import Pattern
from rtlynx.cuda.sm90 import compress as host
from rtlynx.cuda.sm90.prologues import PROLOGUES, bind, rounded
from rtlynx.math.tiles import pack_a, unpack_a
from rtlynx.ops import sparse_linear as ops
from rtlynx.ops.checks import check_prologue
from rtlynx.ops.prologues import COMPRESS, launch_compress


def operator(name):
    return COMPRESS[name]


def dense(result, rows, k=K):
    """What adjacent groups were selected from, with zeros for what they dropped."""
    return unpack_a(result[0], rows, k)


# ------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("leading", [(70,), (3, 11), (1, 7)])
def test_the_selected_values_are_those_of_the_formula(name, leading):
    inputs = make_inputs(name, *leading)
    rows = math.prod(leading)
    kept = dense(operator(name)(*inputs, None, "adjacent", [], False), rows).double()
    expected = by_formula(name, *inputs).view(rows, K)
    chosen = kept != 0
    assert int(chosen.sum()) == rows * K // 2
    error = (kept - expected).abs()[chosen]
    assert bool((error <= 2**-8 * expected.abs()[chosen] + 1e-6).all())
    assert relative_error(kept[chosen], expected[chosen]) < 2e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rank", [0, 33])
@pytest.mark.parametrize(("grouping", "parts"), [("adjacent", []), ("strided", []), ("strided", [24, 40])])
def test_compressed_as_the_rounded_result(name, norm, rank, grouping, parts):
    inputs = make_inputs(name, 2, 35)
    lowrank_a = normal(rank, K, seed=9, scale=K**-0.5) if rank else None
    result = operator(name)(*inputs, lowrank_a, grouping, parts, norm)
    dense = rounded(PROLOGUES[name], inputs)
    for one, other in zip(result, ops.compress(dense, lowrank_a, grouping, parts, norm), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(result[0], pack_a(dense.view(70, K), Pattern(2, 4, grouping, tuple(parts) or 1)))


@pytest.mark.parametrize("name", MODULATED)
def test_every_batch_has_a_modulation_of_its_own(name):
    x, first, second, eps = make_inputs(name, 3, 10)
    tail = (None, "adjacent", [], True)
    together = dense(operator(name)(x, first, second, eps, *tail), 30).view(3, 10, K)
    for batch in range(3):
        own = first if name == "rmsnorm" else first[batch]
        alone = dense(operator(name)(x[batch], own, second[batch], eps, *tail), 10)
        assert torch.equal(together[batch], alone)
    column = (first if name == "rmsnorm" else first.unsqueeze(1)), second.unsqueeze(1)
    assert torch.equal(dense(operator(name)(x, *column, eps, *tail), 30).view(3, 10, K), together)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_choice_beyond_the_table_takes_its_first_or_last_row(handed, rows):
    x, shift, scale, _, eps = make_inputs("adaln_by_token", 2, 4)
    choice = torch.tensor([[-1, 0, rows - 1, rows], [9, -9, 0, 0]], dtype=torch.int32)
    inputs = x, shift[:rows], scale[:rows], choice, eps
    inside = *inputs[:3], choice.clamp(0, rows - 1), eps
    tail = (None, "adjacent", [], True)
    for one, other in zip(
        operator("adaln_by_token")(*inputs, *tail), operator("adaln_by_token")(*inside, *tail), strict=True
    ):
        assert torch.equal(one, other)
    assert torch.equal(handed("adaln_by_token", inputs), handed("adaln_by_token", inside))


@pytest.mark.parametrize("name", MODULATED)
def test_one_modulation_for_all_batches(name):
    x, first, second, eps = make_inputs(name, 3, 10, batch=1)
    tail = (None, "adjacent", [], True)
    expected = operator(name)(x, first, second, eps, *tail)[0]
    row = second.expand(3, K)
    shapes = [(first, second[0]), (first, row), (first, second.unsqueeze(1)), (first, row.float())]
    shapes += [(first[0], row), (first.expand(3, K), second[0])] if name != "rmsnorm" else []
    for one, other in shapes:
        assert torch.equal(operator(name)(x, one, other, eps, *tail)[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_any_strides(name):
    inputs = make_inputs(name, 2, 9)
    expected = operator(name)(*inputs, None, "adjacent", [], True)
    for moved in laid_out_otherwise(inputs):
        for one, other in zip(operator(name)(*moved, None, "adjacent", [], True), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", ANY_AXES)
@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3, 4)])
def test_any_leading_dimensions(name, leading):
    inputs = make_inputs(name, *leading)
    rows = math.prod(leading)
    flat = [one.reshape(rows, one.shape[-1]) for one in inputs]
    tail = (normal(5, K), "adjacent", [], True)
    for one, other in zip(operator(name)(*inputs, *tail), operator(name)(*flat, *tail), strict=True):
        assert torch.equal(one, other)


# --------------------------------------------------------------------------------- as torch sees them


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rank", "norm"), [(0, True), (5, False)])
def test_opcheck(name, rank, norm):
    lowrank_a = normal(rank, K) if rank else None
    torch.library.opcheck(operator(name), (*make_inputs(name, 2, 35), lowrank_a, "strided", [24, 40], norm))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [0, 33])
def test_shapes_alone_are_those_of_the_values(name, rank):
    call = (*make_inputs(name, 2, 35), normal(rank, K) if rank else None, "adjacent", [], True)
    real = operator(name)(*call)
    with FakeTensorMode() as mode:
        fake = operator(name)(
            *(mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for one in call)
        )
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("name", NAMES)
def test_one_compilation_serves_any_number_of_rows(name):
    lowrank_a = normal(5, K)

    def call(*inputs):
        return operator(name)(*inputs, lowrank_a, "adjacent", [], True)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, dynamic=True, fullgraph=True)
    compilations = set()
    for rows in (35, 64, 3):
        inputs = make_inputs(name, 2, rows)
        for one, other in zip(compiled(*inputs), call(*inputs), strict=True):
            assert torch.equal(one, other)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1  # (torch begins anew once when it meets eps)


# --------------------------------------------------------------------------- what the kernel is handed


@pytest.fixture
def handed(monkeypatch):
    """Launches end here, with the dense tensor that the kernel would have selected from."""

    def launch(x, lowrank_a, options, dense):
        if lowrank_a is not None:
            assert lowrank_a.data_ptr() % 16 == 0
            assert lowrank_a.stride(-1) == 1
        assert len(x.parameters) == x.prologue.layout.size
        dense.copy_(read_bound(x))
        return ops.compress(dense, lowrank_a, options.grouping, list(options.parts), options.norm)

    monkeypatch.setattr(host, "launch", launch)

    def run(name, inputs, lowrank_a=None, grouping="adjacent", parts=()):
        shape = check_prologue(PROLOGUES[name], inputs)
        dense = torch.empty(math.prod(shape[:-1]), shape[-1], dtype=torch.bfloat16)
        options = host.CompressOptions(grouping, tuple(parts), True)
        result = launch_compress(PROLOGUES[name], inputs, lowrank_a, options, dense)
        return None if result is None else dense

    return run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("leading", [(7,), (1, 7), (3, 7)])
def test_the_kernel_finds_its_operands(handed, name, leading):
    inputs = make_inputs(name, *leading)
    expected = by_formula(name, *inputs).reshape(-1, K)
    lowrank_a = misaligned(normal(5, K))
    for changed in (
        inputs,
        [torch.cat([one, one], -2)[..., 7:, :] if is_tokens(one) else one for one in inputs],
    ):
        dense = handed(name, changed, lowrank_a)
        assert relative_error(dense, expected) < 3e-3


def test_the_kernel_reads_modulations_of_tokens_where_they_lie():
    inputs = make_inputs("adaln_of_tokens", 2, 7)
    assert not inputs[1].is_contiguous()
    bound = bind(PROLOGUES["adaln_of_tokens"], inputs)
    assert [one.data_ptr() for one in bound.owners[1:3]] == [one.data_ptr() for one in inputs[1:3]]


@pytest.mark.parametrize("name", MODULATED)
def test_the_kernel_finds_modulations_of_every_shape(handed, name):
    x, first, second, eps = make_inputs(name, 3, 7)
    together = normal(3, 4 * K, seed=8)
    chunk = together.chunk(4, dim=-1)[2]
    firsts = [first] if name == "rmsnorm" else [first, first[:1], first[0], first.unsqueeze(1), chunk]
    seconds = [second, chunk, second[:1], second[0], chunk.unsqueeze(1), second[:1].expand(3, K)]
    seconds += [misaligned(second), second.T.contiguous().T]
    for one in firsts:
        for other in seconds:
            dense = handed(name, (x, one, other, eps))
            assert dense is not None
            expected = rounded(PROLOGUES[name], (x, one, other, eps)).reshape(-1, K)
            assert relative_error(dense, expected) < 3e-3
    assert handed(name, (x, first.float(), second, eps)) is None
    assert handed(name, (x, first, second.float(), eps)) is None


@pytest.mark.parametrize("name", NAMES)
def test_what_the_kernel_cannot_read_is_left_to_pytorch(handed, name):
    inputs = make_inputs(name, 2, 7)
    assert handed(name, inputs, grouping="strided") is not None
    assert handed(name, inputs, grouping="strided", parts=(32, 32)) is not None
    assert handed(name, inputs, grouping="strided", parts=(24, 40)) is None
    assert handed(name, make_inputs(name, 2, 7, k=60)) is None
    assert handed(name, [misaligned(inputs[0]), *inputs[1:]]) is None
    assert handed(name, [inputs[0].mT.contiguous().mT, *inputs[1:]]) is None
    if name in ("silu_gate", "concat_gelu", "concat_silu_gate"):
        assert handed(name, [inputs[0], misaligned(inputs[1])]) is None
        assert handed(name, [one[..., 12:] for one in inputs]) is None
    if name in ("gelu", "silu_gate"):
        deep = [one.unflatten(1, (7, 1)).expand(2, 7, 2, K).transpose(1, 2) for one in inputs]
        assert handed(name, deep) is None
        assert handed(name, [one.contiguous() for one in deep]) is not None


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "changes", "error", "match"),
    [
        *((name, {0: normal(2, 5, K).float()}, TypeError, "take bfloat16 inputs") for name in NAMES),
        ("adaln", {0: normal(K)}, ValueError, r"x is \(B, T, K\) or \(T, K\), got \(64,\)"),
        ("adaln", {0: normal(1, 2, 5, K)}, ValueError, r"x is \(B, T, K\)"),
        ("adaln", {1: normal(3, K)}, ValueError, r"shift is .*, B 1 or 2, for x .*, got \(3, 64\)"),
        ("adaln", {2: normal(2, 2, K)}, ValueError, r"scale is \(B, 64\), \(B, 1, 64\) or \(64,\)"),
        ("adaln", {2: normal(K - 1)}, ValueError, r"scale is .*, got \(63,\)"),
        ("adaln", {1: normal(2, K).half()}, TypeError, r"shift is bfloat16 or float32, got torch\.float16"),
        ("adaln", {0: normal(5, K)}, ValueError, r"shift is .*, B 1 or 1, .*got \(2, 64\)"),
        ("adaln", {1: normal(2, K).to("meta")}, ValueError, "shift is on cpu like the first input, got meta"),
        ("rmsnorm", {1: normal(2, K)}, ValueError, r"weight is \(64,\) for x"),
        ("rmsnorm", {1: normal(K).double()}, TypeError, "weight is bfloat16 or float32"),
        ("rmsnorm", {2: normal(3, K)}, ValueError, "scale is"),
        ("adaln_by_token", {1: normal(5, K - 1)}, ValueError, r"shift and scale have one shape"),
        ("adaln_by_token", {1: normal(K), 2: normal(K)}, ValueError, r"shift is \(R, 64\) with R > 0"),
        ("adaln_by_token", {1: normal(0, K), 2: normal(0, K)}, ValueError, r"shift is \(R, 64\) with R > 0"),
        (
            "adaln_by_token",
            {3: torch.zeros(2, 4).int()},
            ValueError,
            r"choice is \(2, 5\), one for each token",
        ),
        ("adaln_by_token", {3: torch.zeros(2, 5).long()}, TypeError, "choice is int32, got torch.int64"),
        (
            "adaln_of_tokens",
            {1: normal(2, 1, K)},
            ValueError,
            r"shift is of x's shape, for x of shape \(2, 5, 64\), got \(2, 1, 64\)",
        ),
        ("adaln_of_tokens", {4: normal(2, K)}, ValueError, r"common_scale is \(64,\) for x"),
        ("rmsnorm_by_token", {2: normal(0, K)}, ValueError, r"scale is \(R, 64\) with R > 0"),
        ("gelu", {0: normal(2, 62)}, ValueError, "K a multiple of 4, got K = 62"),
        ("gelu", {0: torch.tensor(1.0).bfloat16()}, ValueError, "K a multiple of 4"),
        ("silu_gate", {1: normal(2, 5, 60)}, ValueError, r"one shape, got \(2, 5, 64\) and \(2, 5, 60\)"),
        ("silu_gate", {1: normal(2, 5, K).float()}, TypeError, "take bfloat16 inputs"),
        ("concat_gelu", {0: normal(2, 6, 16)}, ValueError, "differ in columns alone"),
        ("concat_gelu", {0: normal(10, 16)}, ValueError, r"got \(10, 16\) and \(2, 5, 48\)"),
        ("concat_gelu", {0: normal(2, 5, 0)}, ValueError, "differ in columns alone"),
        ("concat_gelu", {-4: normal(5, 60)}, ValueError, r"lowrank_a is \(r, 64\)"),
        ("concat_silu_gate", {0: normal(2, 6, 16)}, ValueError, "differ in columns alone"),
        ("concat_silu_gate", {1: normal(2, 5, 95)}, ValueError, r"b has two halves .*, got .*\(2, 5, 95\)"),
        *((name, {-4: normal(5, K).float()}, TypeError, "inputs and factors") for name in NAMES),
        *((name, {-3: "diagonal", -2: []}, ValueError, "grouping is 'adjacent'") for name in NAMES),
        *((name, {-2: [24, 44]}, ValueError, "parts are multiples of 4") for name in NAMES),
    ],
)
def test_what_is_wrong_is_said(name, changes, error, match):
    call = [*make_inputs(name, 2, 5), None, "strided", [24, 40], True]
    for index, value in changes.items():
        call[index] = value
    with pytest.raises(error, match=match):
        operator(name)(*call)
    if any(getattr(one, "is_meta", False) for one in call):
        return
    with FakeTensorMode() as mode, pytest.raises(error, match=match):
        operator(name)(*(mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for one in call))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_refused_not_lost(name):
    call = [*make_inputs(name, 2, 5), normal(5, K), "adjacent", [], True]
    for index, value in enumerate(call):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            asked = [*call[:index], value.detach().requires_grad_(), *call[index + 1 :]]
            with pytest.raises(RuntimeError, match="have no gradient"):
                operator(name)(*asked)
            with torch.no_grad():
                operator(name)(*asked)
