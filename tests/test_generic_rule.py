"""The generic rule: any tree of linears, repeated blocks first, sensitive layers left alone."""

import itertools

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from helpers import (
    output,
    relative_error,
)
from torch import nn

from rtlynx import Recipe, densify, sparsify
from rtlynx.models import sparse_layers, state_of


def test_generic_rule_on_plain_linears():
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 6), nn.Tanh(), nn.Linear(6, 4)).eval()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    dense = model(x)
    sparsify(model)
    assert set(sparse_layers(model)) == {"0", "2"}
    assert [layer.dense_reason for layer in state_of(model).plan.layers] == [
        None,
        None,
        "6 entries do not split into groups of 4",
    ]
    assert 1e-3 < relative_error(model(x), dense) < 1
    densify(model)
    assert torch.equal(model(x), dense)


def test_generic_rule_takes_the_blocks_and_leaves_what_surrounds_them():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)
            self.out_proj = nn.Linear(16, 16)
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(16, 32))
            self.norm1_linear = nn.Linear(16, 16)
            self.to_out = nn.ModuleList([nn.Linear(16, 16), nn.Dropout()])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.x_embedder = nn.Linear(16, 16)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.proj_out = nn.Linear(16, 16)

    model = Model()
    sparsify(model)
    assert set(sparse_layers(model)) == {
        f"blocks.{i}.{name}" for i in range(2) for name in ("qkv", "out_proj", "to_out.0")
    }
    assert model.blocks[1].out_proj.pattern.grouping == "strided"
    assert model.blocks[1].qkv.pattern.grouping == "adjacent"


BASIC = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
CROSS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")


def test_generic_rule_on_dit():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()
    call = {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500]),
        "class_labels": torch.tensor([3]),
    }
    dense = output(model, call)
    sparsify(model)
    assert set(sparse_layers(model)) == {
        f"transformer_blocks.{i}.{name}" for i, name in itertools.product(range(2), BASIC)
    }
    assert 1e-4 < relative_error(output(model, call), dense) < 1
    densify(model)
    sparsify(model, Recipe.immediate(n=4, m=4))
    assert torch.equal(output(model, call), dense)


def test_generic_rule_on_pixart():
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    ).eval()
    gen = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=gen),
        "encoder_hidden_states": torch.randn(1, 5, 24, generator=gen),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    dense = output(model, call)
    sparsify(model, Recipe.immediate(skip=("*.attn2.to_[kv]",)))
    expected = {*BASIC, *CROSS} - {"attn2.to_k", "attn2.to_v"}
    assert set(sparse_layers(model)) == {f"transformer_blocks.0.{name}" for name in expected}
    assert 1e-4 < relative_error(output(model, call), dense) < 1


def test_projections_that_are_read_but_never_called_stay_as_they_are():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    sparsify(model, Recipe.immediate())
    assert set(sparse_layers(model)) == {"0.linear1", "0.linear2"}
