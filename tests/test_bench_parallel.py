"""The benchmark of a step on several cards, as far as it needs no card: two processes over gloo."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import qwen_call, tiny_qwen
from parallel_helpers import torchrun
from rich.console import Console

from rtlynx.timing import card, parallel
from rtlynx.timing.full_models import MODELS
from rtlynx.timing.overview import parallel_overview
from rtlynx.timing.results import over_reference, speed_up
from rtlynx.timing.step_split import kind
from rtlynx.timing.step_variants import DENSE_FP8, RECOMMENDED, REFERENCE, Form, Variant, recommended

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import targets

BENCHMARKS = Path(targets.__file__).parent


def broken(model):
    raise RuntimeError("not today")


class FakeCard:
    name, slug = "a card", "card"

    def sample(self):
        return 1500.0, None

    def describe(self, commit):
        return {"device": self.name, "commit": commit}


def without_cards():
    """A tiny model that is not compiled, in float32 on the CPU."""
    MODELS["qwen-image"] = MODELS["qwen-image"]._replace(
        build=tiny_qwen, calls=lambda size, normal: [qwen_call(), qwen_call(seed=1)]
    )
    card.Card = FakeCard
    parallel.build = lambda full: full.build()
    parallel.normals = lambda seed: torch.randn
    parallel.VARIANTS = (
        Variant(RECOMMENDED, Form(recommended("fp8")), compiled=False),
        Variant(DENSE_FP8, Form(broken), compiled=False),
    )


def test_each_variant_runs_in_each_arrangement_beside_one_card(tmp_path):
    file = tmp_path / "out.json"
    arguments = [
        "--model",
        "qwen-image",
        "--seconds",
        0.005,
        "--rounds",
        1,
        "--attention",
        "native",
        "--timeout",
        20,
    ]
    arguments += ["--out", file, "--commit", "abc", "--variants", f"{RECOMMENDED},{DENSE_FP8}"]
    said = torchrun(tmp_path, BENCHMARKS / "parallel.py", arguments, without_cards)
    assert file.is_file(), said[0]
    document = json.loads(file.read_text())
    assert (document["cards"], document["model"], document["commit"]) == (2, "qwen-image", "abc")
    rows = {(row["name"], row["arrangement"]): row for row in document["rows"]}
    arrangements = ["one card", "ulysses", "ring", "tensor", "guidance"]
    assert list(rows) == [(name, one) for name in (RECOMMENDED, DENSE_FP8) for one in arrangements]
    for (name, arrangement), row in rows.items():
        if name == DENSE_FP8:
            assert (row["wall_ms"], row["reason"]) == (None, "RuntimeError: not today")
            continue
        assert row["reason"] is None
        assert row["wall_ms"] > 0
        assert row["gpu_ms"] is None  # of a CPU
        # Of one card beside each of four arrangements.
        assert len(row["wall_rounds_ms"]) == (4 if arrangement == "one card" else 1)
        assert ("beside" in row) is (arrangement != "one card")
    assert f"wrote {file}" in said[0].replace("\n", "")
    assert "guidance" not in said[1]  # process 0 alone reports
    assert {one.met for one in targets.parallel_targets(document)} == {False}


def test_guidance_is_split_where_a_step_takes_two_calls():
    of = SimpleNamespace(count=2)
    bench = parallel.Bench(None, [{}], of, None, 1.0, 1, True, print)
    (guidance,) = (one for one in parallel.ARRANGEMENTS if one.splits_guidance)
    said = parallel.prepare(parallel.VARIANTS[0], guidance, bench)
    assert said == "a step of this model takes 1 calls, and there are 2 cards"


def test_an_unknown_name_is_refused(tmp_path):
    arguments = ["--model", "flux1-dev", "--arrangements", "ulyses"]
    for said in torchrun(tmp_path, BENCHMARKS / "parallel.py", arguments):
        assert "no arrangements are called ulyses; there are ulysses, ring, tensor, guidance" in said


def row(name, arrangement, gpu, beside=None, gpu_time="graph", **more):
    fields = {"name": name, "arrangement": arrangement, "gpu_ms": gpu, "wall_ms": gpu + 1}
    fields |= {"gpu_time": gpu_time, "reason": None, "peak_gib": [20.0, 20.0], **more}
    if beside:
        fields["beside"] = {"gpu_ms": beside, "gpu_time": "graph", "wall_ms": beside + 1}
    return fields


def document(**changes):
    rows = [
        row(REFERENCE, "one card", 140.0),
        row(REFERENCE, "ulysses", 80.0, 140.0),
        row(RECOMMENDED, "one card", 88.0),
        row(RECOMMENDED, "ulysses", 50.0, 90.0, kernels_ms={"communication": 4.0}),
        row(RECOMMENDED, "ring", 60.0, 90.0, gpu_time="events"),
    ]
    return {
        "device": "a card",
        "cards": 2,
        "model": "flux1-dev",
        "resolution": 1024,
        "rows": rows,
        **changes,
    }


def test_speed_ups_are_over_one_card_measured_beside():
    rows = document()["rows"]
    assert [speed_up(one) for one in rows] == [None, pytest.approx(1.75), None, pytest.approx(1.8), None]
    assert speed_up(rows[4], "wall_ms") == pytest.approx(91 / 61)
    # 80 / 50 on two cards, 140 / 90 on one.
    assert over_reference(rows, RECOMMENDED, "ulysses", REFERENCE) == pytest.approx((80 / 50) / (140 / 90))
    assert over_reference(rows, RECOMMENDED, "ring", REFERENCE) is None


def test_targets_are_of_the_side():
    def verdicts(side):
        return {
            one.what.rpartition("2, ")[2]: one.met
            for one in targets.parallel_targets(document(resolution=side))
        }

    over = "speed over bf16 compiled beside that on one card"
    assert verdicts(1024) == {"speed over one card": True, over: False}
    assert verdicts(2048) == {"speed over one card": False, over: False}


def test_the_table_says_what_was_measured_how():
    console = Console(width=140, record=True)
    console.print(parallel_overview(document()))
    text = console.export_text()
    assert "1.80x" in text
    assert "events" in text
    assert " 4.0 " in text


def test_nccl_is_told_apart():
    assert kind("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)") == "communication"
