"""diffusers' own save_pretrained and from_pretrained: what was sparse comes back the same."""

import copy
import gc
import json
import pickle

import pytest
import torch
from checkpoint_helpers import RECIPES, RIDGE, make
from diffusers import (
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PipelineQuantizationConfig,
)
from helpers import (
    MODELS,
    flux_call,
    output,
    tiny_flux,
    tiny_z_image,
    z_image_call,
)
from peft import LoraConfig
from quantizer_helpers import E4M3, PROJ_OUT, TIMESTEPS, TO_Q, assert_same, config_of, outputs, stored_tensors
from rtlynx_zoo.pipeline import EmojiPipeline
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rtlynx.io.quantizer
from rtlynx import Recipe, RTLynxConfig, densify, load, save, sparsify
from rtlynx.models import sparse_layers, state_of


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_flux().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def refitted():
    return make(RECIPES["refit and low-rank"])


@pytest.fixture(scope="module")
def quantised():
    return make(RECIPES["fp8, refit and low-rank"])


# ----------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip(tmp_path, name):
    model = make(RECIPES[name])
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert_same(loaded, model)
    assert state_of(loaded).plan.recipe == RECIPES[name]
    assert len(loaded._forward_pre_hooks) == len(model._forward_pre_hooks)
    loaded.save_pretrained(tmp_path / "again")  # and what was loaded can be saved
    model.save_pretrained(tmp_path / "one file")
    again, whole = (tmp_path / one / "diffusion_pytorch_model.safetensors" for one in ("again", "one file"))
    assert again.read_bytes() == whole.read_bytes()
    assert config_of(tmp_path / "again")["quantization_config"] == config_of(tmp_path)["quantization_config"]


def test_round_trip_of_a_sidecar(refitted, tmp_path):
    save(refitted, tmp_path / "lynx")
    model = load(tiny_flux(), tmp_path / "lynx")
    model.save_pretrained(tmp_path / "model", variant="bf16")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.bf16.safetensors"}
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "model", variant="bf16")
    assert_same(loaded, refitted)
    save(loaded, tmp_path / "again")
    for file in ("rtlynx.json", "rtlynx.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "lynx" / file).read_bytes()


def tiny_dit():
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    ).eval()


def dit_call(seed=0, timestep=0.5):
    gen = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=gen),
        "timestep": torch.tensor([int(100 * timestep)]),
        "class_labels": torch.tensor([3]),
    }


@pytest.mark.parametrize(
    ("build", "call"),
    [MODELS["flux2"], MODELS["qwen"], (lambda: tiny_z_image(dim=128), z_image_call), (tiny_dit, dit_call)],
    ids=["flux2", "qwen", "z-image", "generic"],
)
def test_round_trip_of_the_other_architectures(tmp_path, build, call):
    model = make(Recipe(rank=4, ridge=RIDGE, intercept=True), build, call)
    model.save_pretrained(tmp_path)
    assert_same(type(model).from_pretrained(tmp_path), model, call)


def test_files_hold_natural_column_order_and_say_what_each_layer_is(tmp_path):
    text = "transformer_blocks.0.attn.to_add_out"
    recipe = Recipe.immediate(grouping="strided", precision="fp8", dense_steps=1, skip=(text,))
    model = sparsify(tiny_flux(), recipe)
    model.save_pretrained(tmp_path)
    tensors, dense = stored_tensors(tmp_path), tiny_flux().state_dict()
    made = config_of(tmp_path)["quantization_config"]
    assert made["quant_method"] == "rtlynx"
    assert Recipe.from_dict(made["recipe"]) == state_of(model).plan.recipe
    assert made["dense"] == {text: f"skipped by {text!r}"}
    entry = made["layers"][PROJ_OUT]
    pattern = {"n": 2, "m": 4, "grouping": "strided", "parts": [128, 512], "score": "magnitude"}
    assert entry["pattern"] == pattern
    assert (entry["norm"], entry["precision"], entry["rank"]) == ("scale", "fp8", 0)
    assert (entry["refitted"], entry["weight_dense"]) == (False, True)
    kinds = {name.removeprefix(f"{PROJ_OUT}.") for name in tensors if name.startswith(PROJ_OUT)}
    assert kinds == {"weight", "bias", "weight_scale", "weight_dense"}
    original, scale = dense[f"{PROJ_OUT}.weight"], tensors[f"{PROJ_OUT}.weight_scale"]
    assert torch.equal(tensors[f"{PROJ_OUT}.weight_dense"], original)
    values = tensors[f"{PROJ_OUT}.weight"]
    assert (values.dtype, scale.dtype) == (E4M3, torch.float32)
    # e4m3 rounds to 3 bits after the first, or to multiples of 2^-9; the scale may clip the largest.
    error = (values.double() * scale.double()[:, None] - original.double()).abs()
    bound = original.double().abs() / 16 + scale.double()[:, None] * 2**-10
    assert (error <= bound).double().mean() > 0.95
    others = {name for name in dense if name.rpartition(".")[0] not in made["layers"]}
    assert all(torch.equal(tensors[name], dense[name]) for name in others)


def test_layers_are_wired_as_they_were(tmp_path):
    model = make(RECIPES["dense steps and rows"])
    model.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)

    def wiring(one):
        layers = sparse_layers(one)
        shared = {}
        for name, layer in layers.items():
            shared.setdefault(id(layer.shared_input), []).append(name)
        return list(shared.values()), [
            (layer.text_rows_dense, layer.dense_steps, layer.dense_reason) for layer in layers.values()
        ]

    assert wiring(loaded) == wiring(model)
    assert not loaded.training
    # A dense step is the dense model.
    expected = output(tiny_flux(), flux_call(9, timestep=1.0))
    first, *_, last = outputs(loaded)
    assert torch.equal(first, expected)
    assert not torch.equal(last, output(tiny_flux(), flux_call(9, timestep=0.6)))


@pytest.mark.parametrize("made", ["refitted", "quantised"])
def test_a_dtype_casts_what_a_cast_of_the_model_casts(made, request, tmp_path):
    model = copy.deepcopy(request.getfixturevalue(made))
    model.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert_same(loaded, model.to(torch.bfloat16))
    layer = loaded.get_submodule(TO_Q)
    assert layer.lowrank_a.dtype == layer.bias.dtype == torch.bfloat16
    if made == "quantised":
        assert (layer.weight.dtype, layer.weight_scale.dtype) == (E4M3, torch.float32)


class NewBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators make, but for those on "meta"."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type != "meta":
            known = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
            if made.untyped_storage().data_ptr() not in known:
                self.total += made.nbytes
        return made


@pytest.mark.parametrize("made", ["refitted", "quantised"])
def test_no_second_copy_of_the_weights_is_made(made, request, tmp_path, monkeypatch):
    request.getfixturevalue(made).save_pretrained(tmp_path)
    size = sum(tensor.nbytes for tensor in stored_tensors(tmp_path).values())
    skeletons, new = [], NewBytes()
    inner = rtlynx.io.quantizer.RTLynxQuantizer.preprocess_model

    def watch(self, model, **kwargs):
        new.total = 0  # until here it is accelerate, whose layers are on the CPU for a moment
        inner(self, model, **kwargs)
        skeletons.append({one.device.type for one in (*model.parameters(), *model.buffers())})

    monkeypatch.setattr(rtlynx.io.quantizer.RTLynxQuantizer, "preprocess_model", watch)
    with new:
        FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert skeletons == [{"meta"}]
    assert new.total < 0.02 * size  # the tensors of the model are those of the file


def test_device_map(quantised, tmp_path):
    quantised.save_pretrained(tmp_path)
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        assert_same(FluxTransformer2DModel.from_pretrained(tmp_path, device_map=device_map), quantised)
    with pytest.raises(ValueError, match="on the disk"):
        FluxTransformer2DModel.from_pretrained(
            tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
        )


# ------------------------------------------------------------------------ what a loaded model can be asked


def test_a_loaded_model_casts_and_moves(tmp_path, quantised):
    from accelerate import cpu_offload

    quantised.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    expected = outputs(loaded)
    offloaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    for timestep, one in zip(TIMESTEPS, expected, strict=True):
        assert torch.allclose(output(offloaded, flux_call(9, timestep=timestep)), one, rtol=1e-4, atol=1e-5)
    loaded.to("cpu").to(torch.device("meta"))
    assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu", dtype=torch.float16), nn.Module.half):
        model = cast(FluxTransformer2DModel.from_pretrained(tmp_path))
        layer = model.get_submodule(TO_Q)
        assert (layer.weight.dtype, layer.weight_scale.dtype) == (E4M3, torch.float32)
        assert layer.bias.dtype in (torch.bfloat16, torch.float16)
    assert torch.isfinite(outputs(FluxTransformer2DModel.from_pretrained(tmp_path).bfloat16())[0]).all()


@pytest.mark.parametrize("undo", [densify, lambda model: model.dequantize()], ids=["densify", "dequantize"])
def test_a_loaded_model_made_dense_is_saved_as_a_plain_one(tmp_path, dense_folder, undo):
    make(RECIPES["refit, dense steps and rows"]).save_pretrained(tmp_path / "sparse")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "sparse")
    assert undo(loaded) is loaded
    assert not hasattr(loaded, "hf_quantizer")
    loaded.save_pretrained(tmp_path / "dense")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        ours, theirs = (folder / file for folder in (tmp_path / "dense", dense_folder))
        if file == "config.json":
            assert {**json.loads(ours.read_text()), "_name_or_path": ""} == {
                **json.loads(theirs.read_text()),
                "_name_or_path": "",
            }
        else:
            assert ours.read_bytes() == theirs.read_bytes()
    assert not state_of(FluxTransformer2DModel.from_pretrained(tmp_path / "dense"))
    sparsify(loaded).save_pretrained(tmp_path / "again")
    assert_same(FluxTransformer2DModel.from_pretrained(tmp_path / "again"), sparsify(tiny_flux()))


def test_densify_of_what_was_not_loaded(tmp_path, dense_folder):
    densify(sparsify(tiny_flux())).save_pretrained(tmp_path)
    assert config_of(tmp_path) == config_of(dense_folder)
    assert stored_tensors(tmp_path).keys() == stored_tensors(dense_folder).keys()


def test_adapters(tmp_path, refitted):
    refitted.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = copy.deepcopy(refitted)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_out"], init_lora_weights=False))
    model.save_lora_adapter(tmp_path / "lora")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "base")
    loaded.load_lora_adapter(tmp_path / "lora", prefix=None, use_safetensors=True)
    for ours, theirs in zip(outputs(loaded), outputs(model), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(outputs(loaded)[0], outputs(refitted)[0])
    with pytest.raises(ValueError, match=r"attn\.to_q\.base_layer.*detach adapters before saving"):
        loaded.save_pretrained(tmp_path / "attached")
    assert not list((tmp_path / "attached").glob("*.safetensors"))
    loaded.unload_lora()
    loaded.save_pretrained(tmp_path / "detached")
    assert_same(FluxTransformer2DModel.from_pretrained(tmp_path / "detached"), refitted)


def test_a_fused_adapter_is_saved_with_the_weights(tmp_path):
    model = sparsify(tiny_flux(), Recipe.immediate(grouping="adjacent"))
    before = model.get_submodule(TO_Q).weight.clone()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_out"], init_lora_weights=False))
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(tmp_path / "fused")
    assert_same(FluxTransformer2DModel.from_pretrained(tmp_path / "fused"), model)
    assert not torch.equal(model.get_submodule(TO_Q).weight, before)


def test_what_is_saved_is_the_model_as_it_is_then(tmp_path):
    model = sparsify(tiny_flux(), Recipe.immediate(skip=["*.proj_mlp"]))
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    model.save_pretrained(tmp_path / "before")
    for number, one in enumerate((model, copied, pickled)):
        layer = one.get_submodule(TO_Q)
        layer.set_refit(layer.weight * 0.5, keep_dense=True)
        layer.set_lowrank(torch.ones(number + 1, 128), torch.full((128, number + 1), 0.01))
        one.get_submodule(PROJ_OUT).quantize()
    for number, one in enumerate((model, copied, pickled)):
        one.save_pretrained(tmp_path / str(number))
        loaded = FluxTransformer2DModel.from_pretrained(tmp_path / str(number))
        for ours, theirs in zip(outputs(loaded), outputs(one), strict=True):
            assert torch.equal(ours, theirs)
        layer = loaded.get_submodule(TO_Q)
        assert (layer.rank, layer.refitted) == (number + 1, True)
        assert torch.equal(layer.original_weight(), tiny_flux().get_submodule(TO_Q).weight)
    assert_same(
        FluxTransformer2DModel.from_pretrained(tmp_path / "before"),
        sparsify(tiny_flux(), Recipe.immediate(skip=["*.proj_mlp"])),
    )


def test_layers_that_were_given_one_factor_are_saved(tmp_path):
    model = sparsify(tiny_flux())
    lowrank_a = torch.randn(4, 128)
    for name in (TO_Q, TO_Q.replace("to_q", "to_k")):
        model.get_submodule(name).set_lowrank(lowrank_a, torch.randn(128, 4))
    model.save_pretrained(tmp_path)
    for ours, theirs in zip(
        outputs(FluxTransformer2DModel.from_pretrained(tmp_path)), outputs(model), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_dense_model_with_a_sparse_ones_config_is_saved_dense(tmp_path):
    model = sparsify(tiny_flux())
    other = FluxTransformer2DModel.from_config(model.config)
    del model
    gc.collect()
    other.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert not state_of(loaded)


def test_the_config_of_another_quantizer_is_left_alone():
    model = tiny_flux()
    model.hf_quantizer = object()
    model.register_to_config(quantization_config={"quant_method": "another"})
    densify(sparsify(model))
    assert model.config["quantization_config"] == {"quant_method": "another"}


# --------------------------------------------------------------------------- dense checkpoints, on load


@pytest.mark.parametrize(
    "recipe",
    [None, Recipe.immediate(dense_steps=2), Recipe.immediate(precision="fp8")],
    ids=["default", "dense steps", "fp8"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recipe_on_a_dense_checkpoint(dense_folder, tmp_path, recipe, dtype):
    loaded = FluxTransformer2DModel.from_pretrained(
        dense_folder, quantization_config=RTLynxConfig(recipe), torch_dtype=dtype
    )
    expected = sparsify(tiny_flux().to(dtype), recipe)
    assert_same(loaded, expected)
    loaded.save_pretrained(tmp_path)
    assert_same(FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype), expected)


def test_a_recipe_in_json_values(dense_folder):
    settings = {"quant_method": "rtlynx", "recipe": Recipe.immediate(n=1).to_dict()}
    loaded = FluxTransformer2DModel.from_pretrained(dense_folder, quantization_config=settings)
    assert_same(loaded, sparsify(tiny_flux(), Recipe.immediate(n=1)))
    assert RTLynxConfig(Recipe.immediate(n=1)).to_dict() == settings
    assert RTLynxConfig(sidecar="lynx").to_dict() == {"quant_method": "rtlynx", "sidecar": "lynx"}


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.paper(), {"rank": 4, "refit": False}])
def test_a_recipe_that_needs_calibration_is_refused(recipe):
    with pytest.raises(ValueError, match=r"rtlynx\.calibrate\(pipeline, prompts, recipe\)"):
        RTLynxConfig(recipe)


def test_contradictions_and_unknown_settings_are_refused(dense_folder):
    with pytest.raises(ValueError, match="recipe or a sidecar"):
        RTLynxConfig(Recipe.immediate(), sidecar="lynx")
    with pytest.raises(ValueError, match="did you mean 'recipe'"):
        RTLynxConfig.from_dict({"quant_method": "rtlynx", "recipy": {}})
    with pytest.raises(ValueError, match=r"'\*\.nothing' matches no layer"):
        FluxTransformer2DModel.from_pretrained(
            dense_folder, quantization_config=RTLynxConfig(Recipe.immediate(skip=["*.nothing"]))
        )
    with pytest.raises(ValueError, match="spreads a dense checkpoint over cpu, cuda:0"):
        FluxTransformer2DModel.from_pretrained(
            dense_folder,
            quantization_config=RTLynxConfig(),
            device_map={"": "cpu", "proj_out": "cuda:0"},
        )


@pytest.mark.parametrize("name", ["paper", "refit and low-rank", "fp8, refit and low-rank"])
def test_a_sidecar_on_a_dense_checkpoint(dense_folder, tmp_path, name):
    model = make(RECIPES[name])
    save(model, tmp_path / "lynx")
    config = RTLynxConfig(sidecar=tmp_path / "lynx")
    loaded = FluxTransformer2DModel.from_pretrained(dense_folder, quantization_config=config)
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "whole")
    assert_same(FluxTransformer2DModel.from_pretrained(tmp_path / "whole"), model)


def test_a_sidecar_of_other_weights_or_none_is_refused(tmp_path):
    save(make(RECIPES["paper"]), tmp_path / "lynx")
    tiny_flux(seed=1).save_pretrained(tmp_path / "others")
    tiny_flux(num_attention_heads=8).save_pretrained(tmp_path / "wide")
    for folder, sidecar, said in (
        ("others", "lynx", "made for other weights"),
        ("wide", "lynx", "made for another size"),
        ("others", "none", "none is not a folder"),
    ):
        with pytest.raises(rtlynx.CheckpointError, match=said):
            FluxTransformer2DModel.from_pretrained(
                tmp_path / folder, quantization_config=RTLynxConfig(sidecar=tmp_path / sidecar)
            )


# -------------------------------------------------------------------------------------------- pipelines


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    transformer = tiny_flux(in_channels=48, joint_attention_dim=384, pooled_projection_dim=384)
    EmojiPipeline(transformer, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return folder


def draw(pipe):
    pipe.transformer = copy.deepcopy(pipe.transformer)  # as in `outputs`
    pipe.set_progress_bar_config(disable=True)
    gen = torch.Generator().manual_seed(0)
    text, pooled = torch.randn(1, 16, 384, generator=gen), torch.randn(1, 384, generator=gen)
    return pipe(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images


def test_a_pipeline(pipeline_folder, tmp_path):
    mapping = {"transformer": RTLynxConfig(Recipe.immediate(dense_steps=1, grouping="strided"))}
    pipe = EmojiPipeline.from_pretrained(
        pipeline_folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
    )
    dense = EmojiPipeline.from_pretrained(pipeline_folder)
    before = draw(dense)
    expected = draw(sparsify(dense, mapping["transformer"].recipe))
    assert not torch.equal(expected, before)
    assert torch.equal(draw(pipe), expected)
    pipe.save_pretrained(tmp_path, max_shard_size="200KB")
    again = EmojiPipeline.from_pretrained(tmp_path)
    assert len(sparse_layers(again.transformer)) == 11
    assert torch.equal(draw(again), expected)
    assert torch.isfinite(draw(again.to("cpu", torch.bfloat16))).all()
