"""Attention in eight bits on the card: cuDNN's kernel against its definition and against float64."""

import copy

import pytest
import torch

pytest.importorskip("cudnn")

from helpers import IN_FP8_ATTENTION, MODELS, in_dtype, output, relative_error

import rtlynx
from rtlynx import Recipe, fp8_attention, schedule, sparsify
from rtlynx.math.attention import attention_fp8 as reference
from rtlynx.math.fp8 import E4M3
from rtlynx.ops.attention import attention, attention_fp8

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory of outputs is full of NaN before a kernel writes it."""
    empty = torch.empty

    def poisoned(*size, **settings):
        memory = empty(*size, **settings)
        if memory.dtype is E4M3:
            memory.view(torch.uint8).fill_(0x7F)
        return memory

    monkeypatch.setattr(torch, "empty", poisoned)


def drawn(batch, s_q, s_kv, heads, width, seed=0):
    gen = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(batch, tokens, heads, width, generator=gen, device="cuda", dtype=torch.bfloat16)
        for tokens in (s_q, s_kv, s_kv)
    ]


def in_float64(q, k, v):
    q, k, v = (one.double().transpose(1, 2) for one in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def as_by_definition(q, k, v):
    """Asserts that the kernel is as near to float64 as its definition."""
    scale = q.shape[-1] ** -0.5
    exact, defined = in_float64(q.float(), k.float(), v.float()), reference(q, k, v, scale)
    y = attention_fp8(q, k, v, scale)
    assert y.is_contiguous()
    assert y.shape == q.shape
    assert y.dtype is E4M3
    assert not bool(y.float().isnan().any())
    # It rounds softmax's numerators by the largest score so far: where outputs are few, chance tells.
    more, apart = (1.1, 0.05) if y.numel() >= 1024 else (1.5, 0.1)
    assert relative_error(y.float(), exact) <= more * relative_error(defined.float(), exact) + 1e-6
    assert relative_error(y.float(), defined.float()) < apart


@pytest.mark.parametrize("width", [16, 48, 64, 96, 128, 256])
@pytest.mark.parametrize(
    ("batch", "s_q", "s_kv", "heads"),
    [(1, 512, 512, 4), (2, 1027, 515, 3), (1, 77, 1025, 1), (1, 1, 512, 2), (3, 130, 1, 2), (1, 1, 1, 1)],
)
def test_the_kernel_is_as_near_to_float64_as_its_definition(batch, s_q, s_kv, heads, width):
    as_by_definition(*(one.to(E4M3) for one in drawn(batch, s_q, s_kv, heads, width)))


@pytest.mark.parametrize("layout", ["slices", "heads first", "odd address", "broken rows"])
def test_it_reads_any_layout(layout):
    q, k, v = (one.to(E4M3) for one in drawn(2, 333, 333, 4, 64))
    if layout == "slices":  # of one product that makes q, k and v
        joint = torch.cat([one.view(torch.uint8) for one in (q, k, v)], -1).view(E4M3)
        q, k, v = joint.split(64, dim=-1)
    elif layout == "heads first":
        q, k, v = (
            one.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(E4M3) for one in (q, k, v)
        )
    elif layout == "odd address":
        memory = torch.empty(q.numel() + 1, dtype=torch.uint8, device="cuda")
        memory[1:] = q.view(torch.uint8).flatten()
        q = memory[1:].view(E4M3).view(q.shape)
    else:
        k = k.view(torch.uint8).repeat_interleave(2, -1)[..., ::2].view(E4M3)
    as_by_definition(q, k, v)


def test_weights_that_fall_on_one_key_and_large_values_are_right():
    q, k, v = drawn(1, 300, 300, 2, 64)
    as_by_definition((q * 8).to(E4M3), (k * 8).to(E4M3), (v * 90).clamp(-448, 448).to(E4M3))


def test_what_no_kernel_takes_is_refused():
    with pytest.raises(ValueError, match="multiples of 16, got 72"):
        attention_fp8(*(one.to(E4M3) for one in drawn(1, 64, 64, 2, 72)), 1.0)


@pytest.mark.parametrize("tokens", [333, 4608])
def test_of_bfloat16_it_is_near_float64_also_compiled_and_captured(tokens):
    q, k, v = drawn(1, tokens, tokens, 3, 128)
    v += 0.2 * torch.randn(1, 1, 3, 128, device="cuda")
    exact = in_float64(q, k, v)

    def call(q, k, v):
        return attention(q, k, v, scale=128**-0.5, q_exponent=0, k_exponent=0)

    y, compiled = call(q, k, v), torch.compile(call, fullgraph=True)
    assert y.dtype is torch.bfloat16
    assert relative_error(y - exact.mean(1, True), exact - exact.mean(1, True)) < 0.12
    assert relative_error(compiled(q, k, v), exact) < 1.1 * relative_error(y, exact)
    assert relative_error(compiled(q, k, v), y) < 2 * relative_error(y, exact)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = compiled(q, k, v)
    for seed in (1, 2):
        for one, fresh in zip((q, k, v), drawn(1, tokens, tokens, 3, 128, seed), strict=True):
            one.copy_(fresh)
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, compiled(q, k, v))


def test_two_streams_and_threads_give_the_same():
    from concurrent.futures import ThreadPoolExecutor

    q, k, v = (one.to(E4M3) for one in drawn(1, 1024, 1024, 8, 128))
    expected = attention_fp8(q, k, v, 0.1)
    torch.cuda.synchronize()

    def on_a_stream(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            outputs = [attention_fp8(q, k, v, 0.1) for _ in range(5)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(y.view(torch.uint8), expected.view(torch.uint8)) for y in outputs)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(on_a_stream, range(8)))


def unmasked(name, call, dtype=torch.bfloat16):
    return in_dtype({**call, "encoder_hidden_states_mask": None} if name == "qwen" else call, dtype, "cuda")


@pytest.mark.parametrize("name", IN_FP8_ATTENTION)
def test_models_are_as_near_compiled(name):
    make, make_call = MODELS[name]
    call, model = unmasked(name, make_call()), make().bfloat16().cuda()
    plain = output(model, call)
    y = output(fp8_attention(model), call)
    assert 0 < relative_error(y, plain) < 0.1
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    twin.compile_repeated_blocks(fullgraph=True)
    assert relative_error(output(twin, call), y) < 0.05
    assert torch.equal(output(fp8_attention(model, enabled=False), call), plain)


def test_a_dense_step_runs_as_before_also_compiled_and_in_cuda_graphs():
    make, make_call = MODELS["flux"]
    scheduled = Recipe.immediate(precision="fp8", dense_sigmas=((0, 0.5),), dense_precision="fp8")
    model = sparsify(make(num_layers=2).bfloat16().cuda(), scheduled)
    call = in_dtype(make_call(), torch.bfloat16, "cuda")

    def at(sigma, of):
        with schedule([float(call["timestep"][0]), 2.0], [sigma, 0.0]):
            return output(of, call).clone()

    plain = {sigma: at(sigma, model) for sigma in (0.9, 0.1)}
    fp8_attention(model)
    expected = {sigma: at(sigma, model) for sigma in (0.9, 0.1)}
    assert torch.equal(expected[0.1], plain[0.1])
    assert 0 < relative_error(expected[0.9], plain[0.9]) < 0.1
    for graphs in (False, True):
        torch._dynamo.reset()
        twin = rtlynx.compile(copy.deepcopy(model), cuda_graphs=graphs)
        for sigma in (0.9, 0.1, 0.9, 0.1, 0.1, 0.9):  # a graph is captured at the second call
            assert relative_error(at(sigma, twin), expected[sigma]) < 0.05
    torch._dynamo.reset()


@pytest.mark.parametrize("recipe", [Recipe.dense_fp8(), Recipe.immediate(precision="fp8")])
def test_a_cuda_graph_for_each_block_gives_the_same(recipe):
    make, make_call = MODELS["flux"]
    model = fp8_attention(sparsify(make(num_layers=2).bfloat16().cuda(), recipe))
    calls = [in_dtype(make_call(seed), torch.bfloat16, "cuda") for seed in range(4)]
    torch._dynamo.reset()
    expected = [output(model, call) for call in calls]
    model.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")
    outputs = [output(model, call) for call in calls]
    for y, wanted in zip(outputs, expected, strict=True):
        assert relative_error(y, wanted) < 0.05
