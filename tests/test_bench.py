"""`rtlynx bench`: what it prints and refuses; what it measures needs a card."""

import json
from functools import partial

import pytest
import torch

from rtlynx.cli import output
from rtlynx.timing import card, linear_layers, results
from rtlynx.timing.sustained import Window


class FakeCard:
    """Stands in for a Hopper card."""

    l2_bytes = 1
    name = "a card"

    def sample(self):
        return 1500.0, 600.0

    def describe(self, commit):
        return {"device": self.name, "commit": commit}


class FakeTimer:
    """Every call takes 10 us; our whole layer 5."""

    def __init__(self, us):
        self.us = us

    def window(self, seconds, sample, discard):
        return Window([self.us], [], [])


@pytest.fixture
def run(command):
    return partial(command, "bench")


@pytest.fixture
def measured(monkeypatch):
    """`linear_layers.run` without a card: each shape's row from fixed times."""
    import diffusers.loaders.peft  # noqa: F401  (which the fake generator, as a type, would break)

    def measure_shape(shape, sets, graphs, cusparselt, sample, seconds, rounds):
        variants = results.LINEAR_VARIANTS + (results.FP8_VARIANTS if sets[0] == "fp8" else ())
        taken = {
            name: results.Measurement(5.0 if name == "ours" else 10.0, [], 1500.0, 600.0) for name in variants
        }
        return results.linear_row(shape, variants, taken, None, {"ours_gemm": "not today"})

    monkeypatch.setattr("rtlynx.timing.card.Card", FakeCard)
    monkeypatch.setattr(linear_layers, "measure_shape", measure_shape)
    monkeypatch.setattr(linear_layers, "random_operands", lambda shape, generator, dtype: dtype)
    monkeypatch.setattr(linear_layers, "Graphs", object)
    monkeypatch.setattr(linear_layers, "CuSparseLt", lambda *arguments: None)
    monkeypatch.setattr(linear_layers.torch, "Generator", lambda device: torch.default_generator)


def test_without_a_hopper_card_it_says_so_in_one_sentence(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run()
    assert code == 1
    assert out == ""
    assert err.strip() == "error: the benchmark needs a Hopper card, and torch sees no CUDA device"


def test_another_card_is_named(run, monkeypatch):
    class Properties:
        major, minor, name = 8, 0, "NVIDIA A100"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    code, _, err = run()
    assert code == 1
    assert "compute capability 9.0" in err
    assert "NVIDIA A100" in err


def test_an_unknown_shape_is_refused_before_the_card_is_asked(run):
    code, _, err = run("--shapes", "flux-dwon")
    assert code == 1
    assert "no shape is called flux-dwon; there are paper-a" in err


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_table_and_the_file_have_every_shape(run, measured, monkeypatch, tmp_path, dtype):
    monkeypatch.setattr(output.out, "width", 160)
    file = tmp_path / "bench.json"
    shapes = "flux-o,zimage-w2"
    code, out, err = run("--dtype", dtype, "--shapes", shapes, "--seconds", "0.1", "--out", file)
    assert code == 0, err
    assert "ours_gemm: not today" in err
    document = json.loads(file.read_text())
    assert [row["shape"] for row in document["rows"]] == shapes.split(",")
    assert document["dtype"] == dtype
    assert document["clock_mhz"] == 1500.0
    for row in document["rows"]:
        line = next(line for line in out.splitlines() if row["shape"] in line)
        assert "2.00x" in line
    assert ("dense fp8" in out) is ("2:4 weights" in out) is (dtype == "fp8")
    assert 0 < out.index("2:4 activations") < out.index("rank 64")  # what is recommended, first
    assert "geometric mean" in out


def test_the_speed_of_a_layer_without_a_branch_is_that_of_its_two_parts():
    row = {
        "ours_quantize_us": 10.0,
        "ours_weight_sparse_gemm_us": 30.0,
        "cublas_us": 60.0,
        "fp8_linear_us": 44.0,
    }
    assert results.plain_layer_speed(row, "2:4 weights") == pytest.approx(1.5)
    assert results.plain_layer_speed(row, "2:4 weights", "fp8_linear_us") == pytest.approx(1.1)
    for missing in row:
        other = "fp8_linear_us" if missing == "fp8_linear_us" else "cublas_us"
        assert results.plain_layer_speed({**row, missing: None}, "2:4 weights", other) is None
    assert results.plain_layer_speed(row, "2:4 activations") is None


def test_an_installed_package_takes_no_commit_from_the_repository_around_it(monkeypatch, tmp_path):
    monkeypatch.delenv("RTLYNX_COMMIT", raising=False)
    monkeypatch.setattr(card, "ROOT", tmp_path)
    assert card.commit_at_hand() is None
