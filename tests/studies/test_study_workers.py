"""Several processes do what one does."""

import json

import pytest
from jobs import jobs_for
from process_helpers import server
from row_store import RowStore
from study_helpers import STEPS, TinySetup
from variants import chosen
from workers import device_of, run_workers

HEADER = {"model": "tiny", "dtype": "float32", "guidance": 3.0, "calibration": {}}
NAMES = "dense,dense:other-seed,activation-2:4"


@pytest.fixture(autouse=True)
def _served(monkeypatch):
    """Processes start as with "spawn", and need not import everything again, which takes seconds."""
    context = server()
    monkeypatch.setattr("torch.multiprocessing.get_context", lambda _method: context)


@pytest.fixture(scope="module")
def made():
    setup = TinySetup()
    return setup, setup.study("cpu")


def test_two_processes_give_the_rows_of_one(made, tmp_path):
    setup, study = made
    jobs = jobs_for(chosen(NAMES), 2, (0, 1), STEPS)
    store, said = RowStore(tmp_path / "q.json", HEADER), []
    assert run_workers(setup, study, store, jobs, 2, say=said.append) == 3
    rows = {row["name"]: row for row in json.loads(store.path.read_text())["rows"]}
    assert set(rows) == set(NAMES.split(","))
    for job in jobs:
        mine = study.row(job.variant, 2, (0, 1))
        assert rows[job.variant.name]["figures"]["psnr"] == mine["figures"]["psnr"]
        assert rows[job.variant.name]["errors"]["layers"] == pytest.approx(mine["errors"]["layers"])
    assert {file.name for file in (tmp_path / "q").iterdir()} >= {"dense.png", "activation-2-4.png"}
    # And a second run finds nothing to do.
    assert run_workers(setup, study, RowStore(store.path, HEADER), jobs, 2, say=said.append) == 0


def test_no_variant_is_begun_after_the_time(made, tmp_path):
    setup, study = made
    store = RowStore(tmp_path / "q.json", HEADER)
    jobs = jobs_for(chosen("dense"), 1, (0,), STEPS)
    assert run_workers(setup, study, store, jobs, 2, minutes=0, say=lambda _: None) == 0
    assert not store.rows


def test_workers_are_on_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert device_of(3) == "cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [device_of(number) for number in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
