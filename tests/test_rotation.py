"""Rotated values: the dense model computes the same, and what attention drops costs less."""

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from helpers import MODELS, flux_call, in_dtype, output, relative_error, tiny_flux
from torch.nn.functional import scaled_dot_product_attention

from rtlynx import Recipe
from rtlynx.math.rotation import rotate_columns, rotate_rows, value_rotation
from rtlynx.math.selection import nm_mask, select
from rtlynx.models.plan import make_plan
from rtlynx.models.reparameterize import reparameterize

TOKENS, HEADS, D, INPUTS, OUTPUTS = 60, 6, 16, 24, 20


def problem(seed, value_heads=HEADS):
    """Weights of a layer that makes values and of one that reads the attention's output; and that output."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    make, bias = normal(value_heads * D, INPUTS), normal(value_heads * D)
    read = normal(OUTPUTS, HEADS * D + 8) * normal(HEADS * D + 8)  # the last columns: of an MLP
    x, query, key = normal(TOKENS, INPUTS), normal(HEADS, TOKENS, D), normal(value_heads, TOKENS, D)
    return make, bias, read, x, query, key


def attend(make, bias, x, query, key):
    value = (x @ make.T + bias).unflatten(-1, (-1, D)).transpose(0, 1)
    y = scaled_dot_product_attention(query[None], key[None], value[None], enable_gqa=True)[0]
    return y.transpose(0, 1).flatten(1)


def gram_of(read):
    columns = read[:, : HEADS * D].unflatten(1, (HEADS, D)).transpose(0, 1)
    return columns.mT @ columns


def rotation(y, read, value_heads=HEADS):
    by_head = (y - y.mean(0)).unflatten(1, (HEADS, D)).transpose(0, 1)
    covariance, gram = by_head.mT @ by_head / TOKENS, gram_of(read)
    shared = (value_heads, -1)
    return value_rotation(covariance.unflatten(0, shared).mean(1), gram.unflatten(0, shared).sum(1), 4)


@pytest.mark.parametrize("value_heads", [HEADS, HEADS // 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_readers_undo_the_rotation(seed, value_heads):
    make, bias, read, x, query, key = problem(seed, value_heads)
    y = attend(make, bias, x, query, key)
    matrix = rotation(y, read, value_heads)
    turned = attend(rotate_rows(make, matrix), rotate_rows(bias, matrix), x, query, key)
    inverse = torch.linalg.inv(matrix)
    again = rotate_columns(read, inverse, HEADS // value_heads)
    rest = torch.ones(TOKENS, 8, dtype=torch.float64)
    expected, found = (torch.cat((a, rest), 1) @ b.T for a, b in ((y, read), (turned, again)))
    assert relative_error(found, expected) < 1e-9
    assert relative_error(turned, y) > 0.1


def test_channels_are_uncorrelated_and_their_magnitude_is_error_at_the_output():
    make, bias, read, x, query, key = problem(3)
    y = attend(make, bias, x, query, key)
    matrix = rotation(y, read)
    turned = attend(rotate_rows(make, matrix), rotate_rows(bias, matrix), x, query, key)
    by_head = (turned - turned.mean(0)).unflatten(1, (HEADS, D)).transpose(0, 1)
    covariance = by_head.mT @ by_head / TOKENS
    energies = covariance.diagonal(dim1=-2, dim2=-1)
    assert (covariance - torch.diag_embed(energies)).abs().max() < 1e-9 * energies.max()
    columns = rotate_columns(read, torch.linalg.inv(matrix))[:, : HEADS * D].unflatten(1, (HEADS, D))
    grams = gram_of(columns.flatten(1))
    inverse = torch.linalg.inv(matrix)
    ridge = 1e-4 * gram_of(read).diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * inverse @ inverse.mT
    assert (grams + ridge - torch.eye(D, dtype=torch.float64)).abs().max() < 1e-9
    # Groups hold one of the strongest quarter, one of the next, ...: each quarter falls from group to group.
    quarters = energies.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1)
    assert bool((quarters.diff(dim=1) <= 1e-9).all())


def test_selection_loses_less_of_the_output():
    make, bias, read, x, query, key = problem(4)
    read = read[:, : HEADS * D]
    y = attend(make, bias, x, query, key)
    matrix = rotation(y, read)
    turned = attend(rotate_rows(make, matrix), rotate_rows(bias, matrix), x, query, key)
    again = rotate_columns(read, torch.linalg.inv(matrix))
    errors = [relative_error(select(a, nm_mask(a)) @ b.T, a @ b.T) for a, b in ((y, read), (turned, again))]
    assert errors[1] < 0.8 * errors[0]


def test_heads_that_nobody_reads_have_an_inverse():
    zero = torch.zeros(2, D, D, dtype=torch.float64)
    matrix = value_rotation(zero, zero, 4)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(D, dtype=torch.float64).expand(2, D, D))


# ---------------------------------------------------------------------------------------------- models


def random_matrices(plan):
    gen = torch.Generator().manual_seed(5)
    return {
        one.name: torch.randn(one.value_heads, one.head_dim, one.head_dim, generator=gen)
        for one in plan.rotated
    }


def rotated(model, **changes):
    plan = make_plan(model, Recipe.immediate(rotate_values=True, text_stream="sparse", **changes))
    reparameterize(model, plan.rotated, random_matrices(plan))
    return plan


@pytest.mark.parametrize("name", MODELS)
def test_a_rotated_model_computes_the_same(name):
    build, call = MODELS[name]
    call, dense, model = in_dtype(call(3), torch.float64), build().double(), build().double()
    plan = rotated(model)
    several = {"flux": 2, "chroma": 2, "sd3": 3, "z-image": 3, "wan": 2, "ltx": 2, "ltx2": 6}
    assert len(plan.rotated) == several.get(name, 1)
    assert len(plan.unrotated) == (name == "flux2")  # its single block makes q, k, v and more in one layer
    before, after = dense.state_dict(), model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    made = {f"{layer}.{kind}" for one in plan.rotated for layer in one.makers for kind in ("weight", "bias")}
    read = {f"{layer}.weight" for one in plan.rotated for layer in one.readers}
    assert changed == (made | read) & before.keys()
    assert relative_error(output(model, call), output(dense, call)) < 1e-12


def test_an_ip_adapter_adds_the_same_to_a_rotated_model():
    torch.manual_seed(0)
    adapter = FluxIPAdapterAttnProcessor(128, 64).double()
    dense, model = (tiny_flux().double() for _ in range(2))
    for one in (dense, model):
        processors = {name: processor for name, processor in one.attn_processors.items()}
        first = next(iter(processors))
        one.set_attn_processor({**processors, first: adapter})
    assert "transformer_blocks.0.attn" in {one.name for one in rotated(model).rotated}
    call = in_dtype(flux_call(3), torch.float64)
    tokens = torch.randn(1, 4, 64, dtype=torch.float64)
    call["joint_attention_kwargs"] = {"ip_hidden_states": [tokens]}
    without = in_dtype(flux_call(3), torch.float64)
    without["joint_attention_kwargs"] = {"ip_hidden_states": [torch.zeros_like(tokens)]}
    assert relative_error(output(model, call), output(dense, call)) < 1e-12
    assert relative_error(output(dense, without), output(dense, call)) > 1e-3


class OwnProcessor:
    """Not one of diffusers'."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, attn, *args, **kwargs):
        return self.inner(attn, *args, **kwargs)


def test_other_processors_and_hooks_are_left_alone_and_said_why():
    model = tiny_flux()
    model.transformer_blocks[0].attn.set_processor(OwnProcessor(model.transformer_blocks[0].attn.processor))
    model.single_transformer_blocks[0].attn.register_forward_hook(lambda *_: None)
    plan = make_plan(model, Recipe(rotate_values=True))
    assert not plan.rotated
    assert {"diffusers' own" in reason for reason in plan.unrotated.values()} == {True}
    patterns = {layer.name: layer.pattern.grouping for layer in plan.layers}
    assert patterns["transformer_blocks.0.attn.to_out.0"] == "strided"  # as without rotation


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe(rotate_values=True, skip=("*.to_out.0", "*.proj_out")), "no layer that reads it drops"),
        (Recipe(rotate_values=True, formats={"*": "fp8-dense"}), "no layer that reads it drops"),
        (Recipe(rotate_values=True, n=12, m=64), "heads of 32 channels do not split into groups of 64"),
    ],
)
def test_attentions_that_gain_nothing_are_left_alone(recipe, reason):
    plan = make_plan(tiny_flux(), recipe)
    assert not plan.rotated
    assert len(plan.unrotated) == 2
    assert all(reason in said for said in plan.unrotated.values())


def test_readers_of_rotated_values_have_adjacent_groups():
    for recipe in (Recipe(rotate_values=True), Recipe(rotate_values=True, text_stream="sparse")):
        plan = make_plan(tiny_flux(), recipe)
        assert len(plan.rotated) == 2
        assert {layer.pattern.grouping for layer in plan.layers} == {"adjacent"}


def test_a_model_without_known_attentions_is_refused():
    model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(8, 8)]))
    with pytest.raises(ValueError, match="attentions is not known: use rotate_values=False"):
        make_plan(model, Recipe(rotate_values=True))


def test_a_rotation_without_an_inverse_is_refused():
    model = tiny_flux()
    plan = make_plan(model, Recipe(rotate_values=True))
    matrices = {name: torch.zeros_like(one) for name, one in random_matrices(plan).items()}
    with pytest.raises(ValueError, match="has no inverse"):
        reparameterize(model, plan.rotated, matrices)
