"""What prompts may be: text, arguments of the pipeline by name, pictures in files; and how each is drawn."""

import copy
import json

import pytest
from calibration_helpers import PROMPTS, REFIT, assert_dense, assert_same, sample, solution
from helpers import tiny_flux
from PIL import Image
from pipeline_helpers import TinyPipeline

from rtlynx import CalibrationError, CalibrationOptions, CheckpointError, Distillation, Recipe, calibrate

OPTIONS = CalibrationOptions(batch_size=4, steps_per_prompt=2)


def picture(level, path=None):
    made = Image.new("RGB", (4, 4), (level, level, level))
    if path is not None:
        made.save(path)
    return made


class Editing(TinyPipeline):
    """Takes a picture first; its brightness is added to the noise."""

    def __init__(self, transformer, lists=True):
        super().__init__(transformer)
        self.lists, self.seen = lists, []

    def __call__(self, image=None, prompt=None, negative_prompt=None, generator=None, output_type="pil"):
        if isinstance(prompt, list) and not self.lists:
            raise ValueError("`prompt` has to be of type `str`")
        self.seen.append((prompt, image, negative_prompt))
        prompts = prompt if isinstance(prompt, list) else [prompt]
        generators = generator if isinstance(generator, list) else [generator]
        level = 0.0 if image is None else image.getpixel((0, 0))[0] / 255
        text = [f"{one} {level}" for one in prompts]
        return super().__call__(text, generators)


def edits(folder=None, count=8):
    """Prompts with pictures: in memory, or in files of `folder`."""
    return [
        {
            "prompt": f"make it {i}",
            "image": picture(10 * i) if folder is None else folder / f"{i}.png",
        }
        for i in range(count)
    ]


def files(folder, count=8):
    for i in range(count):
        picture(10 * i, folder / f"{i}.png")
    return edits(folder, count)


# ------------------------------------------------------------------------------------- inputs of each prompt


def test_each_prompt_goes_with_its_own_picture_one_a_call(tmp_path):
    ours, from_files = Editing(tiny_flux()), Editing(tiny_flux())
    sample(ours, REFIT, OPTIONS, edits())
    assert sorted((prompt, image.getpixel((0, 0))[0]) for prompt, image, _ in ours.seen) == [
        (f"make it {i}", 10 * i) for i in range(8)
    ]
    sample(from_files, REFIT, OPTIONS, files(tmp_path))
    assert_same(solution(ours.transformer), solution(from_files.transformer))


def test_texts_by_name_are_drawn_in_lists_of_those_with_the_same_names():
    pipeline = Editing(tiny_flux())
    named = [{"prompt": f"a {i}", "negative_prompt": f"no {i}"} for i in range(4)]
    sample(pipeline, REFIT, CalibrationOptions(batch_size=8, heldout=0.0), [*named, "alone", *PROMPTS[:2]])
    assert [(prompt, negative) for prompt, _, negative in pipeline.seen] == [
        ([f"a {i}" for i in range(4)], [f"no {i}" for i in range(4)]),
        (["alone", *PROMPTS[:2]], None),
    ]


def test_noise_is_that_of_the_prompt_however_it_is_drawn():
    together, apart = Editing(tiny_flux()), Editing(tiny_flux(), lists=False)
    options = CalibrationOptions(batch_size=4, steps_per_prompt=4)
    first = sample(together, REFIT, options, PROMPTS)
    second = sample(apart, REFIT, options, PROMPTS)
    assert [prompt for prompt, _, _ in together.seen] == [PROMPTS[:4], PROMPTS[4:7], PROMPTS[7:]]
    assert [prompt for prompt, _, _ in apart.seen] == PROMPTS
    assert set(first.solutions) == set(second.solutions)
    assert_same(solution(together.transformer), solution(apart.transformer), rtol=1e-4)


def test_copies_of_an_edit_are_held_out_together():
    pipeline = Editing(tiny_flux())
    once = edits(count=4)
    prompts = [*once, *(copy.deepcopy(one) for one in once)]
    sample(pipeline, REFIT, CalibrationOptions(heldout=0.25), prompts)
    assert [prompt for prompt, _, _ in pipeline.seen[-2:]] == ["make it 3"] * 2


def test_an_edit_is_resumed_by_what_its_picture_shows(tmp_path):
    pictures, work = tmp_path / "pictures", tmp_path / "work"
    pictures.mkdir()
    options = CalibrationOptions(folder=work)
    first, again = Editing(tiny_flux()), Editing(tiny_flux())
    sample(first, REFIT, options, files(pictures))
    moved = tmp_path / "moved"
    pictures.rename(moved)
    sample(again, REFIT, options, edits(moved))
    assert again.seen == []
    assert_same(solution(first.transformer), solution(again.transformer))
    picture(255, moved / "3.png")
    with pytest.raises(CheckpointError, match="other data"):
        sample(Editing(tiny_flux()), REFIT, options, edits(moved))


def test_a_picture_for_all_prompts_is_resumed_by_what_it_shows(tmp_path):
    def run(level):
        pipeline = Editing(tiny_flux())
        kwargs = {"image": picture(level)}
        sample(pipeline, REFIT, CalibrationOptions(folder=tmp_path, pipeline_kwargs=kwargs))
        return pipeline

    run(20)
    assert run(20).seen == []
    with pytest.raises(CheckpointError, match="other pipeline_kwargs"):
        run(30)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([{"prompt": "a", "imge": 1}], ValueError, "unknown prompt key 'imge'; did you mean 'image'"),
        ([{"prompt": "a", "generator": None}], ValueError, "cannot hold 'generator': noise comes from"),
        (["a", {}], ValueError, r"prompts are a list of strings, or of dicts .* prompt 1 is \{\}"),
        (["a", 3], ValueError, "prompt 1 is 3"),
        ([{1: "a"}], ValueError, "prompt 0 is"),
        ([edits(count=1)[0], "b"], CalibrationError, "Editing does not draw the prompt 'b' .*no picture"),
    ],
)
def test_prompts_that_a_pipeline_does_not_take_are_refused_by_what_is_wrong(prompts, error, message):
    class Needs(Editing):
        def __call__(self, image=None, prompt=None, generator=None):
            if image is None:
                raise TypeError("no picture")
            return super().__call__(image, prompt, None, generator)

    Needs.__name__ = "Editing"
    pipeline = Needs(tiny_flux())
    with pytest.raises(error, match=message):
        sample(pipeline, REFIT, CalibrationOptions(heldout=0.0), prompts)
    assert_dense(pipeline.transformer)


def test_a_picture_that_is_not_there_is_named_before_any_work(tmp_path):
    pipeline = Editing(tiny_flux())
    with pytest.raises(FileNotFoundError, match=r"prompt 0: there is no picture .*0\.png \(image\)"):
        sample(pipeline, REFIT, OPTIONS, edits(tmp_path))
    assert pipeline.seen == []


def test_a_list_that_a_pipeline_takes_for_parts_of_one_picture_is_drawn_prompt_by_prompt():
    class Parts(Editing):
        def __call__(self, prompt, generator=None):
            texts = prompt if isinstance(prompt, list) else [prompt]
            one = generator[0] if isinstance(generator, list) else generator
            return super().__call__(None, ["; ".join(texts)], None, [one])

    parts, apart = Parts(tiny_flux()), Editing(tiny_flux(), lists=False)
    sample(parts, REFIT, OPTIONS)
    sample(apart, REFIT, OPTIONS)
    assert [prompt for (prompt,), _, _ in parts.seen] == ["; ".join(PROMPTS[:4]), *PROMPTS]
    assert_same(solution(parts.transformer), solution(apart.transformer))


def test_distillation_draws_with_the_inputs_of_each_prompt():
    pipeline = Editing(tiny_flux())
    distill = Distillation(steps=1, batch_size=2, on_policy_prompts=2)
    recipe = Recipe(rank=None, ridge=0.1, precision="fp8")
    report = calibrate(pipeline, edits(count=4), recipe, OPTIONS, distill=distill, progress=False)
    assert report.distillation.steps == 1
    assert len(pipeline.seen) == 4 + 2
    assert all(image is not None for _, image, _ in pipeline.seen)


def test_dense_steps_are_chosen_on_the_inputs_of_each_prompt():
    pipeline = Editing(tiny_flux())
    report = calibrate(pipeline, edits(), Recipe.recommended(), OPTIONS, progress=False)
    drawn = len(pipeline.seen) - 8  # beside those recorded: a held-out one, dense and by each candidate
    assert drawn == 1 + len(report.choice.candidates) > 1
    assert all(image is not None for _, image, _ in pipeline.seen)


def test_a_failure_after_lists_have_worked_is_no_refusal_of_lists():
    class Fails(Editing):
        def __call__(self, image=None, prompt=None, generator=None):
            if len(self.seen) == 1:
                raise RuntimeError("the second call\nfails")
            return super().__call__(image, prompt, None, generator)

    pipeline = Fails(tiny_flux())
    with pytest.raises(
        CalibrationError, match=r"does not draw the prompt .*RuntimeError: the second call fails"
    ):
        sample(pipeline, REFIT, OPTIONS)
    assert len(pipeline.seen) == 1
    assert_dense(pipeline.transformer)


# ------------------------------------------------------------------------------------ on the command line


def jsonl(folder, *lines):
    file = folder / "edits.jsonl"
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return file


def test_the_command_calibrates_on_edits_whose_pictures_lie_beside_the_file(command, tmp_path, monkeypatch):
    ours, from_command = Editing(tiny_flux()), Editing(tiny_flux())
    sample(ours, REFIT, OPTIONS, files(tmp_path, 4))
    monkeypatch.setattr("rtlynx.models.pipelines.load_model", lambda *_, **__: from_command)
    lines = [{"prompt": f"make it {i}", "image": f"{i}.png"} for i in range(4)]
    recipe = ("rank=null", "ridge=0.1", "budget=null", "precision=bf16", "intercept=no", "rotate_values=no")
    code, _, error = command(
        "calibrate", "MODEL", "--out", tmp_path / "out", "--prompts", jsonl(tmp_path, *lines, ""),
        "--option", "steps_per_prompt=2", "--option", "batch_size=4",
        *(part for one in recipe for part in ("--set", one)),
    )  # fmt: skip
    assert (code, error.count("error")) == (0, 0), error
    assert [prompt for prompt, _, _ in from_command.seen] == [f"make it {i}" for i in range(4)]
    assert_same(solution(ours.transformer), solution(from_command.transformer))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a plain prompt", "line 2: "),
        ('["a"]', 'line 2: expected an object such as {"prompt": '),
        ({}, "line 2: expected an object"),
        ('{"prompt": "a", "prompt": "b"}', "line 2: a key is given twice"),
        ('{"prompt": "a", "strength": NaN}', "line 2: NaN is not a number"),
        ({"prompt": "a", "image": "none.png"}, "none.png (image)"),
        ({"prompt": "a", "mask_image": ["0.png", "none.png"]}, "none.png (mask_image)"),
        (
            {"prompt": "a", "pose_video": "a.mp4"},
            "a.mp4 (pose_video) is a video file: give a list",
        ),
    ],
)
def test_lines_that_are_no_inputs_are_named(command, tmp_path, line, said):
    picture(0, tmp_path / "0.png")
    file = jsonl(tmp_path, {"prompt": "a", "image": "0.png", "guidance_scale": 2.5}, line)
    code, out, error = command("calibrate", "zoo:flux-emoji", "--out", tmp_path / "x", "--prompts", file)
    assert (code, out, len(error.splitlines())) == (1, "", 1)
    assert said in error
    assert str(file) in error


def test_commands_that_compare_pictures_take_text_alone(command, tmp_path):
    file = jsonl(tmp_path, {"prompt": "a"})
    code, _, error = command("evaluate", "zoo:flux-emoji", "--checkpoint", tmp_path, "--prompts", file)
    assert code == 1
    assert "which `rtlynx calibrate --prompts` alone takes" in error
