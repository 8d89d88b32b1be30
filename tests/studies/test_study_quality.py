"""The driver: rows, resuming, plans, limits and failures, on a tiny model."""

import json
from dataclasses import replace

import measure
import pytest
import quality
import torch
from jobs import Job, estimate, jobs_for
from quality import run
from row_store import RowStore, over_seeds
from study_helpers import STEPS, tiny_study
from variants import VARIANTS, chosen

HEADER = {"model": "tiny", "dtype": "float32", "guidance": 3.0, "calibration": {}}


def jobs(globs, pictures=2, seeds=(0,)):
    return jobs_for(chosen(globs), pictures, seeds, STEPS)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of three variants over two seeds."""
    path, said = tmp_path_factory.mktemp("study") / "quality-tiny.json", []
    study = tiny_study()
    run(
        study,
        RowStore(path, HEADER),
        jobs("dense,dense:other-seed,activation-2:4", 2, (0, 1)),
        say=said.append,
    )
    return path, study, said


def test_rows_say_what_was_measured(done):
    path, _, _ = done
    document = json.loads(path.read_text())
    dense, other, sparse = document["rows"]
    assert [row["name"] for row in document["rows"]] == ["dense", "dense:other-seed", "activation-2:4"]
    assert dense["figures"]["psnr"] == {"mean": None, "spread": None, "by_seed": [None, None]}
    assert dense["modelled_speedup"] == 1
    assert (sparse["n"], sparse["pictures"], sparse["seeds"], sparse["steps"]) == (4, 2, [0, 1], STEPS)
    psnr = sparse["figures"]["psnr"]
    assert psnr["mean"] == pytest.approx(sum(psnr["by_seed"]) / 2)
    assert psnr["spread"] > 0
    assert sparse["figures"]["psnr"]["mean"] > other["figures"]["psnr"]["mean"]
    assert sparse["errors"]["layer_error"] > 0 == dense["errors"]["layer_error"]
    assert sparse["modelled_speedup"] > 1
    assert sparse["groups"]["all"]["n"] == 2
    roles = document["distributions"]["roles"]
    assert 0.5 < roles["mlp-down"]["activations"]["share"] < 1
    assert "failures" not in document or not document["failures"]
    files = {file.name for file in path.with_suffix("").iterdir()}
    assert files == {
        *("dense.png", "dense-other-seed.png", "dense-other-seed-worst.png"),
        *("activation-2-4.png", "activation-2-4-worst.png"),
    }


def test_pictures_are_of_the_seed_whatever_the_variant(done):
    _, study, _ = done
    assert torch.equal(study.dense(2, STEPS, 1), study.draw(study.model.pipeline, 2, STEPS, 1_000_000))
    assert torch.equal(study.dense(1, STEPS, 0), study.dense(2, STEPS, 0)[:1])


def test_the_plan_comes_after_the_first_variant(done):
    _, _, said = done
    assert said[0] == "3 of 3 variants to do"
    assert said[1].startswith("dense: equal to dense")
    assert "2 pictures x 2 seeds x 3 steps" in said[2]
    assert "in all about" in said[4]


def test_a_run_goes_on_where_it_stopped(done):
    path, study, _ = done
    before = path.read_text()
    assert (
        run(study, RowStore(path, HEADER), jobs("dense,activation-2:4", 2, (0, 1)), say=lambda _: None) == 0
    )
    assert path.read_text() == before
    with pytest.raises(ValueError, match="dtype"):
        RowStore(path, {**HEADER, "dtype": "bfloat16"})


def test_a_failure_is_noted_and_tried_again(tmp_path, monkeypatch):
    path, study = tmp_path / "q.json", tiny_study()
    build = measure.build

    def broken(variant, *args, **kwargs):
        if variant.name == "activation-2:4":
            raise ValueError("leaves no layer sparse\nmore")
        return build(variant, *args, **kwargs)

    monkeypatch.setattr(measure, "build", broken)
    todo, quiet = jobs("activation-2:4,activation-2:4+norm", 1), lambda _: None
    assert run(study, RowStore(path, HEADER), todo, say=quiet) == 1
    assert json.loads(path.read_text())["failures"] == {
        "activation-2:4": "ValueError: leaves no layer sparse"
    }
    monkeypatch.undo()
    assert run(study, RowStore(path, HEADER), todo, say=quiet) == 1
    document = json.loads(path.read_text())
    assert document["failures"] == {}
    assert len(document["rows"]) == 2


def test_a_crash_leaves_whole_rows(tmp_path, monkeypatch):
    store = RowStore(tmp_path / "q.json", HEADER, "abc", "a card")
    store.append({"name": "dense"})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        store.append({"name": "paper"})
    rows = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert rows == [{"name": "dense", "commit": "abc", "device": "a card"}]
    assert list(tmp_path.iterdir()) == [tmp_path / "q.json"]


def test_a_limit_of_minutes_begins_nothing_that_would_end_later(tmp_path):
    said = []
    assert (
        run(tiny_study(), RowStore(tmp_path / "q.json", HEADER), jobs("dense"), minutes=0, say=said.append)
        == 0
    )
    assert said[-1] == "stopped before dense: 1 variants are left"


def test_estimates_by_hand():
    def row(drawing, n, seconds, calibration):
        return {
            "drawing_seconds": drawing,
            "n": n,
            "steps": 28,
            "seconds": seconds,
            "calibration_seconds": calibration,
        }

    rows = [row(28.0, 100, 30.0, None), row(28.0, 100, 50.0, 20.0)]
    by_name = {variant.name: variant for variant in VARIANTS}
    dense, paper = (Job(by_name[name], 1000, (0, 1, 2)) for name in ("dense", "paper"))
    assert estimate(dense, []) is None
    assert estimate(dense, rows) == pytest.approx(0.01 * 3000 * 28 + 2)
    assert estimate(paper, rows) == pytest.approx(0.01 * 3000 * 28 + 22)
    few = Job(replace(by_name["dense"], steps=8), 256, (0,))
    assert estimate(few, rows) == pytest.approx(0.01 * 256 * 8 + 2)


def test_steps_given_stand_in_for_the_studys_own():
    (few,) = jobs_for(chosen("steps:paper-8"), None, None, 28)
    assert (few.variant.steps, few.variant.reference_steps, few.pictures, few.seeds) == (8, 8, 256, (0,))
    (against,) = jobs_for(chosen("steps:dense-8-against-28"), 4, (3,), 6)
    assert (against.variant.steps, against.variant.reference_steps, against.seeds) == (6, 6, (3,))


def test_spread_over_seeds():
    assert over_seeds([1.0, 3.0]) == {"mean": 2.0, "spread": pytest.approx(2**0.5), "by_seed": [1.0, 3.0]}
    assert over_seeds([4.0]) == {"mean": 4.0, "spread": None, "by_seed": [4.0]}
    assert over_seeds([1.0, None])["mean"] is None


def test_atlas_and_back(tmp_path):
    pictures = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    measure.write_atlas(tmp_path / "a.png", pictures)
    found = measure.read_atlas(tmp_path / "a.png")
    assert found.shape == (16, 3, 8, 8)
    assert (found[:10] - pictures).abs().max() <= 0.5 / 255 + 1e-6


def test_command_line_prints_a_plan_and_refuses_what_it_does_not_know(tmp_path, capsys):
    out = str(tmp_path / "q.json")
    quality.main(["--out", out, "--variants", "ridge:*", "--plan", "--device", "cpu"])
    assert capsys.readouterr().out.count("256 pictures x 1 seeds x 28 steps") == 7
    for arguments, message in (
        (["--variants", "nothing"], "nothing"),
        (["--model", "zoo:none"], "unknown model"),
    ):
        with pytest.raises(SystemExit):
            quality.main(["--out", out, "--device", "cpu", *arguments])
        assert message in capsys.readouterr().err
