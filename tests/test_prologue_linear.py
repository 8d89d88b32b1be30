"""`rtlynx::prologue_linear` is a compression and a product, to the bit, and plans no call twice."""

import pytest
import torch
from prologue_helpers import NAMES, K, make_inputs, normal
from torch._subclasses import FakeTensorMode

from rtlynx.cuda.sm90 import gemm, linear
from rtlynx.cuda.sm90.prologues import PROLOGUES, _bind
from rtlynx.cuda.sm90.weights import Weights
from rtlynx.math.fp8 import quantize_weight
from rtlynx.ops import sparse_linear as ops
from rtlynx.ops.prologue_linear import prologue_linear
from rtlynx.ops.prologues import COMPRESS

N = 24


def arguments(name, fp8=False, rank=0, layers=2):
    """Of a call, and of the same in two: of the compression and of the product."""
    inputs = (normal(2, 35, K),) if name == "identity" else make_inputs(name, 2, 35)
    x, *others = [one for one in inputs if isinstance(one, torch.Tensor)]
    numbers = [one for one in inputs if not isinstance(one, torch.Tensor)]
    weights, biases, scales = [normal(N, K, seed=i) for i in range(layers)], [normal(N, seed=9)] * layers, []
    if fp8:
        pairs = [quantize_weight(one) for one in weights]
        weights, scales = [one for one, _ in pairs], [one for _, one in pairs]
    lowrank_a = normal(rank, K, seed=3) if rank else None
    factors = [normal(N, rank, seed=20 + i) for i in range(layers)] if rank else []
    how = lowrank_a, "adjacent", [], True, "fp8-sparse" if fp8 else "bf16-sparse", "magnitude"
    of = weights, factors, biases, scales, [0] * layers
    return (x, others, numbers, name, *how, *of), (*inputs, *how), of


@pytest.mark.parametrize("name", ["identity", *NAMES])
@pytest.mark.parametrize(("fp8", "rank"), [(False, 0), (True, 0), (True, 5), (False, 33)])
def test_it_is_a_compression_and_a_product(name, fp8, rank):
    whole, first, of = arguments(name, fp8, rank)
    compressed = (ops.compress if name == "identity" else COMPRESS[name])(*first)
    expected = ops.gemm_joint(*compressed, *of, 70)
    assert torch.equal(prologue_linear(*whole), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = prologue_linear(*whole)
    assert (fake.shape, fake.dtype, fake.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("name", ["adaln", "concat_gelu"])
def test_opcheck(name):
    torch.library.opcheck(prologue_linear, arguments(name, rank=5)[0])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({3: "tanh"}, "a prologue is one of identity, adaln.*, got 'tanh'"),
        ({1: []}, "adaln reads 3 tensors and 1 numbers, got 1 and 1"),
        ({2: []}, "adaln reads 3 tensors and 1 numbers, got 3 and 0"),
        ({0: normal(2, 35, 62)}, "62"),
        ({8: "fp4"}, "format is one of"),
        ({10: [normal(N, K // 2)] * 2}, "weights"),
        ({12: [normal(N)]}, "biases"),
    ],
)
def test_wrong_arguments_are_refused(changes, match):
    whole = list(arguments("adaln")[0])
    for place, value in changes.items():
        whole[place] = value
    with pytest.raises((ValueError, TypeError), match=match):
        prologue_linear(*whole)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_kept_call_reads_the_inputs_of_its_own(monkeypatch, name):
    """At other addresses; nothing is kept of inputs that no kernel reads, or that have to be copied."""
    launched = []
    monkeypatch.setattr(gemm, "_encode", lambda *key: bytes(128))
    monkeypatch.setattr(linear, "start_compress", lambda _plan, given, *_: launched.append(given))
    monkeypatch.setattr(linear, "start_gemm", lambda *_: None)
    prologue, of = PROLOGUES[name], Weights(normal(N, K), None, normal(N))
    options = linear.CompressOptions("adjacent", (), True)

    def question(inputs):
        return linear.CallArguments(prologue, inputs, [of], None, (0,), ("adjacent",))

    for _ in range(2):  # the first makes the product, the second keeps the call
        first = question(make_inputs(name, 2, 35))
        linear.plan_call(first, options, first.form())
    again = question(make_inputs(name, 2, 35))
    form, call = linear.known_call(again)
    assert call is not None
    assert linear.launch_call(call, again.inputs).shape == (70, N)
    assert launched[-1][:6] == _bind(prologue, again.inputs)[:6]
    with torch.enable_grad():
        assert linear.known_call(again)[1] is None
    x, *others = again.inputs
    odd = question((torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape), *others))
    form, call = linear.known_call(odd)
    assert call is None
    assert linear.plan_call(odd, options, form) is None
    assert linear.known_call(odd)[1] is None
