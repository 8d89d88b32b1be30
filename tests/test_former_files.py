"""Files and state dicts of earlier versions load: other names of tensors and settings, no score."""

import hashlib
import json

import pytest
import torch
from checkpoint_helpers import RIDGE, make
from diffusers import FluxTransformer2DModel
from helpers import flux_call, output, tiny_flux
from safetensors.torch import load_file, save_file

from rtlynx import Budget, Recipe, load, save

FORMER = {"lowrank_a": "lowrank_down", "lowrank_b": "lowrank_up"}
RECIPE = Recipe(rank=4, ridge=RIDGE, budget=Budget(speedup_share=0.9), formats={"*.to_v": "dense"})


@pytest.fixture(scope="module")
def calibrated():
    return make(RECIPE)


def former_key(key):
    layer, _, name = key.rpartition(".")
    return f"{layer}.{FORMER.get(name, name)}"


def former_file(path):
    """Rename the tensors of a file as version 2 called them."""
    tensors = {former_key(key): tensor for key, tensor in load_file(path).items()}
    assert any("lowrank_down" in key for key in tensors)
    save_file(tensors, path, {"format": "rtlynx"})
    return hashlib.sha256(path.read_bytes()).hexdigest()


def former_index(index):
    """An index as version 2 wrote it, signed."""
    index = {key: value for key, value in index.items() if key != "sha256"} | {"version": 2}
    recipe = index["recipe"]
    recipe["forms"] = recipe.pop("formats")
    recipe["budget"]["saving"] = recipe["budget"].pop("speedup_share")
    for setting in ("score", "intercept", "rotate_values", "permute_hidden"):
        del recipe[setting]
    for entry in index["layers"].values():
        del entry["pattern"]["score"], entry["intercept"]
    if "tensors" in index:
        index["tensors"] = {former_key(key): digest for key, digest in index["tensors"].items()}
    return index | {"sha256": hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()}


def version_4(index):
    """An index of rotated values as version 4 wrote it, signed."""
    index = {key: value for key, value in index.items() if key != "sha256"} | {"version": 4}
    del index["recipe"]["permute_hidden"], index["permutations"]
    index["rotated_tensors"] = index.pop("reparameterized_tensors")
    return index | {"sha256": hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()}


def test_rotated_values_of_version_4(tmp_path):
    model = make(Recipe(rank=4, ridge=RIDGE, rotate_values=True, intercept=True))
    save(model, tmp_path)
    path = tmp_path / "rtlynx.json"
    path.write_text(json.dumps(version_4(json.loads(path.read_text()))))
    assert torch.equal(output(load(tiny_flux(), tmp_path), flux_call()), output(model, flux_call()))


def test_a_whole_model_with_rotated_values_of_version_4(tmp_path):
    model = make(Recipe.immediate(rotate_values=True))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    quantization = config["quantization_config"]
    kept = {"quant_method": quantization.pop("quant_method")}
    config["quantization_config"] = kept | version_4(quantization)
    path.write_text(json.dumps(config))
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(output(again, flux_call()), output(model, flux_call()))
    again.save_pretrained(tmp_path / "again")  # (which knows the rotated layers that stayed dense)
    assert torch.equal(
        output(FluxTransformer2DModel.from_pretrained(tmp_path / "again"), flux_call()),
        output(model, flux_call()),
    )


def test_a_sidecar(calibrated, tmp_path):
    save(calibrated, tmp_path)
    index = json.loads((tmp_path / "rtlynx.json").read_text())
    index["tensors_sha256"] = former_file(tmp_path / "rtlynx.safetensors")
    (tmp_path / "rtlynx.json").write_text(json.dumps(former_index(index)))
    again = load(tiny_flux(), tmp_path)
    assert torch.equal(output(again, flux_call()), output(calibrated, flux_call()))


def test_a_whole_model(calibrated, tmp_path):
    calibrated.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = config["quantization_config"]
    kept = {"quant_method": quantization.pop("quant_method")}
    config["quantization_config"] = kept | former_index(quantization)
    (tmp_path / "config.json").write_text(json.dumps(config))
    former_file(tmp_path / "diffusion_pytorch_model.safetensors")
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(output(again, flux_call()), output(calibrated, flux_call()))


def test_a_state_dict(calibrated):
    state = {
        former_key(key): tensor + 1 for key, tensor in calibrated.state_dict().items() if "lowrank" in key
    }
    state = {**{key: one for key, one in calibrated.state_dict().items() if "lowrank" not in key}, **state}
    twin = make(RECIPE)
    twin.load_state_dict(state)
    for key, tensor in twin.state_dict().items():
        expected = calibrated.state_dict()[key]
        assert torch.equal(tensor, expected + 1 if "lowrank" in key else expected)
