"""The model of time against sums done by hand from the tables."""

import json
from dataclasses import replace
from pathlib import Path

import modelled_time
import pytest
from helpers import tiny_flux, tiny_qwen, tiny_z_image
from modelled_time import FULL_SIZE, Layer, all_dense, step_ms

from rtlynx import Recipe
from rtlynx.models.plan import make_plan

FLUX = "FluxTransformer2DModel"
RESULTS = Path(modelled_time.__file__).parent.parent / "benchmarks" / "results"
ROWS = {row["shape"]: row for row in json.loads((RESULTS / "linear-bf16-h100.json").read_text())["rows"]}
ROWS_FP8 = {row["shape"]: row for row in json.loads((RESULTS / "linear-fp8-h100.json").read_text())["rows"]}


def flux_names(double=2, single=3):
    found = []
    for part in FULL_SIZE[FLUX]:
        blocks = double if part.stack == "transformer_blocks" else single
        found += [f"{part.stack}.{i}.{name}" for i in range(blocks) for name in part.names]
    return found


def flux(image=None, single=None, text=None):
    layers = all_dense(flux_names())
    for name in layers:
        new = single if name.startswith("single") else image
        if any(part in name for part in ("add_", "context")):
            new = text
        layers[name] = new or layers[name]
    return layers


def test_dense_flux_by_hand():
    double = ("flux-qkv", 4096 / 4608), ("flux-o", 1), ("flux-up", 1), ("flux-down", 1)
    text = ("flux-qkv", 512 / 4608), ("flux-o", 1 / 8), ("flux-up", 1 / 8), ("flux-down", 1 / 8)
    us = 19 * sum(ROWS[name]["cublas_us"] * share for name, share in (*double, *text))
    us += 38 * (ROWS["flux-single-in"]["cublas_us"] + ROWS["flux-single-out"]["cublas_us"])
    assert step_ms(FLUX, flux()) == pytest.approx(us / 1000)


@pytest.mark.parametrize(
    ("layer", "column"),
    [
        (Layer("bf16-sparse", 0.02), ("ours_us", "ours_paper_rank_us")),
        (Layer("bf16-sparse", 64 / 3072), ("ours_us", "ours_paper_rank_us")),
        (Layer("weight-2:4"), ("ours_gemm_us", "ours_gemm_us")),
    ],
)
def test_single_blocks_by_hand(layer, column):
    """2 % of 3,072 inputs is 64 columns, of 15,360 it is 320: both are in the table."""
    saved = step_ms(FLUX, flux()) - step_ms(FLUX, flux(single=layer))
    row_in, row_out = ROWS["flux-single-in"], ROWS["flux-single-out"]
    us = row_in["cublas_us"] - row_in[column[0]] + row_out["cublas_us"] - row_out[column[1]]
    assert saved == pytest.approx(38 * us / 1000)


def test_rank_zero_and_fp8_by_hand():
    def single(form):
        dense = step_ms(FLUX, flux())
        return (step_ms(FLUX, flux(single=Layer(form))) - dense) * 1000 / 38

    names = ("flux-single-in", "flux-single-out")
    dense = sum(ROWS[name]["cublas_us"] for name in names)
    plain = sum(ROWS[name]["ours_gemm_us"] + ROWS[name]["ours_compress_plain_us"] for name in names)
    assert single("bf16-sparse") == pytest.approx(plain - dense)
    plain = sum(ROWS_FP8[name]["ours_gemm_us"] + ROWS_FP8[name]["ours_compress_plain_us"] for name in names)
    assert single("fp8-sparse") == pytest.approx(plain - dense)
    assert single("fp8-dense") == pytest.approx(
        sum(ROWS_FP8[name]["fp8_linear_us"] for name in names) - dense
    )


def test_more_rank_costs_more_and_own_factors_more_than_shared():
    ms = [step_ms(FLUX, flux(single=Layer("bf16-sparse", rank))) for rank in (0, 0.01, 0.02, 0.03, 0.05)]
    assert ms == sorted(ms)
    assert len(set(ms)) == 5
    own = step_ms(FLUX, flux(single=Layer("bf16-sparse", 0.02, shared=False)))
    assert own > ms[2]


def test_slim_costs_its_low_rank_branch():
    ms = [step_ms(FLUX, flux(single=Layer("weight-2:4", rank))) for rank in (0, 0.1)]
    row = ROWS["flux-single-out"]
    least = 38 * row["cublas_us"] * 0.1 * (15360 + 3072) / 3072 / 1000
    assert ms[1] - ms[0] > least


def test_text_stream_is_dense_in_every_form_and_text_rows_dense_cost():
    sparse = Layer("bf16-sparse")
    assert step_ms(FLUX, flux(sparse, sparse, sparse)) == step_ms(FLUX, flux(sparse, sparse))
    rows = step_ms(FLUX, flux(sparse, replace(sparse, text_rows_dense=True)))
    assert step_ms(FLUX, flux(sparse, sparse)) < rows < step_ms(FLUX, flux(sparse))


def test_a_block_stands_for_its_share():
    layers = flux()
    one, all_three = dict(layers), dict(layers)
    for name in layers:
        if name.endswith("proj_out"):
            all_three[name] = Layer("bf16-sparse")
            one[name] = Layer("bf16-sparse") if ".1." in name else layers[name]
    dense = step_ms(FLUX, layers)
    assert dense - step_ms(FLUX, one) == pytest.approx((dense - step_ms(FLUX, all_three)) / 3)


def test_part_of_a_joined_layer_multiplies_its_share_and_compresses_once():
    layers = flux()
    some = {
        name: Layer("bf16-sparse") if name.endswith("proj_mlp") else layer for name, layer in layers.items()
    }
    row = ROWS["flux-single-in"]
    us = row["cublas_us"] * 4 / 7 - (row["ours_gemm_us"] * 4 / 7 + row["ours_compress_plain_us"])
    assert step_ms(FLUX, layers) - step_ms(FLUX, some) == pytest.approx(38 * us / 1000)


def test_dense_steps_and_caching_are_averages():
    sparse, dense = flux(single=Layer("bf16-sparse")), flux()
    fast, slow = step_ms(FLUX, sparse), step_ms(FLUX, dense)
    assert step_ms(FLUX, sparse, dense_steps=0.25) == pytest.approx(0.75 * fast + 0.25 * slow)
    first = step_ms(FLUX, dense, computed=0.0)
    stack = [part for part in FULL_SIZE[FLUX] if part.stack == "transformer_blocks"]
    alone = sum(
        ROWS[part.row]["cublas_us"]
        * (part.tokens * part.inputs * sum(part.names.values()))
        / (ROWS[part.row]["M"] * ROWS[part.row]["K"] * ROWS[part.row]["N"])
        for part in stack
    )
    assert first == pytest.approx(alone / 1000)
    assert step_ms(FLUX, dense, computed=0.5) == pytest.approx((slow + first) / 2)


@pytest.mark.parametrize("model", [tiny_flux(), tiny_qwen(), tiny_z_image()])
def test_every_candidate_of_every_architecture_is_priced(model):
    names = [layer.name for layer in make_plan(model, Recipe.immediate()).layers]
    dense = step_ms(type(model).__name__, all_dense(names))
    for name in names:
        layers = {**all_dense(names), name: Layer("bf16-sparse")}
        text = any(word in name for word in ("add_", "context", "txt_mlp"))
        assert (step_ms(type(model).__name__, layers) < dense) is not text, name


def test_pruned_weights_in_fp8_quantise_their_input_and_compress_nothing():
    saved = step_ms(FLUX, flux()) - step_ms(FLUX, flux(single=Layer("weight-2:4-fp8")))
    us = sum(
        ROWS[name]["cublas_us"] - ROWS_FP8[name]["ours_gemm_us"] - ROWS_FP8[name]["cublas_fp8_quant_us"]
        for name in ("flux-single-in", "flux-single-out")
    )
    # The joined layers of a block quantise their one input once.
    assert saved == pytest.approx(38 * us / 1000)


def test_unknown_models_and_forms():
    assert step_ms("Other", {}) is None
    with pytest.raises(ValueError, match="1:4"):
        step_ms(FLUX, flux(single=Layer("1:4")))
