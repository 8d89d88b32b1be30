"""The kernel that norms, rotates and rounds what fp8 attention reads, against float64; and blocks with it."""

from dataclasses import replace

import pytest
import torch
from attention_helpers import EPS, LAYOUTS, ROTARY, arguments_of, assert_right, streams_of
from helpers import (
    flux2_call,
    flux_call,
    in_dtype,
    output,
    qwen_call,
    relative_error,
    tiny_flux,
    tiny_flux2,
    tiny_qwen,
    tiny_z_image,
    z_image_call,
)

from rtlynx import Recipe, fp8_attention, sparsify
from rtlynx.cuda.sm90 import attention_inputs as kernel
from rtlynx.math.attention import attention_inputs as defined
from rtlynx.ops.attention import attention_inputs

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory of outputs is full of NaN before a kernel writes it."""
    empty = torch.empty

    def poisoned(*size, **settings):
        memory = empty(*size, **settings)
        if memory.is_cuda:
            memory.view(torch.uint8).fill_(0xFF)
        return memory

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def launches(monkeypatch):
    """Grids of the kernel's launches."""
    seen, launch = [], kernel.launch
    monkeypatch.setattr(
        kernel, "launch", lambda packing, *rest: seen.append(packing.grid) or launch(packing, *rest)
    )
    return seen


@pytest.mark.parametrize("width", kernel.HEAD_DIMS)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads"),
    [(1, (1,), 1), (1, (255,), 3), (1, (257,), 30), (2, (7, 250), 5), (3, (64, 1030), 2), (1, (0, 33), 24),
     (1, (512, 4096), 24), (1, (7000,), 2)],
)  # fmt: skip
def test_it_gives_the_nearest_numbers(width, batch, tokens, heads, launches):
    streams = streams_of(batch, tokens, heads, width, device="cuda")
    assert_right(attention_inputs(*arguments_of(streams)), streams)
    assert len(launches) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rotary", ROTARY)
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


def test_what_it_cannot_read_goes_through_pytorch(launches):
    for changes in ({"width": 32}, {"dtype": torch.float32}):
        streams = streams_of(1, (9, 300), 2, device="cuda", **changes)
        assert_right(attention_inputs(*arguments_of(streams)), streams)
    assert not launches


def test_captured_it_reads_what_is_there_when_it_is_replayed():
    streams, fresh = (streams_of(1, (64, 1000), 4, 128, device="cuda", seed=seed) for seed in (0, 1))
    attention_inputs(*arguments_of(streams))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = attention_inputs(*arguments_of(streams))
    for one, other in zip(streams, fresh, strict=True):
        for to, of in zip((*one[:5], *one.rotary), (*other[:5], *other.rotary), strict=True):
            to.copy_(of)
    for one in made:
        one.view(torch.uint8).fill_(0xFF)
    graph.replay()
    assert_right(made, fresh)
    for one, again in zip(made, attention_inputs(*arguments_of(fresh)), strict=True):
        assert torch.equal(one.view(torch.uint8), again.view(torch.uint8))


WIDE = {"attention_head_dim": 64, "num_attention_heads": 2}
MODELS = {  # tiny, with heads that the kernel takes
    "flux": (lambda: tiny_flux(**WIDE, axes_dims_rope=(16, 24, 24)), flux_call),
    "flux2": (lambda: tiny_flux2(**WIDE, axes_dims_rope=(16, 16, 16, 16)), flux2_call),
    "qwen": (
        lambda: tiny_qwen(**WIDE, axes_dims_rope=(16, 24, 24)),
        lambda: {**qwen_call(), "encoder_hidden_states_mask": None},
    ),
    "z-image": (lambda: tiny_z_image(dim=256), z_image_call),
}


def attentions(model):
    return [
        module
        for module in model.modules()
        if hasattr(getattr(module, "processor", None), "_attention_backend")
    ]


@pytest.mark.parametrize("recipe", [None, Recipe.dense_fp8()])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_near_with_it(name, recipe, launches):
    pytest.importorskip("cudnn")
    make, call = MODELS[name]
    model, call = make().bfloat16().cuda(), in_dtype(call(), torch.bfloat16, "cuda")
    if recipe is not None:
        sparsify(model, recipe)
    plain = output(model, call)
    fp8_attention(model)
    y = output(model, call)
    assert len(launches) == len(attentions(model))
    for attn in attentions(model):
        processor = attn.processor
        processor._attention_backend = replace(processor._attention_backend, norm_eps=None)
    in_several = output(model, call)
    assert len(launches) == len(attentions(model))
    assert relative_error(y, in_several) < 0.03
    assert relative_error(y, plain) < 1.1 * relative_error(in_several, plain) + 0.005


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_blocks_give_the_same(name, mode):
    pytest.importorskip("cudnn")
    make, make_call = MODELS[name]
    model = fp8_attention(sparsify(make().bfloat16().cuda(), Recipe.dense_fp8()))
    call = in_dtype(make_call(), torch.bfloat16, "cuda")
    y = output(model, call)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, **({"mode": mode} if mode else {}))
    for _ in range(3):
        assert relative_error(output(model, call), y) < 0.05
