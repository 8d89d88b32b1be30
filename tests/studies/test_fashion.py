"""Fashion-MNIST from its files to rows by width, with tiny models and random pictures."""

import argparse
import gzip
import json
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
import rtlynx_zoo as zoo
import torch
import widths
from picture_figures import load_judges
from plots import by_width, write_plots
from rtlynx_zoo import fashion
from rtlynx_zoo.prompts import FASHION_CLASSES
from training import fashion_classifier, fashion_data
from training.architectures import ARCHITECTURES
from zoo_helpers import TINY, fashion_pipeline, randomize, seeds, write_fashion_archive


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def package(tmp_path):
    """The Debian package's files, of a few random pictures."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 6), ("t10k", 3)):
        pictures = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", pictures)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))
    return tmp_path


def main_of(module, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


# ----------------------------------------------------------------------------------------------------- data


def test_the_archive_holds_the_packages_pictures_in_a_black_frame(package, monkeypatch):
    out = package / "fashion.npz"
    main_of(fashion_data, monkeypatch, ["--folder", package, "--out", out])
    saved = np.load(out)
    raw = gzip.decompress((package / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    assert saved["test_pictures"][:, 2:30, 2:30, 0].tobytes() == raw
    frame = saved["pictures"].copy()
    frame[:, 2:30, 2:30] = 0
    assert frame.shape == (6, 32, 32, 1)
    assert not frame.any()
    assert saved["labels"].tolist() == list(range(6))


@pytest.mark.parametrize("damage", ["missing", "cut", "no gzip", "other sizes", "unknown class"])
def test_damaged_files_are_one_clear_line_and_leave_nothing(package, monkeypatch, capsys, damage):
    path = package / "train-labels-idx1-ubyte.gz"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    elif damage == "no gzip":
        path.write_bytes(b"not a zip file")
    else:
        write_idx(path, np.full(5 if damage == "other sizes" else 6, 10, np.uint8))
    with pytest.raises(SystemExit):
        main_of(fashion_data, monkeypatch, ["--folder", package, "--out", package / "fashion.npz"])
    assert "train" in capsys.readouterr().err.splitlines()[-1]
    assert not (package / "fashion.npz").exists()


# ----------------------------------------------------------------------------------------------- classifier


def test_moved_pictures_are_the_picture_somewhere_near():
    torch.manual_seed(0)
    picture = torch.zeros(1, 1, 32, 32)
    picture[..., 10:14, 16] = torch.tensor([1.0, 2, 3, 4])
    moved = fashion_classifier.moved(picture.expand(200, -1, -1, -1))
    rows, columns = moved.argmax(2).amax(2)[:, 0], moved.sum(2)[:, 0].argmax(1)
    assert set((rows - 13).tolist()) == {-2, -1, 0, 1, 2}
    assert set(columns.tolist()) == set(range(13, 19))  # 16 and its mirror image 15, two pixels each way
    assert torch.equal(moved.sum((1, 2, 3)), torch.full((200,), 10.0))


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A folder of models with a classifier that was trained for a moment, and the archive."""
    models = tmp_path_factory.mktemp("models")
    archive = write_fashion_archive(models / "fashion.npz", pictures=70)
    with pytest.MonkeyPatch.context() as patch:
        arguments = f"--data {archive} --out {models / 'flux-fashion'} --epochs 1 --batch 35 --device cpu"
        main_of(fashion_classifier, patch, arguments.split())
    return models, archive


@pytest.fixture
def here(judged, monkeypatch):
    monkeypatch.setattr(zoo, "_REPOSITORY_MODELS", judged[0])
    monkeypatch.setitem(ARCHITECTURES, "flux-fashion", tiny())
    return judged


def tiny():
    architecture = ARCHITECTURES["flux-fashion"]
    return replace(architecture, config={**architecture.config, **TINY["flux-fashion"]})


def test_what_the_judges_load_is_what_training_measured(here):
    models, archive = here
    saved = np.load(archive)
    judges = load_judges("cpu", clothing=True)
    pictures = torch.from_numpy(saved["test_pictures"]).permute(0, 3, 1, 2) / 255
    features = judges.features(pictures)
    torch.testing.assert_close(features, judges.real([]), atol=2e-2, rtol=2e-3)  # kept in float16
    prompts = [FASHION_CLASSES[label] for label in saved["test_labels"]]
    report = json.loads((models / "flux-fashion" / "classifier.json").read_text())
    assert judges.recognised(features, prompts) == pytest.approx(report["accuracy"], abs=0.03)


def test_a_missing_classifier_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, "_REPOSITORY_MODELS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"classifier\.safetensors .* studies/models/flux-fashion"):
        load_judges("cpu", clothing=True)


# --------------------------------------------------------------------------------------------------- widths


def options(archive, out, **changes):
    settings = {
        **{"data": archive, "out": out, "width": 32, "seed": 0, "training_pictures": 12, "batch": 4},
        **{"pictures": 5, "seeds": [0], "steps": 1, "device": "cpu", "dtype": "float32"},
        **{"batch_size": 5, "calibration_prompts": 8, "calibration_steps": 1, "commit": "abc"},
    }
    return argparse.Namespace(**{**settings, **changes})


def test_rows_of_two_widths_stand_in_one_file_and_are_plotted(here, tmp_path, monkeypatch):
    monkeypatch.setattr(widths, "VARIANTS", "dense,fp8:refit")
    archive, out, judges, said = here[1], tmp_path / "widths.json", load_judges("cpu", clothing=True), []
    for width in (32, 64):
        assert widths.run(options(archive, out, width=width), judges, said.append) == 2
    document = json.loads(out.read_text())
    rows = document["rows"]
    assert [(row["name"], row["width"]) for row in rows] == [
        *(("dense", 32), ("fp8:refit", 32)),
        *(("dense", 64), ("fp8:refit", 64)),
    ]
    assert rows[2]["parameters"] > 2 * rows[0]["parameters"]
    assert all(row["training_steps"] == 3 and 0 < row["figures"]["precision"]["mean"] <= 1 for row in rows)
    assert rows[1]["errors"]["output_error"] > 0 == rows[0]["errors"]["output_error"]
    assert rows[0]["learning_rate"] == pytest.approx(2**0.5 * rows[2]["learning_rate"])

    def never(_):
        raise AssertionError("trained again")

    monkeypatch.setattr(widths, "trained", never)
    assert widths.run(options(archive, out), judges, said.append) == 0
    with pytest.raises(ValueError, match="made with training"):
        widths.run(options(archive, out, training_pictures=13), judges, said.append)
    figure = by_width(document)
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[1].lines}
    errors = [[row["width"], row["errors"]["output_error"]] for row in rows if row["name"] == "fp8:refit"]
    assert lines["fp8:refit"] == errors
    assert [path.name for path in write_plots(out)] == ["plot-by-width.png"]


def test_a_width_without_heads_is_one_clear_line(here, tmp_path, capsys):
    arguments = f"--data {here[1]} --out {tmp_path / 'w.json'} --width 40 --device cpu"
    with pytest.raises(SystemExit):
        widths.main(arguments.split())
    assert "multiple of 32, the size of a head; got 40" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "w.json").exists()


# --------------------------------------------------------------------------------------------- command line


def test_commands_draw_its_classes(here, tmp_path, command):
    folder = here[0] / "flux-fashion"
    fashion_pipeline(randomize(tiny().build())).save_pretrained(folder)
    code, out, _ = command("inspect", "zoo:flux-fashion", "--activations", 2, "--json")
    assert code == 0
    assert json.loads(out)["activation_energy_kept"]
    evaluate = ["evaluate", "zoo:flux-fashion", "--images", 2, "--out", tmp_path / "e"]
    evaluate += ["--pipeline", "num_inference_steps=1"]
    code, out, _ = command(*evaluate, "--recipe", "immediate", "--json")
    results = json.loads(out)
    assert code == 0
    assert results["prompts"] == list(FASHION_CLASSES[:2])
    assert "are of emoji" in results["unavailable"]["kid"]
    code, _, error = command(*evaluate, "--recipe", "recommended")
    assert code
    assert "is drawn and calibrated on, which would flatter" in " ".join(error.split())


# ---------------------------------------------------------------------------------------------- what ships


def test_weights_of_the_repository_draw_the_classes_and_other_noise_draws_others():
    folder = zoo.folder("flux-fashion")
    if not (folder / "transformer").exists() or not (folder / fashion.CLASSIFIER).exists():
        pytest.skip("flux-fashion is not in this installation")
    assert json.loads((folder / "classifier.json").read_text())["accuracy"] >= 0.91
    assert (folder / fashion.CLASSIFIER).stat().st_size <= 1e6
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 20e6
    pipe, judges = zoo.load("flux-fashion"), load_judges("cpu", clothing=True)
    pipe.set_progress_bar_config(disable=True)
    prompts = list(FASHION_CLASSES)
    settings = {"num_inference_steps": 8, "guidance_scale": 1.5, "output_type": "pt"}
    drawn = pipe(prompts, generator=seeds(*range(10)), **settings).images
    assert judges.recognised(judges.features(drawn), prompts) >= 0.7
    others = pipe(prompts[:3], generator=seeds(10, 11, 12), **settings).images
    assert ((drawn[:3] - others).square().mean((1, 2, 3)) > 1e-3).all()  # below 30 dB
