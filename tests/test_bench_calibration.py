"""The benchmark of calibration, as far as it needs no card."""

import fnmatch
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import SMALL, qwen_call, tiny_chroma, tiny_flux, tiny_flux2, tiny_qwen, tiny_sd3, tiny_z_image
from parallel_helpers import torchrun
from pipeline_helpers import TinyPipeline

import rtlynx
from rtlynx import CalibrationOptions, Distillation, Recipe
from rtlynx.calibration import run
from rtlynx.models import make_plan, sparse_layers
from rtlynx.timing import card, full_models
from rtlynx.timing.full_models import MODELS, Size

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import calibration
from calibration import BLOCKS, RandomPipeline, Stages, calibrate_whole, distill_quantised

SEVERAL = {
    "chroma": lambda: tiny_chroma(num_layers=3, num_single_layers=3),
    "flux1-dev": lambda: tiny_flux(num_layers=3, num_single_layers=12),
    "flux2-klein": lambda: tiny_flux2(num_layers=3, num_single_layers=12),
    "qwen-image": tiny_qwen,
    "sd3.5-large": tiny_sd3,
    "z-image": tiny_z_image,
}


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        ("chroma", "single", "single_transformer_blocks.0"),
        ("flux1-dev", "double", "transformer_blocks.0"),
        ("flux1-dev", "single", "single_transformer_blocks.0"),
        ("flux2-klein", "double", "transformer_blocks.0"),
        ("flux2-klein", "single", "single_transformer_blocks.0"),
        ("qwen-image", "double", "transformer_blocks.0"),
        ("sd3.5-large", "double", "transformer_blocks.0"),
        ("z-image", "layer", "layers.0"),
    ],
)
def test_one_block_of_a_kind_is_calibrated(name, kind, block):
    model = SEVERAL[name]()
    names = {candidate.name for candidate in make_plan(model, Recipe()).layers}
    skip = [glob for glob in BLOCKS[name][kind] if fnmatch.filter(names, glob)]
    plan = make_plan(model, Recipe(skip=tuple(skip)))
    assert {layer.candidate.block for layer in plan.sparse} == {block}


class FakeCard:
    slug = "card"

    def describe(self, commit):
        return {"device": "a card"}


def without_cards():
    """A tiny model, and a CPU that counts no memory."""
    full_models.MODELS["qwen-image"] = full_models.MODELS["qwen-image"]._replace(
        build=lambda: tiny_qwen(num_layers=2), calls=lambda size, seed: [qwen_call(seed=seed)]
    )
    full_models.build, full_models.normals = (lambda full: full.build()), (lambda seed: seed)
    card.Card = FakeCard
    torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda: None
    torch.cuda.max_memory_allocated = lambda: 0


def test_two_processes_share_the_calls_and_find_the_same_bits(tmp_path):
    arguments = ["--model", "qwen-image", "--calls", 2, "--out", tmp_path / "out.json"]
    said = torchrun(tmp_path, calibration.__file__, arguments, without_cards)
    assert (tmp_path / "out.json").is_file(), said[0]
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["cards"] == 2
    runs = document["blocks"]["double"]["runs"]
    assert [run["calls"] for run in runs] == [2, 4]
    assert all(run["same"] for run in runs)
    assert "double" not in said[1]  # process 0 alone reports


def test_a_bit_is_seen():
    model = tiny_qwen()
    name = make_plan(model, Recipe()).sparse[0].name
    rtlynx.sparsify(model)
    first = calibration.digest(model)
    weight = model.get_submodule(name).weight.data.view(torch.int32)
    weight[0, 0] ^= 1
    assert calibration.digest(model) != first


# ---------------------------------------------------------------------------- a whole model, stage by stage

PROMPTS = ["a cat", "a dog"]


def test_a_random_pipeline_goes_through_the_noise_levels_of_the_model():
    torch.manual_seed(0)
    small = (("flux1-dev", 1), ("flux2-klein", 1), ("qwen-image", 2), ("z-image", 1), ("wan2.2-14b", 2))
    for name, forwards in small:
        of = MODELS[name]
        of = of._replace(sampling=of.sampling._replace(steps=3))
        model, seen = SMALL[name]().eval(), []
        argument = "t" if name == "z-image" else "timestep"
        model.register_forward_pre_hook(
            lambda _m, _a, call, argument=argument, seen=seen: seen.append(float(call[argument])),
            with_kwargs=True,
        )
        size = Size(side=64, text_tokens=5)
        pipeline = RandomPipeline(model, of, size, lambda seed: torch.randn)
        pipeline(["a cat"], [torch.Generator().manual_seed(3)])
        wanted = [sigma for sigma in of.sampling.sigmas(size) for _ in range(forwards)]
        assert seen == pytest.approx(wanted)


def test_a_calibration_that_was_cut_off_goes_on_and_adds_up_its_stages(tmp_path, monkeypatch):
    file, about = tmp_path / "results.json", {"model": "tiny"}
    options = CalibrationOptions(batch_size=1, steps_per_prompt=2, folder=tmp_path / "work")
    choose = run._Calibration._choose

    def cut(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run._Calibration, "_choose", cut)
    with pytest.raises(KeyboardInterrupt):
        calibrate_whole(TinyPipeline(tiny_flux()), PROMPTS, options, Stages(file, about))
    first = json.loads(file.read_text())
    assert not first["finished"]
    assert first["stages"]["recording"]["calls"] == len(PROMPTS)
    assert "budget" not in first["stages"]
    monkeypatch.setattr(run._Calibration, "_choose", choose)
    pipeline = TinyPipeline(tiny_flux())
    calibrate_whole(pipeline, PROMPTS, options, Stages(file, about))
    whole = json.loads(file.read_text())
    assert whole["finished"]
    assert whole["layers"] == len(sparse_layers(pipeline.transformer))
    for stage in ("recording", "moments", "solving"):
        assert whole["stages"][stage] == first["stages"][stage]
    assert {"rotations and permutations", "budget", "applying"} <= set(whole["stages"])
    assert all(row["seconds"] >= row["longest_seconds"] > 0 for row in whole["stages"].values())
    assert len(whole["run_seconds"]) == 2
    assert sum(whole["run_seconds"]) > sum(row["seconds"] for row in whole["stages"].values())
    with pytest.raises(ValueError, match="is finished: move it away, or give another --out"):
        Stages(file, about)
    with pytest.raises(ValueError, match="differs in model: "):
        Stages(file, {"model": "another"})


def test_a_distillation_is_timed_step_by_step_and_leaves_the_model_dense(tmp_path):
    file = tmp_path / "results.json"
    settings = Distillation(
        steps=2, batch_size=2, micro_batch_size=1, on_policy_share=0.0, rank=2, gradient_checkpointing=True
    )
    options = CalibrationOptions(batch_size=1, steps_per_prompt=2)
    model = tiny_flux()
    stages = Stages(file, {})
    distill_quantised(TinyPipeline(model), PROMPTS, options, settings, stages)
    found = json.loads(file.read_text())["stages"]
    assert found["training steps"]["calls"] == 2
    assert found["loss of held-out calls"]["calls"] == 2
    assert not sparse_layers(model)
