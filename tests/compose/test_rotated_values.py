"""Adapters beside rotated values and permuted features: refused on other channels, exact elsewhere."""

import pytest
import torch
from compose_helpers import adapter, formulas, refit
from helpers import flux_call, output, relative_error, watched
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear

from rtlynx import Recipe

ROTATED = Recipe(rank=None, ridge=0.1, rotate_values=True)
TEXT = "transformer_blocks.0.attn.add_v_proj"  # dense and rotated
LAYERS = [
    "transformer_blocks.0.attn.to_v",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.attn.to_add_out",
    "single_transformer_blocks.0.proj_out",
    TEXT,
]
REFUSAL = "values that {} makes or reads were rotated .* Fuse the adapter into the dense model"


PERMUTED = Recipe(rank=None, ridge=0.1, permute_hidden=True)
HIDDEN = ["transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2", *LAYERS[3:4]]


def loaded(model, names, kind):
    if kind == "state":
        model.load_lora_adapter(adapter(model, names)[0], adapter_name="style")
    else:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=names), model, "style")


@pytest.mark.parametrize("kind", ["state", "config"])
@pytest.mark.parametrize("name", LAYERS)
def test_an_adapter_of_a_rotated_layer_is_refused_before_it_changes_any(name, kind):
    model = refit(ROTATED)
    before, names = output(model, flux_call()), [one for one, _ in model.named_modules()]
    with pytest.raises(RuntimeError, match=REFUSAL.format(name)):
        loaded(model, ["transformer_blocks.0.attn.to_q", name], kind)
    assert [one for one, _ in model.named_modules()] == names
    assert not getattr(model, "peft_config", {})
    assert torch.equal(output(model, flux_call()), before)


@pytest.mark.parametrize("kind", ["state", "config"])
@pytest.mark.parametrize("name", HIDDEN)
def test_an_adapter_of_a_permuted_layer_is_refused(name, kind):
    model = refit(PERMUTED)
    before = output(model, flux_call())
    refusal = f"hidden features that {name} makes or reads were permuted .* Recipe.permute_hidden=False"
    with pytest.raises(RuntimeError, match=refusal):
        loaded(model, ["transformer_blocks.0.attn.to_v", name], kind)
    assert torch.equal(output(model, flux_call()), before)


def test_an_adapter_of_a_layer_that_reads_both_is_told_of_both():
    model = refit(Recipe(rank=None, ridge=0.1, rotate_values=True, permute_hidden=True))
    both = (
        r"rotated \(rotate_values\) and the hidden .* permuted \(permute_hidden\): .*=False, permute_hidden=F"
    )
    with pytest.raises(RuntimeError, match=both):
        loaded(model, ["single_transformer_blocks.0.proj_out"], "config")


def test_an_adapter_of_other_layers_is_exact():
    model = refit(ROTATED)
    plain, names = formulas(model), ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"]
    state, deltas = adapter(model, names)
    model.load_lora_adapter(state, adapter_name="style")
    with watched(model, names) as seen:
        output(model, flux_call())
    for name in names:
        ((x, y),) = seen[name]
        assert relative_error(y, plain[name](x) + x @ deltas[name].T) < 2e-6


@pytest.mark.parametrize("name", ["transformer_blocks.0.attn.to_v", TEXT])
def test_an_adapter_put_in_by_hand_is_refused_at_the_next_call(name):
    model = refit(ROTATED)
    loaded(model, ["transformer_blocks.0.attn.to_q"], "state")
    config = model.peft_config["style"]
    wrapped = LoraLinear(model.get_submodule(name), "style", config=config, r=2)
    model.set_submodule(name, wrapped)
    with pytest.raises(RuntimeError, match=REFUSAL.format(name)):
        output(model, flux_call())
