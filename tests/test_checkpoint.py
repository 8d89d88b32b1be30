"""Checkpoints: the same outputs after a round trip; anything else refused, with the model as it was."""

import hashlib
import json
import pickle
import shutil

import pytest
import safetensors.torch
import torch
from checkpoint_helpers import RECIPES, RIDGE, make
from helpers import (
    MODELS,
    flux_call,
    output,
    tiny_flux,
    tiny_qwen,
    tiny_z_image,
    z_image_call,
)

from rtlynx import (
    CheckpointError,
    Recipe,
    densify,
    load,
    save,
)
from rtlynx.models import sparse_layers, state_of

TIMESTEPS = (1.0, 1.0, 0.8, 0.6)


def outputs(model, call=flux_call):
    return [output(model, call(9, timestep=timestep)) for timestep in TIMESTEPS]


def assert_dense(model, build=tiny_flux):
    assert state_of(model) is None
    assert not model._forward_pre_hooks
    before, after = build().state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with refitted weights and low-rank factors. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("saved") / "lynx"
    save(make(RECIPES["refit and low-rank"]), folder)
    return folder


@pytest.fixture(scope="module")
def saved_fp8(tmp_path_factory):
    """A folder with quantised weights."""
    folder = tmp_path_factory.mktemp("saved") / "lynx"
    save(make(RECIPES["fp8, refit and low-rank"]), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "lynx")


def refused(folder, match="", model=None, build=tiny_flux):
    """Load into a fresh model, which must be refused in one line and leave the model dense."""
    model = build() if model is None else model
    with pytest.raises(CheckpointError, match=match) as error:
        load(model, folder)
    assert "\n" not in str(error.value)
    assert_dense(model, build)


def sign(folder, **changes):
    """Write `changes` into the index, with digests that match: damage that no digest can tell."""
    path = folder / "rtlynx.json"
    body = json.loads(path.read_text())
    body.update(changes)
    body["tensors_sha256"] = hashlib.sha256((folder / "rtlynx.safetensors").read_bytes()).hexdigest()
    body.pop("sha256")
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(body))


# ----------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip_gives_identical_outputs(tmp_path, name):
    model = make(RECIPES[name])
    save(model, tmp_path / "lynx")
    other = tiny_flux()
    assert load(other, tmp_path / "lynx") is other
    assert list(sparse_layers(other)) == list(sparse_layers(model))
    for ours, theirs in zip(outputs(other), outputs(model), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = state_of(other).plan, state_of(model).plan
    assert ours.recipe == theirs.recipe == RECIPES[name]
    reasons = [[(layer.name, layer.dense_reason) for layer in plan.layers] for plan in (ours, theirs)]
    assert reasons[0] == reasons[1]
    assert {path.name for path in (tmp_path / "lynx").iterdir()} == {"rtlynx.json", "rtlynx.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["lynx"]


@pytest.mark.parametrize(
    ("build", "call"),
    [MODELS["flux2"], MODELS["qwen"], MODELS["wan"], (lambda: tiny_z_image(dim=128), z_image_call)],
)
def test_round_trip_of_the_other_architectures(tmp_path, build, call):
    model = make(Recipe(rank=4, ridge=RIDGE, intercept=True), build, call)
    save(model, tmp_path / "lynx")
    other = load(build(), tmp_path / "lynx")
    assert torch.equal(output(other, call(9)), output(model, call(9)))


def test_a_loaded_model_can_be_saved_again_and_made_dense(folder, tmp_path):
    model = load(tiny_flux(), folder)
    save(model, tmp_path / "again")
    for name in ("rtlynx.json", "rtlynx.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    kept = make(RECIPES["refit, dense steps and rows"])
    save(kept, tmp_path / "kept")
    assert_dense(densify(load(tiny_flux(), tmp_path / "kept")))


def test_files_hold_natural_column_order_and_only_what_is_needed(tmp_path):
    model = make(RECIPES["refit, dense steps and rows"])
    save(model, tmp_path / "refit")
    tensors = safetensors.torch.load_file(tmp_path / "refit" / "rtlynx.safetensors")
    expected = {
        f"{name}.{kind}" for name in sparse_layers(model) for kind in ("weight", "lowrank_a", "lowrank_b")
    }
    assert set(tensors) == expected  # not the original weights: the base model has them
    name = "single_transformer_blocks.0.proj_out"
    assert torch.equal(tensors[f"{name}.weight"], model.get_submodule(name).weight)
    save(make(RECIPES["immediate"]), tmp_path / "immediate")
    assert safetensors.torch.load_file(tmp_path / "immediate" / "rtlynx.safetensors") == {}


def test_quantised_weights_are_stored_in_eight_bits(saved_fp8):
    tensors = safetensors.torch.load_file(saved_fp8 / "rtlynx.safetensors")
    model = load(tiny_flux(), saved_fp8)
    for name, layer in sparse_layers(model).items():
        stored = tensors[f"{name}.weight"]
        assert stored.dtype == torch.float8_e4m3fn
        assert torch.equal(stored.view(torch.uint8), layer.weight.view(torch.uint8))
        assert torch.equal(tensors[f"{name}.weight_scale"], layer.weight_scale)
        assert tensors[f"{name}.weight_scale"].dtype == torch.float32
        assert layer.refitted is (layer.pattern.n < layer.pattern.m)
    with pytest.raises(RuntimeError, match="refitted without keeping"):
        densify(model)


def test_quantised_weights_survive_a_cast_base_model(saved_fp8):
    model = load(tiny_flux().to(torch.bfloat16), saved_fp8)
    layer = model.get_submodule("transformer_blocks.0.attn.to_q")
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert layer.lowrank_b.dtype == layer.bias.dtype == torch.bfloat16


def test_a_checkpoint_of_the_first_version_still_loads(folder):
    path = folder / "rtlynx.json"
    body = json.loads(path.read_text())
    expected = outputs(load(tiny_flux(), folder))
    layers = {
        name: {key: value for key, value in entry.items() if key != "precision"}
        for name, entry in body["layers"].items()
    }
    recipe = {key: value for key, value in body["recipe"].items() if key not in ("precision", "forms")}
    sign(folder, version=1, layers=layers, recipe=recipe)
    model = load(tiny_flux(), folder)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), expected, strict=True))


def test_a_pipeline_stands_for_its_transformer(folder, tmp_path):
    class Pipeline:
        def __init__(self):
            self.transformer = tiny_flux()

    pipeline = Pipeline()
    assert load(pipeline, folder) is pipeline
    assert len(sparse_layers(pipeline.transformer)) == 11
    save(pipeline, tmp_path / "again")
    assert (tmp_path / "again" / "rtlynx.json").read_bytes() == (folder / "rtlynx.json").read_bytes()


def test_a_cast_base_model_is_the_same_base(folder):
    model = load(tiny_flux().to(torch.bfloat16), folder)
    layer = model.get_submodule("transformer_blocks.0.attn.to_q")
    assert layer.weight.dtype == layer.lowrank_b.dtype == torch.bfloat16


# --------------------------------------------------------------------------------- another, or missing


def test_a_missing_folder_or_file(folder, tmp_path):
    refused(tmp_path / "nowhere", "nowhere is not a folder")
    refused(folder / "rtlynx.json", "is not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"rtlynx\.json is missing")
    (folder / "rtlynx.safetensors").unlink()
    refused(folder, r"rtlynx\.safetensors is missing")


def test_another_architecture(folder):
    refused(folder, "made for FluxTransformer2DModel, this is QwenImageTransformer2DModel", build=tiny_qwen)


def test_another_size(folder):
    def wide():
        return tiny_flux(num_attention_heads=8)

    refused(
        folder,
        r"another size: transformer_blocks\.0\.attn\.to_q maps 128 -> 128 there, 256 -> 256",
        build=wide,
    )

    def shallow():
        return tiny_flux(num_single_layers=0)

    refused(folder, r"another architecture: this model has no linear single_transf", build=shallow)


def test_other_base_weights(folder):
    refused(folder, "made for other weights", build=lambda: tiny_flux(seed=1))
    layer_name = "single_transformer_blocks.0.proj_out"

    def tuned():
        model = tiny_flux()
        with torch.no_grad():
            model.get_submodule(layer_name).weight.mul_(1.02)
        return model

    refused(folder, layer_name, build=tuned)


@pytest.mark.parametrize("version", [0, 8, "1", None])
def test_another_format_version(folder, version):
    sign(folder, version=version)
    refused(folder, f"format version {version}, this rtlynx reads versions 1 to 7")


def test_a_sparse_model_is_refused_and_unchanged(folder):
    model = make(RECIPES["immediate"])
    expected = outputs(model)
    with pytest.raises(ValueError, match="sparse already"):
        load(model, folder)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), expected, strict=True))


# --------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["rtlynx.json", "rtlynx.safetensors"])
def test_truncated_files(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, len(whole) // 3, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:length])
        refused(folder, name)
    path.write_bytes(whole + b"x")
    refused(folder, name)
    path.write_bytes(whole)
    assert len(sparse_layers(load(tiny_flux(), folder))) == 11


@pytest.mark.parametrize("name", ["rtlynx.json", "rtlynx.safetensors"])
def test_flipped_bits(folder, name):
    path = folder / name
    whole = path.read_bytes()
    spread = [*range(12), *range(12, len(whole), max(1, len(whole) // 24)), len(whole) - 2]
    for count, position in enumerate(spread):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (count % 8)
        if name.endswith("json") and whole[position] ^ damaged[position] == 0x20:
            damaged[position] ^= 0x21  # 1e-5 and 1E-5 are one number: flip another bit
        path.write_bytes(damaged)
        refused(folder, name)


def test_damage_that_the_digest_cannot_tell(folder):
    """Each file is well-formed and signed, but they do not belong together."""
    path = folder / "rtlynx.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "transformer_blocks.0.attn.to_q"
    damage = {
        "missing tensor": {k: v for k, v in tensors.items() if k != f"{name}.weight"},
        "weight of another shape": {**tensors, f"{name}.weight": torch.zeros(128, 64)},
        "factor of another shape": {**tensors, f"{name}.lowrank_b": torch.zeros(64, 6)},
        "factor of another rank": {**tensors, f"{name}.lowrank_a": torch.zeros(2, 128)},
    }
    for what, changed in damage.items():
        safetensors.torch.save_file(changed, path)
        sign(folder)
        model = tiny_flux()
        with pytest.raises(CheckpointError) as error:
            load(model, folder)
        assert "\n" not in str(error.value), what
        assert_dense(model)


def test_errors_of_layers_are_kept_where_they_are_known_and_checked(folder):
    index = json.loads((folder / "rtlynx.json").read_text())
    layers = index["layers"]
    found = state_of(load(tiny_flux(), folder)).errors
    assert found == {name: entry["error"] for name, entry in layers.items()}
    assert all(0 < error < 1 for error in found.values())
    name = "transformer_blocks.0.attn.to_q"
    for wrong in (-0.1, "small", True, None):
        layers[name]["error"] = wrong
        sign(folder, layers=layers)
        refused(folder, "unknown error .* of transformer_blocks.0.attn.to_q, should be a number")
    del layers[name]["error"]  # as in older files
    sign(folder, layers=layers)
    assert set(state_of(load(tiny_flux(), folder)).errors) == set(found) - {name}


def test_quantised_damage_that_the_digest_cannot_tell(saved_fp8, tmp_path):
    folder = shutil.copytree(saved_fp8, tmp_path / "lynx")
    path = folder / "rtlynx.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "transformer_blocks.0.attn.to_q"
    weight, scale = f"{name}.weight", f"{name}.weight_scale"
    damage = {
        "lacks the tensor": {k: v for k, v in tensors.items() if k != scale},
        r"weight_scale is \(3,\)": {**tensors, scale: torch.ones(3)},
        r"weight is torch.float32 in a layer of precision fp8": {**tensors, weight: tensors[weight].float()},
    }
    for match, changed in damage.items():
        safetensors.torch.save_file(changed, path)
        sign(folder)
        refused(folder, match)
    safetensors.torch.save_file(tensors, path)
    index = json.loads((folder / "rtlynx.json").read_text())
    index["layers"][name]["precision"] = "bf16"
    sign(folder, layers=index["layers"])
    refused(folder, "weight is torch.float8_e4m3fn in a layer of precision bf16")
    index["layers"][name]["precision"] = "fp4"
    sign(folder, layers=index["layers"])
    refused(folder, "unknown precision")


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": {"n": 9}},
        {"recipe": {"rnak": 9}},
        {"recipe": None},
        {"layers": []},
        {"layers": {"transformer_blocks.0.attn.to_q": {}}},
        {"dense": None},
        {"model": None},
        {"reads": {"transformer_blocks.0.attn.to_q": 3}},
    ],
)
def test_a_signed_index_that_makes_no_sense(folder, changes):
    sign(folder, **changes)
    refused(folder)


def test_a_signed_index_that_lacks_a_part(folder):
    whole = (folder / "rtlynx.json").read_text()
    for key in ("recipe", "layers", "dense", "model", "version", "format"):
        (folder / "rtlynx.json").write_text(
            json.dumps({k: v for k, v in json.loads(whole).items() if k != key})
        )
        sign(folder)
        refused(folder)


class Bomb:
    """Unpickling this leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_nothing_is_unpickled(folder, tmp_path, signed, form):
    bomb = Bomb(tmp_path / "exploded")
    target = folder / "rtlynx.safetensors"
    if form == "pickle":
        target.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, target)
    if signed:
        sign(folder)
    refused(folder, r"rtlynx\.safetensors is damaged")
    (folder / "rtlynx.json").write_bytes(pickle.dumps(bomb))
    refused(folder, r"rtlynx\.json is damaged")
    assert not bomb.path.exists()
