"""Adapters beside layers that make or read rotated values and permuted features: they act as ever."""

import copy

import pytest
import torch
from compose_helpers import adapter, formulas, refit
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from helpers import MODELS, copy_of, flux_call, in_dtype, output, relative_error, tiny_flux, watched
from peft import (
    FourierFTConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file
from torch import nn

from rtlynx import Recipe, densify, load, save
from rtlynx.models import sparse_layers, state_of
from rtlynx.models.architecture import Attention
from rtlynx.models.change_of_basis import LayerBasis, LayerChange
from rtlynx.models.plan import make_plan
from rtlynx.models.reparameterize import reparameterize, undo_reparameterization

BOTH = Recipe(rank=None, ridge=0.1, rotate_values=True, permute_hidden=True)
IMMEDIATE = Recipe.immediate(rotate_values=True, permute_hidden=True)
TO_V, TO_OUT = "transformer_blocks.0.attn.to_v", "transformer_blocks.0.attn.to_out.0"
DENSE = "transformer_blocks.0.attn.add_v_proj"  # in a sparse model too
UP, DOWN = "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"
OUT = "single_transformer_blocks.0.proj_out"  # reads rotated values and permuted features


def in_other_bases(model):
    """The dense `model`, its values in random bases, its hidden features in a random order; and how."""
    plan = make_plan(model, Recipe.immediate(rotate_values=True, permute_hidden=True, text_stream="sparse"))
    gen = torch.Generator().manual_seed(5)
    bases = {one.name: torch.randn(*one.size, one.size[-1], generator=gen) for one in plan.rotated}
    bases |= {one.name: torch.randperm(one.width, generator=gen) for one in plan.permuted}
    return plan, reparameterize(model, plan.reparameterized, bases)


def twins(name="flux"):
    """A call, a dense model, and the same in other bases, in float64; and the layers that changed."""
    build, call = MODELS[name]

    def make():
        model = build().double()
        return model, [one for each in in_other_bases(model)[0].reparameterized for one in each.layers]

    model, layers = copy_of(("other bases", name), make)
    return in_dtype(call(3), torch.float64), build().double(), model, sorted(set(layers))


def flux_pipeline(model):
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=model, **nothing)


def check(dense, model, call, without=None):
    """Both give the same, and something else than `without`."""
    expected = output(dense.double(), call)
    assert relative_error(output(model.double(), call), expected) < 1e-10
    assert without is None or relative_error(without, expected) > 1e-3
    return expected


# ----------------------------------------------------------------------------- against the dense model


@pytest.mark.parametrize("name", MODELS)
def test_a_lora_of_all_changed_layers_adds_what_it_adds_to_the_dense_model(name):
    call, dense, model, layers = twins(name)
    before, (state, _) = output(dense, call), adapter(dense, layers)
    for one in (dense, model):
        one.load_lora_adapter(state, adapter_name="style")
    check(dense, model, call, before)


CONFIGS = {
    "biased": (LoraConfig, {"r": 2, "lora_bias": True, "init_lora_weights": False}),
    "rslora": (LoraConfig, {"r": 2, "use_rslora": True, "lora_alpha": 3, "init_lora_weights": False}),
    "loha": (LoHaConfig, {"r": 2, "init_weights": False}),
    "lokr": (LoKrConfig, {"r": 2, "decompose_factor": 4, "init_weights": False}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_kinds_of_adapters_add_what_they_add_to_the_dense_model(kind):
    call, dense, model, layers = twins()
    before, (config, settings) = output(dense, call), CONFIGS[kind]
    for one in (dense, model):
        torch.manual_seed(0)
        inject_adapter_in_model(config(target_modules=layers, **settings), one, "style")
        gen = torch.Generator().manual_seed(1)
        for parameter in (one.get_parameter(name) for name in sorted(dict(one.named_parameters()))):
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=gen)
    check(dense, model, call, before)
    check(dense, copy.deepcopy(model), call)


def test_several_adapters_scale_add_up_and_leave():
    call, dense, model, layers = twins()
    before, both = output(dense, call), (dense, model)
    for number, name in enumerate(("first", "second")):
        for one in both:
            one.load_lora_adapter(adapter(one, layers, number, rank=2 + number)[0], adapter_name=name)
    for one in both:
        one.set_adapters(["first", "second"], [0.5, -2.0])
    summed = check(dense, model, call, before)
    for one in both:
        one.delete_adapters("first")
        one.set_adapters("second")
    check(dense, model, call, summed)
    for one in both:
        one.disable_lora()
    check(dense, model, call)
    for one in both:
        one.unload_lora()
    assert not [name for name, _ in model.named_modules() if "rtlynx" in name or "lora" in name]
    assert relative_error(check(dense, model, call), before) < 1e-10


@pytest.mark.parametrize("rank", [4, 2])
def test_adapters_are_hot_swapped(rank):
    call, dense, model, layers = twins()
    for one in (dense, model):
        one.enable_lora_hotswap(target_rank=4)
        one.load_lora_adapter(adapter(one, layers, 1, rank=3)[0], adapter_name="style")
    first = check(dense, model, call)
    for one in (dense, model):
        state = adapter(one, layers, 2, rank=rank)[0]
        one.load_lora_adapter(state, adapter_name="style", hotswap=True)
    check(dense, model, call, first)


def test_what_is_saved_is_what_was_loaded(tmp_path):
    call, dense, model, layers = twins()
    state = adapter(dense, layers)[0]
    for one in (dense, model):
        one.load_lora_adapter(state, adapter_name="style")
    output(model, call)
    model.save_lora_adapter(tmp_path, adapter_name="style")
    saved = load_file(next(tmp_path.glob("*.safetensors")))
    assert saved.keys() == {key.removeprefix("transformer.") for key in state}
    assert all(torch.equal(saved[key.removeprefix("transformer.")], one) for key, one in state.items())
    ours, plain = (get_peft_model_state_dict(one, adapter_name="style") for one in (model, dense))
    assert ours.keys() == plain.keys()


def test_training_takes_the_steps_that_it_takes_beside_the_dense_model():
    call, dense, model, layers = twins()
    gradients = []
    for one in (dense, model):
        wrapped = get_peft_model(one, LoraConfig(r=2, target_modules=layers))
        for number, parameter in enumerate(one for one in wrapped.parameters() if one.requires_grad):
            gen = torch.Generator().manual_seed(number)
            parameter.data = torch.randn(parameter.shape, generator=gen, dtype=torch.float64)
        wrapped(**call, return_dict=False)[0].square().sum().backward()
        gradients.append(torch.cat([one.grad.flatten() for one in wrapped.parameters() if one.requires_grad]))
    assert relative_error(gradients[1], gradients[0]) < 1e-10


def test_undone_the_adapters_are_those_of_the_dense_model():
    call, dense = flux_call(3), tiny_flux()
    model = copy.deepcopy(dense)
    done = in_other_bases(model)[1]
    for one in (dense, model):
        one.load_lora_adapter(adapter(tiny_flux(), [TO_V, TO_OUT, OUT])[0], adapter_name="style")
        inject_adapter_in_model(LoKrConfig(target_modules=[UP]), one, "another")
    undo_reparameterization(model, done)
    assert torch.equal(output(model, call), output(dense, call))
    assert {type(one) for one in model.modules()} == {type(one) for one in dense.modules()}


def test_a_lora_is_not_made_of_what_was_turned():
    conversion = pytest.importorskip("peft.tuners.lora.conversion")
    _, dense, model, _ = twins()
    for one in (dense, model):
        config = LoKrConfig(r=2, target_modules=[TO_V], init_weights=False)
        one = get_peft_model(one, config)
        if one.get_base_model() is dense:
            conversion.convert_to_lora(one, 2)
        else:
            with pytest.raises(TypeError, match="do not support LoRA conversion"):
                conversion.convert_to_lora(one, 2)


def test_a_cast_of_the_model_leaves_bases_alone():
    one = Attention("attn", ("make",), ("read",), heads=2, head_dim=8, value_heads=2)
    matrix = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    basis = LayerBasis([LayerChange(one, "rows", matrix)], torch.device("cpu"), torch.float32)
    factor = torch.randn(16, 3)
    expected = torch.einsum("hde,hdr->her", matrix, factor.view(2, 8, 3)).flatten(0, 1)
    assert relative_error(nn.Sequential(basis).bfloat16()[0](factor, "rows", "columns"), expected) < 1e-6
    assert torch.equal(basis(factor, "columns"), factor)
    assert not basis.state_dict()


# ------------------------------------------------------------------------------------- on sparse models


def delta_in_bases(model, name, delta):
    """What an adapter adds to the weight of the layer `name`, from how its tensors changed."""
    state = state_of(model)
    for one in state.plan.reparameterized:
        basis = state.reparameterization.bases[one.name]
        heads = torch.block_diag(*basis) if isinstance(one, Attention) else torch.eye(one.width)[:, basis]
        if name in one.makers:
            delta = heads.T @ delta
        if name in one.readers:
            delta = delta.clone()
            columns = slice(0, len(heads)) if isinstance(one, Attention) else slice(one.first, None)
            delta[:, columns] = delta[:, columns] @ torch.linalg.inv(heads).T
    return delta


@pytest.mark.parametrize("loaded", [False, True])
def test_beside_sparse_layers_it_reads_the_whole_input(loaded, tmp_path):
    model, names = refit(BOTH), [TO_V, TO_OUT, UP, DOWN, OUT]
    if loaded:
        save(model, tmp_path / "lynx")
        model = load(tiny_flux(), tmp_path / "lynx")
    plain, (state, deltas) = formulas(model), adapter(model, names)
    flux_pipeline(model).load_lora_weights(state, adapter_name="style")
    with watched(model, names) as seen:
        output(model, flux_call())
    for name in names:
        turned = delta_in_bases(model, name, deltas[name])
        assert relative_error(turned, deltas[name]) > 0.1
        for x, y in seen[name]:
            assert relative_error(y - plain[name](x), x @ turned.T) < 1e-4, name


def test_densify_gives_the_dense_model_with_the_adapter():
    model, dense = refit(IMMEDIATE), tiny_flux()
    for one in (model, dense):
        one.load_lora_adapter(adapter(tiny_flux(), [TO_V, OUT, DENSE])[0], adapter_name="style")
    densify(model)
    assert torch.equal(output(model, flux_call()), output(dense, flux_call()))
    model.fuse_lora()
    assert relative_error(output(model, flux_call()), output(dense, flux_call())) < 1e-5


@pytest.mark.parametrize("name", [TO_V, DENSE])
def test_an_adapter_put_in_by_hand_follows_at_the_next_call(name):
    outputs = []
    for by_hand in (False, True):
        model = refit(BOTH)
        model.load_lora_adapter(adapter(model, ["x_embedder"])[0], adapter_name="other")
        config = LoraConfig(r=2, target_modules=[name])
        if by_hand:
            layer = model.get_submodule(name)
            model.set_submodule(name, LoraLinear(layer, "style", config=config, r=2, lora_alpha=8))
        else:
            inject_adapter_in_model(config, model, "style")
        wrapper = model.get_submodule(name)
        for number, factor in enumerate((wrapper.lora_A["style"], wrapper.lora_B["style"])):
            gen = torch.Generator().manual_seed(number)
            factor.weight.data = torch.randn(factor.weight.shape, generator=gen)
        wrapper.set_adapter("style")
        model.x_embedder.set_adapter("other")
        outputs.append(output(model, flux_call()))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], output(refit(BOTH), flux_call()))


# ------------------------------------------------------------------------------------------- refusals


def refused(model, names, config, reason):
    """An adapter of that config is refused, and all is as if it had not been tried."""
    before, modules = output(model, flux_call()), [one for one, _ in model.named_modules()]
    with pytest.raises(RuntimeError, match=reason):
        inject_adapter_in_model(config(target_modules=[*names, "x_embedder"]), model, "style")
    assert [one for one, _ in model.named_modules()] == modules
    assert not getattr(model, "peft_config", {})
    assert torch.equal(output(model, flux_call()), before)


def dora(**settings):
    return LoraConfig(use_dora=True, **settings)


def fourier(**settings):
    return FourierFTConfig(n_frequency=50, **settings)


@pytest.mark.parametrize(
    ("names", "config", "reason"),
    [
        ([DENSE], dora, f"values that {DENSE} .* rotated .*: it needs the original weight .DoRA .*fuse "),
        ([UP], dora, rf"hidden features that {UP} makes .*DoRA .* Recipe.permute_hidden=False"),
        ([TO_V], fourier, "the kind fourierft are not known to follow that, as a plain LoRA does"),
        ([OUT], fourier, r"rotated .rotate_values. and the hidden .* permuted .*=False, permute_hidden=F"),
    ],
)
def test_adapters_that_cannot_follow_are_refused_before_they_change_a_layer(names, config, reason):
    refused(refit(BOTH), names, config, reason)


def test_where_the_bases_are_not_known_adapters_are_refused(tmp_path):
    refit(BOTH).save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    refused(loaded, [TO_V], LoraConfig, "not known how, since from_pretrained .* rtlynx.load, which knows")
    loaded.load_lora_adapter(adapter(loaded, ["transformer_blocks.0.attn.to_q"])[0], adapter_name="style")
    output(loaded, flux_call())


@pytest.mark.parametrize("name", [TO_V, DENSE])
def test_merging_into_changed_layers_is_refused(name):
    model = refit(Recipe(rank=None, ridge=0.1, rotate_values=True, grouping="adjacent"))
    assert all(layer.mergeable for layer in sparse_layers(model).values())
    model.load_lora_adapter(adapter(model, [name])[0], adapter_name="style")
    before = output(model, flux_call())
    for merge in (model.fuse_lora, model.get_submodule(name).merge):
        with pytest.raises(RuntimeError, match=r"not merged into this model: its weights are .* rotated or"):
            merge()
    wrapped = get_peft_model(refit(IMMEDIATE), LoraConfig(target_modules=[name]))
    with pytest.raises(RuntimeError, match="adapters are not merged"):
        wrapped.merge_and_unload()
    assert torch.equal(output(model, flux_call()), before)
