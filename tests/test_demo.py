"""`rtlynx demo` end to end on the real model, in small: what it writes and says, and nothing on failure."""

import copy
import json

import pytest
import rtlynx_zoo as zoo
import torch
from PIL import Image
from rtlynx_zoo import dense
from rtlynx_zoo.prompts import demo_prompts

from rtlynx.evaluate import demo as demo_module
from rtlynx.evaluate import sample_pictures
from rtlynx.evaluate.demo import GUIDANCE, IMAGES, STEPS, run_demo, sampling, sentences

SMALL = {"images": 2, "steps": 1, "progress": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder and return value of one small demo."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return folder, run_demo(folder, **SMALL)


def test_results_say_what_was_drawn(written):
    folder, returned = written
    results = json.loads((folder / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert (results["model"], results["steps"], results["images"], results["seed"]) == (
        "zoo:flux-emoji",
        1,
        2,
        0,
    )
    assert results["prompts"] == demo_prompts(2)
    dense_row, *others = results["variants"]
    assert (dense_row["name"], dense_row["psnr"], dense_row["ssim"]) == ("dense", None, 1.0)
    assert [row["label"] for row in others] == ["dense fp8", "the paper's recipe", "rtlynx, recommended"]
    assert all(row["seconds"] > 0 for row in results["variants"])  # none ships for one step


def test_what_drops_less_is_nearer(written):
    fp8, paper, ours = (row["psnr"] for row in written[1]["variants"][1:])
    assert fp8 > ours > paper > 5


def test_the_two_files_and_no_other(written):
    folder, _ = written
    assert {path.name for path in folder.iterdir()} == {"pictures.png", "results.json"}
    with Image.open(folder / "pictures.png") as grid:
        assert grid.height > 4 * 128
        assert grid.width > 2 * 128


def test_sentences_hold_whatever_the_numbers_are(written):
    results = copy.deepcopy(written[1])
    _, fp8, paper, ours = results["variants"]
    fp8["psnr"], paper["psnr"], ours["psnr"] = 30.0, 20.0, 28.0
    first, second, third = sentences(results)
    assert "dense fp8 30.0 dB, the paper's recipe 20.0 dB, rtlynx, recommended 28.0 dB" in first
    assert "8.0 dB above the paper's and 2.0 dB below dense fp8" in second
    assert "64x64 emoji with 13.6M parameters" in third
    ours["psnr"] = 18.0
    assert "2.0 dB below the paper's and 12.0 dB below dense fp8" in sentences(results)[1]
    fp8["psnr"] = None  # the same pictures to the bit
    assert "dense fp8 identical" in sentences(results)[0]


def test_the_dense_pictures_that_ship_are_those_that_the_model_draws():
    prompts = demo_prompts(2)
    shipped = zoo.dense_pictures("flux-emoji", prompts, 0, STEPS, GUIDANCE)
    drawn = sample_pictures(zoo.load(), prompts, **sampling(STEPS, 0))
    assert shipped.dtype == torch.float32
    torch.testing.assert_close(shipped, drawn, atol=2e-3, rtol=0)


def test_dense_pictures_ship_for_the_demo_s_own_settings_alone(tmp_path):
    prompts = demo_prompts(IMAGES)
    assert len(zoo.dense_pictures("flux-emoji", prompts, 0, STEPS, GUIDANCE)) == IMAGES
    for others in ((demo_prompts(IMAGES + 1), 0, STEPS, GUIDANCE), (prompts[1:], 0, STEPS, GUIDANCE)):
        assert zoo.dense_pictures("flux-emoji", *others) is None
    for settings in ((1, STEPS, GUIDANCE), (0, STEPS + 1, GUIDANCE), (0, STEPS, 1.0)):
        assert zoo.dense_pictures("flux-emoji", prompts, *settings) is None
    with pytest.raises(ValueError, match="unknown model"):
        zoo.dense_pictures("flux", prompts, 0, STEPS, GUIDANCE)
    assert dense.read(tmp_path, prompts, {}) is None


def test_dense_pictures_of_other_weights_or_damaged_ones_are_not_taken(tmp_path):
    prompts, settings = ["a", "b"], {"seed": 0}
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"some weights")
    pictures = torch.rand(2, 3, 4, 4)
    dense.write(tmp_path, pictures, prompts, settings)
    torch.testing.assert_close(dense.read(tmp_path, prompts, settings), pictures, atol=1e-3, rtol=0)
    weights.write_bytes(b"some others")
    assert dense.read(tmp_path, prompts, settings) is None
    weights.write_bytes(b"some weights")
    file = tmp_path / dense.FILE
    for damaged in (file.read_bytes()[:-1] + b"?", file.read_bytes()[:40]):
        file.write_bytes(damaged)
        assert dense.read(tmp_path, prompts, settings) is None


def test_dense_pictures_that_ship_are_not_drawn(tmp_path, monkeypatch):
    pictures = torch.rand(1, 3, 64, 64)
    monkeypatch.setattr(zoo, "dense_pictures", lambda *_: pictures)
    results = run_demo(tmp_path, **{**SMALL, "images": 1})
    assert results["variants"][0]["seconds"] is None
    assert results["variants"][1]["psnr"] < 15  # compared with those


@pytest.mark.parametrize("broken", ["picture_grid", "psnr", "write_results"])
def test_an_error_midway_leaves_nothing(tmp_path, monkeypatch, broken):
    def fail(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(demo_module, broken, fail)
    monkeypatch.setattr(demo_module, "LABELS", {"dense": "dense"})
    (tmp_path / "results.json").write_text("older")
    with pytest.raises(OSError, match="No space"):
        run_demo(tmp_path, **{**SMALL, "images": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "older"


@pytest.mark.parametrize("changes", [{"images": 0}, {"images": 65}, {"steps": 0}])
def test_numbers_out_of_range(tmp_path, changes):
    with pytest.raises(ValueError, match=r"there are 64 demo prompts|steps is a whole number"):
        run_demo(tmp_path / "out", **{**SMALL, **changes})
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="not a folder"):
        run_demo(tmp_path / "out", **SMALL)
    assert (tmp_path / "out").read_text() == "mine"
