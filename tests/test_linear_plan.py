"""What a call of `rtlynx::linear` remembers on the host: only what does not change between calls."""

import pytest
import torch

from rtlynx.cuda.sm90 import gemm, linear
from rtlynx.cuda.sm90.compress import CompressOptions
from rtlynx.cuda.sm90.prologues import IDENTITY, bind_matrix
from rtlynx.cuda.sm90.weights import Weights
from rtlynx.math.formats import BF16_SPARSE
from rtlynx.math.scores import MAGNITUDE


def normal(*shape):
    return torch.randn(*shape).bfloat16()


@pytest.fixture
def launches(monkeypatch):
    """(compression's input, A^T's address, product) of each call, in place of two launches."""
    found = []

    def compress(_plan, given, lowrank_a, _to):
        found.append([given, lowrank_a])

    def product(of, _given, _out, _workspace):
        found[-1].append(of)

    monkeypatch.setattr(gemm, "_encode", lambda *key: repr(key).encode()[:128].ljust(128))
    monkeypatch.setattr(linear, "start_compress", compress)
    monkeypatch.setattr(linear, "start_gemm", product)
    return found


@torch.no_grad()
def test_it_is_planned_once_for_a_form_and_weights_at_their_places(launches):
    checks = []

    def run(x, of, lowrank_a=None, *how):
        how = how or ("adjacent", (), True, "magnitude")
        grouping, parts, norm, _ = how

        def check():
            checks.append(1)
            if x.shape[-1] != of.weight.shape[1]:
                raise ValueError("x is (..., K)")
            return CompressOptions(grouping, parts, norm, of.format, MAGNITUDE)

        y = linear.launch_linear(x, of, lowrank_a, how, check)
        assert y.shape == (x.numel() // x.shape[-1], of.weight.shape[0])
        given, factor, product = launches[-1]
        assert given == bind_matrix(x)
        assert factor == (0 if lowrank_a is None else lowrank_a.data_ptr())
        return product._replace(owners=())

    of, x = Weights(normal(72, 64), None, normal(72)), normal(2, 100, 64)
    first = run(x, of)
    asked = len(checks)
    buffer = normal(3, 200, 64)
    for other in (x, x.clone(), x.mul_(2)):
        assert run(other, of) == first
    assert len(checks) <= asked + 1
    for other in (buffer[:2, :100], buffer[:2, :100].transpose(0, 1), x[0], x[:, :50]):
        run(other, of)
    assert run(x, of._replace(bias=None)).vectors != first.vectors
    assert run(x, Weights(normal(72, 64), None, normal(72))).maps != first.maps
    factors = normal(32, 64), normal(72, 32)
    assert run(x, of._replace(lowrank_b=factors[1]), factors[0]).plan != first.plan
    run(x, of._replace(lowrank_b=factors[1]), factors[0].clone())
    asked = len(checks)
    run(x, of, None, "strided", (), True, "magnitude")
    assert len(checks) == asked + 1
    with torch.enable_grad():
        run(x, of)
    assert len(checks) == asked + 2
    for _ in range(2):
        with pytest.raises(ValueError, match="K"):
            run(normal(4, 32), of)


@torch.no_grad()
def test_copies_of_weights_are_made_at_each_call_and_no_rows_launch_nothing(launches):
    odd = Weights(normal(64, 65)[:, :64], None, None)  # rows at no multiple of 16 bytes
    how = "adjacent", (), False, "magnitude"

    def check():
        return CompressOptions("adjacent", (), False, odd.format, MAGNITUDE)

    for _ in range(2):
        linear.launch_linear(normal(8, 64), odd, None, how, check)
        assert launches[-1][2].owners[0].weight is not odd.weight
    assert linear.launch_linear(normal(0, 64), odd, None, how, check).shape == (0, 64)
    assert len(launches) == 2


@torch.no_grad()
def test_no_call_is_planned_of_rows_that_two_strides_do_not_describe(launches):
    options = CompressOptions("adjacent", (), True, BF16_SPARSE, MAGNITUDE)
    of = Weights(normal(72, 64), None, normal(72))
    for x, planned in ((normal(2, 3, 8, 64), True), (normal(2, 8, 3, 64).transpose(1, 2), False)):
        arguments = linear.CallArguments(IDENTITY, (x,), (of,), None, (0,), ("adjacent",))
        call = linear.plan_call(arguments, options, arguments.form())
        assert (call is not None) is planned
