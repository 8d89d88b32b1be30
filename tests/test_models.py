"""Which layers of which architecture turn sparse, which share an input, how their channels are grouped."""

import copy

import pytest
import torch
from helpers import (
    output,
    relative_error,
    tiny_flux,
    tiny_qwen,
    tiny_z_image,
    watched,
    z_image_call,
)
from layer_name_helpers import (
    ADDED,
    ATTENTION,
    DOUBLE,
    FLUX_SINGLE,
    LAST_DOUBLE,
    LTX2_AUDIO,
    LTX2_TEXT,
    LTX_VIDEO,
    MODELS,
    SECOND_ATTENTION,
    SINGLE,
    WAN_CROSS,
    WAN_VIDEO,
    Z_LAYER,
    names,
)
from torch import nn

from rtlynx import Recipe, SparseLinear, sparsify
from rtlynx.math import reference
from rtlynx.models import make_plan, sparse_layers, state_of

each_model = pytest.mark.parametrize("name", MODELS)


# --------------------------------------------------------------------------------- which layers, exactly


@each_model
@pytest.mark.parametrize("text_stream", ["dense", "sparse"])
def test_exactly_the_named_layers_turn_sparse(name, text_stream):
    build, call, image, text = MODELS[name]
    model = build()
    others = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in {*image, *text}}
    assert sparsify(model, Recipe.immediate(text_stream=text_stream)) is model
    expected = {*image, *text} if text_stream == "sparse" else {*image}
    assert {n for n, m in model.named_modules() if isinstance(m, SparseLinear)} == expected
    assert all(model.get_submodule(n) is module for n, module in others.items())
    y = output(model, call())
    assert bool(torch.isfinite(y).all())
    plan = {layer.name: layer for layer in state_of(model).plan.layers}
    assert set(plan) == {*image, *text}
    if text_stream == "dense":
        assert {n: plan[n].dense_reason for n in text} == {
            n: "audio stream" if n in LTX2_AUDIO else "text stream" for n in text
        }


@each_model
def test_default_is_the_text_stream_dense_without_calibration(name):
    build, call, image, _ = MODELS[name]
    model, dense = build(), build()
    sparsify(model)
    assert set(sparse_layers(model)) == set(image)
    assert 1e-4 < relative_error(output(model, call()), output(dense, call())) < 1


@each_model
@pytest.mark.parametrize("grouping", ["auto", "strided"])
def test_keeping_everything_equals_dense_exactly(name, grouping):
    build, call, image, text = MODELS[name]
    model, expected = build(), output(build(), call())
    recipe = Recipe.immediate(n=4, m=4, text_stream="sparse", text_rows="dense", grouping=grouping)
    sparsify(model, recipe)
    assert len(sparse_layers(model)) == len(image) + len(text)
    assert torch.equal(output(model, call()), expected)


SHARED = {
    "flux": [names(DOUBLE, *ATTENTION[:3]), names(DOUBLE, *ADDED[:3]), FLUX_SINGLE[:4]],
    "chroma": [names(DOUBLE, *ATTENTION[:3]), names(DOUBLE, *ADDED[:3]), FLUX_SINGLE[:4]],
    "flux2": [names(DOUBLE, *ATTENTION[:3]), names(DOUBLE, *ADDED[:3])],
    "qwen": [names(DOUBLE, *ATTENTION[:3]), names(DOUBLE, *ADDED[:3])],
    "sd3": [
        names(DOUBLE, *SECOND_ATTENTION[:3]),
        *(names(one, *layers[:3]) for one in (DOUBLE, LAST_DOUBLE) for layers in (ATTENTION, ADDED)),
    ],
    "z_image": [
        group
        for block in ("noise_refiner.0", "context_refiner.0", "layers.0")
        for group in (names(block, *Z_LAYER[:3]), names(block, "feed_forward.w1", "feed_forward.w3"))
    ],
    "wan": [WAN_VIDEO[:3], names(WAN_CROSS, "to_k", "to_v")],
    "wan_with_picture": [
        *(WAN_VIDEO[:3], names(WAN_CROSS, "to_k", "to_v")),
        names(WAN_CROSS, "add_k_proj", "add_v_proj"),
    ],
    "ltx": [LTX_VIDEO[:3], names(f"{DOUBLE}.attn2", "to_k", "to_v")],
    "ltx2": [
        *(LTX_VIDEO[:3], LTX2_AUDIO[:3], LTX2_TEXT[:2], LTX2_TEXT[2:]),
        *(
            names(f"{DOUBLE}.{attn}", "to_k", "to_v")
            for attn in ("audio_to_video_attn", "video_to_audio_attn")
        ),
    ],
    "hunyuan_video15": [names(DOUBLE, *ATTENTION[:3]), names(DOUBLE, *ADDED[:3])],
}


@each_model
def test_layers_that_share_an_input(name, monkeypatch):
    build, call, image, text = MODELS[name]
    model = build()
    plan = make_plan(model, Recipe.immediate(text_stream="sparse"))
    groups = {}
    for layer in plan.layers:
        groups.setdefault(layer.candidate.reads, set()).add(layer.name)
    assert sorted(map(sorted, (g for g in groups.values() if len(g) > 1))) == sorted(
        map(sorted, SHARED[name])
    )

    # What the plan says is what happens: the inputs are one tensor, and each is selected once.
    with watched(model, [*image, *text]) as seen:
        output(model, call())
    for group in SHARED[name]:
        assert all(torch.equal(seen[n][0][0], seen[group[0]][0][0]) for n in group)
    selections = []
    original = reference.compress
    monkeypatch.setattr(reference, "compress", lambda *args: selections.append(1) or original(*args))
    sparsify(model, Recipe.immediate(text_stream="sparse"))
    output(model, call())
    assert len(selections) == len(groups)


@each_model
def test_sharing_changes_nothing(name):
    build, call, _, _ = MODELS[name]
    model = sparsify(build())
    shared = output(model, call())
    for layer in sparse_layers(model).values():
        layer.shared_input = copy.deepcopy(layer.shared_input)  # a memory of its own
    assert torch.equal(output(model, call()), shared)


# -------------------------------------------------------------------------------- groupings and reasons


def test_attention_outputs_are_strided_and_parts_do_not_mix_attention_with_mlp():
    model = sparsify(tiny_flux(), Recipe.immediate(text_stream="sparse"))
    patterns = {name: layer.pattern for name, layer in sparse_layers(model).items()}
    strided = {name for name, pattern in patterns.items() if pattern.grouping == "strided"}
    assert strided == {f"{DOUBLE}.attn.to_out.0", f"{DOUBLE}.attn.to_add_out", f"{SINGLE}.proj_out"}
    out = model.get_submodule(f"{SINGLE}.proj_out")
    assert out.in_features == 5 * 128
    assert out.pattern.widths(5 * 128) == (128, 4 * 128)  # attention | MLP

    adjacent = sparsify(tiny_flux(), Recipe.immediate(grouping="adjacent"))
    assert {layer.pattern.grouping for layer in sparse_layers(adjacent).values()} == {"adjacent"}
    everywhere = sparsify(tiny_flux(), Recipe.immediate(grouping="strided"))
    assert {layer.pattern.grouping for layer in sparse_layers(everywhere).values()} == {"strided"}
    assert everywhere.get_submodule(f"{SINGLE}.proj_out").pattern.widths(640) == (128, 512)


def test_strided_attention_outputs_of_the_others():
    for build, name in (
        (tiny_qwen, f"{DOUBLE}.attn.to_out.0"),
        (tiny_z_image, "layers.0.attention.to_out.0"),
    ):
        model = sparsify(build())
        assert model.get_submodule(name).pattern.grouping == "strided"
        assert model.get_submodule(name.replace("to_out.0", "to_q")).pattern.grouping == "adjacent"


def test_a_width_that_does_not_split_stays_dense_with_a_reason():
    model = tiny_z_image(dim=128)
    sparsify(model)
    odd = {"noise_refiner.0.feed_forward.w2", "layers.0.feed_forward.w2"}
    assert type(model.get_submodule("layers.0.feed_forward.w2")) is nn.Linear
    assert model.get_submodule("layers.0.feed_forward.w2").in_features == 341
    assert set(sparse_layers(model)) == set(MODELS["z_image"][2]) - odd
    reasons = {layer.name: layer.dense_reason for layer in state_of(model).plan.layers}
    assert all("341 entries do not split into groups of 4" in reasons[name] for name in odd)
    assert bool(torch.isfinite(output(model, z_image_call())).all())


def test_skip():
    model = sparsify(tiny_flux(), Recipe.immediate(skip=("*.proj_out", f"{DOUBLE}.attn.*")))
    expected = {*names(DOUBLE, "ff.net.0.proj", "ff.net.2"), *FLUX_SINGLE[:4]}
    assert set(sparse_layers(model)) == expected
    reasons = {layer.name: layer.dense_reason for layer in state_of(model).plan.layers}
    assert reasons[f"{SINGLE}.proj_out"] == "skipped by '*.proj_out'"
