"""`prologue_linear` on a Hopper card: the bits of compression and product, call after call."""

import pytest
import torch
from cases import poisoned
from prologue_cases import NAMES, PrologueCase, make_inputs, make_tail

from rtlynx.ops import sparse_linear as ops
from rtlynx.ops.prologue_linear import prologue_linear
from rtlynx.ops.prologues import COMPRESS

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="the kernels need a Hopper card (compute capability 9.0)"),
]


def layers(case, widths, seed):
    """Weights, factors, biases, scales and first ranks."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    weights, scales = [normal(n, case.k).bfloat16() for n in widths], []
    if case.fp8:
        weights = [one.to(torch.float8_e4m3fn) for one in weights]
        scales = [normal(n).abs() + 0.5 for n in widths]
    factors = [normal(n, case.rank).bfloat16() for n in widths] if case.rank else []
    return weights, factors, [normal(n).bfloat16() for n in widths], scales, [0] * len(widths)


def both(name, inputs, tail, of):
    """The operator's result and that of the two others."""
    x, *others = [one for one in inputs if isinstance(one, torch.Tensor)]
    numbers = [one for one in inputs if not isinstance(one, torch.Tensor)]
    tail = (*tail, "magnitude")
    with poisoned():
        y = prologue_linear(x, others, numbers, name, *tail, *of)
        compress = ops.compress if name == "identity" else COMPRESS[name]
        rows = x.numel() // x.shape[-1]
        return y, ops.gemm_joint(*compress(*inputs, *tail), *of, rows)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("rows", "rank", "widths"), [(258, 40, (256, 264)), (2048, 0, (512, 8, 1001))])
@pytest.mark.parametrize("layout", ["wide", "odd"])
def test_bits_in_the_first_call_and_in_those_that_follow(name, fp8, rows, rank, widths, layout):
    held = []
    for seed in range(4):  # the first calls of a form are in two parts; inputs lie elsewhere each time
        case = PrologueCase(name, rows, 640, 2, rank=rank, layout=layout, fp8=fp8, seed=seed)
        inputs, tail, of = make_inputs(case), make_tail(case), layers(case, widths, seed // 2)
        held.append((inputs, tail, of))
        y, expected = both(name, inputs, tail, of)
        assert torch.equal(y, expected)
        assert bool(y.isfinite().all())
    for inputs, tail, of in held:
        y, expected = both(name, inputs, tail, of)
        assert torch.equal(y, expected)


@torch.no_grad()
def test_rows_that_two_strides_do_not_describe():
    of = layers(PrologueCase("adaln", 48, 64), (64,), 0)
    tail = None, "adjacent", [], True, "bf16-sparse"
    for _ in range(4):
        x = torch.randn(2, 8, 3, 64, device="cuda").bfloat16().transpose(1, 2)
        y, expected = both("identity", (x,), tail, of)
        assert torch.equal(y, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_graph_reads_new_contents(name):
    case = PrologueCase(name, 512, 1024, rank=32, fp8=True)
    inputs, tail, of = make_inputs(case), make_tail(case), layers(case, (512, 512), 0)
    for _ in range(3):
        both(name, inputs, tail, of)
    x, *others = [one for one in inputs if isinstance(one, torch.Tensor)]
    numbers = [one for one in inputs if not isinstance(one, torch.Tensor)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = prologue_linear(x, others, numbers, name, *tail, "magnitude", *of)
    for factor in (0.5, 3.0):
        x.mul_(factor)
        graph.replay()
        assert torch.equal(y, both(name, inputs, tail, of)[1])
