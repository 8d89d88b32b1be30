"""Models not known by name: a call tells which layers read one tensor, and compiled code shares it."""

import copy
from collections import Counter

import pytest
import torch
from calibration_helpers import RIDGE, run
from diffusers import PixArtTransformer2DModel
from fusion_helpers import count_calls, serve
from helpers import in_dtype, output
from torch import nn

from rtlynx import Recipe, densify, load, save
from rtlynx.models import architecture_of, state_of
from rtlynx.models.tracing import shared_reads

RECIPE = Recipe(rank=None, ridge=RIDGE)
BLOCK = "transformer_blocks.0"
QKV = [f"{BLOCK}.attn1.to_{one}" for one in "qkv"]


def tiny_pixart():
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    ).eval()


def pixart_call(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=gen),
        "encoder_hidden_states": torch.randn(1, 5, 24, generator=gen),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def calibrated(data=None):
    return run(tiny_pixart(), RECIPE, data=data or [pixart_call(seed) for seed in range(2)])[0]


def readers(model):
    found = {}
    for layer in state_of(model).plan.layers:
        found.setdefault(layer.candidate.reads, []).append(layer.name)
    return found


def test_a_call_tells_what_reads_one_tensor():
    model = tiny_pixart()
    candidates = architecture_of(model).candidates(model)
    reads = shared_reads(model, candidates, pixart_call())
    assert set(reads) == {candidate.name for candidate in candidates}
    groups = Counter(reads.values())
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        assert groups[f"{block}.attn1.to_q"] == 3
        assert groups[f"{block}.attn2.to_k"] == 2  # the prompt, which other blocks read too: each for itself
    assert reads[QKV[2]] == QKV[0]
    assert sum(count == 1 for count in groups.values()) == 2 * 5


class Readers(nn.Module):
    """Blocks of two layers; what the second reads is made of what the first does by `between`."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)}) for _ in range(2)
        )

    def forward(self, x):
        for block in self.blocks:
            h = x * 2
            x = block["one"](h) + block["two"](self.between(h))
        return x


@pytest.mark.parametrize(
    ("between", "groups"),
    [(lambda h: h, 2), (lambda h: h.add_(1), 4), (torch.clone, 4), (lambda h: h.contiguous(), 2)],
    ids=["the same", "changed in place", "a copy", "no copy"],
)
def test_equal_numbers_are_not_one_tensor_and_one_that_changed_is_another(between, groups):
    model = Readers(between)
    candidates = architecture_of(model).candidates(model)
    reads = shared_reads(model, candidates, {"x": torch.ones(3, 8)})
    assert len(reads) == 4
    assert len(set(reads.values())) == groups


def test_calibration_solves_what_reads_one_tensor_together_and_the_checkpoint_remembers(tmp_path):
    model = calibrated()
    assert readers(model)[QKV[0]] == QKV
    assert model.transformer_blocks[0].attn1.to_q.shared_input.traced
    save(model, tmp_path)
    loaded = load(tiny_pixart(), tmp_path)
    assert readers(loaded) == readers(model)
    call = pixart_call(5)
    assert torch.equal(output(loaded, call), output(model, call))


def test_a_model_that_is_dense_again_is_as_before():
    model, dense = tiny_pixart(), tiny_pixart()
    run(model, Recipe(rank=4, refit=False, ridge=RIDGE), data=[pixart_call(seed) for seed in range(2)])
    assert readers(model)[QKV[0]] == QKV
    assert len(model.transformer_blocks[0]._forward_hooks) == 1
    densify(model)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(output(model, pixart_call()), output(dense, pixart_call()))


@pytest.mark.parametrize(("how", "graphs"), [("model", 1), ("blocks", 2)])  # (another layout, in block 0)
def test_compiled_code_prepares_once_what_several_layers_read(how, graphs, monkeypatch):
    serve(monkeypatch)
    calls = in_dtype([pixart_call(seed) for seed in range(3)], torch.bfloat16)
    model = run(tiny_pixart().bfloat16(), RECIPE, data=calls[:2])[0]
    expected = [output(model, call) for call in calls]
    torch._dynamo.reset()
    seen, twin = [], copy.deepcopy(model)

    def backend(graph, _inputs):
        targets = (str(node.target).split(".") for node in graph.graph.nodes)
        seen.append(Counter(parts[1] for parts in targets if parts[0] == "rtlynx"))
        return graph.forward

    if how == "model":
        twin.compile(fullgraph=True, backend=backend)
    for block in twin.transformer_blocks if how == "blocks" else ():
        block.compile(fullgraph=True, backend=backend)
    for call, one in zip(calls, expected, strict=True):
        torch.testing.assert_close(output(twin, call), one)
    # q, k and v; the output projections, a query of the prompt and an MLP prepare and multiply in one call.
    blocks = len(twin.transformer_blocks) // graphs
    assert seen == [{"compress": blocks, "gemm": 3 * blocks, "linear": 5 * blocks}] * graphs

    count = count_calls(monkeypatch)
    assert torch.equal(output(model, calls[0]), expected[0])
    assert (count["compress"], count["gemm"], count["linear"]) == (2, 6, 10)
