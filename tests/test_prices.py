"""The prices of a budget: what the file says against what was measured, and what an input then takes."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers import tiny_flux
from hypothesis import given, settings
from hypothesis import strategies as st

from rtlynx import Recipe
from rtlynx.calibration.budget import inputs_of
from rtlynx.calibration.prices import FILE, ModelPrices, PreparationLaw, Prices, ProductLaw, packaged_prices
from rtlynx.math.formats import FORMAT_NAMES
from rtlynx.models.plan import make_plan
from rtlynx.timing.sustained import Measurement

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import prices

DOCUMENT = json.loads(FILE.read_text())
H100 = ("linear-bf16-h100.json", "linear-fp8-h100.json", "compress-h100.json", "threshold-h100.json")
SINGLE, DOUBLE = "single_transformer_blocks.0", "transformer_blocks.0"


@pytest.fixture(scope="module")
def h100():
    """What the results of one card give, whatever card the packaged file is of."""
    return Prices.of(prices.document(H100))


# ------------------------------------------------------------------------------------------- the file


def test_the_file_is_what_the_results_give():
    made = prices.document(list(DOCUMENT["sources"]))
    assert {key: made[key] for key in ("device", "sources")} == {
        key: DOCUMENT[key] for key in ("device", "sources")
    }
    for kind in ("products", "preparations"):
        assert set(made[kind]) == set(DOCUMENT[kind])
        for format, law in made[kind].items():
            assert law == pytest.approx(DOCUMENT[kind][format], rel=1e-3)
    assert set(DOCUMENT["products"]) == set(FORMAT_NAMES)
    assert set(DOCUMENT["preparations"]) == {"bf16-sparse", "fp8-dense", "fp8-sparse"}


@pytest.mark.parametrize("file", ["linear-bf16-h100.json", "linear-fp8-h100.json"])
def test_layers_that_no_law_was_fitted_to_take_what_it_says(file, h100):
    rows = [row for row in prices.rows_of(file) if row.held_out]
    assert len(rows) == 15
    for row in rows:
        laws = h100.preparations if row.n is None else h100.products
        assert prices.us_of(laws[row.format], row) == pytest.approx(row.us, rel=0.09), row


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_whole_layers_take_what_the_laws_of_their_parts_say(dtype, h100):
    """Preparation and product with a branch of rank 64, measured as one; the fit has the parts alone."""
    document = json.loads((prices.FOLDER / f"linear-{dtype}-h100.json").read_text())
    product, preparation = h100.products[f"{dtype}-sparse"], h100.preparations[f"{dtype}-sparse"]
    for row in document["rows"]:
        (m, k, n), rank = (row[axis] for axis in "MKN"), document["rank"]
        us = preparation.us(m, k, rank) + product.us(m, k, n, rank)
        assert us == pytest.approx(row["ours_us"], rel=0.06), row["shape"]


def test_compression_measured_apart_takes_what_the_law_says(h100):
    rows = json.loads((prices.FOLDER / "compress-h100.json").read_text())["rows"]
    for row in rows:
        for rank, column in ((0, "compress_adjacent_us"), (64, "compress_adjacent_lowrank_us")):
            us = h100.preparations["bf16-sparse"].us(row["M"], row["K"], rank)
            assert us == pytest.approx(row[column], rel=0.16)  # on a card that clocks higher


coefficients = st.floats(0.1, 10)


@given(*(coefficients for _ in range(4)), st.sampled_from(prices.LEAST_OUTPUTS))
@settings(max_examples=20, deadline=None)
def test_the_fit_finds_the_law_of_a_product(launch, work, output, lowrank, least):
    law = ProductLaw(launch, work, output, lowrank, least)
    rows = [
        prices.Row("dense", m, k, n, rank, law.us(m, k, n, rank))
        for m in prices.TOKENS
        for k in prices.INPUTS
        for n in prices.OUTPUTS
        for rank in (0, 64)
    ]
    found = prices.product_law(rows, None)
    assert all(abs(error) < 1e-6 for error in prices.errors(found, rows))


@given(*(coefficients for _ in range(4)))
@settings(max_examples=20, deadline=None)
def test_the_fit_finds_the_law_of_a_preparation(launch, entry, width, lowrank):
    law = PreparationLaw(launch, entry, width, lowrank)
    rows = [
        prices.Row("dense", m, k, None, rank, law.us(m, k, rank))
        for m in prices.TOKENS
        for k in prices.INPUTS
        for rank in (0, 64)
    ]
    assert all(abs(error) < 1e-6 for error in prices.errors(prices.preparation_law(rows, None), rows))


def test_no_coefficient_is_negative():
    """More outputs that take less time: the law says that outputs take none, not that they give some back."""
    rows = [prices.Row("dense", 4096, 3072, n, 0, 1e-5 * n**0.5) for n in (1024, 4096, 16384)]
    law = prices.product_law(rows, ProductLaw(0.0, 0.0, 0.0, 0.0, 0.0))
    assert min(law.work_us, law.output_us, law.lowrank_us) >= 0


def test_a_run_on_a_card_measures_every_part_of_the_grid(monkeypatch, tmp_path):
    """On a machine without one: the times are made up by a law, which the file then holds."""
    law, prepared = ProductLaw(3.0, 2e4, 5e2, 5e4, 0.0), PreparationLaw(2.0, 1e3, 5e3, 8e4)
    slower = {"dense": 5, "bf16-sparse": 4, "fp8-dense": 3, "fp8-sparse": 2, "fp8-weight-sparse": 1}

    class Graphs:
        def timer(self, calls, replay_ms):
            assert len(calls) == 3
            return calls

    def measure(timers, seconds, rounds, sample, missing, discard):
        assert not missing
        found = {}
        for name in timers:
            format, m, k, n, _, rank = name.split()
            size = int(m), int(k)
            us = prepared.us(*size, int(rank)) if n == "None" else law.us(*size, int(n), int(rank))
            found[name] = Measurement(slower[format] * us, [], None, None)
        return found

    def compressed(of, lowrank_a):
        return of.x, None, None

    monkeypatch.setattr("rtlynx.timing.operands.compress", compressed)  # whose kernels need a card
    monkeypatch.setattr(prices, "Graphs", Graphs)
    monkeypatch.setattr(prices, "measure", measure)
    monkeypatch.setattr(prices, "FOLDER", tmp_path)
    for name, sizes in (("TOKENS", (64, 512)), ("INPUTS", (64, 128)), ("OUTPUTS", (64, 256))):
        monkeypatch.setattr(prices, name, sizes)
    card = SimpleNamespace(l2_bytes=1, sample=None)
    rows = prices.measured_rows(card, torch.Generator(), 0.1, 1)
    assert len(set(row[:5] for row in rows)) == len(rows) == 2 * 2 * (2 * 7 + 5)
    head = {"device": "a card", "commit": "abc", "rows": [row._asdict() for row in rows]}
    (tmp_path / "prices-card.json").write_text(json.dumps(head))
    document = prices.document(["prices-card.json"])
    assert document["sources"] == {"prices-card.json": "abc"}
    found = Prices.of(document)
    for format, factor in slower.items():
        rank = 64 if format in ("bf16-sparse", "fp8-sparse") else 0
        us = found.products[format].us(4608, 3072, 3072, rank)
        assert us == pytest.approx(factor * law.us(4608, 3072, 3072, rank), rel=0.01)
        if format != "dense":
            factor = slower["fp8-dense"] if format == "fp8-weight-sparse" else factor
            us = found.preparations[format].us(4608, 3072, rank)
            assert us == pytest.approx(factor * prepared.us(4608, 3072, rank), rel=0.01)


def test_results_of_two_cards_make_no_prices(monkeypatch, tmp_path):
    for name in ("prices-a.json", "prices-b.json"):
        (tmp_path / name).write_text(json.dumps({"device": name, "commit": None, "rows": []}))
    monkeypatch.setattr(prices, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="prices are of one card, and these are of prices-a"):
        prices.document(["prices-a.json", "prices-b.json"])
    with pytest.raises(ValueError, match="no time of dense products in prices-a"):
        prices.document(["prices-a.json"])


# ----------------------------------------------------------------------------------------- the inputs


def full_size_flux():
    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=1, num_single_layers=1)


def flux_inputs(recipe, model=None, of=None):
    """Prices of a FLUX.1 block of each kind at 1024 x 1024 pixels, and the readers of each input."""
    plan = make_plan(model or full_size_flux(), recipe)
    tokens = {"image": 4096, "text": 512, "joint": 4608}
    counts = {layer.name: tokens[layer.candidate.stream] for layer in plan.layers}
    return ModelPrices(plan, counts, of), inputs_of(plan.layers)


def test_an_input_is_prepared_once_for_each_format_of_its_readers():
    of, inputs = flux_inputs(Recipe.immediate(precision="fp8"))
    q, k, v = inputs[f"{DOUBLE}.attention"]
    laws, m, width = packaged_prices(), 4096, 3072
    products = {format: law.us(m, width, width) for format, law in laws.products.items()}
    prepared = {format: law.us(m, width) for format, law in laws.preparations.items()}
    assert of.us([q, k, v]) == pytest.approx(3 * products["fp8-sparse"] + prepared["fp8-sparse"])
    mixed = [q, k.in_format("fp8-dense"), v.dense("by hand")]
    each = products["fp8-sparse"] + products["fp8-dense"] + products["dense"]
    assert of.us(mixed) == pytest.approx(each + prepared["fp8-sparse"] + prepared["fp8-dense"])
    assert of.us(mixed) > of.us([one.in_format("fp8-dense") for one in (q, k, v)])


def test_factors_that_are_shared_are_multiplied_once():
    shared, own = (flux_inputs(Recipe(rank=64, lowrank_sharing=sharing))[0] for sharing in ("shared", "own"))
    _, inputs = flux_inputs(Recipe(rank=64))
    readers, down = inputs[f"{DOUBLE}.attention"], packaged_prices().preparations["bf16-sparse"].lowrank_us
    assert own.us(readers) - shared.us(readers) == pytest.approx(2 * 64 * down * 4096 * 3072 * 1e-9)
    without = [replace(layer, rank=0) for layer in readers]
    up = packaged_prices().products["bf16-sparse"].lowrank_us
    extra = 64 * 4096 * 3072 * 1e-9 * (down + 3 * up)
    assert shared.us(readers) - shared.us(without) == pytest.approx(extra)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_few_outputs_and_many_inputs_save_less_than_their_products(precision, h100):
    """The share that a layer saves, by measured products and compressions, not by the product alone."""
    of, inputs = flux_inputs(Recipe.immediate(precision=precision), of=h100)
    laws = h100.products
    product = 1 - laws[f"{precision}-sparse"].work_us / laws["dense"].work_us
    rows = json.loads((prices.FOLDER / f"linear-{precision}-h100.json").read_text())["rows"]
    measured = {row["shape"]: row for row in rows}
    saved = {}
    for key, shape in (("attn.to_out.0", "flux-o"), ("ff.net.2", "flux-down"), ("ff.net.0.proj", "flux-up")):
        readers, row = inputs[f"{DOUBLE}.{key}"], measured[shape]
        saved[key] = 1 - of.us(readers) / of.us([one.dense("") for one in readers])
        taken = row["ours_gemm_us"] + row["ours_compress_plain_us"]
        assert saved[key] == pytest.approx(1 - taken / row["cublas_us"], abs=0.04)
    assert saved["attn.to_out.0"] < product - 0.1
    assert saved["ff.net.2"] < product - 0.1
    assert saved["ff.net.0.proj"] > max(saved["attn.to_out.0"], saved["ff.net.2"])


def test_other_patterns_multiply_in_proportion():
    taken = {}
    for n in (1, 2, 3):
        of, inputs = flux_inputs(Recipe.immediate(n=n))
        taken[n] = of.us(inputs[f"{DOUBLE}.ff.net.2"])
    assert taken[2] - taken[1] == pytest.approx(taken[3] - taken[2])
    work = packaged_prices().products["bf16-sparse"].work_us * 4096 * 12288 * 3072e-9
    assert taken[2] - taken[1] == pytest.approx(work / 2)


def test_a_small_model_stands_for_one_of_full_size():
    """A tiny FLUX, 128 wide, is priced as FLUX.1: choices for it are those for the full-size model."""
    of, inputs = flux_inputs(Recipe.immediate(precision="fp8"), tiny_flux())
    full, full_inputs = flux_inputs(Recipe.immediate(precision="fp8"))
    assert of.stands_for_full_size
    assert not full.stands_for_full_size
    # Its longest input, image and text together, counts as 4,096 tokens.
    plan = make_plan(full_size_flux(), Recipe.immediate(precision="fp8"))
    tokens = {"image": 4096, "text": 512, "joint": 4608}
    counts = {one.name: tokens[one.candidate.stream] * 4096 / 4608 for one in plan.layers}
    for key, readers in full_inputs.items():
        assert of.us(inputs[key]) == pytest.approx(ModelPrices(plan, counts).us(readers))


def test_what_does_not_run_takes_no_time():
    plan = make_plan(full_size_flux(), Recipe.immediate())
    assert ModelPrices(plan, {}).us(plan.layers) == 0
