"""A work folder serves one calibration: other data or settings, leftovers and changed files are refused."""

import re
import shutil

import pytest
import safetensors.torch
import torch
import torch.multiprocessing
from calibration_helpers import JOINT, PROMPTS, RIDGE, assert_same, sample, solution
from helpers import relative_error, tiny_flux
from pipeline_helpers import TinyPipeline
from process_helpers import in_two_processes

from rtlynx import CalibrationOptions, CheckpointError, Recipe
from rtlynx.calibration.folder import digest
from rtlynx.models import state_of


def options_in(folder, **changes):
    return CalibrationOptions(batch_size=4, steps_per_prompt=2, folder=folder, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished calibration."""
    folder = tmp_path_factory.mktemp("finished")
    sample(TinyPipeline(tiny_flux()), JOINT, options_in(folder))
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "copy")


def refused_in(folder, message, prompts=PROMPTS, pipeline=None, recipe=JOINT, **changes):
    """A calibration in `folder` is refused before it samples, and leaves the folder and the model."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    pipeline = TinyPipeline(tiny_flux()) if pipeline is None else pipeline
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        sample(pipeline, recipe, options_in(folder, **changes), prompts)
    assert pipeline.batches == []
    assert state_of(pipeline.transformer) is None
    after = pipeline.transformer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


# ------------------------------------------------------------------------------------- another calibration


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["a\nb", "c"], ["a", "b", "c"]), (["a, b", "c"], ["a", "b, c"]), (["", "a"], ["a", ""]),
        (["ab", "c"], ["a", "bc"]),
    ],
)  # fmt: skip
def test_prompts_that_read_alike_are_other_data(tmp_path, first, second):
    stopped = TinyPipeline(tiny_flux(), interrupt_at=1)
    with pytest.raises(KeyboardInterrupt):
        sample(stopped, JOINT, options_in(tmp_path), first)
    refused_in(tmp_path, "other data", second)


class OtherPipeline(TinyPipeline):
    pass


def test_another_class_of_pipeline_is_another_calibration(finished):
    refused_in(finished, "other pipeline:", pipeline=OtherPipeline(tiny_flux()))


@pytest.mark.parametrize(
    "name", ["x_embedder.bias", "norm_out.linear.weight", "transformer_blocks.0.attn.to_q.weight"]
)
def test_any_other_weight_is_another_calibration(finished, name):
    model = tiny_flux()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] += 1e-5
    refused_in(finished, "other model:", pipeline=TinyPipeline(model))


class Guided(TinyPipeline):
    def __call__(self, prompt, generator, image=None, **settings):
        return super().__call__(prompt, generator, **settings)


def test_arrays_among_the_pipeline_kwargs_are_told_apart(tmp_path):
    image = torch.arange(5000.0)
    other = image.clone()
    other[2500] = 0  # where printing leaves entries out
    first, again = Guided(tiny_flux()), Guided(tiny_flux())
    settings = {"image": image, "guidance_scale": 1}
    sample(first, JOINT, options_in(tmp_path, pipeline_kwargs=settings))
    settings = {"guidance_scale": 1.0, "image": image.clone()}  # the same
    sample(again, JOINT, options_in(tmp_path, pipeline_kwargs=settings))
    assert again.batches == []
    settings = {**settings, "image": other}
    refused_in(tmp_path, "other pipeline_kwargs", pipeline=Guided(tiny_flux()), pipeline_kwargs=settings)
    settings = options_in(tmp_path / "new", pipeline_kwargs={"image": lambda: 0})
    with pytest.raises(TypeError, match="function cannot be written down: leave out `folder`"):
        sample(Guided(tiny_flux()), JOINT, settings)


# ------------------------------------------------------------------------------------------------ leftovers


@pytest.mark.parametrize("kind", ["calls", "solution"])
def test_files_without_a_manifest_are_not_claimed(folder, kind):
    for path in folder.iterdir():
        if not path.name.startswith(kind):
            path.unlink()
    message = rf"holds {kind}-.*no calibration\.json .*choose another folder, or delete it"
    refused_in(folder, message, recipe=Recipe(rank=8, ridge=RIDGE))
    refused_in(folder, message)


def test_what_is_not_ours_does_not_matter(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = tiny_flux()
    sample(TinyPipeline(model), JOINT, options_in(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_files_of_other_settings_are_not_taken(folder, tmp_path):
    sample(TinyPipeline(tiny_flux()), Recipe(rank=8, ridge=RIDGE), options_in(tmp_path / "other"))
    path = sorted((tmp_path / "other").glob("solution-*"))[0]
    shutil.copy(path, folder)
    refused_in(folder, f"{re.escape(path.name)} is not of this calibration")


def test_a_file_under_the_name_of_another_is_not_taken(folder):
    shutil.copy(folder / "calls-00000.safetensors", folder / "calls-00001.safetensors")
    for path in folder.glob("solution-*"):
        path.unlink()
    refused_in(folder, r"calls-00001\.safetensors is damaged")


@pytest.mark.parametrize("manifest", ["[]", "{}", "3", '{"data": "", "format": 1}'])
def test_other_manifests_are_refused(folder, manifest):
    (folder / "calibration.json").write_text(manifest)
    refused_in(folder, "choose another folder, or delete")


# ------------------------------------------------------------------------------------------ two processes


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    pipeline = TinyPipeline(tiny_flux())
    sample(pipeline, JOINT, options_in(folder / "work"))
    assert pipeline.batches
    torch.distributed.destroy_process_group()


def test_two_processes_share_a_folder_that_one_goes_on_from(tmp_path):
    in_two_processes(_one_of_two, tmp_path)
    later, alone = TinyPipeline(tiny_flux()), TinyPipeline(tiny_flux())
    sample(later, JOINT, options_in(tmp_path / "work"))
    assert later.batches == []
    sample(alone, JOINT, options_in(None))
    name = "transformer_blocks.0.attn.to_q.weight"  # factors are free in their signs
    assert relative_error(solution(later.transformer)[name], solution(alone.transformer)[name]) < 1e-3


# --------------------------------------------------------------------------------------------- changed files


def flip(name, tensors, about):
    tensor = tensors[name].clone()
    tensor.view(-1).view(torch.uint8)[0] ^= 1
    return {**tensors, name: tensor}, about


CHANGES = {
    "a bit": flip,
    "NaN": lambda name, tensors, about: ({**tensors, name: tensors[name] * torch.nan}, about),
    "missing": lambda name, tensors, about: ({k: v for k, v in tensors.items() if k != name}, about),
    "extra": lambda name, tensors, about: ({**tensors, "extra": torch.zeros(2)}, about),
    "shape": lambda name, tensors, about: ({**tensors, name: tensors[name].flatten()}, about),
    "dtype": lambda name, tensors, about: ({**tensors, name: tensors[name].half()}, about),
    "about": lambda name, tensors, about: (tensors, {**about, "about": about["about"].replace("0", "1")}),
    "no seal": lambda name, tensors, about: (tensors, {k: v for k, v in about.items() if k != "seal"}),
    "nothing known": lambda name, tensors, about: (tensors, None),
}


@pytest.mark.parametrize("kind", ["calls", "solution"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_contents_are_refused(folder, kind, change):
    path = sorted(folder.glob(f"{kind}-*"))[0]
    with safetensors.safe_open(path, framework="pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dim() > 1)
    tensors, about = CHANGES[change](name, tensors, about)
    safetensors.torch.save_file(tensors, path, about)
    refused_in(folder, re.escape(path.name))


def test_a_folder_left_as_it_was_gives_the_same(folder):
    first, again = TinyPipeline(tiny_flux()), TinyPipeline(tiny_flux())
    sample(first, JOINT, options_in(None))
    sample(again, JOINT, options_in(folder))
    assert again.batches == []
    assert_same(solution(again.transformer), solution(first.transformer))


def test_a_timestep_of_one_picture_is_written_down():
    expanded = torch.tensor(0.75).expand(1)
    assert expanded.stride() == (0,)
    assert digest(expanded) == digest(torch.tensor([0.75])) != digest(torch.tensor([0.5]))
