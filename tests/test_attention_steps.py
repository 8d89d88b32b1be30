"""Attention in eight bits leaves some steps of a picture to the backend that was there before."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from helpers import IN_FP8_ATTENTION, MODELS, flux_call, output, relative_error, tiny_flux
from pipeline_helpers import TinyPipeline
from torch._dynamo.testing import CompileCounter

import rtlynx
from rtlynx import CalibrationOptions, Recipe, densify, fp8_attention, schedule, set_dense_steps, sparsify
from rtlynx.calibration.calls import calls_by_step
from rtlynx.models.attention_backend import Fp8Attention
from rtlynx.models.plan import architecture_of

LATE = ((0.0, 0.5),)
SPARSE, DENSE = 0.9, 0.1  # noise levels outside of LATE and inside
SCHEDULED = Recipe.immediate(dense_sigmas=LATE)
IN_FP8 = Recipe.immediate(precision="fp8", dense_sigmas=LATE, dense_precision="fp8")


def call_of(name):
    call = MODELS[name][1]()
    return {**call, "encoder_hidden_states_mask": None} if name == "qwen" else call


def at(sigma, model, call):
    """The output of a call at this noise level."""
    t = float(call["t" if "t" in call else "timestep"].flatten()[0])
    with schedule([t, 2 * t + 1], [sigma, 0.5]):
        return output(model, call)


@torch.no_grad()
def without_schedule(model, call):
    return model(**call, return_dict=False)[0]


def eight_bit(model):
    """Names of the attentions that are in eight bits."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(getattr(module, "processor", None), "_attention_backend", None), Fp8Attention)
    ]


def follows(model, plain, call, late=True):
    """That `model` is like `plain` in late steps, if `late`, and near it, but for eight bits, in others."""
    for sigma, same in ((SPARSE, False), (DENSE, late), (SPARSE, False)):
        y, expected = at(sigma, model, call), at(sigma, plain, call)
        assert torch.equal(y, expected) == same, sigma
        assert relative_error(y, expected) < 0.2


# ------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize(("sigma", "most", "least"), [(SPARSE, 0.1, 5e-3), (DENSE, 1e-5, 0)])
def test_values_are_those_of_the_formula(sigma, most, least):
    """Exact up to float32 in a step that is left to PyTorch, up to e4m3 in the others."""
    model, seen = fp8_attention(sparsify(tiny_flux(), SCHEDULED)), {}
    attn = model.single_transformer_blocks[0].attn
    for name in ("to_q", "to_k", "to_v"):
        attn.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: seen.update({name: y}))
    attn.register_forward_hook(
        lambda _m, _a, kwargs, y: seen.update(y=y, rotary=kwargs["image_rotary_emb"]), with_kwargs=True
    )
    at(sigma, model, flux_call())
    q, k, v = (seen[name].double().unflatten(-1, (attn.heads, -1)) for name in ("to_q", "to_k", "to_v"))
    turn = torch.complex(*(one.double()[:, ::2] for one in seen["rotary"]))[:, None]

    def normed_and_turned(x, norm):
        x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
        return torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn
        ).flatten(-2)

    q, k = normed_and_turned(q, attn.norm_q), normed_and_turned(k, attn.norm_k)
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    exact = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
    assert least <= relative_error(seen["y"], exact) < most


@pytest.mark.parametrize("first", ["attention", "layers"])
@pytest.mark.parametrize("name", IN_FP8_ATTENTION)
def test_steps_that_the_recipe_runs_dense_are_left_to_the_backend_before(name, first):
    (make, _), call = MODELS[name], call_of(name)
    plain, model = sparsify(make(), SCHEDULED), make()
    changes = [fp8_attention, lambda one: sparsify(one, SCHEDULED)]
    for change in changes if first == "attention" else reversed(changes):
        change(model)
    follows(model, plain, call)
    always = fp8_attention(sparsify(make(), SCHEDULED), bf16_sigmas=())
    assert torch.equal(at(SPARSE, model, call), at(SPARSE, always, call))
    assert not torch.equal(at(DENSE, model, call), at(DENSE, always, call))


def test_the_backend_before_is_the_one_that_was_set():
    model, call = sparsify(tiny_flux(), SCHEDULED), flux_call()
    model.transformer_blocks[0].attn.processor._attention_backend = "no such backend"
    fp8_attention(model)
    at(SPARSE, model, call)
    with pytest.raises(ValueError, match="no such backend"):
        at(DENSE, model, call)


@pytest.mark.parametrize("recipe", [None, Recipe.dense_fp8(), Recipe.immediate(text_rows="dense")])
def test_without_dense_steps_it_is_in_eight_bits_in_every_call_and_asks_for_no_schedule(recipe):
    model, always = tiny_flux(), fp8_attention(tiny_flux(), bf16_sigmas=())
    for one in (model, always) if recipe is not None else ():
        sparsify(one, recipe)
    hooks = len(model._forward_pre_hooks)
    fp8_attention(model)
    assert len(model._forward_pre_hooks) == hooks
    expected = without_schedule(always, flux_call())
    assert torch.equal(without_schedule(model, flux_call()), expected)
    assert torch.equal(at(DENSE, model, flux_call()), expected)


def test_it_follows_when_dense_steps_change_and_when_the_model_is_dense_again():
    model, call = fp8_attention(sparsify(tiny_flux(), SCHEDULED)), flux_call()
    plain = sparsify(tiny_flux(), SCHEDULED)
    for late, steps in ((False, {"dense_sigmas": [(0.95, 1.0)]}), (True, {"dense_sigmas": LATE})):
        set_dense_steps(model, **steps)
        set_dense_steps(plain, **steps)
        follows(model, plain, call, late)
    densify(model)
    assert torch.equal(without_schedule(model, call), without_schedule(fp8_attention(tiny_flux()), call))


@pytest.mark.parametrize("recipe", [None, Recipe.dense_fp8(), Recipe.immediate(dense_sigmas=[(0.5, 1.0)])])
@pytest.mark.parametrize("first", ["attention", "layers"])
def test_ranges_of_its_own_hold_whatever_the_recipe_says(recipe, first):
    plain, model, call = tiny_flux(), tiny_flux(), flux_call()
    if first == "attention":
        fp8_attention(model, bf16_sigmas=LATE)
    for one in (plain, model) if recipe is not None else ():
        sparsify(one, recipe)
    if first == "layers":
        fp8_attention(model, bf16_sigmas=LATE)
    follows(model, plain, call)
    fp8_attention(model, enabled=False)
    assert torch.equal(at(SPARSE, model, call), at(SPARSE, plain, call))


def test_copies_tell_their_steps_themselves():
    model, plain, call = fp8_attention(tiny_flux(), bf16_sigmas=LATE), tiny_flux(), flux_call()
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    fp8_attention(model, enabled=False)
    for one in twins:
        follows(one, plain, call)


def test_called_again_it_chooses_anew_and_taken_out_nothing_is_left():
    model, plain, call = tiny_flux(), tiny_flux(), flux_call()
    hooks = len(model._forward_pre_hooks)
    for _ in range(2):
        fp8_attention(model, bf16_sigmas=LATE)
        follows(model, plain, call)
    fp8_attention(model, bf16_sigmas=())
    follows(model, plain, call, late=False)
    fp8_attention(fp8_attention(model, bf16_sigmas=LATE))
    without_schedule(model, call)
    fp8_attention(fp8_attention(model, bf16_sigmas=LATE), enabled=False)
    assert len(model._forward_pre_hooks) == hooks
    assert torch.equal(without_schedule(model, call), without_schedule(plain, call))


@pytest.mark.parametrize("steps", [2, 5])
def test_a_pipeline_tells_the_steps(steps):
    def draw(model):
        return TinyPipeline(model)(["a cat"], [torch.Generator().manual_seed(1)], num_inference_steps=steps)

    plain = draw(tiny_flux())
    drawn = {sigmas: draw(fp8_attention(tiny_flux(), bf16_sigmas=sigmas)) for sigmas in ((), LATE, ((0, 1),))}
    assert torch.equal(drawn[(0, 1),], plain)
    errors = [relative_error(one, plain) for one in drawn.values()]
    assert errors[0] > errors[1] > errors[2] == 0
    pipeline = TinyPipeline(sparsify(tiny_flux(), Recipe.immediate(dense_sigmas=((0, 1),))))
    assert torch.equal(draw(fp8_attention(pipeline).transformer), plain)


def test_a_change_that_fails_leaves_it_as_it_was():
    model, failing = fp8_attention(tiny_flux()), sparsify(tiny_flux(), SCHEDULED)
    y = without_schedule(model, flux_call())
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(SimpleNamespace(transformer=model, transformer_2=failing), SCHEDULED)
    assert torch.equal(without_schedule(model, flux_call()), y)


def test_calibration_draws_with_the_steps_that_the_recipe_will_run_dense():
    prompts = ["a cat", "a dog"]
    options = CalibrationOptions(heldout=0.0, batch_size=2, pipeline_kwargs={"num_inference_steps": 4})

    def seen_by(model, draw):
        seen = []
        model.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
        draw(TinyPipeline(model))
        return seen[:4]

    def calibration(recipe):
        return lambda one: rtlynx.calibrate(one, prompts, recipe, options, progress=False)

    def sampling(pipeline):
        noise = [torch.Generator().manual_seed(i) for i in range(2)]
        pipeline(prompts, noise, num_inference_steps=4)

    for steps, sigmas in (({"dense_steps": 2}, ((0.6, 1.0),)), ({"dense_last_steps": 1}, ((0.0, 0.3),))):
        found = seen_by(fp8_attention(tiny_flux()), calibration(Recipe(rank=None, ridge=0.1, **steps)))
        expected = seen_by(fp8_attention(tiny_flux(), bf16_sigmas=sigmas), sampling)
        assert len(found) == 4
        assert all(map(torch.equal, found, expected))


def test_what_is_recorded_without_a_recipe_keeps_its_own_steps():
    model = fp8_attention(tiny_flux(), bf16_sigmas=LATE)
    pipeline, drawn = TinyPipeline(model), []

    def sample():
        noise = [torch.Generator().manual_seed(i) for i in range(2)]
        drawn.append(pipeline(["a cat", "a dog"], noise, num_inference_steps=4))

    sample()
    architecture = architecture_of(model)
    recorded = calls_by_step(model, architecture, sample, pipeline=pipeline)
    assert len(recorded) == 4
    assert torch.equal(*drawn)


# ------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize(
    "changed", [lambda one: sparsify(one, IN_FP8), lambda one: sparsify(one, Recipe.dense_fp8())]
)
def test_compiled_it_is_the_same_and_makes_no_graph_more_than_there_are_kinds_of_steps(changed):
    torch._dynamo.reset()
    model, call = changed(tiny_flux(num_layers=1, num_single_layers=1)), flux_call()
    own = model._rtlynx.plan.recipe.has_dense_steps
    fp8_attention(model, bf16_sigmas="dense" if own else LATE)
    expected = {sigma: at(sigma, model, call) for sigma in (SPARSE, DENSE)}
    counter = CompileCounter()
    rtlynx.compile(model, backend=counter)
    for sigma in (SPARSE, DENSE, SPARSE, DENSE, SPARSE):
        assert relative_error(at(sigma, model, call), expected[sigma]) < 1e-5
        other = sparsify(tiny_flux(num_layers=0), SCHEDULED)  # its calls leave a mark in the thread
        at(DENSE, other, call)
    assert counter.frame_count == 4  # two blocks, two kinds of steps
    assert relative_error(expected[SPARSE], expected[DENSE]) > 1e-3
    torch._dynamo.reset()


def test_compiled_without_dense_steps_it_is_one_graph_a_block():
    torch._dynamo.reset()
    model, call = fp8_attention(sparsify(tiny_flux(), Recipe.dense_fp8())), flux_call()
    counter = CompileCounter()
    rtlynx.compile(model, backend=counter)
    for sigma in (SPARSE, DENSE):
        at(sigma, model, call)
        at(DENSE, sparsify(tiny_flux(num_layers=0), SCHEDULED), call)
    assert counter.frame_count == 2
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------- skip


def test_attentions_are_left_out_by_name():
    model, call = tiny_flux(), flux_call()
    plain, whole = output(model, call), output(fp8_attention(model), call)
    both = eight_bit(model)
    assert both == ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
    fp8_attention(model, skip=["transformer_blocks.*"])  # is taken out there
    assert eight_bit(model) == both[1:]
    part = output(model, call)
    assert not torch.equal(part, whole)
    assert not torch.equal(part, plain)
    fp8_attention(model, skip=("*",))
    assert eight_bit(model) == []
    assert torch.equal(output(model, call), plain)


def test_what_is_left_out_need_not_be_known():
    model = tiny_flux()
    model.transformer_blocks[0].attn.norm_q = torch.nn.Identity()
    fp8_attention(model, skip=("transformer_blocks.0.*",))
    assert eight_bit(model) == ["single_transformer_blocks.0.attn"]


# ----------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"bf16_sigmas": "last"},
            r"bf16_sigmas is a list of \(low, high\), low below high, or 'dense'; got 'last'",
        ),
        ({"bf16_sigmas": (0.0, 0.5)}, "bf16_sigmas is a list of"),
        ({"bf16_sigmas": [(0.5, 0.1)]}, "bf16_sigmas is a list of"),
        (
            {"skip": "transformer_blocks.0.*"},
            "skip is a list of glob patterns of attentions' names, got 'trans",
        ),
        ({"skip": [3]}, "skip is a list of glob patterns"),
        (
            {"skip": ["*.attn", "blocks.7.*"]},
            r"'blocks.7.\*' matches no attention; there are transformer_blocks",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_and_changes_nothing(settings, message):
    model, plain = tiny_flux(), output(tiny_flux(), flux_call())
    with pytest.raises(ValueError, match=message):
        fp8_attention(model, **settings)
    assert torch.equal(output(model, flux_call()), plain)


def test_a_shared_processor_is_not_half_skipped():
    model = tiny_flux()
    model.single_transformer_blocks[0].attn.processor = model.transformer_blocks[0].attn.processor
    with pytest.raises(ValueError, match=r"single_transformer_blocks.0.attn shares its processor"):
        fp8_attention(model, skip=("transformer_blocks.*",))
    assert eight_bit(model) == []


def test_a_call_that_says_no_step_is_refused_by_name():
    model = fp8_attention(tiny_flux(), bf16_sigmas=LATE)
    with pytest.raises(RuntimeError, match=r"bf16_sigmas=\(\(0.0, 0.5\),\) of .*rtlynx.schedule"):
        without_schedule(model, flux_call())
    with schedule([900, 500]), pytest.raises(RuntimeError, match=r"bf16_sigmas=.*noise level"):
        output(model, flux_call(timestep=900))
    fp8_attention(model)
    without_schedule(model, flux_call())


def test_calibrate_refuses_steps_that_recorded_calls_do_not_tell():
    model = fp8_attention(tiny_flux(), bf16_sigmas=LATE)
    with pytest.raises(ValueError, match=r"steps of its own \(bf16_sigmas\)"):
        rtlynx.calibrate(model, calls=[flux_call()], recipe=Recipe(rank=None), progress=False)


def test_a_model_whose_attentions_are_all_left_out_needs_no_schedule():
    model = fp8_attention(tiny_flux(), bf16_sigmas=LATE, skip=("*",))
    assert torch.equal(without_schedule(model, flux_call()), without_schedule(tiny_flux(), flux_call()))
