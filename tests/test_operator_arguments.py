"""Whatever an operator is given, it refuses by name, or does what it does with contiguous copies."""

import re

import pytest
import torch
from argument_helpers import Call, K, calls, changed
from torch._subclasses import FakeTensorMode

from rtlynx.ops import checks
from rtlynx.ops import sparse_linear as ops
from rtlynx.ops.prologues import COMPRESS, quantize

NAMES = list(calls())
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
REFUSALS = (ValueError, TypeError, RuntimeError)


def flat(result) -> list[torch.Tensor]:
    return [*result] if isinstance(result, tuple) else [result]


def outcome(call: Call):
    """What the call returns, or the error that it raises on purpose."""
    try:
        return flat(call())
    except REFUSALS as error:
        return error


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_meta or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(each.contiguous().view(torch.uint8) for each in (one, other)))


def named(error: Exception, name: str, how: str, call: Call) -> bool:
    """Whether the message names the argument; where several disagree, one of those."""
    if how == "device":
        several = name == next(iter(call.arguments))
    else:
        several = not how.startswith(("dtype", "layout"))
    names = call.arguments if several else [name]
    return re.search(rf"\b({'|'.join(names)})\b", str(error)) is not None


def faults(name: str, device: str) -> list[str]:
    """What is wrong with the operator `name`, among all changes of its arguments."""
    found = []
    for argument, how, call in changed(calls(device)[name]):
        case, result = f"{argument}, {how}", outcome(call)
        if isinstance(result, Exception):
            if not named(result, argument, how, call):
                found.append(f"{case}: not named in {result!r}")
            continue
        copies = call.map(lambda one: one.clone(memory_format=torch.contiguous_format))
        expected = outcome(copies)
        if isinstance(expected, Exception) or not all(map(same_bits, result, expected)):
            found.append(f"{case}: another result than with contiguous copies")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_refused_by_name_or_as_with_contiguous_copies(name):
    assert faults(name, "cpu") == []


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="the kernels need a Hopper card")
@pytest.mark.parametrize("name", NAMES)
def test_likewise_on_the_card(name):
    assert faults(name, "cuda") == []
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", NAMES)
def test_shapes_alone_are_refused_alike(name):
    differing, mode = [], FakeTensorMode()
    for argument, how, call in changed(calls()[name]):
        if how == "device":
            continue  # (a fake tensor is on the meta device already)
        result = outcome(call)
        with mode:
            fake = outcome(call.map(mode.from_tensor))
        alike = type(result) is type(fake)
        if alike and isinstance(result, Exception):
            alike = str(result) == str(fake)
        elif alike:
            alike = [(one.shape, one.dtype) for one in result] == [(one.shape, one.dtype) for one in fake]
        if not alike:
            differing.append(f"{argument}, {how}: {result!r} but {fake!r}")
    assert differing == []


@pytest.mark.parametrize("name", NAMES)
def test_all_elsewhere_is_shapes_alone(name):
    call = calls()[name]
    elsewhere = call.map(lambda one: one.to("meta"))
    for one, other in zip(flat(elsewhere()), flat(call()), strict=True):
        assert one.is_meta
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize("shape", [(2**31, K), (2**16, 2**16, K), (4, 2**32)])
@pytest.mark.parametrize("run", [ops.compress, COMPRESS["gelu"]])
def test_sizes_that_kernels_cannot_count(run, shape):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=rf"of x are 0 to {checks.MAX_SIZE}, got"):
        run(x, None, "adjacent", [], False)
    with pytest.raises(ValueError, match=rf"of x are 0 to {checks.MAX_SIZE}, got"):
        quantize(x)
