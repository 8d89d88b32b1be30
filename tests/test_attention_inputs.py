"""What attention reads, from before the norms: definition, operators, models; no card needed."""

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
from helpers import MODELS, output, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import rms_norm

import rtlynx.models.attention as models_attention
from rtlynx import Recipe, fp8_attention, sparsify
from rtlynx.cuda.sm90 import attention_inputs as kernel
from rtlynx.math.attention import quantize_values, rotated, saturated
from rtlynx.ops.attention import attention_inputs, qk_norm_rotary


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.lists(st.integers(1, 40) | st.integers(255, 270), min_size=1, max_size=2),
    heads=st.integers(1, 4),
    width=st.sampled_from([2, 16, 64]),
    rotary=st.sampled_from(ROTARY),
    layout=st.sampled_from(LAYOUTS),
    exponents=st.tuples(st.sampled_from([-8, 0, 8]), st.sampled_from([-8, 0, 8])),
    seed=st.integers(0, 2**20),
)
def test_it_gives_the_nearest_numbers(batch, tokens, heads, width, rotary, layout, exponents, seed):
    streams = streams_of(batch, tokens, heads, width, rotary, layout, torch.float32, seed=seed)
    assert_right(attention_inputs(*arguments_of(streams, EPS, *exponents)), streams, *exponents)
    assert_normed(qk_norm_rotary(*arguments_of(streams)[:7]), streams)
    streams = streams_of(batch, tokens, heads, width, rotary, layout, torch.bfloat16, seed=seed)
    assert_normed(qk_norm_rotary(*arguments_of(streams)[:7]), streams)


@pytest.mark.parametrize("rotary", ROTARY)
def test_it_is_the_norm_the_rotation_and_the_rounding_one_after_the_other(rotary):
    streams = streams_of(2, (30, 300), 3, 64, rotary, dtype=torch.float32)
    q, k, v, scale, mean = attention_inputs(*arguments_of(streams))
    for made, which in ((q, 0), (k, 1)):
        each = [
            rotated(rms_norm(one[which], (64,), one[3 + which], EPS), one.rotary).type_as(one.query)
            for one in streams
        ]
        expected = saturated(torch.cat(each, 1))
        assert float((made.float() != expected.float()).float().mean()) < 1e-4  # (ties, by another last bit)
        assert relative_error(made.float(), expected.float()) < 1e-3
    expected = quantize_values(torch.cat([one.value for one in streams], 1))
    for made, one in zip((v, scale, mean), expected, strict=True):
        assert torch.equal(made.float(), one.float())


def test_the_operator_is_one():
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for tokens in ((5,), (5, 9)):
        arguments = arguments_of(streams_of(1, tokens, 2, 16))
        torch.library.opcheck(attention_inputs, arguments, test_utils=checks)
        torch.library.opcheck(qk_norm_rotary, arguments[:7], test_utils=checks)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda q: q[0], r"query is \(B, T, H, D\)"),
        (0, lambda q: q[..., :15], "D even"),
        (0, lambda q: q.int(), "of numbers"),
        (0, lambda q: q[:, :0], "nothing to attend to|queries, keys and values of a stream"),
        (1, lambda k: k[:, 1:], "queries, keys and values of a stream are"),
        (2, lambda v: v.double(), "got .* of torch.float64"),
        (3, lambda behind: behind[:2], "got 2, 4 and 2 tensors"),
        (
            3,
            lambda behind: [behind[0], behind[1][:, 1:], behind[2]],
            "queries, keys and values of a stream are",
        ),
        (4, lambda weights: weights[:2], "got 3, 2 and 2 tensors"),
        (4, lambda weights: [*weights[:3], weights[3][1:]], r"norm weights are \(16,\)"),
        (5, lambda rotary: rotary[:1], "got 3, 4 and 1 tensors"),
        (5, lambda rotary: [rotary[0][1:], rotary[1]], r"rotary is float32 of shape \(5, 8, 2\)"),
        (5, lambda rotary: [one.double() for one in rotary], "of torch.float64"),
    ],
)
def test_it_refuses_what_does_not_fit(index, change, message):
    arguments = list(arguments_of(streams_of(1, (5, 9), 2, 16)))
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=message):
        attention_inputs(*arguments)
    with pytest.raises(ValueError, match=message):
        qk_norm_rotary(*arguments[:7])


def test_a_kernel_takes_rows_at_multiples_of_16_bytes():
    for layout in LAYOUTS:
        for rotary in ROTARY:
            assert kernel.pack(streams_of(2, (5, 9), 2, 64, rotary, layout)) is not None
    dense = streams_of(2, (5, 9), 2, 64)[0]
    odd = torch.zeros(2, 5, 2, 65, dtype=torch.bfloat16)[..., :64]
    for change in (
        {"query": odd},
        {"value": odd.repeat_interleave(2, -1)[..., ::2]},
        {"key": dense.key.float()},
        {"rotary": (dense.rotary[0].transpose(-1, -2).contiguous().transpose(-1, -2),)},
        {"rotary": (torch.zeros(5, 65)[:, :64], torch.zeros(5, 64))},
    ):
        assert kernel.pack([dense._replace(**change)]) is None
    assert kernel.pack(streams_of(2, (5, 9), 2, 32)) is None
    streams = streams_of(2, (5, 2300), 3, 128)
    assert kernel.pack(streams).grid == (2 * 3 * 3 + -(-2 * 2305 // 8), 1, 1)
    assert kernel.pack(streams, fp8=False).grid == (-(-2 * 2305 // 8), 1, 1)  # (no values to look at)


# ------------------------------------------------------------------------------------------- in models


def call_of(name):
    call = MODELS[name][1]()
    return {**call, "encoder_hidden_states_mask": None} if name == "qwen" else call


@pytest.fixture
def seen(monkeypatch):
    """Tokens of the streams of each call of the operator."""
    calls, real = [], attention_inputs

    def watched(*arguments):
        calls.append([one.shape[1] for one in (arguments[0], *arguments[3][:1])])
        return real(*arguments)

    monkeypatch.setattr("rtlynx.ops.attention.attention_inputs", watched)
    return calls


def attentions(model):
    found = [module for module in model.modules() if hasattr(module, "processor")]
    return [one for one in found if hasattr(one.processor, "_attention_backend")]


def without(model):
    for attn in attentions(model):
        attn.norm_q.register_forward_hook(lambda *_: None)  # which only PyTorch hears
    return model


@pytest.mark.parametrize("recipe", [None, Recipe.dense_fp8()])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flux", [[8, 64], [72]]),
        ("flux2", [[8, 64], [72]]),
        ("qwen", [[8, 64]]),
        ("z-image", [[64], [32], [96]]),
        ("wan", []),
    ],
)
def test_models_hand_on_what_is_before_the_norms(name, expected, recipe, seen):
    model, call = MODELS[name][0](), call_of(name)
    if recipe is not None:
        sparsify(model, recipe)
    with torch.no_grad():
        for attn in attentions(model):
            for norm in (attn.norm_q, attn.norm_k, getattr(attn, "norm_added_q", None)):
                if norm is not None:
                    norm.weight.uniform_(0.5, 1.5)
    fp8_attention(model)
    y = output(model, call)
    assert seen == expected
    seen.clear()
    in_several = output(without(model), call)
    assert not seen
    assert relative_error(y, in_several) < 2e-3


def test_own_norms_and_hooks_are_heard(seen):
    model, call = fp8_attention(MODELS["flux"][0]()), call_of("flux")
    heard = []
    attn = model.single_transformer_blocks[0].attn
    attn.norm_q.register_forward_hook(lambda *_: heard.append(1))
    output(model, call)
    assert heard
    assert seen == [[8, 64]]


@pytest.mark.parametrize(
    "change",
    [
        lambda attn: setattr(attn.norm_q, "eps", 1e-3),
        lambda attn: setattr(attn, "norm_k", torch.nn.RMSNorm(32, elementwise_affine=False, eps=1e-6)),
        lambda attn: setattr(attn, "norm_q", torch.nn.LayerNorm(32)),
        lambda attn: attn.norm_k.double(),
        lambda attn: setattr(attn, "norm_k", torch.nn.RMSNorm(32, eps=None)),
    ],
)
def test_norms_that_it_does_not_know_stay_as_they_are(change, seen):
    model, call = MODELS["flux"][0](), call_of("flux")
    for attn in attentions(model):
        change(attn)
    plain = output(model, call)
    assert relative_error(output(fp8_attention(model), call), plain) < 0.05
    assert not seen


def test_fused_projections_go_through_diffusers_own_processor(seen):
    model, call = MODELS["flux"][0](), call_of("flux")
    plain = output(model, call)
    model.fuse_qkv_projections()
    fp8_attention(model)
    kinds = {type(attn.processor).__name__ for attn in attentions(model)}
    assert kinds <= set(models_attention.PROCESSORS)
    assert relative_error(output(model, call), plain) < 0.05
    assert not seen
