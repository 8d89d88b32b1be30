"""Adapters of peft that need a layer's original weight, where it is and where it is not; and merging."""

import copy
import inspect

import peft
import pytest
import torch
from compose_helpers import REFIT, adapter, formulas, refit, sparse_flux
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from helpers import flux_call, output, relative_error, tiny_flux, watched
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from rtlynx import Recipe, SparseLinear, densify, sparsify
from rtlynx.models import sparse_layers

DORA = LoraConfig(r=2, target_modules=["to_q", "proj_mlp"], use_dora=True, init_lora_weights=False)
CHANGED = {
    "refit": lambda: refit(),
    "fp8": lambda: sparsify(tiny_flux(), Recipe.immediate(precision="fp8")),
    "fp8-dense": lambda: sparsify(tiny_flux(), Recipe.dense_fp8()),
    "fp8-refit": lambda: refit(Recipe(rank=4, ridge=0.1, precision="fp8")),
    "original kept": lambda: refit(Recipe(rank=4, ridge=0.1, text_rows="dense")),
}


def dora(model, names):
    """A DoRA as trainers save it, with 1.1 times the norms of W + BA as magnitudes; and what they are."""
    state, deltas = adapter(model, names)
    magnitudes = {}
    for name, delta in deltas.items():
        magnitudes[name] = 1.1 * (model.get_submodule(name).weight.detach() + delta).norm(dim=1)
        state[f"transformer.{name}.lora_magnitude_vector.weight"] = magnitudes[name]
    return state, deltas, magnitudes


def by_pipeline(model, state):
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=model, **nothing)
    pipeline.load_lora_weights(state, adapter_name="style")


def by_model(model, state):
    model.load_lora_adapter(state, adapter_name="style")


BY_STATE = [by_pipeline, by_model]
BY_CONFIG = {
    "add_adapter": lambda model, config: model.add_adapter(config, "style"),
    "inject": lambda model, config: inject_adapter_in_model(config, model, "style"),
    "get_peft_model": lambda model, config: get_peft_model(model, config, "style"),
}


def refused_and_unchanged(model, attach, reason):
    """`attach` is refused, and all is as if it had not been tried: a plain adapter of that name loads."""
    before, weights = output(model, flux_call()), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=rf"needs the original weight of .*{reason}"):
        attach(model)
    assert not getattr(model, "peft_config", {}).keys() & {"style"}
    assert torch.equal(output(model, flux_call()), before)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    plain, _ = adapter(model, ["transformer_blocks.0.attn.to_k"])
    model.load_lora_adapter(plain, adapter_name="style")
    assert not torch.equal(output(model, flux_call()), before)


@pytest.mark.parametrize("load", BY_STATE)
@pytest.mark.parametrize("kind", CHANGED)
def test_a_dora_beside_a_changed_weight_is_refused_as_it_loads(kind, load):
    dense = tiny_flux()
    names = list(sparse_layers(sparsify(tiny_flux())))
    state, *_ = dora(dense, names)
    refused_and_unchanged(CHANGED[kind](), lambda model: load(model, state), "DoRA")


@pytest.mark.parametrize("how", BY_CONFIG)
@pytest.mark.parametrize("kind", ["refit", "fp8"])
def test_a_dora_is_refused_however_it_comes(kind, how):
    refused_and_unchanged(CHANGED[kind](), lambda model: BY_CONFIG[how](model, copy.deepcopy(DORA)), "DoRA")


@pytest.mark.parametrize("how", ["add_adapter", "inject"])
def test_a_dora_after_a_plain_adapter_is_refused_and_that_one_stays(how):
    model = CHANGED["fp8"]()
    model.load_lora_adapter(adapter(model, ["transformer_blocks.0.attn.to_q"])[0], adapter_name="first")
    before = output(model, flux_call())
    for _ in range(2):  # its name is free again
        with pytest.raises(
            RuntimeError, match=r"needs the original weight of transformer_blocks\.0\.attn\.to_q"
        ):
            BY_CONFIG[how](model, copy.deepcopy(DORA))
    assert list(model.peft_config) == ["first"]
    assert torch.equal(output(model, flux_call()), before)
    wrapped = get_peft_model(CHANGED["fp8"](), LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(RuntimeError, match="needs the original weight"):
        wrapped.add_adapter("second", copy.deepcopy(DORA))
    assert list(wrapped.peft_config) == ["default"]


def test_a_dora_after_a_plain_adapter_is_refused_by_the_loader_too():
    model = CHANGED["fp8"]()
    name = "transformer_blocks.0.attn.to_q"
    plain, _ = adapter(model, [name])
    model.load_lora_adapter(plain, adapter_name="first")
    before = output(model, flux_call())
    state, *_ = dora(tiny_flux(), [name])
    with pytest.raises(RuntimeError, match="needs the original weight"):
        model.load_lora_adapter(state, adapter_name="style")
    assert list(model.peft_config) == ["first"]
    assert torch.equal(output(model, flux_call()), before)


@pytest.mark.parametrize("load", BY_STATE)
@pytest.mark.parametrize("kind", ["immediate", "strided"])
def test_a_dora_beside_the_original_weight_has_the_norms_of_the_dense_model(kind, load):
    model = sparse_flux(kind)
    plain, biases = formulas(model), {name: layer.bias for name, layer in sparse_layers(model).items()}
    state, deltas, magnitudes = dora(tiny_flux(), list(plain))
    load(model, state)
    with watched(model, deltas) as seen:
        output(model, flux_call())
    for name, calls in seen.items():
        norms = (plain[name].weight.detach() + deltas[name]).norm(dim=1)
        for x, y in calls:
            rest = plain[name](x) - biases[name] + x @ deltas[name].T
            assert relative_error(y, magnitudes[name] / norms * rest + biases[name]) < 2e-6, name


def test_a_dora_of_dense_layers_loads_beside_changed_ones():
    model = CHANGED["fp8"]()
    before = output(model, flux_call())
    state, *_ = dora(model, ["x_embedder", "context_embedder"])
    model.load_lora_adapter(state, adapter_name="style")
    loaded = output(model, flux_call())
    assert relative_error(loaded, before) > 1e-3
    config = LoraConfig(r=2, target_modules=["x_embedder"], use_dora=True)
    model.add_adapter(config, "another")
    output(model, flux_call())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "mica", "loftq", "corda", "lora_ga"])
def test_adapters_begun_from_the_base_weight_are_refused_before_they_change_it(init):
    settings = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    config = LoraConfig(r=2, target_modules=["to_q"], **settings)
    config.init_lora_weights = init
    refused_and_unchanged(CHANGED["refit"](), lambda model: model.add_adapter(config, "style"), f"{init}")


@pytest.mark.parametrize("targets", ["all-linear", ["to_q"], "transformer_blocks.*to_q"])
def test_targets_are_found_as_peft_finds_them(targets):
    config = LoraConfig(r=2, target_modules=targets, use_dora=True)
    refused_and_unchanged(
        CHANGED["fp8"](), lambda model: inject_adapter_in_model(config, model, "style"), "DoRA"
    )


def test_modules_saved_whole_are_refused_in_place_of_changed_layers():
    config = LoraConfig(r=2, target_modules=["x_embedder"], modules_to_save=["proj_mlp"])
    refused_and_unchanged(
        CHANGED["refit"](), lambda model: get_peft_model(model, config, "style"), "modules_to_save"
    )


def test_an_adapter_put_in_by_hand_is_refused_at_the_next_call():
    model = CHANGED["fp8"]()
    model.load_lora_adapter(adapter(model, ["transformer_blocks.0.attn.to_q"])[0], adapter_name="style")
    output(model, flux_call())
    model.transformer_blocks[0].attn.to_k = peft.tuners.lora.layer.Linear(
        model.transformer_blocks[0].attn.to_k, "style", LoraConfig(init_lora_weights=False), r=2
    )
    output(model, flux_call())
    block = model.transformer_blocks[0].attn
    block.to_k = block.to_k.base_layer
    block.to_k = peft.tuners.hra.layer.HRALinear(block.to_k, "style", peft.HRAConfig(), r=2)
    with pytest.raises(
        RuntimeError, match=r"needs the original weight of transformer_blocks\.0\.attn\.to_k.*hra"
    ):
        output(model, flux_call())
    block.to_k = block.to_k.base_layer
    output(model, flux_call())


# ------------------------------------------------------------------------------- kinds that peft knows

SETTINGS = {
    "FOURIERFT": {"n_frequency": 50},
    "WAVEFT": {"n_frequency": 50},
    "C3A": {"block_size": 16},
    "OFT": {"oft_block_size": 16, "r": 0},
    "BOFT": {"boft_block_size": 8},
    "ADALORA": {"total_step": 10},
    "VBLORA": {"vector_length": 16, "num_vectors": 32},
    "IA3": {"feedforward_modules": []},
    "GRALORA": {"r": 8},
    "MISS": {"r": 8},
}
KINDS = [
    kind.name
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if {"target_modules"} <= inspect.signature(config).parameters.keys()
]
EXACT = {"LORA", "LOHA", "LOKR", "VERA", "IA3", "OFT", "BOFT", "RANDLORA", "FOURIERFT", "VBLORA", "ADALORA"}


class Net(nn.Module):
    """One layer; its weight is `seed`'s, what it computes is not."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(0)
        self.layer = SparseLinear(64, 64)
        truth = nn.Linear(64, 64)
        self.layer.forward = truth.forward
        torch.manual_seed(seed)
        self.layer.set_refit(torch.randn(64, 64))
        self.config = {"model_type": "custom"}

    def forward(self, x):
        return self.layer(x)


def with_adapter(kind, seed):
    """What `Net` gives with an adapter of random values; None where we or peft refuse to add that."""
    model = Net(seed).requires_grad_(False)
    torch.manual_seed(1)
    try:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=["layer"], **SETTINGS.get(kind, {}))
        wrapped = get_peft_model(model, config)
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError):
        return None
    for name, parameter in wrapped.named_parameters():
        if "base_layer" not in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    with torch.no_grad():
        return wrapped.eval()(torch.randn(3, 64, generator=torch.Generator().manual_seed(2)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_is_let_beside_changed_weights_does_not_read_them(kind):
    first, second = with_adapter(kind, 3), with_adapter(kind, 4)
    assert first is not None or kind not in EXACT
    assert first is None or torch.allclose(first, second)


@pytest.mark.parametrize("kind", ["HRA", "SHIRA", "HIRA", "DELORA", "PSOFT", "OSF"])
def test_kinds_that_read_the_weight_are_refused(kind):
    if kind not in KINDS:
        pytest.skip(f"this peft does not know {kind}")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=["to_q"])
    refused_and_unchanged(
        CHANGED["fp8"](), lambda model: inject_adapter_in_model(config, model, "style"), kind.lower()
    )


# -------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("kind", ["fp8", "fp8-dense", "original kept"])
@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig, IA3Config])
def test_merging_into_what_cannot_take_it_is_refused_before_any_layer(config, kind, merge):
    extra = {"feedforward_modules": []} if config is IA3Config else {}
    model = get_peft_model(
        CHANGED[kind](), config(target_modules=["x_embedder", "to_q", "proj_mlp"], **extra)
    )
    before = output(model, flux_call())
    with pytest.raises(RuntimeError, match="adapters are not merged into this model"):
        getattr(model, merge)()
    assert torch.equal(output(model, flux_call()), before)
    plain = model.unload()
    assert torch.equal(output(plain, flux_call()), output(CHANGED[kind](), flux_call()))


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_one_quantised_layer_is_refused(safe):
    model = CHANGED["fp8"]()
    name = "transformer_blocks.0.attn.to_q"
    model.load_lora_adapter(adapter(model, [name])[0])
    before = output(model, flux_call())
    with pytest.raises(RuntimeError, match="adapters are not merged into this model"):
        model.get_submodule(name).merge(safe_merge=safe)
    assert torch.equal(output(model, flux_call()), before)


def test_what_scales_the_weight_is_not_merged_beside_a_low_rank_branch():
    config = IA3Config(target_modules=["to_q"], feedforward_modules=[])
    wrapped = get_peft_model(refit(), copy.deepcopy(config))
    with pytest.raises(RuntimeError, match="low-rank branches"):
        wrapped.merge_and_unload()
    immediate = get_peft_model(
        sparsify(tiny_flux()), IA3Config(target_modules=["to_q"], feedforward_modules=[])
    )
    for name, parameter in immediate.named_parameters():
        if "ia3" in name:
            parameter.data.mul_(1.5)
    beside = output(immediate, flux_call())
    assert relative_error(output(immediate.merge_and_unload(), flux_call()), beside) < 2e-6


def test_a_lora_still_merges_into_refitted_weights():
    assert REFIT.rank
    wrapped = get_peft_model(refit(), LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    plain, (wide, *_) = formulas(wrapped), [m for m in wrapped.modules() if hasattr(m, "lora_A")]
    name = next(iter(one for one in plain if one.endswith("transformer_blocks.0.attn.to_q")))
    delta = wide.get_delta_weight("default").detach()
    merged = wrapped.merge_and_unload()
    name = name.removeprefix("base_model.model.")
    with watched(merged, [name]) as seen:
        output(merged, flux_call())
    for x, y in seen[name]:
        assert relative_error(y, plain[f"base_model.model.{name}"](x, delta=delta)) < 2e-6


def test_densify_reaches_through_a_peft_model():
    dense = tiny_flux()
    before = output(dense, flux_call())
    wrapped = get_peft_model(sparsify(dense), LoraConfig(r=2, target_modules=["to_q"]))
    assert densify(wrapped) is wrapped
    assert not sparse_layers(wrapped)
    assert relative_error(output(wrapped, flux_call()), before) < 1e-6
