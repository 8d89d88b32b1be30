"""`rtlynx.compile`: fewer guards, the same results after every change, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from compose_helpers import adapter, sparse_flux
from diffusers import FirstBlockCacheConfig
from fusion_helpers import RECIPES, serve
from helpers import flux_call, in_dtype, output, tiny_flux
from torch import nn
from torch._dynamo.testing import CompileCounter

import rtlynx
from rtlynx import Recipe, sparsify
from rtlynx.models import compilation, sparse_layers


class Blocks(nn.Module):
    """Blocks of linears that no list declares as repeated."""

    def __init__(self, count=10):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class Declared(Blocks):
    _repeated_blocks = ("SparseLinear",)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield


@pytest.fixture
def guards(monkeypatch):
    """(all, kept) numbers of guards of each graph that `rtlynx.compile` makes."""
    numbers, needed = [], compilation.needed

    def counted(entries):
        kept = needed(entries)
        numbers.append((len(kept), sum(kept)))
        return kept

    monkeypatch.setattr(compilation, "needed", counted)
    return numbers


def guards_of_dense():
    """Numbers of guards of the graphs of a dense model's blocks."""
    numbers = []

    def count(entries):
        numbers.append(len(entries))
        return [True] * len(entries)

    model = tiny_flux().bfloat16()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(backend="eager", options={"guard_filter_fn": count})
    output(model, in_dtype(flux_call(), torch.bfloat16))
    return numbers


def test_sparse_blocks_check_about_as_many_guards_as_dense_ones(monkeypatch, guards):
    serve(monkeypatch)
    model = sparsify(tiny_flux().bfloat16(), RECIPES["fp8"])
    call = in_dtype(flux_call(), torch.bfloat16)
    expected = output(model, call)
    assert torch.equal(output(rtlynx.compile(model, backend="eager"), call), expected)
    for (every, kept), dense in zip(guards, guards_of_dense(), strict=True):
        assert kept < 0.8 * every
        assert kept <= 1.2 * dense


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("norm", "none"),
        ("pattern", rtlynx.Pattern(1, 4)),
        ("pattern", rtlynx.Pattern(grouping="strided")),
        ("dense_reason", "chosen by hand"),
    ],
)
@torch.no_grad()
def test_a_setting_changed_by_hand_compiles_again(setting, value):
    torch.manual_seed(0)
    model, x = sparsify(Declared(2), Recipe.immediate(grouping="adjacent")), torch.randn(5, 32)
    counter = CompileCounter()
    rtlynx.compile(model, backend=counter)
    before = model(x)
    assert counter.frame_count == 1
    setattr(model.blocks[1], setting, value)
    after = model(x)
    assert counter.frame_count == 2
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(after, model(x))
    assert not torch.allclose(before, after)


@torch.no_grad()
def test_other_sizes_take_one_compilation_more():
    model, counter = sparsify(Declared(2)), CompileCounter()
    rtlynx.compile(model, backend=counter)
    for tokens, frames in ((5, 1), (7, 2), (9, 2)):
        x = torch.randn(tokens, 32)
        y = model(x)
        assert counter.frame_count == frames
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(y, model(x))


def test_adapters_come_and_go_after_it():
    model = sparse_flux("fp8", num_layers=0)
    rtlynx.compile(model, backend="eager")
    plain = output(model, flux_call())
    model.load_lora_adapter(adapter(model, ["single_transformer_blocks.0.attn.to_q"])[0])
    with_adapter = output(model, flux_call())
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(with_adapter, output(model, flux_call()))
    assert not torch.allclose(plain, with_adapter)
    model.unload_lora()
    torch.testing.assert_close(output(model, flux_call()), plain)


@pytest.mark.parametrize("kind", [Blocks, Declared])
def test_any_model_compiles_whatever_its_number_of_kinds_of_blocks(kind):
    torch.manual_seed(0)
    model = sparsify(kind(), Recipe.immediate())
    for index, layer in enumerate(sparse_layers(model).values()):
        layer.norm = ("none", "scale", "paper")[index % 3]
        layer.pattern = rtlynx.Pattern(1 + index // 3 % 3, 4, ("adjacent", "strided")[index // 9])
    x = torch.randn(5, 32)
    expected = model(x)
    counter = CompileCounter()
    assert rtlynx.compile(model, backend=counter) is model
    torch.testing.assert_close(model(x), expected)
    assert counter.frame_count == (1 if kind is Blocks else 10)


def test_all_transformers_of_a_pipeline_are_compiled():
    pipeline = SimpleNamespace(transformer=sparsify(Blocks(1)), transformer_2=sparsify(Blocks(2)))
    counter = CompileCounter()
    assert rtlynx.compile(pipeline, backend=counter) is pipeline
    for frames, model in enumerate((pipeline.transformer, pipeline.transformer_2), start=1):
        model(torch.randn(5, 32))
        assert counter.frame_count == frames


def test_what_comes_in_another_order_is_refused_and_nothing_compiled():
    dense, sparse = tiny_flux(num_layers=0), sparse_flux("fp8", num_layers=0)
    with pytest.raises(ValueError, match=r"FluxTransformer2DModel is dense: make it sparse .* first"):
        rtlynx.compile(SimpleNamespace(transformer=sparse, transformer_2=dense))
    with pytest.raises(ValueError, match=r"compiled already: leave out torch\.compile"):
        rtlynx.compile(SimpleNamespace(transformer=torch.compile(sparse)))
    with pytest.raises(ValueError, match=r"CUDA graphs do not serve .* on one CUDA device, found cpu"):
        rtlynx.compile(sparse, cuda_graphs=True)
    with pytest.raises(ValueError, match="are of the backend 'inductor', not 'eager'"):
        rtlynx.compile(sparse, cuda_graphs=True, backend="eager")
    assert sparse.single_transformer_blocks[0]._compiled_call_impl is None
    sparse.single_transformer_blocks[0].attn.compile()
    with pytest.raises(ValueError, match=r"single_transformer_blocks\.0\.attn, a FluxAttention, is compiled"):
        rtlynx.compile(sparse)
    with pytest.raises(TypeError, match="expected a torch module or a diffusers pipeline"):
        rtlynx.compile(object())


def test_layers_that_were_pickled_or_copied_know_their_settings(tmp_path):
    model = sparse_flux("fp8", num_layers=0)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for (name, layer), other in zip(sparse_layers(model).items(), sparse_layers(again).values(), strict=True):
        assert layer.settings is other.settings, name
        assert "settings" not in vars(rtlynx.SparseLinear.from_linear(nn.Linear(8, 8)).to_linear())


@torch.no_grad()
def test_beside_a_cache_that_skips_blocks():
    def steps(model):
        model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        if model is compiled:
            rtlynx.compile(model, backend="eager")
        drawn = []
        for timestep in (1.0, 0.5):
            with model.cache_context("cond"):
                drawn.append(output(model, flux_call(timestep=timestep)))
        return drawn

    plain, compiled = (sparsify(tiny_flux(num_layers=0, num_single_layers=2)) for _ in range(2))
    for expected, y in zip(steps(plain), steps(compiled), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"do not serve .* a cache skips some of its blocks"):
        rtlynx.compile(plain, cuda_graphs=True)
