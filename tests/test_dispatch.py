"""Which calls the kernels support, and what is said where they do not."""

import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

from rtlynx import Pattern
from rtlynx.cuda import jit
from rtlynx.ops import dispatch as choice

K, N = 64, 24


@pytest.fixture
def hopper(monkeypatch):
    """Fake tensors on a card that is said to be a Hopper; nothing has been said yet."""
    monkeypatch.setattr(choice, "_cards", {0: None})
    monkeypatch.setattr(choice, "_said", set())
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer")
        yield


def served(rows=64, k=K, pattern=None, norm="scale", dtype=torch.bfloat16, device="cuda", **changes):
    tensors = {
        "x": torch.empty(rows, k, device=device, dtype=dtype),
        "weight": torch.empty(N, k, device=device, dtype=dtype),
        "bias": None,
        "lowrank_a": None,
        "lowrank_b": None,
        **changes,
    }
    return choice.kernels_support(tensors.pop("x"), pattern or Pattern(), norm, **tensors)


def test_a_hopper_card_is_served(hopper):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert served()
        assert served(norm="none", pattern=Pattern(grouping="strided"), k=72)
        bias = torch.empty(N, device="cuda", dtype=torch.float32)
        assert served(bias=bias, x=torch.empty(2, 32, K, device="cuda", dtype=torch.bfloat16))
        with torch.no_grad():
            assert served(bias=bias.requires_grad_())


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"k": 68}, "multiple of 8"),
        ({"pattern": Pattern(4, 8)}, "2 of every 4"),
        ({"pattern": Pattern(1, 4)}, "2 of every 4"),
        ({"pattern": Pattern(grouping="strided", parts=9), "k": 72}, "at most 8 parts"),
        ({"norm": "paper"}, "printed formula"),
        ({"dtype": torch.float16}, "bfloat16 inputs"),
    ],
)
def test_others_are_told_why_once(hopper, call, reason):
    with pytest.warns(RuntimeWarning, match=f"plain PyTorch.*{reason}"):
        assert not served(**call)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert not served(**call)  # said before
        assert served()


def test_parameters_that_the_kernels_cannot_read(hopper):
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, device="cuda", dtype=dtype)

    for changes, reason in (
        ({"weight": empty(K, N).T}, "not contiguous"),
        ({"weight": empty(N, K, dtype=torch.float32)}, "bfloat16 inputs and factors, and weights of"),
        ({"bias": empty(N, dtype=torch.float64)}, "float32 biases"),
        ({"lowrank_a": empty(5, K).requires_grad_(), "lowrank_b": empty(N, 5)}, "under torch.no_grad"),
    ):
        with pytest.warns(RuntimeWarning, match=reason):
            assert not served(**changes)
    assert not served(lowrank_a=empty(5, K, dtype=torch.float32), lowrank_b=empty(N, 5))


def test_quantised_weights_are_served(hopper):
    def weight(k):
        return torch.empty(N, k, device="cuda", dtype=torch.float8_e4m3fn)

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert served(weight=weight(K))
        assert served(k=20480, weight=weight(20480))
    for k, reason in ((72, "are a multiple of 16"), (20544, "at most 20480 inputs")):
        with pytest.warns(RuntimeWarning, match=reason):
            assert not served(k=k, weight=weight(k))


def test_a_cpu_is_not_served_and_nothing_is_said(hopper):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert not served(device="cpu")


@pytest.mark.parametrize("unsupported_reason", ["", "the kernels need a Hopper card"])
def test_a_card_is_examined_once(monkeypatch, unsupported_reason):
    asked = []
    monkeypatch.setattr(choice, "_cards", {})
    monkeypatch.setattr(jit, "unsupported_reason", lambda index: asked.append(index) or unsupported_reason)
    for _ in range(2):
        assert choice.card_unsupported_reason(1) == (unsupported_reason or None)
    assert asked == [1]
