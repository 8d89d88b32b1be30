"""The generic rule: any tree of linears, repeated blocks first, sensitive layers left alone."""

import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from helpers import (
    output,
    relative_error,
)
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from rtlynx import Recipe, densify, sparsify
from rtlynx.calibration.collect import input_groups
from rtlynx.models import architecture_of, make_plan, sparse_layers, state_of
from rtlynx.models.architecture import Candidate
from rtlynx.models.generic import GENERIC


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


def test_a_list_of_blocks_may_end_in_a_norm_and_a_list_of_linears_is_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj_in = nn.Linear(16, 16)
            self.mixed = nn.ModuleList(weight_norm(nn.Linear(16, 16)) for _ in range(2))
            self.layers = nn.ModuleList(
                [*(nn.Sequential(nn.Linear(16, 16)) for _ in range(2)), nn.LayerNorm(16)]
            )

    found = architecture_of(Model()).candidates(Model())
    assert [(one.name, one.block) for one in found] == [
        ("layers.0.0", "layers.0"),
        ("layers.1.0", "layers.1"),
    ]


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
    # Every block reads the prompt through layers of its own: no row of the others is text.
    sparsify(model, Recipe.immediate(text_rows="dense"))
    keys = {layer.name: layer.dense_reason for layer in state_of(model).plan.layers}
    assert keys["transformer_blocks.0.attn2.to_k"] == keys["transformer_blocks.0.attn2.to_v"] == "text stream"
    expected = {*BASIC, *CROSS} - {"attn2.to_k", "attn2.to_v"}
    assert set(sparse_layers(model)) == {f"transformer_blocks.0.{name}" for name in expected}
    assert 1e-4 < relative_error(output(model, call), dense) < 1


def test_projections_that_are_read_but_never_called_stay_as_they_are():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    sparsify(model, Recipe.immediate())
    assert set(sparse_layers(model)) == {"0.linear1", "0.linear2"}


KNOWN = (
    FluxTransformer2DModel,
    Flux2Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)
def test_the_rule_says_of_models_known_by_name_what_their_files_say(kind):
    with torch.device("meta"):
        model = kind()
    found = [replace(one, rule="", reads="", lent=False) for one in GENERIC.candidates(model)]
    by_name = [
        replace(one, rule="", reads="", lent=False) for one in architecture_of(model).candidates(model)
    ]
    assert found == by_name


class Part(nn.Module):
    """Linear layers by name, each (inputs, outputs); a dict is a part inside."""

    def __init__(self, **parts):
        super().__init__()
        for name, one in parts.items():
            self.add_module(name, Part(**one) if isinstance(one, dict) else nn.Linear(*one))


class WithText(nn.Module):
    """Takes text, and has blocks of the parts given."""

    def __init__(self, blocks, **parts):
        super().__init__()
        self.blocks = nn.ModuleList(Part(**parts) for _ in range(blocks))

    def forward(self, hidden_states, encoder_hidden_states):
        raise NotImplementedError


SAME, UP, DOWN = (64, 64), (64, 128), (128, 64)


@pytest.mark.parametrize(
    ("parts", "name", "expected"),
    [
        ({"mlp": {"gate": UP, "up": UP, "down": DOWN}}, "mlp.gate", "mlp-up"),
        ({"mlp": {"gate": (64, 8), "experts": {"0": SAME}}}, "mlp.gate", "chooses experts"),
        ({"mlp": {"gate": (64, 8), "experts": {"0": SAME}}}, "mlp.experts.0", "linear"),
        ({"attn": {"to_bias": (64, 2), "to_k": (64, 2)}}, "attn.to_bias", "makes 32 times fewer features"),
        ({"attn": {"to_bias": (64, 2), "to_k": (64, 2)}}, "attn.to_k", "attention-in"),
        ({"face_adapter": {"to_q": SAME}}, "face_adapter.to_q", "attention-in"),
        ({"adaptive_norm": SAME, "ff": SAME}, "adaptive_norm", "makes modulation"),
        ({"film": {"scale_bias": UP}, "ff": SAME}, "film.scale_bias", "makes modulation"),
        ({"time_mlp": SAME, "ff": SAME}, "time_mlp", "embeds what conditions the blocks"),
        ({"self_attn": {"proj": SAME}}, "self_attn.proj", "attention-out"),
    ],
)
def test_what_a_layer_does_is_told_by_its_name_and_what_is_beside_it(parts, name, expected):
    decided = GENERIC.decisions(WithText(2, **parts))[f"blocks.1.{name}"]
    assert (decided.role if isinstance(decided, Candidate) else decided).startswith(expected)


def streams(model):
    return {one.name.removeprefix("blocks.0."): one.stream for one in GENERIC.candidates(model)}


def test_keys_and_values_of_cross_attention_are_text_and_those_of_self_attention_are_not():
    attention = {"to_q": SAME, "to_k": SAME, "to_v": SAME}
    found = streams(WithText(1, self_attn=attention, cross_attn=attention))
    assert {name for name, stream in found.items() if stream == "text"} == {
        "cross_attn.to_k",
        "cross_attn.to_v",
    }
    # A second attention is one unless it says that it is not.
    model = WithText(1, attn1=attention, attn2=attention, ff=UP)
    assert streams(model)["attn2.to_k"] == "text"
    model.blocks[0].attn2.is_cross_attention = False
    assert "text" not in streams(model).values()


def test_where_no_layer_of_a_block_reads_text_it_is_among_the_other_tokens():
    with torch.device("meta"):
        model = AuraFlowTransformer2DModel(num_mmdit_layers=1, num_single_dit_layers=1)
    found = {one.name: one.stream for one in GENERIC.candidates(model)}
    assert {stream for name, stream in found.items() if name.startswith("single")} == {"joint"}
    assert {stream for name, stream in found.items() if name.startswith("joint_")} == {"image", "text"}
    # Calibration does not keep apart kinds of tokens that it cannot tell apart: each takes K x K numbers.
    assert {group.gathered.kinds for group in input_groups(make_plan(model, Recipe()).sparse)} == {1}
    with pytest.raises(
        ValueError, match=r"7 layers, as single_transformer_blocks\.0\.attn\.to_q, may read them"
    ):
        make_plan(model, Recipe.immediate(text_rows="dense"))
