"""Models with fused blocks on the card: the same numbers as layer by layer, compiled and captured."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

from fusion_helpers import RECIPES, give_factors, unfused
from helpers import (
    IMAGE_TOKENS,
    flux_call,
    in_dtype,
    ltx_call,
    output,
    qwen_edit_call,
    relative_error,
    tiny_ltx,
    tiny_qwen_edit,
    tiny_wan,
    wan_call,
)
from helpers import MODELS as KNOWN

from rtlynx import sparsify
from rtlynx.nn.prepared import CompressedInput, MixedInput, PreparedInput, QuantizedInput

pytestmark = pytest.mark.gpu


def by_token(make):
    """Calls as beside a given picture: the first half of the tokens is at timestep 0."""

    def call(seed=0):
        made = make(seed)
        timestep = made["timestep"][:, None].repeat(1, IMAGE_TOKENS)
        timestep[:, : IMAGE_TOKENS // 2] = 0
        return {**made, "timestep": timestep}

    return call


MODELS = {
    **KNOWN,
    "qwen-edit": (tiny_qwen_edit, qwen_edit_call),
    "wan-by-token": (tiny_wan, by_token(wan_call)),
    "ltx-by-token": (tiny_ltx, by_token(ltx_call)),
}
# What stands for a chain's result, in each of them.
READ = {
    "bf16": {CompressedInput},
    "fp8": {CompressedInput},
    "whole": {QuantizedInput},
    "mixed": {CompressedInput, QuantizedInput, MixedInput},
}
# Compilation takes seconds: of models whose blocks are much like those of others one recipe is compiled.
ONCE = {
    "chroma": "whole",
    "sd3": "mixed",
    "qwen-edit": "fp8",
    "ltx": "mixed",
    "wan-by-token": "fp8",
    "ltx-by-token": "whole",
    "ltx2": "mixed",
    "hunyuan-video15": "mixed",
}
COMPILED = [(name, recipe) for name in MODELS for recipe in RECIPES if ONCE.get(name, recipe) == recipe]
BRANCHED = ("bf16", "fp8")  # (a branch beside a layer that drops nothing reads the dense chain)


def on_card(call, dtype):
    return in_dtype(call, dtype, "cuda")


def sparse_model(name, recipe):
    make, call = MODELS[name]
    model = sparsify(make().bfloat16().cuda(), RECIPES[recipe])
    if recipe in BRANCHED:
        give_factors(model, 16)
    return model, call()


@pytest.fixture
def _no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.usefixtures("_no_tf32")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_fused_it_is_as_near_to_the_model_in_float32_as_unfused(name, recipe, monkeypatch):
    model, call = sparse_model(name, recipe)
    exact = output(copy.deepcopy(model).float(), on_card(call, torch.float32))
    call = on_card(call, torch.bfloat16)
    expected = output(unfused(model), call)
    read, output_of = set(), PreparedInput.output_of
    monkeypatch.setattr(PreparedInput, "output_of", lambda x, layer: read.add(type(x)) or output_of(x, layer))
    y = output(model, call)
    assert read == READ[recipe]
    assert bool(torch.isfinite(y).all())
    assert relative_error(y, exact) < 1.4 * relative_error(expected, exact)


@pytest.mark.usefixtures("_no_tf32")
@pytest.mark.parametrize(("name", "recipe"), COMPILED)
def test_compiled_it_is_as_near(name, recipe):
    """Inductor rounds chains that are left to PyTorch at other places, and selection follows."""
    model, call = sparse_model(name, recipe)
    exact = output(copy.deepcopy(model).float(), on_card(call, torch.float32))
    call = on_card(call, torch.bfloat16)
    expected = output(model, call)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True)
    y = output(model, call)
    assert relative_error(y, exact) < 1.4 * relative_error(expected, exact)
    assert relative_error(y, expected) < 2 * relative_error(expected, exact)


@pytest.mark.parametrize(("name", "recipe"), COMPILED)
def test_with_a_cuda_graph_for_each_block_it_gives_the_same(name, recipe):
    """As a sampler calls it: guidance keeps the output of one call while the next runs, and marks no step."""
    model, _ = sparse_model(name, recipe)
    _, make_call = MODELS[name]
    calls = [on_card(make_call(seed), torch.bfloat16) for seed in range(5)]
    outputs = {}
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True, mode=mode)
        outputs[mode] = [output(model, call) for call in calls]
    for y, expected in zip(outputs["reduce-overhead"], outputs["default"], strict=True):
        assert relative_error(y, expected) < 1e-2


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_captured_step_replays(recipe):
    model, call = sparse_model("flux", recipe)
    call = on_card(call, torch.bfloat16)
    output(model, call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = output(model, call)
    for seed in (3, 4):
        fresh = on_card(flux_call(seed), torch.bfloat16)
        for name, value in fresh.items():
            call[name].copy_(value)
        graph.replay()
        assert torch.equal(y, output(model, fresh))
