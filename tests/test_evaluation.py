"""`rtlynx evaluate` on the model in the box: figures, what is kept and resumed, what is refused."""

import copy
import gc
import json
import math
import statistics
import weakref

import pytest
import rtlynx_zoo as zoo
import torch
from evaluation_helpers import PROMPTS, evaluate, settings, tiny_pipeline, with_stand_ins

import rtlynx
from rtlynx import Recipe
from rtlynx.evaluate import evaluation, picture_folder, psnr, sample_pictures, ssim
from rtlynx.evaluate.evaluation import DENSE_FP8
from rtlynx.storage.files import CheckpointError

NAMES = ["dense", "dense-fp8", "sparse"]
STEPS = {"num_inference_steps": 1}


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Collecting garbage would look through all that libraries hold, half a second a time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder and results of one evaluation of two pictures, with all metrics."""
    folder = tmp_path_factory.mktemp("evaluation") / "new" / "folder"
    return folder, evaluate(folder, metrics=with_stand_ins())


@pytest.fixture
def tiny(monkeypatch):
    """A smaller transformer in place of the box's."""
    monkeypatch.setattr(evaluation, "load_model", tiny_pipeline)


@pytest.fixture
def draws(tiny, monkeypatch):
    """The prompts that are drawn, in order; `draws.limit` of them, then the machine stops."""

    class Draws(list):
        limit = math.inf

    seen, real = Draws(), sample_pictures

    def draw(pipeline, prompts, **how):
        if len(seen) >= seen.limit:
            raise KeyboardInterrupt
        seen.append(prompts[0])
        return real(pipeline, prompts, **how)

    monkeypatch.setattr(evaluation, "sample_pictures", draw)
    return seen


# ------------------------------------------------------------------------------------------------- figures


def test_figures_are_those_of_pictures_drawn_one_by_one(written):
    rows = {row["name"]: row for row in written[1]["variants"]}
    assert list(rows) == NAMES
    dense = zoo.load()
    reference = sample_pictures(dense, PROMPTS[:2], pipeline_kwargs=STEPS)
    for name, recipe in (("dense-fp8", DENSE_FP8), ("sparse", Recipe.immediate())):
        pipeline = copy.deepcopy(dense)
        rtlynx.sparsify(pipeline, recipe)
        pictures = sample_pictures(pipeline, PROMPTS[:2], pipeline_kwargs=STEPS)
        assert rows[name]["psnr"] == pytest.approx(psnr(pictures, reference), abs=1e-3)
        assert rows[name]["ssim"] == pytest.approx(ssim(pictures, reference), abs=1e-5)
        distances = (pictures - reference).abs().mean((1, 2, 3)).tolist()
        assert rows[name]["lpips"] == pytest.approx(sum(distances) / 2, rel=1e-4)
        assert [one["lpips"] for one in rows[name]["pictures"]] == pytest.approx(distances, rel=1e-4)
    assert rows["dense"]["psnr"] is None
    assert rows["dense"]["lpips"] is None
    assert 0 < rows["dense"]["clip_score"] <= 100
    assert rows["dense-fp8"]["psnr"] > rows["sparse"]["psnr"]


def test_results_say_what_was_drawn_and_what_was_not_measured(written):
    folder, results = written
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (results["model"], results["images"], results["prompts"]) == (
        "zoo:flux-emoji",
        2,
        list(PROMPTS[:2]),
    )
    assert results["sparse"] == {"recipe": Recipe.immediate().to_dict(), "calibration_prompts": 0}
    assert [row["layers"] for row in results["variants"]] == [{}, {"fp8-dense": 66}, {"bf16-sparse": 48}]
    for row in results["variants"]:
        assert row["seconds"] == pytest.approx(
            statistics.median(p["seconds"] for p in row["pictures"]), abs=1e-4
        )
    if not torch.cuda.is_available():
        assert results["simulated"]
        assert "CUDA" in results["unavailable"]["peak_memory_bytes"]
    assert "at least 64" in results["unavailable"]["kid"]


def test_pictures_come_from_the_seed_that_is_asked_for(place, tiny):
    other = evaluate(place / "out", images=1, seed=1)
    pictures = picture_folder.PictureFolder(place / "out", settings(seed=1).to_dict())
    expected = sample_pictures(tiny_pipeline(), PROMPTS[:1], seed=1, pipeline_kwargs=STEPS)[0]
    torch.testing.assert_close(pictures.read("dense", 0)[0], expected)
    assert other["seed"] == 1


def test_kid_of_many_pictures(place, monkeypatch, tiny):
    def draw(_pipeline, prompts, *, seed, **_how):
        return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))

    monkeypatch.setattr(evaluation, "sample_pictures", draw)
    results = evaluate(place / "out", prompts=zoo_prompts(64), images=64, metrics=())
    dense, *others = results["variants"]
    assert dense["kid"] > 3 * dense["kid_stderr"] > 0  # noise is no emoji
    assert [row["kid"] for row in others] == [dense["kid"]] * 2  # the same noise
    assert "kid" not in results["unavailable"]


def zoo_prompts(count):
    from rtlynx_zoo.prompts import demo_prompts

    return demo_prompts(count)


def test_a_network_that_fails_on_a_picture_leaves_the_other_figures(place, tiny):
    from dataclasses import replace

    def fails(_network, _pictures, _reference, _prompts):
        raise RuntimeError("kernel size can't be greater than actual input size")

    metrics = [replace(one, compute=fails) if one.name == "lpips" else one for one in with_stand_ins()]
    results = evaluate(place / "out", images=1, metrics=metrics)
    assert "kernel size" in results["unavailable"]["lpips"]
    assert all("lpips" not in row for row in results["variants"])
    assert results["variants"][1]["psnr"] > 5


# -------------------------------------------------------------------------------------------------- resuming


def test_an_interrupted_run_continues_where_it_stopped(place, draws):
    draws.limit = 5  # a warm-up picture and both of dense; a warm-up picture and one of dense fp8
    with pytest.raises(KeyboardInterrupt):
        evaluate(place / "out", metrics=with_stand_ins())
    assert not (place / "out" / "report.html").exists()
    draws.clear()
    draws.limit = math.inf
    results = evaluate(place / "out", metrics=with_stand_ins())
    warm, both = PROMPTS[0], list(PROMPTS[:2])
    assert draws == [warm, PROMPTS[1], warm, *both]  # the rest of dense fp8, then sparse
    whole = evaluate(place / "other", metrics=with_stand_ins())
    for mine, theirs in zip(results["variants"], whole["variants"], strict=True):
        for key in ("psnr", "ssim", "clip_score", "image_reward"):
            assert mine[key] == theirs[key]


def test_a_finished_run_draws_nothing_and_more_images_only_what_is_new(place, draws):
    first = evaluate(place / "out", images=1)
    draws.clear()
    assert evaluate(place / "out", images=1)["variants"] == first["variants"]
    assert draws == []
    evaluate(place / "out", images=2)
    assert draws == [PROMPTS[0], PROMPTS[1]] * 3  # a warm-up picture and the new one


def test_other_settings_are_refused_with_what_differs(written):
    folder, _ = written
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"seed: 0 there, 3 now\): give another --out, or delete"):
        evaluate(folder, seed=3)
    with pytest.raises(
        CheckpointError, match=r"recipe\.n: 2 there, 1 now.*num_inference_steps: 1 there, 2 now"
    ):
        evaluate(folder, recipe=Recipe.immediate(n=1), pipeline_kwargs={"num_inference_steps": 2})
    with pytest.raises(CheckpointError, match="prompts"):
        evaluate(folder, prompts=("fox", "rocket"))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_pictures_of_other_weights_are_not_mixed(place, monkeypatch, tiny):
    evaluate(place / "out", images=1)

    def changed(*arguments, **how):
        pipeline = tiny_pipeline()
        with torch.no_grad():
            pipeline.transformer.x_embedder.weight.mul_(1.01)
        return pipeline

    monkeypatch.setattr(evaluation, "load_model", changed)
    with pytest.raises(CheckpointError, match="a model with other weights drew"):
        evaluate(place / "out", images=2)


def test_calibration_is_kept_when_the_run_is_interrupted_after_it(place, draws, monkeypatch):
    others = ("transformer_blocks.*", "*.proj_out")
    recipe = Recipe(rank=None, ridge=0.1, skip=others)
    chosen = {"recipe": recipe, "calibration_prompts": ("fox", "key"), "images": 1}
    draws.limit = 4  # dense and dense fp8
    with pytest.raises(KeyboardInterrupt):
        evaluate(place / "out", **chosen)
    assert (place / "out" / "checkpoint" / "rtlynx.json").is_file()
    draws.limit = math.inf
    monkeypatch.setattr(evaluation, "calibrate", lambda *_, **__: pytest.fail("calibrated twice"))
    results = evaluate(place / "out", **chosen)
    assert results["variants"][2]["layers"] == {"bf16-sparse": 4}
    assert results["variants"][2]["calibration_seconds"] > 0
    assert results["variants"][2]["dense_steps"] == []  # the recipe asks for no comparison
    assert results["sparse"]["calibration_prompts"] == 2


def test_a_checkpoint_in_place_of_a_recipe(place, tiny):
    pipeline = tiny_pipeline()
    rtlynx.sparsify(pipeline, Recipe.immediate(norm="none"))
    rtlynx.save(pipeline, place / "checkpoint")
    results = evaluate(place / "out", images=1, checkpoint=place / "checkpoint")
    expected = sample_pictures(pipeline, PROMPTS[:1], pipeline_kwargs=STEPS)
    dense = sample_pictures(tiny_pipeline(), PROMPTS[:1], pipeline_kwargs=STEPS)
    assert results["variants"][2]["psnr"] == pytest.approx(psnr(expected, dense), abs=1e-3)
    assert results["sparse"]["recipe"]["norm"] == "none"
    rtlynx.densify(pipeline)
    rtlynx.sparsify(pipeline, Recipe.immediate())
    rtlynx.save(pipeline, place / "checkpoint")
    with pytest.raises(CheckpointError, match="checkpoint: '"):  # another one under the same name
        evaluate(place / "out", images=1, checkpoint=place / "checkpoint")


def test_no_two_transformers_are_in_memory_at_once(place, monkeypatch, tiny):
    alive, real = [], evaluation.load_model

    def load(*arguments, **how):
        gc.collect()
        assert not any(one() is not None for one in alive)
        pipeline = real(*arguments, **how)
        alive.append(weakref.ref(pipeline.transformer))
        return pipeline

    monkeypatch.setattr(evaluation, "load_model", load)
    evaluate(place / "out", images=1)
    gc.collect()
    assert [one() for one in alive] == [None, None]


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": ()}, "at least one"),
        ({"prompts": "red heart"}, "list of at least one string"),
        ({"recipe": Recipe()}, "needs calibration: give prompts"),
        (
            {"recipe": Recipe(), "calibration_prompts": ("fox", "rocket")},
            "'rocket' is drawn and calibrated on",
        ),
    ],
)
def test_settings_that_make_no_evaluation(changes, said):
    with pytest.raises(ValueError, match=said):
        settings(**changes)


def test_a_recipe_and_a_checkpoint_are_one_too_many(tmp_path):
    with pytest.raises(ValueError, match="not both"):
        settings(recipe=Recipe.immediate(), checkpoint=tmp_path)


def test_a_model_that_is_sparse_already(place, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", lambda *_, **__: rtlynx.sparsify(tiny_pipeline()))
    with pytest.raises(ValueError, match=r"sparse already \(\d+ layers\): give the dense model"):
        evaluate(place / "out")
    assert not (place / "out").exists()


def test_a_bare_transformer(place):
    with pytest.raises(TypeError, match="give a pipeline folder"):
        evaluate(place / "out", model=str(zoo.folder("flux-emoji") / "transformer"))
    assert not (place / "out").exists()


def test_a_picture_of_nan(place, monkeypatch, tiny):
    monkeypatch.setattr(evaluation, "sample_pictures", lambda *_, **__: torch.full((1, 3, 64, 64), math.nan))
    with pytest.raises(ValueError, match="Dense drew NaN or Inf for 'red heart'"):
        evaluate(place / "out")


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="not a folder"):
        evaluate(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"holds other files, but no evaluation\.json"):
        evaluate(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"format": 1, "settings": 3}')
    with pytest.raises(CheckpointError, match="damaged or of another version"):
        evaluate(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "file"]


def test_pictures_are_kept_without_loss(tmp_path):
    folder = picture_folder.PictureFolder(tmp_path / "out", {})
    folder.claim("weights")
    exact = torch.rand(3, 8, 8)
    for number, picture in enumerate((exact, exact.bfloat16().float())):
        folder.write("dense", number, picture, 1.5)
        read, seconds = folder.read("dense", number)
        assert torch.equal(read, picture)
        assert (read.dtype, seconds) == (torch.float32, 1.5)
    assert folder.missing("dense", 3) == [2]
    (file,) = (tmp_path / "out").rglob("00000.safetensors")
    file.write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="damaged"):
        folder.read("dense", 0)


# ----------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--recipe", "recommendd"), 2, "no recipe or file is called 'recommendd': give recommended, paper"),
        (("--recipe", "paper", "--checkpoint", "x"), 2, "not both"),
        (("--recipe", "immediate", "--calibration-prompts", "x"), 2, "nothing is calibrated"),
        (("--recipe", "immediate", "--prompts", "none.txt"), 1, "none.txt"),
        (("--recipe", "immediate", "--out", "file"), 1, "file exists and is not a folder"),
        (("--recipe", "immediate", "--pipeline", "steps=3"), 1, "unknown pipeline_kwargs key 'steps'"),
        (("--checkpoint", "none"), 1, "none is not a folder"),
    ],
)
def test_wrong_calls_are_one_line_and_write_nothing(command, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    found, out, error = command("evaluate", "zoo:flux-emoji", *arguments)
    assert (found, out) == (code, "")
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_ones_own_needs_prompts_to_calibrate_on(command, tmp_path):
    (tmp_path / "prompts.txt").write_text("fox\n")
    code, _, error = command("evaluate", tmp_path / "model", "--prompts", tmp_path / "prompts.txt")
    assert code == 2
    assert "give --calibration-prompts FILE" in error


def test_the_command_prints_a_table_and_where_the_report_is(command, place, tiny):
    (place / "recipe.json").write_text(json.dumps({"rank": None, "refit": False, "norm": "none"}))
    (place / "prompts.txt").write_text("red heart\nhot dog\n")
    code, out, _ = command(
        "evaluate", "zoo:flux-emoji", "--recipe", place / "recipe.json", "--prompts", place / "prompts.txt",
        "--images", "1", "--pipeline", "num_inference_steps=1", "--out", place / "out",
    )  # fmt: skip
    assert code == 0
    text = " ".join(out.split())
    for said in ("Dense fp8", "PSNR, dB", "report.html", "kid is not available: it takes at least 64"):
        assert said in text
