"""Pipelines that draw with several transformers, as Wan 2.2 does: what is done to one is done to all."""

import json
from dataclasses import replace

import pytest
import torch
from all_pipelines import PIPELINES
from helpers import tiny_flux

from rtlynx import (
    CalibrationError,
    CalibrationOptions,
    CheckpointError,
    Distillation,
    Recipe,
    calibrate,
    densify,
    load,
    save,
    set_dense_steps,
    sparsify,
)
from rtlynx.models import sparse_layers, state_of, target_model, transformers_of

REFIT = Recipe(rank=None, ridge=0.1)
NAMES = ["transformer", "transformer_2"]
BOUNDARY = 0.5  # share of the noise below which transformer_2 draws


def in_two_stages(case):
    """As Wan 2.2: another transformer, of the same kind, draws the later steps."""
    models = {**case.models, "transformer_2": case.models["transformer"]}
    return replace(case, models=models, arguments={"boundary_ratio": BOUNDARY})


IDEOGRAM = "Ideogram4Pipeline"
TWO_STAGES = ("WanPipeline", "WanVACEPipeline", "LucyEditPipeline")
CASES = {name: in_two_stages(PIPELINES[name]) for name in TWO_STAGES} | {IDEOGRAM: PIPELINES[IDEOGRAM]}
OTHER = {IDEOGRAM: "unconditional_transformer"}  # else transformer_2
every_pipeline = pytest.mark.parametrize("name", CASES)


def two(name="WanPipeline"):
    """The pipeline in small; other weights in either transformer."""
    pipeline = CASES[name].build(name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompts(count=3, name="WanPipeline"):
    torch.manual_seed(1)
    return [CASES[name].inputs() for _ in range(count)]


def options(steps=4, name="WanPipeline", **changes):
    settings = {**CASES[name].settings, "num_inference_steps": steps}
    return CalibrationOptions(steps_per_prompt=4, pipeline_kwargs=settings, **changes)


def draw(pipeline):
    name = type(pipeline).__name__
    (inputs,) = prompts(1, name)
    settings = {**CASES[name].settings, "num_inference_steps": 4, "output_type": "latent"}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return pipeline(**inputs, **settings, generator=generator, return_dict=False)[0]


def names_of(pipeline):
    return ["transformer", OTHER.get(type(pipeline).__name__, "transformer_2")]


def states(pipeline):
    return [state_of(getattr(pipeline, name)) for name in names_of(pipeline)]


def test_each_transformer_is_calibrated_on_the_steps_that_it_draws(recorded):
    pipeline = two()
    report = calibrate(pipeline, prompts(), REFIT, options(), progress=False)
    assert list(report.others) == ["transformer_2"]
    for name, one in zip(NAMES, (report, report.others["transformer_2"]), strict=True):
        assert set(one.solutions) == set(sparse_layers(getattr(pipeline, name)))
        assert one.solutions
    levels = [{float(call["timestep"].max()) / 1000 for call in batch} for batch in recorded]
    assert len(levels) == 4  # fit and held-out prompts of either
    assert all(min(some) >= BOUNDARY for some in levels[:2])
    assert all(max(some) < BOUNDARY for some in levels[2:])
    assert all(levels)


@every_pipeline
def test_a_checkpoint_has_a_folder_for_each_and_draws_the_same(name, tmp_path):
    pipeline = two(name)
    names = names_of(pipeline)
    settings = options(name=name, folder=tmp_path / "work")
    report = calibrate(pipeline, prompts(2, name), REFIT, settings, progress=False)
    assert list(report.others) == names[1:]
    for _ in range(2):  # also in place of one that is there
        save(pipeline, tmp_path / "lynx")
    assert sorted(path.name for path in (tmp_path / "lynx").iterdir()) == names
    assert {path.name for path in (tmp_path / "work").iterdir()} == set(names)
    again = load(two(name), tmp_path / "lynx")
    drawn = draw(pipeline)
    assert torch.equal(draw(again), drawn)
    for one in names:
        other = two(name)
        load(getattr(other, one), tmp_path / "lynx" / one)
        assert set(sparse_layers(getattr(other, one))) == set(sparse_layers(getattr(pipeline, one)))
        assert not torch.equal(draw(other), drawn)  # each has its part in the picture


@every_pipeline
def test_sparse_and_dense_again(name):
    pipeline = two(name)
    dense = draw(pipeline)
    sparsify(pipeline, Recipe.immediate(dense_last_steps=1))
    assert all(states(pipeline))
    assert not torch.equal(draw(pipeline), dense)
    set_dense_steps(pipeline, dense_steps=4)
    assert torch.equal(draw(pipeline), dense)
    densify(pipeline)
    assert states(pipeline) == [None, None]
    assert torch.equal(draw(pipeline), dense)


def test_a_change_that_fails_for_one_is_made_to_none(tmp_path):
    pipeline = two()
    sparsify(pipeline.transformer_2)
    before = states(pipeline)
    for change in (sparsify, lambda one: load(one, tmp_path / "none")):
        with pytest.raises(ValueError, match="is sparse already"):
            change(pipeline)
        assert states(pipeline) == before
    with pytest.raises(ValueError, match="is dense, there is nothing to save"):
        save(pipeline, tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_steps_that_one_alone_draws_are_refused_by_the_name_of_the_other():
    pipeline = two()
    with pytest.raises(CalibrationError, match="WanPipeline made 0 calls of its transformer_2"):
        calibrate(pipeline, prompts(), REFIT, options(steps=1), progress=False)
    assert states(pipeline) == [None, None]


@pytest.mark.parametrize("name", ["WanPipeline", "LucyEditPipeline"])
def test_prompts_that_reach_one_alone_are_no_error(name):
    pipeline = two(name)
    given = [
        {**one, "num_inference_steps": 1 if number == 0 else 4} for number, one in enumerate(prompts(4, name))
    ]
    settings = CalibrationOptions(batch_size=1, steps_per_prompt=4, pipeline_kwargs=CASES[name].settings)
    report = calibrate(pipeline, given, Recipe(rank=None, precision="fp8"), settings, progress=False)
    assert report.others["transformer_2"].solutions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calls": [{}]}, r"calls are of one transformer, .* several \(transformer, transformer_2\)"),
        ({"prompts": ["a"], "distill": Distillation()}, "distillation trains one transformer"),
    ],
)
def test_what_is_about_one_transformer_is_refused(arguments, message):
    pipeline = two()
    with pytest.raises(ValueError, match=message):
        calibrate(pipeline, **{"recipe": REFIT, "progress": False, **arguments})
    with pytest.raises(ValueError, match="give one of them in place of the pipeline"):
        target_model(pipeline)
    assert list(transformers_of(pipeline)) == NAMES


def test_dense_steps_are_not_chosen_for_several():
    pipeline = two()
    recipe = Recipe.recommended(ridge=0.1)
    with pytest.warns(RuntimeWarning, match="it is for one transformer, and this pipeline has 2"):
        calibrate(pipeline, prompts(2), recipe, options(steps=3), progress=False)
    assert {state.plan.recipe.dense_sigmas for state in states(pipeline)} == {()}


def test_checkpoints_of_one_and_of_several_are_not_taken_for_each_other(tmp_path):
    several, one = sparsify(two()), sparsify(two().transformer)
    save(several, tmp_path / "several")
    save(one, tmp_path / "one")
    with pytest.raises(CheckpointError, match="of one transformer, and this pipeline has several"):
        load(two(), tmp_path / "one")
    with pytest.raises(CheckpointError, match=r"holds checkpoints of several .*load .*several/transformer"):
        load(two().transformer, tmp_path / "several")
    with pytest.raises(FileExistsError, match="than one folder for each transformer"):
        save(several, tmp_path / "one")
    with pytest.raises(FileExistsError, match="holds other files"):
        save(one, tmp_path / "several")
    (tmp_path / "several" / "transformer_2" / "rtlynx.json").unlink()
    pipeline = two()
    with pytest.raises(CheckpointError):
        load(pipeline, tmp_path / "several")
    assert states(pipeline) == [None, None]


def test_a_pipeline_whose_second_transformer_is_the_first_has_one():
    holder = type("Holder", (), {})()
    holder.transformer = holder.transformer_2 = tiny_flux()
    assert list(transformers_of(holder)) == ["transformer"]


@pytest.mark.parametrize("name", ["WanPipeline", IDEOGRAM])
def test_the_commands_tell_of_all(name, command, tmp_path, monkeypatch):
    monkeypatch.setattr("rtlynx.models.pipelines.load_model", lambda *_, **__: two(name))
    names = names_of(two(name))
    code, out, _ = command("inspect", "MODEL", "--json")
    assert code == 0
    assert list(json.loads(out)) == names
    code, out, _ = command("convert", "MODEL", "--out", tmp_path / "lynx")
    assert code == 0
    code, out, _ = command("inspect", "MODEL", "--checkpoint", tmp_path / "lynx")
    assert code == 0
    assert f"{names[1]}:" in out
    assert out.count("candidates sparse") == 2
