"""The benchmark of a denoising step where steps at some noise levels run dense."""

import pytest
import torch
from helpers import flux_call, tiny_flux

from rtlynx import Recipe, fp8_attention, sparsify
from rtlynx.models import sparse_layers
from rtlynx.timing import step, step_variants
from rtlynx.timing.full_models import MODELS, TIMESTEP, Size


def test_larger_pictures_stay_noisy_for_longer_where_the_shift_grows_with_them():
    small, large = (MODELS["flux1-dev"].sampling.sigmas(Size(side=side)) for side in (512, 1024))
    assert all(a < b for a, b in zip(small[1:], large[1:], strict=True))


def scheduled(monkeypatch):
    """A small model as the variant with a schedule, as always sparse, as always in dense fp8; and a call."""
    monkeypatch.setattr(step_variants, "normals", lambda seed: torch.randn)
    changes = {variant.name: variant.form.change for variant in step_variants.VARIANTS}
    model, sparse, dense = tiny_flux(), tiny_flux(), tiny_flux()
    changes[step_variants.RECOMMENDED](model)
    step_variants.recommended("fp8")(sparse)
    changes[step_variants.DENSE_FP8](dense)
    return model, sparse, dense, flux_call(timestep=TIMESTEP)


def test_both_kinds_of_step_are_those_that_users_and_graphs_run(monkeypatch):
    model, sparse, dense, call = scheduled(monkeypatch)
    kinds = step.kinds_of_steps(model, [call], [1.0, 0.7, 0.15, 0.14, 0.1])
    assert {name: one.steps for name, one in kinds.items()} == {", sparse step": 3, ", dense step": 2}
    for one, like in zip(kinds.values(), (sparse, dense), strict=True):
        (wanted,), (users,), (captured,) = (
            made() for made in (step.step_of(like, [call]), one.users, one.captured)
        )
        assert torch.equal(users, wanted)
        assert torch.equal(captured, wanted)
    assert not torch.equal(kinds[", sparse step"].captured()[0], kinds[", dense step"].captured()[0])


def test_a_dense_step_has_attention_as_it_was_also_where_the_others_have_it_in_eight_bits(monkeypatch):
    model, sparse, dense, call = scheduled(monkeypatch)
    for one in (model, sparse):
        fp8_attention(one)
    kinds = step.kinds_of_steps(model, [call], [1.0, 0.1])
    for one, like in zip(kinds.values(), (sparse, dense), strict=True):
        (wanted,), (users,), (captured,) = (
            made() for made in (step.step_of(like, [call]), one.users, one.captured)
        )
        assert torch.equal(users, wanted)
        assert torch.equal(captured, wanted)


def test_a_captured_step_reads_no_timestep(monkeypatch):
    """Reading one that is on the card waits for the card, and no CUDA graph can hold that."""
    model, *_, call = scheduled(monkeypatch)
    kinds = step.kinds_of_steps(model, [call], [1.0, 0.1])

    def read(_timestep):
        raise AssertionError("a timestep was read")

    monkeypatch.setattr("rtlynx.models.hooks.step_of", read)
    for one in kinds.values():
        one.captured()
        with pytest.raises(AssertionError, match="a timestep was read"):
            one.users()


def test_a_model_without_dense_steps_has_one_kind_and_a_schedule_of_one_kind_too(monkeypatch):
    model, sparse, _, call = scheduled(monkeypatch)
    for like in (tiny_flux(), sparse):
        ((name, one),) = step.kinds_of_steps(like, [call], [1.0, 0.1]).items()
        assert (name, one.steps) == ("", None)
    assert list(step.kinds_of_steps(model, [call], [1.0])) == [", sparse step"]


def test_dense_rows_of_text_beside_dense_steps_are_refused():
    model = sparsify(tiny_flux(), Recipe.immediate(dense_sigmas=((0, 0.5),), text_rows="dense"))
    with pytest.raises(ValueError, match="cannot be measured with text_rows='dense'"):
        step.kinds_of_steps(model, [], [1.0, 0.1])


def test_the_variant_with_a_schedule_drops_weights_and_holds_the_original_ones_too(monkeypatch):
    model, sparse, *_ = scheduled(monkeypatch)
    dropping = {name: layer for name, layer in sparse_layers(model).items() if layer.format.weight_sparse}
    assert dropping
    assert all(
        (layer.weight.float().unflatten(1, (-1, 4)) != 0).sum(-1).max() == 2 for layer in dropping.values()
    )
    more = step.held_bytes(model) - step.held_bytes(sparse)
    entries = sum(layer.weight.numel() for layer in dropping.values())
    scales = 4 * sum(layer.out_features for layer in dropping.values())
    biases = scales  # in float32 here
    assert more == entries + scales + biases
