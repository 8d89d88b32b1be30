"""Goals: what counts as reached, and that each stands once on its page."""

import json
import sys
from pathlib import Path

import pytest
from results_helpers import step, write_results, write_step

from rtlynx.timing.full_models import MODELS
from rtlynx.timing.results import BLOCK_GRAPHS, REFERENCE
from rtlynx.timing.step_variants import (
    DENSE_FP8,
    EVERY_LAYER,
    EVERY_WEIGHT,
    FP8_ATTENTION,
    FP8_MODULATION,
    LORA_RANK,
    RECOMMENDED,
    TORCHAO,
    named,
)

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs"))

import goals
import targets
import update

ROOT = Path(__file__).resolve().parent.parent


def found(of):
    """What is wanted -> its target; each once."""
    by_what = {target.what: target for target in of}
    assert len(by_what) == len(of)
    return by_what


def steps(model, *rows):
    return found(targets.step_targets({"model": model, "variants": list(rows)}))


# ------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("model", MODELS)
def test_each_model_has_goals_before_it_is_measured(model):
    of = steps(model)
    assert f"{model}, {RECOMMENDED}, speed over {REFERENCE}" in of
    by_host = model in ("flux1-dev", "qwen-image", "z-image")
    for variant in (DENSE_FP8, RECOMMENDED):
        assert (f"{model}, {variant}, wall time over GPU time" in of) is by_host
        assert (f"{model}, {variant}{BLOCK_GRAPHS}, wall time over GPU time" in of) is by_host
    assert {(one.measured, one.met) for one in of.values()} == {(None, False)}


def test_the_fastest_form_reaches_a_steps_goal():
    of = steps(
        "flux1-dev",
        step(REFERENCE, 140.0),
        step(TORCHAO, 105.0),
        step(DENSE_FP8, 95.0),
        step(DENSE_FP8 + FP8_ATTENTION, 82.0),
        step(RECOMMENDED, 80.0),
        step(RECOMMENDED + FP8_ATTENTION, 70.0),
        step(RECOMMENDED + FP8_ATTENTION + FP8_MODULATION, 68.0),
        step(EVERY_LAYER, 76.0),
        step(EVERY_WEIGHT + FP8_ATTENTION, 64.0),
        step(f"{RECOMMENDED}, LoRA of rank {LORA_RANK}", 86.0),
    )
    over = {what.partition(", ")[2]: (one.measured, one.by, one.met) for what, one in of.items()}
    best = FP8_ATTENTION + FP8_MODULATION
    assert over[f"{RECOMMENDED}, speed over {REFERENCE}"] == (140 / 68, best, True)
    assert over[f"{RECOMMENDED}, speed over {TORCHAO}"] == (105 / 68, best, True)
    assert over[f"{RECOMMENDED}, speed over {DENSE_FP8}"] == (95 / 68, best, True)  # as it is without
    assert over[f"{DENSE_FP8}, speed over {REFERENCE}"] == (140 / 82, FP8_ATTENTION, True)
    every = f"every layer sparse, speed over {REFERENCE}"
    assert over[every] == (140 / 64, EVERY_WEIGHT + FP8_ATTENTION, True)
    assert over[f"{every}, stretch goal"] == (140 / 64, EVERY_WEIGHT + FP8_ATTENTION, False)
    lora = over[f"{RECOMMENDED}, LoRA of rank {LORA_RANK}, time over that without"]
    assert lora == (86 / 80, "", False)


@pytest.mark.parametrize("model", ["flux1-dev", "flux2-klein", "wan2.2-14b"])
def test_some_models_are_to_be_faster_by_the_clock_on_the_wall_too(model):
    what = f"{model}, {RECOMMENDED}, speed over {REFERENCE}"
    rows = step(REFERENCE, 150.0, 150.0), step(RECOMMENDED, 75.0, 120.0)
    of = steps(model, *rows)
    assert (of[what].met, of[f"{what}, by wall time"].met) == (True, False)
    of = steps(model, *rows, step(RECOMMENDED + BLOCK_GRAPHS, None, 78.125))
    assert of[f"{what}, by wall time"].measured == 150 / 78.125
    assert of[f"{what}, by wall time"].by == BLOCK_GRAPHS
    assert "by wall time" not in " ".join(steps("z-image"))


def test_with_every_layer_sparse_a_step_is_to_be_as_fast_by_wall_time():
    name = EVERY_WEIGHT + FP8_ATTENTION + BLOCK_GRAPHS
    of = steps("flux1-dev", step(REFERENCE, 140.0, 142.0), step(name, None, 65.0))
    what = f"flux1-dev, every layer sparse, speed over {REFERENCE}, by wall time"
    assert (of[what].measured, of[what].by, of[what].met) == (142 / 65, name, True)
    assert not of[f"{what}, stretch goal"].met
    assert [one.name for one in named(None) if one.name == name] == [name]  # measured without being asked for


def test_wall_time_is_compared_with_the_same_forms_gpu_time():
    def over(*rows):
        of = steps("z-image", *rows)
        return [of[f"z-image, {RECOMMENDED}{how}, wall time over GPU time"] for how in ("", BLOCK_GRAPHS)]

    plain, attention = step(RECOMMENDED, 50.0, 60.0), step(RECOMMENDED + FP8_ATTENTION, 40.0, 52.0)
    alone, graphs = over(plain, step(RECOMMENDED + BLOCK_GRAPHS, None, 51.0))
    assert (alone.measured, alone.met) == (1.2, False)
    assert (graphs.measured, graphs.met, graphs.by) == (1.02, True, "")
    # The fastest form that was measured so.
    alone, graphs = over(plain, attention, step(RECOMMENDED + BLOCK_GRAPHS, None, 51.0))
    assert (alone.measured, alone.by) == (1.3, FP8_ATTENTION)
    assert (graphs.measured, graphs.by) == (1.02, "")


# ----------------------------------------------------------------------------------------- layers


def row(shape="flux-up", m=4096, k=3072, n=12288, **changes):
    """A layer in fp8: 24 + 256 us dense, 20 + 180 by 2:4 activations, 12 + 170 by 2:4 weights."""
    times = {"cublas": 500.0, "cublas_fp8": 256.0, "fp8_linear": 280.0, "ours": 220.0}
    times |= {"ours_gemm": 180.0, "ours_compress_plain": 20.0}
    times |= {"ours_weight_sparse_gemm": 170.0, "ours_quantize": 12.0}
    row = {"shape": shape, "M": m, "K": k, "N": n} | {f"{name}_us": us for name, us in times.items()}
    return row | changes


def layers(*rows):
    of = found(targets.linear_targets({"dtype": "fp8", "rows": list(rows)}))
    return {what: (one.measured and round(one.measured, 3), one.by) for what, one in of.items()}


def test_a_layer_counts_with_the_better_of_both_ways():
    of = layers(row(), row("zimage-w13", 4128, 3840, 20480))
    assert of["fp8 layer, speed over the dense fp8 layer, mean"] == (round(280 / 182, 3), "2:4 weights")
    assert of["fp8 GEMM, speed over cuBLAS fp8, mean"] == (round(256 / 170, 3), "2:4 weights")
    flops = 2 * 4096 * 3072 * 12288
    assert of["fp8 GEMM, flux-up"] == (round(flops / 170e6, 3), "2:4 weights")
    activations = layers(row(ours_quantize_us=None), row(ours_quantize_us=30.0, ours_gemm_us=150.0))
    assert activations["fp8 layer, speed over the dense fp8 layer, mean"] == (
        round((280 / 200 * 280 / 170) ** 0.5, 3),
        "2:4 activations",
    )


def test_older_files_have_no_product_by_sparse_weights():
    old = {
        name: value
        for name, value in row().items()
        if name not in ("ours_weight_sparse_gemm_us", "ours_quantize_us")
    }
    of = layers(old)
    assert of["fp8 layer, speed over the dense fp8 layer, mean"] == (1.4, "2:4 activations")
    assert of["fp8 GEMM, zimage-w13"] == (None, "")


def test_few_and_odd_rows_have_goals_of_their_own():
    few, odd = "fp8 layer of 1,024 rows", "fp8 layer of an odd number of rows"
    rest = "speed over the dense fp8 layer, slowest shape"
    of = layers(row())
    assert of[f"{few}, {rest}"] == of[f"{odd}, {rest}"] == (None, "")
    slow = {"fp8_linear_us": 190.0}
    of = layers(row(), row(m=2048, **slow), row(m=1024), row(m=1024, **slow), row(m=4097, **slow))
    assert of[f"{few}, {rest}"] == of[f"{odd}, {rest}"] == (round(190 / 182, 3), "")
    assert of["fp8 layer, speed over the dense fp8 layer, mean"][0] == round(280 / 182, 3)


def test_targets_are_met_missed_or_not_measured():
    rows = [row(ours_us=300.0, cublas_us=450.0, ours_gemm_us=250.0, cusparselt_gemm_us=None)]
    rows.append(rows[0] | {"shape": "other", "ours_us": 400.0})

    def verdicts():
        of = found(targets.linear_targets({"dtype": "bf16", "rows": rows}))
        return {what: (one.measured, one.met) for what, one in of.items()}

    of = verdicts()
    assert of["GEMM, speed over cuBLAS, mean"] == (pytest.approx(1.8), True)
    assert of["GEMM, speed over cuSPARSELt's, mean"] == (None, False)
    assert of["whole layer, speed over cuBLAS, slowest shape"] == (1.125, False)
    assert of["GEMM, flux-up"] == (pytest.approx(2 * 4096 * 3072 * 12288 / 250e6), True)
    rows[1] |= {"ours_us": None}
    assert verdicts()["whole layer, speed over cuBLAS, slowest shape"] == (None, False)


def test_compression_is_to_be_nearly_as_fast_as_a_copy_in_both_formats_at_every_width():
    def row(k, speed, **of):
        return {"K": k, "speed_vs_copy": {"compress_adjacent": speed, "compress_adjacent_lowrank": 0.8}} | of

    rows = [row(3072, 0.89), row(12288, 0.91, format="bf16-sparse"), row(3072, 0.95, format="fp8-sparse")]
    of = found(targets.compress_targets({"rank": 64, "rows": rows, "producers": []}))

    def plain(precision, k):
        one = of[f"{precision} compression without T, speed over a plain copy, K = {k}"]
        assert one.wanted == 0.9
        return one.measured, one.met

    assert plain("bf16", "3,072") == (0.89, False)
    assert plain("bf16", "12,288") == (0.91, True)
    assert plain("fp8", "3,072") == (0.95, True)
    assert {plain("fp8", k) for k in ("3,840", "10,240", "12,288", "15,360")} == {(None, False)}
    assert of["bf16 compression with T at rank 64, speed over a plain copy, K = 3,072"].met


# --------------------------------------------------------------------------------------- the page


def lines_of(root, group):
    return goals.goals_section(root, group).splitlines()[2:]


def test_each_goal_stands_once_as_the_newest_card_has_it_at_its_best(tmp_path):
    write_step(tmp_path, "z-image", "H100", {REFERENCE: 100.0, RECOMMENDED: 40.0})
    root = write_step(tmp_path, "z-image", "H200", {REFERENCE: 100.0, RECOMMENDED: 60.0})
    again = json.loads((root / "benchmarks/results/step-z-image-h200.json").read_text())
    again["variants"][1]["name"] += FP8_ATTENTION
    again["variants"][1]["gpu_ms"] = 50.0
    write_results(root, "step-z-image-again-h200", again)
    lines = lines_of(root, "step")
    goal = "| Z-Image, recommended, speed over compiled bf16: at least 1.90x |"
    assert [line for line in lines if line.startswith(goal)] == [f"{goal} 2.00x (fp8 attention) | reached |"]
    assert lines[-1].endswith("| reached |")  # those come last
    missing = "| Z-Image, dense fp8, speed over compiled bf16: at least 1.65x | – | "  # noqa: RUF001
    assert any(line.startswith(missing) for line in lines)
    assert len(set(lines)) == len(lines) > 8


def test_rounding_hides_nothing(tmp_path):
    root = write_step(tmp_path, "chroma", "H200", {REFERENCE: 149.8, RECOMMENDED: 100.0})
    [line] = [line for line in lines_of(root, "step") if line.startswith("| Chroma, recommended, speed")]
    assert "at least 1.50x | 1.498x |" in line


def test_rounding_of_rates_keeps_their_unit(tmp_path):
    us = 2 * 4096 * 3072 * 12288 / 1849.7e6
    layer = row(ours_weight_sparse_gemm_us=us)
    root = write_results(tmp_path, "linear-fp8-h200", {"device": "an H200", "dtype": "fp8", "rows": [layer]})
    [line] = [line for line in lines_of(root, "layer") if line.startswith("| fp8 GEMM, flux-up")]
    assert "at least 1,850&nbsp;TFLOP/s | 1,849.700&nbsp;TFLOP/s (2:4 weights) |" in line


def test_the_host_may_take_half_as_long_again_as_for_a_plain_layer(tmp_path):
    def lines(**median_us):
        rows = [{"call": call, "median_us": us} for call, us in median_us.items()]
        root = write_results(tmp_path, "host-h200", {"device": "NVIDIA H200", "rows": rows})
        goal = "| eager call of a layer by 2:4 weights in fp8, host time over `F.linear`: at most 1.50x"
        return [line.removeprefix(goal) for line in lines_of(root, "host") if line.startswith(goal)]

    layer = {targets.HOST_LAYER: 29.2}
    assert lines(**layer, **{targets.HOST_REFERENCE: 20.0}) == [" | 1.46x | reached |"]
    [missing] = lines(**{"SparseLinear": 25.0, targets.HOST_REFERENCE: 20.0})  # an older file
    assert missing.startswith(" | –")  # noqa: RUF001


def test_every_goal_has_its_place_and_what_is_next():
    of_files = [target for _, target in goals._of_files(ROOT)]
    shown = [lines_of(ROOT, group) for group in goals.NEXT]
    assert all(shown)
    assert sum(map(len, shown)) == len({(target.what, target.wanted) for target in of_files})
    notes = (ROOT / "benchmarks" / "NOTES.md").read_text()
    assert all(f"\n## {section}\n" in notes for sections in goals.NEXT.values() for section in sections)
    page = (ROOT / "docs/results/goals.md").read_text()
    assert all(f"<!-- goals-{group}: begin -->" in page for group in goals.NEXT)
    assert {f"goals-{group}" for group in goals.NEXT} <= set(update.PARTS)
