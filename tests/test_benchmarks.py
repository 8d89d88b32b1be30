"""The benchmarks' arithmetic and files; what they measure needs a card."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import attention
import compress
import host
import prologues
import script
import targets
import tune

from rtlynx.cuda import jit, tuning
from rtlynx.math.fp8 import quantize_tokens
from rtlynx.timing import (
    card,
    linear_layers,
    operands,
    peers,
    results,
    shapes,
    sustained,
)

ROOT = Path(__file__).resolve().parent.parent
# What the results of benchmarks/linear.py have at least.
DOCUMENT = {"device", "power_limit_w", "clock_mhz", "power_w", "torch", "cuda", "commit", "rows", "geomean"}
ROW = {
    "shape",
    "M",
    "K",
    "N",
    "ours_us",
    "ours_gemm_us",
    "ours_compress_us",
    "cublas_us",
    "cusparselt_gemm_us",
    "cusparselt_compress_us",
    "rel_err",
}
GEOMEAN = {"linear_vs_cublas", "gemm_vs_cublas", "gemm_vs_cusparselt"}


def no_sample():
    return None, None


class FakeTimer:
    """Windows of given times; remembers the order in which timers were asked."""

    def __init__(self, name, call_us, asked):
        self.name, self.call_us, self.asked = name, list(call_us), asked

    def window(self, seconds, sample, discard):
        self.asked.append(self.name)
        us = self.call_us.pop(0)
        if us is None:
            raise RuntimeError("broke\nin detail")
        return sustained.Window([us - 1, us, us + 5], [1500.0], [])


class FakeGraphs:
    """Timers that ran every call once and claim 10 us."""

    def timer(self, calls, replay_ms=0.0):
        for call in calls:
            call()
        return FakeTimer("", [10.0, 10.0], [])


def test_the_paper_rank_is_in_proportion_and_a_multiple_of_16():
    assert [shapes.paper_rank(k) for k in (3072, 3840, 10240, 12288, 15360)] == [64, 80, 224, 256, 320]


def test_twelve_shapes_and_a_choice_among_them():
    assert len({shape.name for shape in shapes.SHAPES}) == 12
    assert shapes.chosen(None) == shapes.SHAPES
    assert [shape.k for shape in shapes.chosen("flux-down,paper-a")] == [12288, 3072]
    with pytest.raises(ValueError, match="no shape is called flux-dwon"):
        shapes.chosen("flux-dwon")


def test_teraflops_are_those_of_the_dense_product():
    up = shapes.chosen("flux-up")[0]
    assert up.teraflops(388) == pytest.approx(797, rel=1e-3)


@pytest.mark.parametrize("size", [1, 10**6, 50 * 2**20, 10**9])
def test_rotating_sets_exceed_three_times_the_cache(size):
    cache = 50 * 2**20
    assert shapes.set_count(size, cache) * size > 3 * cache
    assert shapes.set_count(size, cache) >= 3


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA H100-SXM5", "h100")],
)
def test_results_are_named_after_the_card(name, slug):
    assert card.card_slug(name) == slug


def test_the_commit_can_be_given_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("RTLYNX_COMMIT", "abc")
    assert card.commit_at_hand() == "abc"


def test_windows_take_turns_and_order_alternates():
    asked = []
    timers = {name: FakeTimer(name, [us, us + 2], asked) for name, us in (("a", 10.0), ("b", 20.0))}
    taken = sustained.measure(timers, 1.0, 2, no_sample, {})
    assert asked == ["a", "b", "b", "a"]
    assert taken["a"].rounds_us == [10.0, 12.0]
    assert taken["a"].us == statistics.median([9, 10, 15, 11, 12, 17])
    assert taken["b"].clock_mhz == 1500.0
    assert taken["b"].power_w is None


def test_a_timer_that_breaks_takes_no_other_with_it():
    missing = {}
    timers = {"good": FakeTimer("good", [10.0] * 2, []), "bad": FakeTimer("bad", [10.0, None], [])}
    taken = sustained.measure(timers, 1.0, 2, no_sample, missing)
    assert set(taken) == {"good"}
    assert missing == {"bad": "RuntimeError: broke"}


def test_replays_are_whole_passes_of_about_the_wanted_length():
    assert sustained.passes_per_replay(1000.0, 30.0) == 30
    assert sustained.passes_per_replay(80_000.0, 30.0) == 1


def test_a_mean_over_a_part_is_no_mean():
    assert results.geomean([1.0, 4.0]) == pytest.approx(2.0)
    assert results.geomean([1.0, None]) is None
    assert results.geomean([]) is None


def tiny_row(cusparselt=None, dtype="bf16"):
    shape = shapes.Shape("tiny", 96, 128, 64)
    generator = torch.Generator().manual_seed(0)
    sets = [operands.random_operands(shape, generator, dtype) for _ in range(2)]
    # A rank for the column of the paper's rank that differs from 64, as at wide layers.
    sets = [
        of._replace(paper_lowrank_a=of.lowrank_a[:16], paper_lowrank_b=of.lowrank_b[:, :16].contiguous())
        for of in sets
    ]
    return linear_layers.measure_shape(shape, sets, FakeGraphs(), cusparselt, no_sample, 0.0, 2)


def test_a_shape_runs_every_variant_and_fills_its_row():
    row = tiny_row()
    assert set(row) >= ROW
    ours = [f"{name}_us" for name in results.LINEAR_VARIANTS if not name.startswith("cusparselt")]
    assert {name: row[name] for name in ours} == dict.fromkeys(ours, 10.0)
    assert row["rel_err"] < 2.5e-3
    assert row["cusparselt_gemm_us"] is None
    assert set(row["missing"]) == {"cusparselt_gemm", "cusparselt_compress"}
    means = results.geomeans([row])
    assert set(means) >= GEOMEAN
    assert means["linear_vs_cublas"] == 1.0
    assert means["gemm_vs_cusparselt"] is None
    json.dumps(row)
    assert row["shape"] in linear_layers.table([row])


def test_fp8_has_its_peers_too(monkeypatch):
    def scaled_mm(x, weight, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        assert x.dtype is weight.dtype is torch.float8_e4m3fn
        product = x.float() @ weight.float() * scale_a * scale_b + bias
        return product.to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    row = tiny_row(dtype="fp8")
    assert row["cublas_fp8_us"] == row["cublas_fp8_quant_us"] == 10.0
    assert row["ours_weight_sparse_gemm_us"] == row["ours_quantize_us"] == 10.0
    assert row["fp8_linear_us"] == 20.0
    assert row["rel_err"] < 3e-3
    assert 0.01 < row["quantization_err"] < 0.1
    means = results.geomeans([row], "fp8")
    assert means["linear_vs_fp8_linear"] == 2.0
    assert set(means) >= {"linear_vs_cublas_bf16", "linear_vs_fp8_linear", "gemm_vs_cublas_fp8"}
    groups, headings, line = linear_layers.table([row]).splitlines()
    assert groups.index("2:4 weights") < groups.index("2:4 activations") < groups.index("rank 64")
    assert len(headings) == len(line)
    assert row["shape"] in line


def test_quantised_rows_are_ours():
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scale = peers.quantize_rows(x)
    torch.testing.assert_close(values.float() * scale, quantize_tokens(x).dequantize(), rtol=0.13, atol=0.01)


def test_the_peer_is_its_fastest_algorithm_with_the_right_product(monkeypatch):
    def multiply(compressed, dense, alg_id):
        if alg_id > 2:
            raise RuntimeError("no such algorithm")
        return compressed @ dense * (0.5 if alg_id == 0 else 1.0)

    monkeypatch.setattr(torch, "_cslt_compress", lambda x: x.clone())
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    cusparselt = peers.CuSparseLt(FakeGraphs, torch.Generator().manual_seed(0))
    assert cusparselt.method == "cuda graph"
    row = tiny_row(cusparselt)
    assert row["missing"] == {}
    assert row["cusparselt_gemm_us"] == row["cusparselt_compress_us"] == 10.0
    assert row["cusparselt_algorithm"]["alg_id"] == 1


def test_a_peer_that_no_graph_can_hold_is_profiled(monkeypatch):
    class NoGraphs:
        def timer(self, calls, replay_ms):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch, "_cslt_compress", lambda x: x.clone())
    cusparselt = peers.CuSparseLt(NoGraphs, torch.Generator().manual_seed(0))
    assert (cusparselt.method, cusparselt.reason) == (
        "profiler",
        "operation not permitted when stream is capturing",
    )
    assert isinstance(cusparselt.timer(NoGraphs(), []), sustained.ProfilerTimer)


def test_rows_tell_the_state_of_the_card():
    rows = [
        {"windows": {"a": {"clock_mhz": 1500.0, "power_w": None}, "b": {"clock_mhz": 1400, "power_w": None}}}
    ]
    assert results.card_state(rows) == {"clock_mhz": 1450.0, "power_w": None}


@pytest.mark.parametrize("prologue", prologues.PROLOGUES, ids=lambda prologue: prologue.name)
def test_chains_end_with_what_a_layer_reads(prologue):
    inputs = prologue.inputs(8, 60, lambda *size: torch.randn(*size, dtype=torch.bfloat16))
    out = prologue.chain(*inputs)
    assert out.shape == (1, 8, 60)
    assert out.dtype is torch.bfloat16
    values, scale = prologue.quantized(*inputs)
    assert (values.shape, scale.shape) == ((1, 8, 60), (1, 8, 1))


def test_attention_is_compared_on_the_same_inputs():
    assert {shape.width for shape in attention.SHAPES} == {128}
    of = tuple(torch.randn(1, 4100, 3, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(*(one.transpose(1, 2) for one in of))
    y = attention.in_fp8(*(one[:, :300] for one in of))
    assert attention.relative_error(exact.transpose(1, 2), of) < 1e-5
    assert attention.relative_error(y, tuple(one[:, :300] for one in of)) < 0.1
    rotary = torch.stack([torch.ones(4100, 8), torch.zeros(4100, 8)], -1)
    of = tuple(one / one.square().mean(-1, keepdim=True).sqrt() for one in of)
    blocks = attention.in_block(lambda q, k, v: (q, k, v), torch.ones(16), rotary)(*of)
    for one, given in zip(blocks, of, strict=True):
        torch.testing.assert_close(one, given, rtol=1e-4, atol=1e-4)  # normalised and not turned: the same
    few = tuple(one[:, :300] for one in of)
    y = attention.fused(torch.ones(16), rotary[:300])(*few)
    assert attention.relative_error(y, few) < 0.1
    assert torch.equal(attention.quantized(*of)[0].float(), of[0].to(torch.float8_e4m3fn).float())


def test_host_time_leaves_out_warming_up_and_waiting():
    order = []
    calls = {"one": lambda: order.append("one"), "other": lambda: order.append("other")}
    times = host.host_us(calls, lambda: order.append("wait"), count=200)
    assert {name: len(of_call) for name, of_call in times.items()} == {"one": 200, "other": 200}
    turn = ["wait", *["one"] * 100, "wait", *["other"] * 100]
    assert order == 3 * turn


def test_layers_whose_host_time_is_measured_are_what_their_names_say():
    x = torch.randn(host.M, host.K, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, (format, rank) in host.LAYERS.items():
        layer = host.layer(torch.Generator().manual_seed(1), format, rank)
        assert (layer.format.name, layer.rank) == (format, rank), name
        assert torch.isfinite(layer(x)).all()
    weights = host.layer(torch.Generator().manual_seed(1), "fp8-weight-sparse").weight.float()
    assert (weights.unflatten(-1, (-1, 4)) != 0).sum(-1).max() == 2
    assert host.LAYERS[targets.HOST_LAYER] == ("fp8-weight-sparse", 0)


@pytest.mark.parametrize("format", compress.GROUPINGS)
def test_the_copy_moves_the_bytes_of_compression(format):
    x = torch.randn(64, 3072, generator=torch.Generator().manual_seed(0)).bfloat16()
    for calls in compress.compress_calls([x], [x[:16]], "adjacent", format).values():
        tiles, _, _ = calls[0]()
        assert tiles.nbytes / x.nbytes == compress.compressed_bytes(format) / 16


def test_compression_is_measured_at_every_width_of_the_layers():
    assert set(compress.WIDTHS) == {shape.k for shape in shapes.SHAPES}


@pytest.mark.parametrize("out", [4, 5, 8, 9])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_the_copy_kernel_compiles(mode, out):
    pytest.importorskip("cuda.core")
    report = jit.report("copy.cu", (("THREADS", 256), ("MODE", mode), ("OUT", out)), ROOT / "benchmarks")
    assert not report.faults
    assert report.registers <= 128


def test_a_tuned_table_keeps_what_was_not_timed_and_is_the_packages(tmp_path, monkeypatch):
    table = tmp_path / "tiles.json"
    monkeypatch.setattr(tuning, "TABLE", table)
    names = [tile.name for tile in tuning.CANDIDATES]
    tune.rewrite_table({(2, 2, 2): names[0], (1, 2, 2): names[0]})
    tune.rewrite_table({(2, 2, 2): names[-1]})
    tuning._table.cache_clear()
    try:
        assert tuning._table() == {(1, 2, 2): names[0], (2, 2, 2): names[-1]}
    finally:
        tuning._table.cache_clear()


@pytest.mark.parametrize("path", sorted(script.FOLDER.glob("linear-*.json")), ids=lambda path: path.name)
def test_committed_results_are_whole(path):
    document = json.loads(path.read_text())
    assert set(document) >= DOCUMENT
    assert document["commit"]
    if "-rows-" not in path.name:
        assert [row["shape"] for row in document["rows"]] == [shape.name for shape in shapes.SHAPES]
    assert all(set(row) >= ROW and row["rel_err"] <= 2.5e-3 for row in document["rows"])
    assert document["geomean"] == results.geomeans(document["rows"], document["dtype"])
