"""LoRAs in fused blocks on the card: values, CUDA graphs, swaps in compiled blocks."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from fusion_helpers import RECIPES, check_loras, drop_weights, give_factors
from helpers import MODELS, flux_call, in_dtype, output, relative_error

from rtlynx import sparsify
from rtlynx.models import sparse_layers
from rtlynx.nn.prepared import PreparedInput
from rtlynx.nn.prologue import adaln, read

pytestmark = pytest.mark.gpu


def load(model, seed=0, rank=5, size=3.0, names=None, adapter="style", **kwargs):
    gen, state = torch.Generator().manual_seed(seed), {}
    for name in names or sparse_layers(model):
        name = name.removesuffix(".base_layer")
        layer = model.get_submodule(name)
        lowrank_a = torch.randn(rank, layer.in_features, generator=gen) * (size / layer.in_features)
        state[f"transformer.{name}.lora_A.weight"] = lowrank_a
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=gen)
    model.load_lora_adapter(state, adapter_name=adapter, **kwargs)


def sparse_model(name="flux", recipe="fp8"):
    make, call = MODELS[name]
    model = make().bfloat16().cuda()
    model = drop_weights(model) if recipe == "weights" else sparsify(model, RECIPES[recipe])
    return model, in_dtype(call(), torch.bfloat16, "cuda")


@pytest.fixture(autouse=True)
def _without_tf32():
    torch.backends.cuda.matmul.allow_tf32 = False  # (which monkeypatch cannot restore)


@pytest.mark.parametrize("recipe", [*RECIPES, "weights"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_fused_it_is_as_near_to_the_model_in_float32_as_with_peft(name, recipe):
    model, call = sparse_model(name, recipe)
    before = output(model, call)
    load(model, 1, 5, adapter="first")
    load(model, 2, 33, size=1.0, adapter="second")
    model.set_adapters(["first", "second"], [1.0, -0.75])
    y, exact, peft_error, layers = check_loras(model, call)
    assert layers >= 6
    assert bool(torch.isfinite(y).all())
    assert 1.4 * peft_error < 0.5 * relative_error(before, exact)


@pytest.mark.parametrize("own", [0, 24])
@pytest.mark.parametrize("tokens", [1, 77])
@pytest.mark.parametrize("recipe", ["bf16", "fp8", "whole", "weights"])
@pytest.mark.parametrize("ranks", [(0, 5, 0), (31, 2, 40), (33, 0, 64), (16, 16, 16)])
@torch.no_grad()
def test_each_reader_gets_its_own_loras_of_its_input(ranks, recipe, tokens, own):
    model, _ = sparse_model(recipe=recipe)
    if own:
        if recipe in ("whole", "weights"):
            pytest.skip("layers that drop nothing and have a branch of their own read the dense input")
        give_factors(model.cpu(), own)
        model.cuda()
    block = model.transformer_blocks[0]
    layers = {name: getattr(block.attn, name) for name in ("to_q", "to_k", "to_v")}
    x, shift, scale = (
        torch.randn(*s, device="cuda").bfloat16() for s in ((1, tokens, 128), (1, 128), (1, 128))
    )
    prologue = adaln(block.norm1.norm, x, shift, scale)
    plain = {name: layer(read(prologue, *layers.values())).double() for name, layer in layers.items()}
    for name, rank in zip(layers, ranks, strict=True):
        if rank:
            load(model, rank, rank, 3.0, [f"transformer_blocks.0.attn.{name}"], f"style_{name}")
    model.set_adapters(list(model.peft_config), -1.5)
    wrappers = [getattr(block.attn, name) for name in layers]
    prepared, dense = read(prologue, *wrappers), prologue.dense().double()
    assert isinstance(prepared, PreparedInput)
    if recipe in ("whole", "weights"):
        dense = prepared.quantized.dequantize().double()
    for name, wrapper, rank in zip(layers, wrappers, ranks, strict=True):
        expected = plain[name]
        if rank:
            a, b = (getattr(wrapper, part)[f"style_{name}"].weight.double() for part in ("lora_A", "lora_B"))
            expected = expected - 1.5 * dense @ a.T @ b.T
        assert relative_error(wrapper(prepared).double(), expected) < 1e-2, name


@pytest.mark.parametrize("recipe", ["fp8", "whole", "weights"])
@torch.no_grad()
def test_a_captured_step_replays_with_what_was_written_since(recipe):
    model, call = sparse_model(recipe=recipe)
    load(model)
    output(model, call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = output(model, call)
    for seed in (3, 4):
        load(model, seed, hotswap=True)
        for name, value in in_dtype(flux_call(seed), torch.bfloat16, "cuda").items():
            call[name].copy_(value)
        graph.replay()
        assert torch.equal(y, output(model, call))


@pytest.mark.parametrize(
    ("recipe", "mode"), [("fp8", "default"), ("mixed", "reduce-overhead"), ("weights", "reduce-overhead")]
)
@torch.no_grad()
def test_hot_swapped_in_compiled_blocks(recipe, mode):
    model, call = sparse_model(recipe=recipe)
    model.enable_lora_hotswap(target_rank=8)
    load(model, 1, 8, 10.0)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, mode=mode)
    first = output(model, call).clone()
    for seed in (2, 3):
        with torch._dynamo.config.patch(error_on_recompile=True):
            load(model, seed, 6, -10.0, hotswap=True)
            y = output(model, call).clone()
        fresh, _ = sparse_model(recipe=recipe)
        load(fresh, seed, 6, -10.0)
        expected = output(fresh, call)
        assert relative_error(y, expected) < 3e-2 < 0.2 * relative_error(first, expected)
