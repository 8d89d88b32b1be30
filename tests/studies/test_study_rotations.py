"""Other bases of values: what each is, and that calibration takes it and gives the library's own back."""

from dataclasses import replace

import pytest
import torch
from make_variant import build
from rotations import ROTATIONS, rotating
from study_helpers import SMALL, tiny_study_model
from variants import VARIANTS

from rtlynx.calibration import reparameterize, run
from rtlynx.evaluate.sampling import sample_pictures
from rtlynx.math.rotation import value_rotation
from rtlynx.models.plan import make_plan
from rtlynx.models.reparameterize import reparameterize as turn_model
from rtlynx.models.sparsify import state_of

BY_NAME = {variant.name: variant for variant in VARIANTS}
M, D = 4, 8


def moments(heads=4, d=D):
    """C and M of each head, positive definite."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, heads, d, 3 * d, dtype=torch.float64, generator=generator)
    covariance, gram = factors @ factors.mT
    return covariance, gram


def worth(rotation, covariance, gram):
    """Energy of each channel of R at the readers' output (H, d)."""
    inverse = torch.linalg.inv(rotation)
    turned, read = rotation.mT @ covariance @ rotation, inverse @ gram @ inverse.mT
    return turned.diagonal(dim1=-2, dim2=-1) * read.diagonal(dim1=-2, dim2=-1)


def ranks(values):
    """Of each channel in its head, 0 the strongest."""
    return values.argsort(dim=-1, descending=True).argsort(dim=-1)


@pytest.mark.parametrize("name", ROTATIONS)
def test_every_basis_can_be_undone(name):
    rotation = ROTATIONS[name](*moments(), M)
    assert torch.linalg.cond(rotation).max() < 1e6


def test_groups_alone_move_channels_to_the_places_of_one_head_that_compete():
    (rotation, *others) = ROTATIONS["grouped"](*moments(), M)
    assert all(torch.equal(one, rotation) for one in others)
    moved = torch.arange(D, dtype=torch.float64) @ rotation
    assert moved.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_by_worth_one_channel_of_each_quarter_competes_and_nothing_is_mixed():
    covariance, gram = moments()
    rotation = ROTATIONS["grouped-by-worth"](covariance, gram, M)
    assert set(rotation.flatten().tolist()) == {0, 1}
    assert rotation.sum(-1).eq(1).all()
    found = ranks(worth(rotation, covariance, gram))
    assert found.tolist() == [[0, 2, 4, 6, 1, 3, 5, 7]] * 4


def test_without_the_metric_channels_are_uncorrelated_and_keep_their_lengths():
    covariance, gram = moments()
    rotation = ROTATIONS["without-metric"](covariance, gram, M)
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(D).double().expand_as(rotation))
    turned = rotation.mT @ covariance @ rotation
    energy = turned.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(turned, torch.diag_embed(energy), atol=1e-9, rtol=0)
    assert ranks(energy).tolist() == [[0, 2, 4, 6, 1, 3, 5, 7]] * 4


def test_strong_beside_strong_has_the_librarys_channels_in_falling_order():
    covariance, gram = moments()
    rotation = ROTATIONS["strong-beside-strong"](covariance, gram, M)
    torch.testing.assert_close(rotation[..., [0, 2, 4, 6, 1, 3, 5, 7]], value_rotation(covariance, gram, M))
    assert (
        ranks((rotation.mT @ covariance @ rotation).diagonal(dim1=-2, dim2=-1)).tolist() == [[*range(D)]] * 4
    )


@pytest.mark.parametrize("heads", [4, 6, 7, 8])
def test_across_heads_a_strided_group_holds_one_channel_of_each_quarter(heads):
    covariance, gram = moments(heads)
    rotation = ROTATIONS["across-heads"](covariance, gram, M)
    found = ranks(worth(rotation, covariance, gram))
    assert found.sort().values.tolist() == [[*range(D)]] * heads
    quarters = (found // (D // M)).flatten().unflatten(0, (M, -1))  # (member, group)
    assert quarters.sort(dim=0).values.T.tolist() == [[0, 1, 2, 3]] * (heads * D // M)


# ------------------------------------------------------------------------------------------ calibration


@pytest.fixture(scope="module")
def model():
    return tiny_study_model()


@pytest.fixture(scope="module")
def own_bases(model):
    """What the library turns values by."""
    variant = replace(BY_NAME["free:fp8-refit+rotated+intercept"], prompts=2)
    return state_of(build(variant, model, SMALL).pipeline.transformer).reparameterization.known


@pytest.mark.parametrize("name", ROTATIONS)
def test_calibration_turns_values_so_and_groups_them_so(model, own_bases, name):
    variant = replace(BY_NAME[f"rotation:{name}"], prompts=2)
    state = state_of(build(variant, model, SMALL).pipeline.transformer)
    assert list(state.reparameterization.bases) == [one.name for one in state.plan.rotated]
    plain = make_plan(model.pipeline.transformer, variant.recipe)
    for layer in state.plan.sparse:
        reads_values = any(layer.name in one.readers for one in state.plan.rotated)
        strided = reads_values and not layer.keeps_all and name == "across-heads"
        assert layer.pattern.grouping == ("strided" if strided else "adjacent"), layer.name
        assert strided or layer.pattern == plain.layer(layer.name).pattern
    bases = state.reparameterization.known
    assert not any(torch.equal(bases[key], basis) for key, basis in own_bases.items())
    turned = model.copy_of_pipeline()
    turn_model(turned.transformer, state.plan.rotated, bases)
    settings = {"guidance_scale": 3.0, "num_inference_steps": 2}
    pictures = [
        sample_pictures(pipeline, ["red heart"], pipeline_kwargs=settings)
        for pipeline in (turned, model.pipeline)
    ]
    torch.testing.assert_close(*pictures, atol=1e-3, rtol=0)


def test_the_librarys_own_is_back_after_an_error():
    own = reparameterize.value_rotation, run.make_plan_for_dense

    def fail():
        with rotating("across-heads"):
            assert reparameterize.value_rotation is ROTATIONS["across-heads"]
            assert run.make_plan_for_dense is not own[1]
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert (reparameterize.value_rotation, run.make_plan_for_dense) == own
    with rotating(""):
        assert (reparameterize.value_rotation, run.make_plan_for_dense) == own
