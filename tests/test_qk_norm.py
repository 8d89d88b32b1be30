"""Queries and keys in front of attention in a model's own dtype: when one kernel norms and rotates them."""

import pytest
import torch
from attention_helpers import EPS, streams_of
from helpers import MODELS, output, relative_error, tiny_flux
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import rtlynx
from rtlynx import Recipe, fp8_attention, schedule, sparsify
from rtlynx.math.attention import Stream
from rtlynx.models import fusion
from rtlynx.ops import dispatch
from rtlynx.ops.attention import joint_heads, qk_norm_rotary

SPARSE, DENSE = 0.9, 0.1  # noise levels outside of the dense steps and inside
IN_FP8 = Recipe.immediate(precision="fp8", dense_sigmas=((0.0, 0.5),), dense_precision="fp8")
# Tokens of the streams of each attention that fused blocks compute themselves.
FUSED = {"flux2": [[72]], "qwen": [[8, 64]], "z-image": [[64], [96]]}


def call_of(name):
    call = MODELS[name][1]()
    return {**call, "encoder_hidden_states_mask": None} if name == "qwen" else call


def with_weights(model):
    """Norms of queries and keys that weigh entries differently."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm_q" in name or "norm_k" in name or "norm_added" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def at(sigma, model, call):
    """The output of a call at this noise level."""
    t = float(call["t" if "t" in call else "timestep"].flatten()[0])
    with schedule([t, 2 * t + 1], [sigma, 0.5]):
        return output(model, call)


@pytest.fixture
def on_card(monkeypatch):
    """As on a card, where the kernel serves what it can."""
    monkeypatch.setattr(fusion, "qk_norm_rotary_supports", dispatch.attention_inputs_support)


@pytest.fixture
def seen(monkeypatch):
    """Tokens of the streams of each call of the operator."""
    calls = []

    def watched(*arguments):
        calls.append([one.shape[1] for one in (arguments[0], *arguments[3][:1])])
        return qk_norm_rotary(*arguments)

    monkeypatch.setattr("rtlynx.ops.attention.qk_norm_rotary", watched)
    return calls


# -------------------------------------------------------------------------------------------- what it serves


def test_values_of_one_stream_are_not_copied():
    streams = streams_of(1, (5, 9), 2, 64)
    assert joint_heads(streams[:1], EPS)[2] is streams[0].value
    assert torch.equal(joint_heads(streams, EPS)[2], torch.cat([one.value for one in streams], 1))


@pytest.fixture
def fake():
    with FakeTensorMode():
        yield


def test_a_hopper_card_serves_bfloat16_without_gradients(fake, monkeypatch):
    monkeypatch.setattr(dispatch, "_cards", {0: None})

    def served(width=64, dtype=torch.bfloat16, device="cuda", **changes):
        heads, weight = (torch.empty(size, dtype=dtype, device=device) for size in ((1, 5, 2, width), width))
        rotary = (torch.empty(5, width // 2, 2, device=device),)
        stream = Stream(heads, heads, heads, weight, weight, rotary)
        return dispatch.qk_norm_rotary_supports([stream._replace(**changes)])

    assert served()
    assert not served(device="cpu")
    assert not served(width=32)
    assert not served(dtype=torch.float16)
    weight = torch.empty(64, dtype=torch.bfloat16, device="cuda").requires_grad_()
    assert not served(q_weight=weight)
    with torch.no_grad():
        assert served(q_weight=weight)
    monkeypatch.setattr(dispatch, "_cards", {0: "an older card"})
    assert not served()


# ------------------------------------------------------------------------------------------------- in models


@pytest.mark.parametrize("name", FUSED)
def test_fused_blocks_ask_for_it_and_give_the_same(name, on_card, seen):
    model, call = with_weights(MODELS[name][0]()), call_of(name)
    sparsify(model, Recipe.dense_fp8())
    y = output(model, call)
    assert seen == FUSED[name]
    seen.clear()
    for module in model.modules():
        if hasattr(module, "norm_q"):
            module.norm_q.register_forward_hook(lambda *_: None)  # which only PyTorch hears
    expected = output(model, call)
    assert seen == []
    assert relative_error(y, expected) < 2e-3


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "z-image"])
def test_under_fp8_attention_a_dense_step_asks_for_it_and_no_other(name, on_card, seen, monkeypatch):
    model, plain, call = MODELS[name][0](), MODELS[name][0](), call_of(name)
    for one in (model, plain):
        sparsify(with_weights(one), IN_FP8)
    plain.load_state_dict(model.state_dict())
    fp8_attention(model)
    at(SPARSE, model, call)
    assert seen == []
    y = at(DENSE, model, call)
    attentions = [one for one in model.modules() if hasattr(one, "norm_q")]
    assert len(seen) == len(attentions)
    monkeypatch.undo()
    assert relative_error(y, at(DENSE, plain, call)) < 2e-3


def test_on_a_cpu_the_norms_do_it(seen):
    model = fp8_attention(sparsify(tiny_flux(), IN_FP8))
    at(DENSE, model, call_of("flux"))
    assert seen == []


def test_a_backend_gets_the_mask_behind_it(on_card, seen):
    call = MODELS["qwen"][1]()
    assert call["encoder_hidden_states_mask"] is not None
    model = sparsify(with_weights(MODELS["qwen"][0]()), Recipe.dense_fp8())
    y = output(model, call)
    assert seen == FUSED["qwen"]
    model.transformer_blocks[0].attn.norm_k.register_forward_hook(lambda *_: None)
    assert relative_error(y, output(model, call)) < 2e-3
    assert seen == FUSED["qwen"]


def test_compiled_it_is_the_same_in_no_more_graphs_than_there_are_kinds_of_steps(on_card):
    torch._dynamo.reset()
    model, call = fp8_attention(sparsify(with_weights(tiny_flux()), IN_FP8)), call_of("flux")
    expected = {sigma: at(sigma, model, call) for sigma in (SPARSE, DENSE)}
    counter = CompileCounterWithBackend("aot_eager")
    rtlynx.compile(model, backend=counter)
    for sigma in (SPARSE, DENSE, SPARSE, DENSE, SPARSE):
        assert relative_error(at(sigma, model, call), expected[sigma]) < 1e-4
    assert counter.frame_count == 4  # two blocks, two kinds of steps
    asked = [sum(node.target is qk_norm_rotary for node in graph.graph.nodes) for graph in counter.graphs]
    assert sorted(asked) == [0, 0, 1, 1]
    torch._dynamo.reset()
