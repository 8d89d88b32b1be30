"""Models from single files, in the formats that their makers publish: as those from folders of diffusers."""

import pytest
import torch
from helpers import MODELS, in_dtype, output, relative_error
from safetensors.torch import save_file

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


def z_image(state):
    """As Tongyi-MAI publishes it, with the prefix of ComfyUI: q, k and v in one."""
    names = {
        "all_final_layer.2-1.": "final_layer.",
        "all_x_embedder.2-1.": "x_embedder.",
        ".attention.to_out.0.": ".attention.out.",
        ".attention.norm_k.": ".attention.k_norm.",
        ".attention.norm_q.": ".attention.q_norm.",
        ".attention.to_q.": ".attention.qkv.",
    }
    found = {}
    for name, tensor in state.items():
        if ".attention.to_k." in name or ".attention.to_v." in name:
            continue
        if ".attention.to_q." in name:
            tensor = torch.cat([state[name.replace("to_q", f"to_{one}")] for one in "qkv"])
        for old, new in names.items():
            name = name.replace(old, new)
        found[f"model.diffusion_model.{name}"] = tensor
    return found


def flux2(state):
    """As Black Forest Labs publishes it: q, k and v in one, shift before scale."""
    double = {
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "attn.to_q": "img_attn.qkv",
        "attn.add_q_proj": "txt_attn.qkv",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
    }
    single = {
        "attn.to_qkv_mlp_proj": "linear1",
        "attn.to_out": "linear2",
        "attn.norm_q": "norm.query_norm",
        "attn.norm_k": "norm.key_norm",
    }
    outside = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    found = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if any(module.endswith(one) for one in (".to_k", ".to_v", ".add_k_proj", ".add_v_proj")):
            continue
        for q in ("to_q", "add_q_proj"):
            if module.endswith(f".{q}"):
                same = [name.replace(q, q.replace("q", one)) for one in "qkv"]
                tensor = torch.cat([state[one] for one in same])
        if module == "norm_out.linear":
            tensor = torch.cat(tensor.chunk(2)[::-1])
        parts = module.split(".", 2)
        for kept, block, table in (("transformer_blocks", "double_blocks", double),
                                   ("single_transformer_blocks", "single_blocks", single)):  # fmt: skip
            if parts[0] == kept:
                module = f"{block}.{parts[1]}.{table[parts[2]]}"
                kind = "scale" if "norm" in parts[2] else kind
        if parts[0].endswith(("_modulation", "_modulation_img", "_modulation_txt")):
            module = module.replace(".linear", ".lin")
        found[f"{outside.get(module, module)}.{kind}"] = tensor
    return found


# (FLUX.1's own format diffusers converts for a width of 3072 alone; files of its own names load as they are.)
FORMATS = {"z-image": z_image, "flux2": flux2, "qwen": dict, "flux": dict, "wan": dict}


@pytest.fixture(scope="module", params=FORMATS)
def files(request, tmp_path_factory):
    """(name, loads the model from its single file)."""
    folder, build = tmp_path_factory.mktemp("single"), MODELS[request.param][0]
    model = build()
    model.save_config(folder)
    tensors = FORMATS[request.param](model.state_dict())
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")

    def load_file(**settings):
        path = str(folder / "model.safetensors")
        return type(model).from_single_file(path, config=str(folder), **settings)

    return request.param, load_file


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
