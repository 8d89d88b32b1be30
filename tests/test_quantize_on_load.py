"""Dense checkpoints that become eight bits layer by layer as they load: the same bits, and less memory."""

import gc
from itertools import accumulate

import accelerate.utils.modeling
import pytest
import safetensors.torch
import torch
from accelerate.utils.modeling import compute_module_sizes
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from diffusers.models import modeling_utils
from helpers import MODELS, tiny_flux
from quantizer_helpers import E4M3, TO_Q, assert_same, stored_tensors
from torch.profiler import ProfilerActivity, profile

import rtlynx.math.fp8
from rtlynx import Recipe, RTLynxConfig, save, sparsify
from rtlynx.io.quantize_on_load import QuantizeOnLoad
from rtlynx.models import sparse_layers, state_of

RECIPES = {
    "dense fp8": Recipe.dense_fp8(),
    "dense fp8, modulation": Recipe.dense_fp8(modulation="fp8"),
    "fp8": Recipe.immediate(precision="fp8", grouping="strided"),
    "originals in bf16": Recipe.immediate(precision="fp8", dense_steps=1, text_rows="dense"),
    "originals in fp8": Recipe.immediate(
        precision="fp8", dense_steps=1, text_rows="dense", dense_precision="fp8"
    ),
    "formats": Recipe.immediate(
        dense_last_steps=1,
        dense_precision="fp8",
        skip=("*.to_v",),
        formats={"*.to_q": "fp8-sparse", "*.to_k": "fp8-dense", "*.proj_mlp": "dense"},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_flux().save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def from_pretrained(folder, recipe, kind=FluxTransformer2DModel, **settings):
    return kind.from_pretrained(folder, quantization_config=RTLynxConfig(recipe), **settings)


def assert_made_alike(ours, theirs, folder, *call):
    """Also in what is known of the weights that are not there any more."""
    assert_same(ours, theirs, *call)
    flags = [[one.requires_grad for one in model.parameters()] for model in (ours, theirs)]
    assert flags[0] == flags[1]
    for name, model in (("ours", ours), ("theirs", theirs)):
        save(model, folder / name)
    for file in ("rtlynx.json", "rtlynx.safetensors"):
        assert (folder / "ours" / file).read_bytes() == (folder / "theirs" / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_it_is_what_sparsify_makes_of_the_loaded_model(folder, tmp_path, recipe, dtype):
    loaded = from_pretrained(folder, recipe, torch_dtype=dtype)
    assert_made_alike(loaded, sparsify(tiny_flux().to(dtype), recipe), tmp_path)
    assert any(layer.format.quantized for layer in sparse_layers(loaded).values())
    tensors = loaded.state_dict().values()
    assert len({one.untyped_storage().data_ptr() for one in tensors}) == len(tensors)
    loaded.save_pretrained(tmp_path / "whole")
    assert_same(FluxTransformer2DModel.from_pretrained(tmp_path / "whole", torch_dtype=dtype), loaded)


@pytest.mark.parametrize("name", ["flux2", "qwen", "wan"])  # without bias; two streams; float32 kept
def test_other_models(tmp_path, name):
    build, call = MODELS[name]
    dense = build()
    dense.save_pretrained(tmp_path / "dense")
    loaded = from_pretrained(tmp_path / "dense", Recipe.dense_fp8(), type(dense), torch_dtype=torch.bfloat16)
    plain = type(dense).from_pretrained(tmp_path / "dense", torch_dtype=torch.bfloat16)
    assert_made_alike(loaded, sparsify(plain, Recipe.dense_fp8()), tmp_path, call)


def test_files_read_in_parallel_and_a_device_map(folder, tmp_path, monkeypatch):
    expected = sparsify(tiny_flux(), Recipe.dense_fp8())
    assert_made_alike(from_pretrained(folder, Recipe.dense_fp8(), device_map="cpu"), expected, tmp_path)
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    assert_made_alike(from_pretrained(folder, Recipe.dense_fp8()), expected, tmp_path)


def test_low_cpu_mem_usage_cannot_be_left_out(folder):
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        from_pretrained(folder, Recipe.dense_fp8(), low_cpu_mem_usage=False)


# ---------------------------------------------------------------------------------------------- memory

LARGE = {"num_layers": 2, "num_single_layers": 6}
SHARD = 400_000  # bytes; the largest tensor has 393,216 in float32


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    tiny_flux(**LARGE).save_pretrained(folder, max_shard_size="300KB")
    return folder


def held(model):
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def memory(load):
    """The model that `load` gives, and the bytes of PyTorch's that it takes at most, and at last."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model = load()
        gc.collect()
    changes = [one.nbytes() for one in seen.profiler.kineto_results.events() if one.name() == "[memory]"]
    sums = list(accumulate(changes))
    return model, max(sums), sums[-1]


@pytest.mark.parametrize("name", ["dense fp8", "fp8", "originals in fp8"])
def test_the_dense_model_is_never_there_as_a_whole(large_folder, monkeypatch, name):
    """The file is in float32, so that all tensors in bfloat16 are new, as on a card."""
    monkeypatch.setattr(rtlynx.math.fp8, "_CHANNELS", 16)  # of layers with 128, as 2,048 of large ones
    dense = 2 * sum(one.numel() for one in tiny_flux(**LARGE).parameters())
    settings = {"torch_dtype": torch.bfloat16}
    model, most, at_last = memory(lambda: from_pretrained(large_folder, RECIPES[name], **settings))
    assert at_last <= held(model) + 1000  # no layer of the dense model is kept
    assert most < held(model) + 2 * SHARD
    if name != "originals in fp8":
        assert most < 0.8 * dense


def test_a_device_map_is_chosen_for_eight_bits(large_folder):
    """The dense model does not fit the limit, the one that comes out does."""
    model = sparsify(tiny_flux(**LARGE).bfloat16(), Recipe.dense_fp8())
    limit = {"cpu": int(1.1 * held(model))}
    settings = {"torch_dtype": torch.bfloat16, "device_map": "auto", "max_memory": limit}
    assert_same(from_pretrained(large_folder, Recipe.dense_fp8(), **settings), model)
    with pytest.raises(ValueError, match="on the disk"):
        from_pretrained(large_folder, Recipe.immediate(), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RECIPES)
def test_a_device_map_counts_what_layers_will_hold(large_folder, monkeypatch, name, dtype):
    counted = []

    def watched(model, dtype=None, special_dtypes=None, **others):
        sizes = compute_module_sizes(model, dtype=dtype, special_dtypes=special_dtypes, **others)
        if model.__class__ is FluxTransformer2DModel and not others.get("buffers_only"):
            counted.append(sizes[""])
        return sizes

    monkeypatch.setattr(accelerate.utils.modeling, "compute_module_sizes", watched)
    settings = {"torch_dtype": dtype, "device_map": "auto", "max_memory": {"cpu": 10**9}}
    model = from_pretrained(large_folder, RECIPES[name], **settings)
    scales = sum(
        4 * len(scale)
        for layer in sparse_layers(model).values()
        for scale in (layer.weight_scale, layer.weight_dense_scale)
        if scale is not None
    )
    assert counted[0] == pytest.approx(held(model) - scales, rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_a_card_holds_eight_bits_and_one_layer(tmp_path):
    settings = {"num_layers": 2, "num_single_layers": 12, "num_attention_heads": 8, "attention_head_dim": 128}
    with torch.device("cuda"):
        dense = Flux2Transformer2DModel(in_channels=16, joint_attention_dim=64, **settings).bfloat16()
    dense.save_pretrained(tmp_path)
    whole, largest = held(dense), max(one.nbytes for one in dense.parameters())
    expected = sparsify(dense, Recipe.dense_fp8()).state_dict()
    expected = {name: tensor.cpu() for name, tensor in expected.items()}
    del dense
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = from_pretrained(
        tmp_path, Recipe.dense_fp8(), Flux2Transformer2DModel, torch_dtype=torch.bfloat16, device_map="cuda"
    )
    most, at_last = (one() - before for one in (torch.cuda.max_memory_allocated, torch.cuda.memory_allocated))
    # Beside the layer: its eight bits, and 2,048 of its rows in float32 a few times.
    assert most < held(loaded) + 6 * largest < 0.9 * whole
    assert at_last < held(loaded) + largest
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.cpu().view(torch.uint8), expected[name].view(torch.uint8)), name


# -------------------------------------------------------------------------------------------- refusals


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    model = tiny_flux()
    model.get_submodule(TO_Q).weight.data[77, 3] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{TO_Q}: the weight of output channel 77 holds NaN or Inf"):
        from_pretrained(tmp_path, Recipe.dense_fp8())


def test_a_file_that_holds_a_weight_in_eight_bits(tmp_path):
    """diffusers casts it, after all that is done while it loads."""
    rewritten(tmp_path, lambda weight: {f"{TO_Q}.weight": weight.to(E4M3)})
    settings = {"torch_dtype": torch.bfloat16}
    plain = FluxTransformer2DModel.from_pretrained(tmp_path, **settings)
    loaded = from_pretrained(tmp_path, Recipe.dense_fp8(), **settings)
    assert_made_alike(loaded, sparsify(plain, Recipe.dense_fp8()), tmp_path)


def test_a_weight_that_is_lost(tmp_path):
    rewritten(tmp_path, lambda _: {})
    with pytest.raises(ValueError, match=f'{TO_Q}.weight of .* is on "meta"'):
        from_pretrained(tmp_path, Recipe.dense_fp8())


def rewritten(folder, change):
    """Save a model with what `change` makes of one weight in its place."""
    tiny_flux().save_pretrained(folder)
    tensors = stored_tensors(folder)
    weight = tensors.pop(f"{TO_Q}.weight")
    safetensors.torch.save_file(tensors | change(weight), folder / "diffusion_pytorch_model.safetensors")


def test_layers_that_keep_their_weight_are_not_quantised_on_load(folder, monkeypatch):
    put = []
    monkeypatch.setattr(QuantizeOnLoad, "put", lambda *_: put.append(1))
    for recipe in (Recipe.immediate(), RECIPES["originals in bf16"]):
        loaded = from_pretrained(folder, recipe)
        assert state_of(loaded).plan.recipe == recipe
    assert not put
