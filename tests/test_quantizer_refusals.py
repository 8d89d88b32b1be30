"""Folders that from_pretrained must not take, said in one line; and the registry that diffusers looks in."""

import hashlib
import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from checkpoint_helpers import RECIPES, make
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from helpers import tiny_flux
from quantizer_helpers import E4M3, PROJ_OUT, TO_Q, config_of

import rtlynx.io.quantizer
from rtlynx import CheckpointError, RTLynxConfig, sparsify


def quantization(folder, sign=True, **changes):
    """Change a folder's `quantization_config`, with a digest that matches unless told."""
    config = config_of(folder)
    body = {**config["quantization_config"], **changes}
    method, digest = body.pop("quant_method"), body.pop("sha256")
    if sign:
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    config["quantization_config"] = {"quant_method": method, **body, "sha256": digest}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def refitted():
    return make(RECIPES["refit and low-rank"])


# ----------------------------------------------------------------------------- damage, and another's files


@pytest.fixture
def folder(refitted, tmp_path):
    refitted.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(folder, match, cls=FluxTransformer2DModel):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=match) as error:
        cls.from_pretrained(folder)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    sparsify(tiny_flux())  # what was refused leaves no trace


def test_a_newer_format_is_refused(folder):
    quantization(folder, version=8, rtlynx="9.1")
    refused(folder, r"config\.json is of format version 8, this rtlynx reads versions 1 to 7: .* rtlynx 9\.1")


def test_an_edited_plan_is_refused(folder):
    layers = config_of(folder)["quantization_config"]["layers"]
    layers[PROJ_OUT]["pattern"]["grouping"] = "adjacent"
    quantization(folder, sign=False, layers=layers)
    refused(folder, r"config\.json is damaged: its content does not match its digest")


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": {"rnak": 9}},
        {"recipe": None},
        {"layers": []},
        {"layers": {TO_Q: {}}},
        {"layers": {"transformer_blocks.0.attn.to_x": {"in_features": 1, "out_features": 1}}},
        {"dense": None},
        {"model": None},
        {"format": "lynxes"},
    ],
    ids=str,
)
def test_a_plan_that_makes_no_sense_is_refused(folder, changes):
    quantization(folder, **changes)
    refused(folder, "model")


def test_a_plan_for_another_class_is_refused(folder):
    quantization(folder, model="QwenImageTransformer2DModel")
    refused(folder, "made for QwenImageTransformer2DModel, this is FluxTransformer2DModel")


def test_tensors_that_do_not_fit_the_plan_are_refused(folder, tmp_path):
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    weight, lowrank_b, extra = f"{TO_Q}.weight", f"{TO_Q}.lowrank_b", f"{TO_Q}.weight_scale"
    damage = {
        rf"lacks {TO_Q}.lowrank_b": {k: v for k, v in tensors.items() if k != lowrank_b},
        rf"lacks {TO_Q}.lowrank_b and 1 more": {
            k: v for k, v in tensors.items() if k not in (lowrank_b, weight)
        },
        rf"has {TO_Q}.weight_scale, which": {**tensors, extra: torch.ones(128)},
        r"weight is \(128, 64\), should be \(128, 128\)": {**tensors, weight: torch.zeros(128, 64)},
        r"lowrank_b is \(64, 6\), should be": {**tensors, lowrank_b: torch.zeros(64, 6)},
        r"weight is torch.float8_e4m3fn in a layer of precision bf16": {
            **tensors,
            weight: tensors[weight].to(E4M3),
        },
        "files of two models": {**tensors, weight: tiny_flux().get_submodule(TO_Q).weight.detach()},
    }
    for match, changed in damage.items():
        safetensors.torch.save_file(changed, path, {"format": "pt"})
        refused(folder, match)
    make(RECIPES["fp8, refit and low-rank"]).save_pretrained(tmp_path / "fp8")
    path = tmp_path / "fp8" / path.name
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, weight: tensors[weight].float()}, path, {"format": "pt"})
    refused(tmp_path / "fp8", "weight is torch.float32 in a layer of precision fp8")


def test_a_missing_shard_of_a_sparse_layer_is_refused(refitted, tmp_path):
    refitted.save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"][f"{TO_Q}.weight"]
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file != shard}
    index.write_text(json.dumps(content))
    (tmp_path / shard).unlink()
    refused(tmp_path, rf"lacks .*{TO_Q}.*fetch or copy the folder again")


def test_ways_around_the_loader_are_refused(folder):
    with pytest.raises(CheckpointError, match="without offload_state_dict"):
        FluxTransformer2DModel.from_pretrained(folder, offload_state_dict=True)
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        FluxTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False)


# ------------------------------------------------------------------------------------------ registration


def test_registering_again_changes_nothing():
    configs, quantizers = dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)
    assert configs["rtlynx"] is RTLynxConfig
    rtlynx.io.quantizer.register()
    assert (configs, quantizers) == (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)
    assert RTLynxConfig().quant_method.value == RTLynxConfig().quant_method == "rtlynx"


def test_a_diffusers_without_the_registry_breaks_nothing_else(tmp_path):
    script = f"""
import sys
sys.modules["diffusers.quantizers.auto"] = None
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
import rtlynx, torch
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
rtlynx.densify(rtlynx.sparsify(model))
try:
    rtlynx.RTLynxConfig()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "does not know the quantizers of diffusers" in done.stdout
    assert "rtlynx.load" in done.stdout
