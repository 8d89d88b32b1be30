"""The operators that quantise all of a tensor, or of the result of a prologue, on the CPU."""

import math
import struct

import pytest
import torch
import torch._dynamo.testing
from prologue_helpers import (
    ANY_AXES,
    NAMES,
    K,
    along_tokens,
    by_formula,
    is_tokens,
    laid_out_otherwise,
    make_inputs,
    misaligned,
    normal,
    read_bound,
    read_matrix,
)
from torch._subclasses import FakeTensorMode

from rtlynx.cuda.sm90 import quantize
from rtlynx.cuda.sm90.prologues import IDENTITY, PROLOGUES, bind_matrix, rounded
from rtlynx.math.fp8 import E4M3, quantize_tokens
from rtlynx.math.selection import Pattern
from rtlynx.ops import dispatch as choice
from rtlynx.ops import fp8_linear as fp8
from rtlynx.ops import prologues
from rtlynx.ops.checks import check_prologue
from rtlynx.ops.prologues import QUANTIZE, launch_quantize

OPERATORS = ("quantize", *(f"{name}_quantize" for name in NAMES))


def operator(name):
    return QUANTIZE[name]


def make_call(operator_name, *leading, k=K):
    """An operator and its arguments for a result (*leading, k)."""
    if operator_name == "quantize":
        return QUANTIZE["identity"], (normal(*leading, k, seed=1),)
    name = operator_name.removesuffix("_quantize")
    return QUANTIZE[name], make_inputs(name, *leading, k=k)


def assert_same_bits(result, expected):
    for one, other in zip(result, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


# ------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("leading", [(70,), (3, 11), (1, 7)])
def test_values_times_scale_are_those_of_the_formula(name, leading):
    inputs = make_inputs(name, *leading)
    values, scale = operator(name)(*inputs)
    assert (values.shape, values.dtype) == ((*leading, K), E4M3)
    assert (scale.shape, scale.dtype) == ((*leading, 1), torch.float32)
    assert values.is_contiguous()
    expected = by_formula(name, *inputs).view(*leading, K)
    largest = expected.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double(), largest / 448, rtol=2**-7, atol=0)
    # Half a step of three bits and of bfloat16; below 2^-6 of the scale steps are even.
    error = (values.double() * scale - expected).abs()
    assert bool((error <= (2**-4 + 2**-8) * expected.abs() + 2**-10 * scale + 1e-6).all())


@pytest.mark.parametrize("name", NAMES)
def test_quantised_as_the_rounded_result(name):
    inputs = make_inputs(name, 2, 35)
    dense = rounded(PROLOGUES[name], inputs)
    assert_same_bits(operator(name)(*inputs), quantize_tokens(dense))
    assert_same_bits(QUANTIZE["identity"](dense), quantize_tokens(dense))


def test_awkward_tokens_are_quantised_as_the_definition_says():
    x = normal(12, K) * torch.logspace(-38, 38, 12).unsqueeze(-1).bfloat16()
    x[3], x[4, 0], x[5, 7], x[6, 8] = 0, -0.0, math.nan, -math.inf
    values, scale = QUANTIZE["identity"](x)
    assert_same_bits((values, scale), quantize_tokens(x))
    assert float(scale[3]) == 1
    assert bool(values[3].view(torch.uint8).eq(0).all())
    assert bool(torch.isnan(scale[5:7]).all())
    assert bool(values[5:7].view(torch.uint8).eq(0x7F).all())
    assert bool(torch.isfinite(scale[[*range(5), *range(7, 12)]]).all())


@pytest.mark.parametrize("name", OPERATORS)
def test_any_strides(name):
    run, inputs = make_call(name, 2, 9)
    expected = run(*inputs)
    for moved in laid_out_otherwise(inputs):
        result = run(*moved)
        assert all(one.is_contiguous() for one in result)
        assert_same_bits(result, expected)


@pytest.mark.parametrize("name", ["quantize", *(f"{name}_quantize" for name in ANY_AXES)])
@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3, 4)])
def test_any_leading_dimensions(name, leading):
    run, inputs = make_call(name, *leading)
    rows = math.prod(leading)
    values, scale = run(*inputs)
    assert (values.shape, scale.shape) == ((*leading, K), (*leading, 1))
    flat = run(*(one.reshape(rows, one.shape[-1]) for one in inputs))
    assert_same_bits((values.view(rows, K), scale.view(rows, 1)), flat)


# --------------------------------------------------------------------------------- as torch sees them


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    run, inputs = make_call(name, 2, 35)
    torch.library.opcheck(run, inputs)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("strided", [False, True])
def test_shapes_alone_are_those_of_the_values(name, strided):
    run, inputs = make_call(name, 2, 35)
    if strided:
        inputs = [one[:, 3:] if along_tokens(one) else one for one in inputs]
    real = run(*inputs)
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for one in inputs))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("name", OPERATORS)
def test_one_compilation_serves_any_number_of_rows(name):
    run, _ = make_call(name, 2, 35)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *inputs: run(*inputs), backend=counter, dynamic=True, fullgraph=True)
    compilations = set()
    for rows in (35, 64, 3):
        _, inputs = make_call(name, 2, rows)
        assert_same_bits(compiled(*inputs), run(*inputs))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1  # (torch begins anew once when it meets eps)


# --------------------------------------------------------------------------- what the kernel is handed


@pytest.fixture
def handed(monkeypatch):
    """Launches end here, in plain PyTorch over what the kernel would have found in memory."""

    def launch(x, shape, dense=None):
        assert len(x.parameters) == x.prologue.layout.size
        found = read_bound(x).bfloat16()
        if dense is not None:
            dense.copy_(found)
        return quantize_tokens(found.view(tuple(shape)))

    monkeypatch.setattr(quantize, "launch", launch)


def run_handed(name, inputs):
    """The tensor that the kernel quantises, or None where it cannot read the inputs."""
    shape = check_prologue(PROLOGUES[name], inputs)
    dense = torch.empty(math.prod(shape[:-1]), shape[-1], dtype=torch.bfloat16)
    result = launch_quantize(PROLOGUES[name], inputs, shape, dense)
    if result is not None:
        assert_same_bits(result, quantize_tokens(dense.view(shape)))
    return None if result is None else dense


@pytest.mark.usefixtures("handed")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("leading", [(7,), (1, 7), (3, 7)])
def test_the_kernel_finds_its_operands(name, leading):
    inputs = make_inputs(name, *leading)
    expected = by_formula(name, *inputs).reshape(-1, K).bfloat16()
    for changed in (
        inputs,
        [torch.cat([one, one], -2)[..., 7:, :] if is_tokens(one) else one for one in inputs],
    ):
        assert torch.equal(run_handed(name, changed), expected)


@pytest.mark.usefixtures("handed")
@pytest.mark.parametrize("name", NAMES)
def test_what_the_kernel_cannot_read_is_left_to_pytorch(name):
    inputs = make_inputs(name, 2, 7)
    assert run_handed(name, inputs) is not None
    assert run_handed(name, make_inputs(name, 2, 7, k=60)) is None
    assert run_handed(name, make_inputs(name, 1, k=quantize.MAX_COLUMNS + 32)) is None
    assert run_handed(name, [misaligned(inputs[0]), *inputs[1:]]) is None
    assert run_handed(name, [inputs[0].mT.contiguous().mT, *inputs[1:]]) is None


@pytest.mark.usefixtures("handed")
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (2, 3, 4, K)])
def test_a_tensor_is_read_where_it_lies(shape):
    x = normal(*shape)
    wide = torch.cat([x, x], -1)[..., K:]
    swapped = x.transpose(0, -2).contiguous().transpose(0, -2) if len(shape) > 2 else x
    for one in (x, wide, swapped, x.mT.contiguous().mT if len(shape) > 1 else x, misaligned(x)):
        assert_same_bits(prologues._quantize_matrix(one), quantize_tokens(x))


@pytest.mark.parametrize("prologue", PROLOGUES.values(), ids=PROLOGUES)
@pytest.mark.parametrize("columns", [8, 256, 264, 3072, 3840, 4096, 4104, 10240, 12288, 15360, 16384])
def test_threads_hold_whole_rows(prologue, columns):
    config = quantize._config(prologue, columns)
    threads = config.threads(columns)
    assert threads % 32 == 0
    assert threads - 32 < columns / (8 * config.chunks) <= threads
    defines = dict(quantize._defines(prologue, config))
    assert threads <= defines["MAX_THREADS"] <= 1024
    assert defines["MAX_THREADS"] * defines["MIN_CTAS"] <= 2048
    assert any(one.defines == quantize._defines(prologue, config) for one in quantize.INSTANTIATIONS)


@pytest.mark.parametrize(("columns", "blocks"), [(64, 4), (4096, 4), (4104, 7)])
def test_what_a_launch_says(monkeypatch, columns, blocks):
    launched = []

    class Kernel:
        def launch(self, grid, stream, parameters):
            launched.append((grid, stream, parameters))

    monkeypatch.setattr(quantize, "_kernel", lambda prologue, columns: Kernel())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5, raising=False)
    x = normal(7, columns)
    values, scale = quantize.launch(bind_matrix(x), x.shape)
    assert (values.shape, scale.shape) == ((7, columns), (7, 1))
    ((grid, stream, parameters),) = launched
    assert (grid, stream) == ((blocks, 1, 1), 5)
    config = quantize._config(IDENTITY, columns)
    assert len(parameters) == dict(quantize._defines(IDENTITY, config))["PARAMETER_BYTES"]
    assert torch.equal(read_matrix(parameters, 0, 7, columns)[0], x)
    assert struct.unpack_from("<3Q2i", parameters, 32) == (values.data_ptr(), scale.data_ptr(), 0, 7, columns)
    quantize.launch(bind_matrix(x[:0]), (0, columns))
    assert len(launched) == 1  # nothing to do


# ---------------------------------------------------------------------------------------- which calls


class OnCuda:
    is_cuda, requires_grad = True, False

    def __init__(self, dtype=torch.bfloat16):
        self.dtype = dtype

    def get_device(self):
        return 0


def test_what_the_quantiser_serves(monkeypatch):
    monkeypatch.setattr(choice, "_cards", {0: None})
    assert choice.quantizer_supports(3072, OnCuda())
    assert not choice.quantizer_supports(3072, normal(2, 3072))
    assert not choice.quantizer_supports(3072, OnCuda(torch.float16))
    assert not choice.quantizer_supports(3076, OnCuda())
    assert not choice.quantizer_supports(quantize.MAX_COLUMNS + 8, OnCuda())
    assert not choice.quantizer_supports(3072, OnCuda(), normal(2).requires_grad_())
    with torch.no_grad():
        assert choice.quantizer_supports(3072, OnCuda(), normal(2).requires_grad_())
    monkeypatch.setattr(choice, "_cards", {0: "an older card"})
    assert not choice.quantizer_supports(3072, OnCuda())


@torch.no_grad()
def test_a_dense_fp8_layer_quantises_with_it_to_the_same_bits(monkeypatch):
    x, calls = normal(3, 5, K), []
    expected = fp8.compress_fp8(x, Pattern(1, 1), "none")
    monkeypatch.setattr(fp8, "quantizer_supports", lambda k, x: True)
    monkeypatch.setattr(fp8, "quantize", lambda x, of=fp8.quantize: calls.append(x.shape) or of(x))
    assert_same_bits(fp8.compress_fp8(x, Pattern(1, 1), "none"), expected)
    assert calls == [x.shape]
    fp8.compress_fp8(x, Pattern(), "none")  # (what drops entries is another pass)
    assert len(calls) == 1


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "changes", "error", "match"),
    [
        *((name, {0: normal(2, 5, K).float()}, TypeError, "take bfloat16 inputs") for name in OPERATORS),
        ("quantize", {0: normal(2, 5, 0)}, ValueError, r"\(\.\.\., K\) with K > 0, got \(2, 5, 0\)"),
        ("quantize", {0: torch.tensor(1.0).bfloat16()}, ValueError, r"with K > 0, got \(\)"),
        ("gelu_quantize", {0: normal(2, 5, 0)}, ValueError, "with K > 0"),
        ("adaln_quantize", {1: normal(3, K)}, ValueError, r"shift is .*, B 1 or 2, for x .*, got \(3, 64\)"),
        ("rmsnorm_quantize", {1: normal(K).double()}, TypeError, "weight is bfloat16 or float32"),
        ("silu_gate_quantize", {1: normal(2, 5, 60)}, ValueError, "one shape"),
        ("concat_gelu_quantize", {0: normal(2, 6, 16)}, ValueError, "differ in columns alone"),
    ],
)
def test_what_is_wrong_is_said(name, changes, error, match):
    run, call = make_call(name, 2, 5)
    call = [changes.get(index, one) for index, one in enumerate(call)]
    with pytest.raises(error, match=match):
        run(*call)
    with FakeTensorMode() as mode, pytest.raises(error, match=match):
        run(*(mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for one in call))


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_are_refused_not_lost(name):
    run, call = make_call(name, 2, 5)
    for index, value in enumerate(call):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            asked = [*call[:index], value.detach().requires_grad_(), *call[index + 1 :]]
            with pytest.raises(RuntimeError, match="have no gradient"):
                run(*asked)
            with torch.no_grad():
                run(*asked)
