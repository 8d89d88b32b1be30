"""Which layers of which architecture turn sparse, and that a model is changed whole or not at all."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    chroma_call,
    flux2_call,
    flux_call,
    hunyuan_video15_call,
    ltx2_call,
    ltx_call,
    output,
    qwen_call,
    relative_error,
    sd3_call,
    tiny_chroma,
    tiny_flux,
    tiny_flux2,
    tiny_hunyuan_video15,
    tiny_ltx,
    tiny_ltx2,
    tiny_qwen,
    tiny_sd3,
    tiny_wan,
    tiny_wan_of_picture,
    tiny_z_image,
    wan_call,
    wan_picture_call,
    watched,
    z_image_call,
)
from peft import LoraConfig
from torch import nn

from rtlynx import Recipe, SparseLinear, densify, schedule, sparsify
from rtlynx.math import reference
from rtlynx.models import make_plan, sparse_layers, state_of

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
LAST_DOUBLE = "transformer_blocks.1"


def names(block, *layers):
    return [f"{block}.{layer}" for layer in layers]


ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
SECOND_ATTENTION = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
Z_LAYER = (
    *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
)
FLUX_SINGLE = names(SINGLE, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
FLUX2_SINGLE = names(SINGLE, "attn.to_qkv_mlp_proj", "attn.to_out")
WAN_SELF, WAN_CROSS = "blocks.0.attn1", "blocks.0.attn2"
WAN_VIDEO = [
    *names(WAN_SELF, "to_q", "to_k", "to_v", "to_out.0"),
    *names(WAN_CROSS, "to_q", "to_out.0"),
    *names("blocks.0.ffn.net", "0.proj", "2"),
]
LTX_VIDEO = [
    *names(f"{DOUBLE}.attn1", "to_q", "to_k", "to_v", "to_out.0"),
    *names(f"{DOUBLE}.attn2", "to_q", "to_out.0"),
    *names(f"{DOUBLE}.ff.net", "0.proj", "2"),
]
LTX2_VIDEO = [
    *LTX_VIDEO,
    *names(f"{DOUBLE}.audio_to_video_attn", "to_q", "to_out.0"),
    *names(f"{DOUBLE}.video_to_audio_attn", "to_k", "to_v"),
]
LTX2_AUDIO = [
    *names(f"{DOUBLE}.audio_attn1", "to_q", "to_k", "to_v", "to_out.0"),
    *names(f"{DOUBLE}.audio_attn2", "to_q", "to_out.0"),
    *names(f"{DOUBLE}.audio_to_video_attn", "to_k", "to_v"),
    *names(f"{DOUBLE}.video_to_audio_attn", "to_q", "to_out.0"),
    *names(f"{DOUBLE}.audio_ff.net", "0.proj", "2"),
]
LTX2_TEXT = [name for attn in ("attn2", "audio_attn2") for name in names(f"{DOUBLE}.{attn}", "to_k", "to_v")]

# name -> model, its call, image and joint layers, text and audio layers: written out from the architectures.
MODELS = {
    "flux": (
        tiny_flux,
        flux_call,
        [*names(DOUBLE, *ATTENTION, "ff.net.0.proj", "ff.net.2"), *FLUX_SINGLE],
        names(DOUBLE, *ADDED, "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    "chroma": (
        tiny_chroma,
        chroma_call,
        [*names(DOUBLE, *ATTENTION, "ff.net.0.proj", "ff.net.2"), *FLUX_SINGLE],
        names(DOUBLE, *ADDED, "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    "flux2": (
        tiny_flux2,
        flux2_call,
        [*names(DOUBLE, *ATTENTION, "ff.linear_in", "ff.linear_out"), *FLUX2_SINGLE],
        names(DOUBLE, *ADDED, "ff_context.linear_in", "ff_context.linear_out"),
    ),
    "qwen": (
        tiny_qwen,
        qwen_call,
        names(DOUBLE, *ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2"),
        names(DOUBLE, *ADDED, "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ),
    "sd3": (
        tiny_sd3,
        sd3_call,
        [
            *names(DOUBLE, *ATTENTION, *SECOND_ATTENTION, "ff.net.0.proj", "ff.net.2"),
            *names(LAST_DOUBLE, *ATTENTION, "ff.net.0.proj", "ff.net.2"),
        ],
        # Nothing reads the text after the last block.
        [
            *names(DOUBLE, *ADDED, "ff_context.net.0.proj", "ff_context.net.2"),
            *names(LAST_DOUBLE, *ADDED[:3]),
        ],
    ),
    "z_image": (
        tiny_z_image,
        z_image_call,
        [*names("noise_refiner.0", *Z_LAYER), *names("layers.0", *Z_LAYER)],
        names("context_refiner.0", *Z_LAYER),
    ),
    "wan": (
        tiny_wan,
        wan_call,
        WAN_VIDEO,
        names(WAN_CROSS, "to_k", "to_v"),
    ),
    "wan_with_picture": (
        tiny_wan_of_picture,
        wan_picture_call,
        WAN_VIDEO,
        names(WAN_CROSS, "to_k", "to_v", "add_k_proj", "add_v_proj"),
    ),
    "ltx": (tiny_ltx, ltx_call, LTX_VIDEO, names(f"{DOUBLE}.attn2", "to_k", "to_v")),
    "ltx2": (tiny_ltx2, ltx2_call, LTX2_VIDEO, [*LTX2_AUDIO, *LTX2_TEXT]),
    "hunyuan_video15": (
        tiny_hunyuan_video15,
        hunyuan_video15_call,
        names(DOUBLE, *ATTENTION, "ff.net.0.proj", "ff.net.2"),
        names(DOUBLE, *ADDED, "ff_context.net.0.proj", "ff_context.net.2"),
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    assert state_of(model) is None
    assert not sparse_layers(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


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


def test_skip_that_matches_nothing_is_refused():
    model = tiny_flux()
    before = weights(model)
    with pytest.raises(ValueError, match=r"'\*\.to_quu' matches no layer"):
        sparsify(model, Recipe.immediate(skip=("*.to_quu",)))
    assert_untouched(model, before)


# ------------------------------------------------------------------------------------------- bad input


def test_sparse_twice_is_refused():
    model = sparsify(tiny_flux())
    expected = output(model, flux_call())
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(model, Recipe.immediate(n=1))
    assert torch.equal(output(model, flux_call()), expected)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.paper(), Recipe.immediate(rank=4)])
def test_a_recipe_that_needs_calibration_is_refused(recipe):
    model = tiny_flux()
    before = weights(model)
    with pytest.raises(ValueError, match="calibrate"):
        sparsify(model, recipe)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 1)), nn.Identity()]
)
def test_a_model_without_linears_is_refused(model):
    with pytest.raises(ValueError, match="no linear layers"):
        sparsify(model)


def test_a_lone_linear_is_refused_and_not_half_changed():
    model = nn.Linear(16, 8)
    with pytest.raises(ValueError, match="SparseLinear"):
        sparsify(model)
    assert not list(model.children())
    assert state_of(model) is None


@pytest.mark.parametrize("thing", [None, "flux", SimpleNamespace(unet=nn.Linear(4, 4))])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(TypeError, match="expected a torch module or a diffusers pipeline"):
        sparsify(thing)


@pytest.mark.parametrize("how", ["cpu_offload", "one layer"])
def test_a_model_with_an_offload_hook_is_refused_and_unchanged(how):
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

    model = tiny_flux()
    before = weights(model)
    if how == "cpu_offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        add_hook_to_module(model.get_submodule(FLUX_SINGLE[3]), AlignDevicesHook())
    with pytest.raises(TypeError, match=r"proj_mlp|transformer_blocks\.0\.attn\.to_q") as refused:
        sparsify(model)
    assert "then enable offloading" in str(refused.value)
    assert not sparse_layers(model)
    remove_hook_from_submodules(model)
    assert_untouched(model, before)


def test_offloading_after_sparsifying_works():
    from accelerate import cpu_offload

    model = sparsify(tiny_flux(), Recipe.immediate(text_rows="dense"))
    expected = output(model, flux_call())
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(output(model, flux_call()), expected)


def test_adapters_must_come_after():
    model = tiny_flux()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="has adapters attached"):
        sparsify(model, Recipe.immediate())
    assert not sparse_layers(model)


# -------------------------------------------------------------------------------------------- densify


@each_model
def test_densify_restores_exactly(name):
    build, call, image, _ = MODELS[name]
    model = build()
    parameters = dict(model.named_parameters())
    before, expected = weights(model), output(model, call())
    sparsify(model, Recipe.immediate(dense_steps=1, text_rows="dense"))
    assert not torch.equal(output(model, call(timestep=0.9)), 0 * expected)
    assert densify(model) is model
    assert_untouched(model, before)
    assert all(type(model.get_submodule(n)) is nn.Linear for n in image)
    assert all(parameter is parameters[n] for n, parameter in model.named_parameters())
    assert not model._forward_pre_hooks
    assert torch.equal(output(model, call()), expected)
    sparsify(model)  # and again
    assert set(sparse_layers(model)) == set(image)


def test_densify_of_a_dense_model_changes_nothing():
    model = tiny_flux()
    before = weights(model)
    densify(model)
    assert_untouched(model, before)


def test_densify_with_a_lost_original_changes_nothing():
    model = sparsify(tiny_flux())
    model.get_submodule(FLUX_SINGLE[4]).set_refit(torch.zeros(128, 640))
    expected = output(model, flux_call())
    with pytest.raises(RuntimeError, match="refitted without keeping"):
        densify(model)
    assert len(sparse_layers(model)) == 11
    assert torch.equal(output(model, flux_call()), expected)


def test_a_pipeline_stands_for_its_transformer():
    pipeline = SimpleNamespace(transformer=tiny_flux())
    assert sparsify(pipeline) is pipeline
    assert len(sparse_layers(pipeline.transformer)) == 11
    assert densify(pipeline) is pipeline
    assert not sparse_layers(pipeline.transformer)


# ------------------------------------------------------------------------------------- copies and dtypes


def test_copies_are_independent():
    recipe = Recipe.immediate(dense_steps=1, text_rows="dense")
    model = sparsify(tiny_flux(), recipe)
    dense = output(tiny_flux(), flux_call())
    twin = copy.deepcopy(model)
    assert torch.equal(output(model, flux_call(timestep=1.0)), output(tiny_flux(), flux_call(timestep=1.0)))
    assert not torch.equal(output(model, flux_call()), dense)
    assert torch.equal(output(twin, flux_call(timestep=0.4)), output(model, flux_call(timestep=0.4)))

    # Text rows: the other copy is called with another text length in between.
    longer = flux_call(timestep=0.3)
    longer["encoder_hidden_states"] = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(3))
    longer["txt_ids"] = torch.zeros(24, 3)
    expected = output(model, flux_call(timestep=0.3))
    output(twin, longer)
    assert torch.equal(output(model, flux_call(timestep=0.3)), expected)

    densify(twin)
    assert not twin._forward_pre_hooks
    assert model._forward_pre_hooks
    assert torch.equal(output(twin, flux_call()), dense)
    assert torch.equal(output(model, flux_call(timestep=0.3)), expected)


def test_copies_do_not_share_weights_or_memories():
    model = sparsify(tiny_flux())
    twin = copy.deepcopy(model)
    expected = output(model, flux_call())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(output(model, flux_call()), expected)
    ours = {id(layer.shared_input) for layer in sparse_layers(model).values()}
    theirs = {id(layer.shared_input) for layer in sparse_layers(twin).values()}
    assert not ours & theirs
    assert len(ours) == len(theirs)  # still one a block


def test_half_precision_model_runs():
    model = sparsify(tiny_flux()).to(torch.bfloat16)
    call = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in flux_call().items()}
    expected = output(sparsify(tiny_flux()), flux_call())
    y = output(model, call)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 0.1


def test_two_models_of_one_class_do_not_interfere():
    first = sparsify(tiny_flux(0), Recipe.immediate(dense_steps=1))
    second = sparsify(tiny_flux(1), Recipe.immediate(dense_steps=1))
    for timestep in (0.9, 0.5):
        for model, seed in ((first, 0), (second, 1)):
            with schedule([0.9, 0.5]):
                y, dense = (output(m, flux_call(timestep=timestep)) for m in (model, tiny_flux(seed)))
            assert torch.equal(y, dense) == (timestep == 0.9)


def test_training_gradients_reach_every_weight():
    model = sparsify(tiny_flux(), Recipe.immediate(text_stream="sparse"))
    model(**flux_call(), return_dict=False)[0].square().mean().backward()
    # (The last text output and feed-forward feed nothing but the single block here, which reads them.)
    for name, layer in sparse_layers(model).items():
        assert layer.weight.grad is not None, name
        assert bool(layer.weight.grad.any()), name


@pytest.mark.parametrize(
    ("changes", "keep"), [({}, set()), ({"text_rows": "dense"}, set(FLUX_SINGLE)), ({"dense_steps": 1}, None)]
)
def test_original_weights_are_kept_where_something_runs_dense(changes, keep):
    layers = sparse_layers(sparsify(tiny_flux(), Recipe.immediate(precision="fp8", **changes)))
    kept = {name for name, layer in layers.items() if layer.weight_dense is not None}
    assert kept == (set(layers) if keep is None else keep)


def test_text_rows_of_a_model_that_is_not_known_are_refused():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])})
    before = weights(model)
    with pytest.raises(ValueError, match="where the text rows of ModuleDict are is not known"):
        sparsify(model, Recipe.immediate(text_rows="dense"))
    assert_untouched(model, before)
