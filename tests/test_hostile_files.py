"""Files that were damaged or made to do harm: refused by name in one line, or the same model to the bit."""

import hashlib
import json
import os
import re
import shutil
import socket
import time

import pytest
import safetensors.torch
import torch
from checkpoint_helpers import RECIPES, make
from diffusers import FluxTransformer2DModel
from helpers import flux_call, output, tiny_flux
from mutations import change_json, change_tensors, flip, rng, signed, truncate

from rtlynx import CheckpointError, Recipe, RTLynxConfig, load, save, sparsify
from rtlynx.models import sparse_layers, state_of

INDEX, TENSORS = "rtlynx.json", "rtlynx.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TO_Q = "transformer_blocks.0.attn.to_q"
# Damaged files of each test: of each kind of damage several dozen; hostile values in turn.
SIDECARS, MODELS = 200, 160


# No digest tells these when the file is signed anew: numbers like any other.
def plausible(how, name):
    return how == "swapped" or (how in ("sign", "zero") and not name.endswith("_scale"))


@pytest.fixture(scope="module")
def sparse():
    return make(RECIPES["every format"])


@pytest.fixture
def folder(sparse, tmp_path):
    save(sparse, tmp_path / "lynx")
    return tmp_path / "lynx"


@pytest.fixture
def whole(sparse, tmp_path):
    sparse.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(folder, match=None, names=INDEX):
    """Refused within a second, in one line that names the file, and the model stays dense."""
    model, start = tiny_flux(), time.monotonic()
    with pytest.raises(CheckpointError, match=match) as error:
        load(model, folder)
    assert time.monotonic() - start < 5
    assert names in str(error.value)
    assert "\n" not in str(error.value)
    assert state_of(model) is None


def sign(folder, **changes):
    body = json.loads((folder / INDEX).read_text())
    body = signed({**body, **changes, "tensors_sha256": digest((folder / TENSORS).read_bytes())})
    (folder / INDEX).write_text(json.dumps(body))


def digest(data):
    return hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------------ random damage


def mutated_sidecar(seed, index, tensors):
    random, kind = rng(seed), seed % 5
    if kind < 2:
        damage = (flip, truncate)[kind]
        return (damage(random, index), tensors) if seed % 2 else (index, damage(random, tensors))
    if kind == 2:
        tensors, how, name = change_tensors(random, tensors)
        if not plausible(how, name):
            index = json.dumps(signed({**json.loads(index), "tensors_sha256": digest(tensors)})).encode()
        return index, tensors
    body, _ = change_json(random, json.loads(index), keep=("dense_steps", "sha256"), number=seed // 5)
    return json.dumps(signed(body)).encode(), tensors


def test_mutated_sidecars_are_refused_or_right(folder):
    index, tensors = (folder / INDEX).read_bytes(), (folder / TENSORS).read_bytes()
    expected = output(load(tiny_flux(), folder), flux_call(9))
    model, said, unchanged = tiny_flux(), [], True
    for seed in range(SIDECARS):
        for name, data in zip((INDEX, TENSORS), mutated_sidecar(seed, index, tensors), strict=True):
            (folder / name).write_bytes(data)
        try:
            load(model, folder)
        except CheckpointError as error:
            said.append(str(error))
            unchanged = unchanged and state_of(model) is None
        else:
            assert torch.equal(output(model, flux_call(9)), expected), seed
            model = tiny_flux()
    assert unchanged
    assert 0.9 * SIDECARS < len(said) < 0.995 * SIDECARS
    assert not [one for one in said if "\n" in one or str(folder) not in one]


def mutated_model(seed, config, weights):
    random, kind = rng(seed), seed % 4
    stored = config["quantization_config"]
    if kind == 0:  # the numbers: what diffusers cannot read at all, it refuses itself
        start = 8 + int.from_bytes(weights[:8], "little")
        return config, weights[:start] + flip(random, weights[start:])
    if kind == 1:
        return config, change_tensors(random, weights)[0]
    if kind == 2:
        layers = stored["layers"]
        told = [
            name for name in stored["tensors"] if name.rpartition(".")[0] in layers and "bias" not in name
        ]
        weights, how, name = change_tensors(random, weights, told)
        if not plausible(how, name):  # as if its files knew no digests
            stored = signed({key: value for key, value in stored.items() if key != "tensors"})
    else:
        keep = ("dense_steps", "quant_method", "sha256")
        stored = signed(change_json(random, stored, keep, number=seed // 4)[0])
    return {**config, "quantization_config": {**stored, "quant_method": "rtlynx"}}, weights


def test_mutated_models_are_refused_or_right(whole):
    config, weights = json.loads((whole / "config.json").read_text()), (whole / WEIGHTS).read_bytes()
    expected = output(FluxTransformer2DModel.from_pretrained(whole), flux_call(9))
    said = []
    for seed in range(MODELS):
        changed, data = mutated_model(seed, config, weights)
        (whole / "config.json").write_text(json.dumps(changed))
        (whole / WEIGHTS).write_bytes(data)
        try:
            model = FluxTransformer2DModel.from_pretrained(whole)
        except CheckpointError as error:
            said.append(str(error))
        else:
            assert torch.equal(output(model, flux_call(9)), expected), seed
    assert 0.7 * MODELS < len(said) < 0.995 * MODELS
    assert not [one for one in said if "\n" in one or not re.search(r"model|config\.json", one)]


# ------------------------------------------------------------------------------------------ no such files


def fifo(path):
    os.mkfifo(path)


def zeros(path):
    path.symlink_to("/dev/zero")


def listening(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


def loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize("name", [INDEX, TENSORS])
@pytest.mark.parametrize("put", [fifo, zeros, listening, loop, os.mkdir])
def test_what_is_no_regular_file_is_refused_at_once(folder, name, put):
    (folder / name).unlink()
    put(folder / name)
    refused(folder, "not a regular file|cannot be read", names=name)


def test_links_to_files_are_followed(folder, tmp_path, sparse):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(f"../blobs/{number}")
    model = load(tiny_flux(), folder)
    assert torch.equal(output(model, flux_call(9)), output(sparse, flux_call(9)))


def test_an_endless_tensors_file_is_not_read(folder):
    os.truncate(folder / TENSORS, 1 << 40)  # all holes
    refused(folder, "bytes are more than its layers can fill", names=TENSORS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "damaged"),
        ('{"a":' * 100_000, "damaged"),
        ("9" * 5000, "5000 digits"),
        ('{"format": "rtlynx", "format": "rtlynx"}', "a key twice"),
        ('{"format": NaN}', "not finite"),
        ('{"format": 1e999}', "not finite"),
        ("[]", "not an rtlynx checkpoint"),
        ('"rtlynx"', "not an rtlynx checkpoint"),
        (" " * (17 << 20), "larger than 16 MB"),
        ("\ufeff{}", "damaged"),
    ],
    ids=range(10),
)
def test_json_that_only_hurts(folder, text, said):
    (folder / INDEX).write_text(text)
    refused(folder, said)


# ------------------------------------------------------------------------------ signed, and still nonsense


@pytest.mark.parametrize("number", [2**31, 2**62, 2**63, 10**300])
@pytest.mark.parametrize("where", ["rank", "in_features", "out_features", "parts", "widths", "n", "m"])
def test_huge_numbers_of_a_layer(folder, number, where):
    layers = json.loads((folder / INDEX).read_text())["layers"]
    entry = layers[TO_Q]
    if where in ("n", "m"):
        entry["pattern"][where] = number
    elif where in ("parts", "widths"):
        entry["pattern"].update(grouping="strided", parts=number if where == "parts" else [number, number])
    else:
        entry[where] = number
    sign(folder, layers=layers)
    refused(folder, "damaged")


@pytest.mark.parametrize(
    "changes",
    [
        {"tp_degree": 2**63},
        {"tp_degree": 2**40, "grouping": "strided"},
        {"skip": ["*"] * 100_000},
        {"skip": ["*a" * 2000]},
        {"forms": {"x" * 3000: "dense"}},
        {"x" * 4000: 1},
        {"rank": [1]},
        {"budget": {"saving": "all"}},
    ],
    ids=range(8),
)
def test_a_recipe_that_would_hang(folder, changes):
    recipe = json.loads((folder / INDEX).read_text())["recipe"]
    sign(folder, recipe={**recipe, **changes})
    refused(folder, "damaged")
    with pytest.raises(ValueError, match="tp_degree"):
        Recipe(tp_degree=2**63)


BAD_NUMBERS = {
    "NaN": ("weight", lambda w: torch.full_like(w.float(), float("nan")).to(w.dtype), "NaN"),
    "a negative NaN": ("weight", lambda w: (w.view(torch.uint8) | 0xFF).view(w.dtype), "NaN"),
    "Inf": ("lowrank_b", lambda w: w / 0, "not finite"),
    "float64": ("lowrank_a", lambda w: w.double(), "float64"),
    "whole": ("lowrank_a", lambda w: w.int(), "int32"),
    "complex": ("lowrank_b", lambda w: w.to(torch.complex64), "complex64"),
    "a negative scale": ("weight_scale", lambda w: -w, "scales are above 0"),
    "a scale of zero": ("weight_scale", lambda w: w * (torch.arange(len(w)) > 0), "scales are above 0"),
    "an infinite scale": ("weight_scale", lambda w: w / 0, "not finite"),
    "a scale of another dtype": ("weight_scale", lambda w: w.bfloat16(), "bfloat16"),
}


@pytest.mark.parametrize("what", BAD_NUMBERS)
def test_numbers_that_no_layer_has(folder, whole, what):
    kind, change, said = BAD_NUMBERS[what]
    name = f"{TO_Q}.{kind}"
    tensors = safetensors.torch.load_file(folder / TENSORS)
    safetensors.torch.save_file({**tensors, name: change(tensors[name])}, folder / TENSORS)
    sign(folder)
    refused(folder, f"{name} .*{said}", names=TENSORS)
    config = json.loads((whole / "config.json").read_text())
    del config["quantization_config"]["tensors"]
    config["quantization_config"] = {**signed(config["quantization_config"]), "quant_method": "rtlynx"}
    (whole / "config.json").write_text(json.dumps(config))
    tensors = safetensors.torch.load_file(whole / WEIGHTS)
    safetensors.torch.save_file({**tensors, name: change(tensors[name])}, whole / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} .*{said}"):
        FluxTransformer2DModel.from_pretrained(whole)


def test_what_load_would_refuse_is_not_saved(tmp_path):
    model = make(RECIPES["refit"])
    with torch.no_grad():
        model.get_submodule(TO_Q).weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=rf"{TO_Q}\.weight holds numbers that are not finite"):
        save(model, tmp_path / "lynx")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- models of save_pretrained


def test_every_bit_of_a_model_is_signed(whole, tmp_path):
    data = (whole / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for seed in range(12):
        (whole / WEIGHTS).write_bytes(data[:start] + flip(rng(seed), data[start:]))
        with pytest.raises(CheckpointError, match=r"is not the tensor|holds NaN|finite|scales are above 0"):
            FluxTransformer2DModel.from_pretrained(whole)


def test_a_changed_setting_of_a_model_is_refused(whole):
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, "axes_dims_rope": [12, 12, 8]}))
    with pytest.raises(CheckpointError, match=r"config\.json: axes_dims_rope is \[12, 12, 8\]"):
        FluxTransformer2DModel.from_pretrained(whole)


def test_shards_and_dtypes_are_other_forms_of_the_same(sparse, whole, tmp_path):
    sparse.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        one, many = (
            FluxTransformer2DModel.from_pretrained(path, torch_dtype=dtype)
            for path in (whole, tmp_path / "shards")
        )
        for name, tensor in one.state_dict().items():
            assert torch.equal(many.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_model_without_digests_still_loads(sparse, whole):
    config = json.loads((whole / "config.json").read_text())
    old = {
        k: v
        for k, v in config["quantization_config"].items()
        if k not in ("tensors", "config", "base_tensors")
    }
    config["quantization_config"] = {**signed(old), "quant_method": "rtlynx"}
    (whole / "config.json").write_text(json.dumps(config))
    model = FluxTransformer2DModel.from_pretrained(whole)
    assert torch.equal(output(model, flux_call(9)), output(sparse, flux_call(9)))
    save(model, whole.parent / "again")  # knows no base model, and says none
    assert "base_tensors" not in json.loads((whole.parent / "again" / INDEX).read_text())
    assert len(sparse_layers(load(tiny_flux(), whole.parent / "again"))) == len(sparse_layers(sparse))


# ------------------------------------------------------------------- a sidecar that a model's config names


@pytest.fixture
def dense(tmp_path):
    tiny_flux().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def name_sidecar(dense, **settings):
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "rtlynx", **settings}
    (dense / "config.json").write_text(json.dumps(config))


def test_a_sidecar_inside_the_folder_of_the_file(dense, sparse, folder):
    shutil.copytree(folder, dense / "lynx")
    name_sidecar(dense, sidecar="lynx")
    model = FluxTransformer2DModel.from_pretrained(dense)
    assert torch.equal(output(model, flux_call(9)), output(sparse, flux_call(9)))


@pytest.mark.parametrize("path", ["../lynx", "lynx/../../lynx", "link", None, "\0", "x" * 5000, "\n"])
def test_a_sidecar_elsewhere_is_refused(dense, folder, path):
    (dense / "link").symlink_to(folder)
    name_sidecar(dense, sidecar=str(folder) if path is None else path)
    with pytest.raises(CheckpointError, match=r"config\.json names a sidecar outside") as error:
        FluxTransformer2DModel.from_pretrained(dense)
    assert "\n" not in str(error.value)


def test_the_caller_may_name_any_sidecar(dense, folder):
    for config in (RTLynxConfig(sidecar=folder), {"quant_method": "rtlynx", "sidecar": str(folder)}):
        assert state_of(FluxTransformer2DModel.from_pretrained(dense, quantization_config=config))


@pytest.mark.parametrize(
    "settings",
    [
        {"sidecar": 5},
        {"sidecar": ["x"]},
        {"recipe": [1]},
        {"recipe": {"tp_degree": 2**63}},
        {"recipe": 5},
        {"x": 1},
    ],
    ids=str,
)
def test_settings_of_a_config_that_make_no_sense(dense, settings):
    name_sidecar(dense, **settings)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        FluxTransformer2DModel.from_pretrained(dense)
    sparsify(tiny_flux())
