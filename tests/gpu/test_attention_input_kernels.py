"""The kernel that norms and rotates what attention reads, in e4m3 and in bf16, against float64."""

import pytest
import torch
from attention_helpers import (
    EPS,
    LAYOUTS,
    ROTARY,
    arguments_of,
    assert_normed,
    assert_right,
    streams_of,
)

from rtlynx.cuda.sm90 import attention_inputs as kernel
from rtlynx.math.attention import attention_inputs as defined
from rtlynx.math.attention import qk_norm_rotary as defined_in_bf16
from rtlynx.ops.attention import attention_inputs, qk_norm_rotary

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory of outputs is full of NaN before a kernel writes it."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))


def poisoning(allocate):
    def allocated(*given, **settings):
        memory = allocate(*given, **settings)
        if memory.is_cuda:
            memory.view(torch.uint8).fill_(0xFF)
        return memory

    return allocated


@pytest.fixture
def launches(monkeypatch):
    """Grids of the kernel's launches."""
    seen = []

    def watched(launch):
        return lambda packing, *rest: seen.append(packing.grid) or launch(packing, *rest)

    for name in ("launch", "launch_bf16"):
        monkeypatch.setattr(kernel, name, watched(getattr(kernel, name)))
    return seen


SHAPES = pytest.mark.parametrize(
    ("batch", "tokens", "heads"),
    [(1, (1,), 1), (1, (257,), 30), (2, (7, 250), 5), (3, (64, 1030), 2), (1, (0, 33), 24), (1, (7000,), 2)],
)
FORMS = pytest.mark.parametrize(("layout", "rotary"), list(zip(LAYOUTS, (*ROTARY, ROTARY[-1]), strict=True)))


@pytest.mark.parametrize("width", kernel.HEAD_DIMS)
@SHAPES
def test_it_gives_the_nearest_numbers(batch, tokens, heads, width, launches):
    streams = streams_of(batch, tokens, heads, width, device="cuda")
    assert_right(attention_inputs(*arguments_of(streams)), streams)
    assert len(launches) == 1


@pytest.mark.parametrize("width", kernel.HEAD_DIMS)
@SHAPES
def test_in_bf16_it_gives_the_nearest_numbers(batch, tokens, heads, width, launches):
    streams = streams_of(batch, tokens, heads, width, device="cuda")
    assert_normed(qk_norm_rotary(*arguments_of(streams)[:7]), streams)
    assert len(launches) == 1


@FORMS
@pytest.mark.parametrize("tokens", [(71,), (70, 333)])
def test_in_bf16_it_reads_any_layout_and_rotation(layout, rotary, tokens, launches):
    streams = streams_of(2, tokens, 6, 128, rotary, layout, device="cuda")
    assert_normed(qk_norm_rotary(*arguments_of(streams)[:7]), streams)
    assert len(launches) == 1


@FORMS
def test_it_reads_any_layout_and_rotation(layout, rotary, launches):
    streams = streams_of(2, (70, 333), 6, 128, rotary, layout, device="cuda")
    assert_right(attention_inputs(*arguments_of(streams, q_exponent=8, k_exponent=-8)), streams, 8, -8)
    assert launches


def test_zeros_infinities_and_nans_are_as_in_pytorch():
    streams = streams_of(1, (9, 300), 2, 128, device="cuda")
    for i, one in enumerate((torch.inf, torch.nan, 0.0)):
        streams[1].query[0, i], streams[1].key[0, 5 + i, 1] = one, one
        streams[0].value[0, 2 + i, 0, i] = one
    for stream in streams:
        stream.value[..., 7] = 0
    made, expected = attention_inputs(*arguments_of(streams)), defined(streams, EPS, 0, 0)
    for one, other in zip(made, expected, strict=True):
        if one is not made[3]:  # (the mean of a channel with a NaN makes its outputs one)
            assert torch.equal(one.float().isnan(), other.float().isnan())


def test_in_bf16_zeros_infinities_and_nans_are_as_in_pytorch():
    streams = streams_of(1, (9, 300), 2, 128, device="cuda")
    for i, one in enumerate((torch.inf, torch.nan, 0.0)):
        for x in streams[1][:3]:
            x[0, i] = one
            x[0, 5 + i, 1, :3] = one
    made, expected = qk_norm_rotary(*arguments_of(streams)[:7]), defined_in_bf16(streams, EPS)
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_what_it_cannot_read_goes_through_pytorch(launches):
    for changes in ({"width": 32}, {"dtype": torch.float32}):
        streams = streams_of(1, (9, 300), 2, device="cuda", **changes)
        assert_right(attention_inputs(*arguments_of(streams)), streams)
        assert_normed(qk_norm_rotary(*arguments_of(streams)[:7]), streams)
    assert not launches


def test_captured_it_reads_what_is_there_when_it_is_replayed():
    streams, fresh = (streams_of(1, (64, 1000), 4, 128, device="cuda", seed=seed) for seed in (0, 1))
    attention_inputs(*arguments_of(streams))
    graph = torch.cuda.CUDAGraph()
    qk_norm_rotary(*arguments_of(streams)[:7])
    with torch.cuda.graph(graph):
        made = attention_inputs(*arguments_of(streams))
        in_bf16 = qk_norm_rotary(*arguments_of(streams)[:7])
    for one, other in zip(streams, fresh, strict=True):
        for to, of in zip((*one[:5], *one.rotary), (*other[:5], *other.rotary), strict=True):
            to.copy_(of)
    for one in (*made, *in_bf16):
        one.view(torch.uint8).fill_(0xFF)
    graph.replay()
    assert_right(made, fresh)
    assert_normed(in_bf16, fresh)
    for one, again in zip(made, attention_inputs(*arguments_of(fresh)), strict=True):
        assert torch.equal(one.view(torch.uint8), again.view(torch.uint8))
