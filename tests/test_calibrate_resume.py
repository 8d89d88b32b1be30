"""An interrupted calibration goes on where it stopped; a folder of another one is refused."""

import errno
import shutil
from pathlib import Path

import pytest
import safetensors.torch
from calibration_helpers import (
    ALL_FIT,
    JOINT,
    PROMPTS,
    REFIT,
    RIDGE,
    assert_dense,
    assert_same,
    calls,
    run,
    sample,
    solution,
)
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import tiny_flux, tiny_z_image, z_image_call
from pipeline_helpers import TinyPipeline

import rtlynx.calibration.run
from rtlynx import (
    Budget,
    CalibrationOptions,
    CheckpointError,
    Recipe,
)
from rtlynx.models import sparse_layers, state_of


@pytest.fixture(scope="module")
def uninterrupted():
    """A calibration without a folder by `JOINT`: its pipeline and report."""
    pipeline = TinyPipeline(tiny_flux())
    return pipeline, sample(pipeline, JOINT, CalibrationOptions(batch_size=2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished calibration."""
    folder = tmp_path_factory.mktemp("finished")
    sample(TinyPipeline(tiny_flux()), JOINT, options_in(folder))
    return folder


def options_in(folder, **changes):
    return CalibrationOptions(batch_size=2, folder=folder, **changes)


@pytest.mark.parametrize("recipe", [JOINT, Recipe.paper(rank=4, lowrank_solver="trained", train_steps=5)])
def test_interrupted_while_recording_then_resumed(tmp_path, recipe, uninterrupted):
    whole, report = uninterrupted
    if recipe != JOINT:
        whole = TinyPipeline(tiny_flux())
        report = sample(whole, recipe, CalibrationOptions(batch_size=2))

    stopped = TinyPipeline(tiny_flux(), interrupt_at=3)
    with pytest.raises(KeyboardInterrupt):
        sample(stopped, recipe, options_in(tmp_path))
    assert_dense(stopped.transformer)
    assert stopped._progress_bar_config == {"leave": False}

    resumed = TinyPipeline(tiny_flux())
    again = sample(resumed, recipe, options_in(tmp_path))
    assert resumed.batches == whole.batches[2:]  # two batches were on disk
    assert_same(solution(resumed.transformer), solution(whole.transformer))
    assert {n: s.error for n, s in again.solutions.items()} == {
        n: s.error for n, s in report.solutions.items()
    }
    assert all(path.suffix in (".json", ".safetensors") for path in tmp_path.iterdir())


@pytest.mark.parametrize("sequential", [False, True])
def test_interrupted_while_solving_then_resumed(tmp_path, monkeypatch, sequential, uninterrupted):
    whole, _ = uninterrupted
    if sequential:
        whole = TinyPipeline(tiny_flux())
        sample(whole, JOINT, CalibrationOptions(batch_size=2, sequential=True))

    original, solved = rtlynx.calibration.run.solve_layers, []

    def solve(*args, **kwargs):
        if len(solved) == 5:  # four inputs of the double block, one of the single block
            raise KeyboardInterrupt
        solved.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(rtlynx.calibration.run, "solve_layers", solve)
    settings = options_in(tmp_path, sequential=sequential, memory_gb=1e-9)
    stopped = TinyPipeline(tiny_flux())
    with pytest.raises(KeyboardInterrupt):
        sample(stopped, JOINT, settings)
    assert_dense(stopped.transformer)

    solved[:] = [1] * 100  # counts on, and never interrupts again
    resumed = TinyPipeline(tiny_flux())
    sample(resumed, JOINT, settings)
    assert resumed.batches == []
    assert len(solved) == 101  # one input was left to solve
    assert_same(solution(resumed.transformer), solution(whole.transformer))


def test_a_finished_folder_gives_the_same_again_and_serves_another_budget(tmp_path, finished, uninterrupted):
    folder = shutil.copytree(finished, tmp_path / "calibration")
    second, third = (TinyPipeline(tiny_flux()) for _ in range(2))
    sample(second, JOINT, options_in(folder))
    assert second.batches == []
    assert_same(solution(second.transformer), solution(uninterrupted[0].transformer))
    sample(third, Recipe(rank=4, ridge=RIDGE, budget=Budget(speedup_share=0.5)), options_in(folder))
    assert third.batches == []
    assert 0 < len(sparse_layers(third.transformer)) < 11


OTHER = {
    "data": {"prompts": [*PROMPTS[:-1], "something else"]},
    "recipe": {"recipe": REFIT},
    "seed": {"changes": {"seed": 1}},
    "heldout": {"changes": {"heldout": 0.3}},
    "steps_per_prompt": {"changes": {"steps_per_prompt": 1}},
    "sequential": {"changes": {"sequential": True}},
    "pipeline_kwargs": {"changes": {"pipeline_kwargs": {"guidance_scale": 2.0}}},
    "model": {"model_seed": 1},
    "scheduler": {"scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0)},
}


def test_a_folder_of_another_calibration_is_refused_naming_what_differs(finished):
    files = {path.name: path.read_bytes() for path in finished.iterdir()}
    for what, change in OTHER.items():
        pipeline = TinyPipeline(tiny_flux(change.get("model_seed", 0)))
        pipeline.scheduler = change.get("scheduler")
        settings = options_in(finished, **change.get("changes", {}))
        with pytest.raises(CheckpointError, match=rf"other {what}: choose another folder"):
            sample(pipeline, change.get("recipe", JOINT), settings, change.get("prompts", PROMPTS))
        assert state_of(pipeline.transformer) is None
        assert pipeline.batches == []
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == files


@pytest.mark.parametrize("kind", ["calls", "solution", "manifest"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "pickle", "flipped header"])
def test_damaged_files_are_refused(finished, tmp_path, kind, damage):
    folder = shutil.copytree(finished, tmp_path / "calibration")
    pattern = {"calls": "calls-*", "solution": "solution-*", "manifest": "*.json"}[kind]
    path = sorted(folder.glob(pattern))[0]
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[9 if kind != "manifest" else 0] ^= 0x10
    pickled = b"\x80\x04cposix\nsystem\n(S'touch gone-wrong'\ntR."
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "pickle": pickled,
        "flipped header": flipped,
    }
    path.write_bytes(damaged[damage])
    model = tiny_flux()
    with pytest.raises(CheckpointError) as refused:
        sample(TinyPipeline(model), JOINT, options_in(folder))
    assert path.name in str(refused.value)
    assert "\n" not in str(refused.value)
    assert_dense(model)


def test_what_is_in_the_way_of_a_folder_is_an_error_and_leaves_the_model(tmp_path):
    (tmp_path / "file").write_text("mine")
    model = tiny_flux()
    with pytest.raises(OSError, match="file"):
        sample(TinyPipeline(model), JOINT, options_in(tmp_path / "file"))
    assert_dense(model)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_no_half_file_and_is_resumed(tmp_path, monkeypatch):
    def full_disk(_tensors, path, **_settings):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    stopped = TinyPipeline(tiny_flux())
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            sample(stopped, JOINT, options_in(tmp_path))
    assert_dense(stopped.transformer)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]
    sample(TinyPipeline(tiny_flux()), JOINT, options_in(tmp_path))


def test_calls_may_be_kept_in_a_folder_too(tmp_path):
    options = CalibrationOptions(folder=tmp_path)
    first, _ = run(options=options)
    plain, _ = run()
    assert_same(solution(first), solution(plain))
    with pytest.raises(CheckpointError, match="other data"):
        run(options=options, data=calls(8, first=1))
    z_image = [z_image_call(i, timestep=i / 4) for i in range(3)]  # lists of tensors come back as such
    folder = CalibrationOptions(folder=tmp_path / "z", heldout=0.0)
    on_disk, _ = run(tiny_z_image(), REFIT, folder, z_image)
    in_memory, _ = run(tiny_z_image(), REFIT, ALL_FIT, z_image)
    assert_same(solution(on_disk), solution(in_memory))
