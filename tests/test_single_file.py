"""Models from single files, in the formats that their makers publish: as those from folders of diffusers."""

import pytest
import torch
from helpers import in_dtype, output, relative_error
from safetensors.torch import save_file
from single_file_formats import FORMATS, MODELS, read_narrow

from rtlynx import (
    CalibrationOptions,
    CheckpointError,
    Recipe,
    RTLynxConfig,
    calibrate,
    load,
    save,
    sparsify,
)
from rtlynx.models import sparse_layers

ROUNDING = 2e-6  # a file's tensors lie elsewhere in memory, where CPU kernels add up in another order


@pytest.fixture(scope="module", params=FORMATS)
def files(request, tmp_path_factory):
    """(name, loads the model from its single file)."""
    folder, (build, _) = tmp_path_factory.mktemp("single"), MODELS[request.param]
    model = build()
    model.save_config(folder)
    tensors = FORMATS[request.param](model.state_dict())
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")

    def load_file(**settings):
        path = str(folder / "model.safetensors")
        return type(model).from_single_file(path, config=str(folder), **settings)

    with pytest.MonkeyPatch.context() as monkeypatch:
        read_narrow(monkeypatch, model)
        yield request.param, load_file


def test_it_is_calibrated_saved_and_loaded_into_models_of_either_kind(files, tmp_path):
    name, load_file = files
    build, call = MODELS[name]
    model = load_file()
    assert relative_error(output(model, call()), output(build(), call())) < ROUNDING
    recipe, options = Recipe(rank=None, ridge=0.1, precision="fp8"), CalibrationOptions(heldout=0.0)
    calibrate(model, calls=[call(0), call(1)], recipe=recipe, options=options, progress=False)
    save(model, tmp_path / "lynx")
    y = output(model, call())
    assert torch.equal(output(load(load_file(), tmp_path / "lynx"), call()), y)
    of_folder = load(build(), tmp_path / "lynx")
    assert relative_error(output(of_folder, call()), y) < 5e-3  # an entry of e4m3 may take the next step
    save(of_folder, tmp_path / "again")
    assert torch.equal(output(load(load_file(), tmp_path / "again"), call()), y)
    model.save_pretrained(tmp_path / "whole")
    assert relative_error(output(type(model).from_pretrained(tmp_path / "whole"), call()), y) < 5e-3


def test_it_is_made_sparse_while_it_loads(files, tmp_path):
    name, load_file = files
    call = in_dtype(MODELS[name][1](), torch.bfloat16)
    recipe = Recipe.immediate(precision="fp8")
    expected = sparsify(load_file(torch_dtype=torch.bfloat16), recipe)
    save(expected, tmp_path / "lynx")
    for config in (RTLynxConfig(recipe), RTLynxConfig(sidecar=tmp_path / "lynx")):
        model = load_file(torch_dtype=torch.bfloat16, quantization_config=config)
        assert sparse_layers(model).keys() == sparse_layers(expected).keys()
        # (With a quantizer diffusers keeps float32 what Wan wants so, here as in from_pretrained.)
        assert relative_error(output(model, call), output(expected, call)) < (1e-2 if name == "wan" else 1e-9)


def test_a_checkpoint_of_other_weights_is_refused(files, tmp_path):
    name, load_file = files
    save(sparsify(MODELS[name][0](seed=1)), tmp_path / "lynx")
    with pytest.raises(CheckpointError, match="other weights"):
        load(load_file(), tmp_path / "lynx")
    with pytest.raises(CheckpointError, match="other weights"):
        load_file(quantization_config=RTLynxConfig(sidecar=tmp_path / "lynx"))
