"""`rtlynx demo --full` end to end on the real model, in small: what it writes, and nothing on failure."""

import copy
import json
import re
from html import unescape

import pytest
import rtlynx_zoo as zoo
import torch
from PIL import Image
from rtlynx_zoo.prompts import ASSETS, calibration_prompts, demo_prompts

import rtlynx
from rtlynx.evaluate import compare, sample_pictures
from rtlynx.evaluate import full_demo as demo_module
from rtlynx.evaluate.activations import activation_energy_kept
from rtlynx.evaluate.full_demo import run_full_demo
from rtlynx.evaluate.report import findings
from rtlynx.evaluate.variants import NAMES, build_variant, prune_weights
from rtlynx.io.checkpoint import read_index
from rtlynx.math.fp8 import quantize_weight
from rtlynx.math.selection import nm_mask

SMALL = {"images": 2, "steps": 1, "progress": False}
FILES = {"results.json", "grid.png", "report.html"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder and return value of one small demo."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return folder, run_full_demo(folder, **SMALL)


@pytest.fixture(scope="module")
def pipeline():
    return zoo.load()


def strictly(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_results_say_what_the_issue_asks(written):
    folder, returned = written
    results = strictly((folder / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert {"model", "device", "torch", "steps", "images", "seed", "variants"} <= results.keys()
    assert (results["model"], results["device"]) == ("zoo:flux-emoji", "cpu")
    assert (results["steps"], results["images"], results["seed"]) == (1, 2, 0)
    assert results["torch"] == torch.__version__
    assert [row["name"] for row in results["variants"]] == list(NAMES)
    wanted = {"name", "layer_error", "psnr", "ssim", "kid", "retrieval", "sparse_layers", "seconds"}
    for row in results["variants"]:
        assert wanted <= row.keys()


def test_dense_is_the_reference(written):
    dense, *others = written[1]["variants"]
    assert (dense["psnr"], dense["ssim"], dense["layer_error"], dense["sparse_layers"]) == (None, 1.0, 0.0, 0)
    for row in others:
        assert 5 < row["psnr"] < 60
        assert 0 < row["ssim"] < 1
        assert 0 < row["layer_error"] < 0.5
        assert 0 <= row["retrieval"] <= 1


def test_layer_errors_are_the_mean_over_the_sparse_layers(written):
    counts = {}
    for row in written[1]["variants"]:
        assert len(row["layers"]) == row["sparse_layers"]
        if row["layers"]:
            assert row["layer_error"] == pytest.approx(sum(row["layers"].values()) / len(row["layers"]))
        counts[row["name"]] = row["sparse_layers"]
    # 3 double blocks of 6 image layers, 6 single blocks of 5; 3 of 6 text layers in the last variant.
    changed = len(read_index(ASSETS / "solutions" / "recommended")["layers"])
    assert 48 < changed <= 66  # the text stream's in eight bits, where the budget took them
    apart = {"dense": 0, "recommended": changed, NAMES[-1]: 66}
    assert counts == {name: apart.get(name, 48) for name in NAMES}


def test_compensation_lowers_the_layer_error(written):
    error = {row["name"]: row["layer_error"] for row in written[1]["variants"]}
    assert error["activation-2:4+refit+lowrank"] < error["activation-2:4+norm+lowrank"]
    assert error["activation-2:4+norm+lowrank"] < error["activation-2:4+norm"]


def test_eight_bits_cost_little(written):
    error = {row["name"]: row["layer_error"] for row in written[1]["variants"]}
    ours, both = error["activation-2:4+refit+lowrank"], error["fp8+activation-2:4+refit+lowrank"]
    assert 1e-4 < error["fp8"] < 0.1 * ours
    assert ours < both < ours + 1.5 * error["fp8"]  # two independent errors add up


def test_layers_of_the_recommended_recipe_lie_between_its_parts(written):
    error = {row["name"]: row["layer_error"] for row in written[1]["variants"]}
    assert error["fp8"] < error["recommended"] < error["activation-2:4+refit+lowrank"]


def test_the_three_files_and_no_other(written):
    folder, _ = written
    assert {path.name for path in folder.iterdir()} == FILES
    with Image.open(folder / "grid.png") as grid:
        assert grid.height > 7 * 128
        assert grid.width > 2 * 128


def test_report_is_self_contained_and_complete(written):
    folder, results = written
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(
        r"""(src|href|srcset|action|poster)\s*=\s*["']?\s*(https?:)?//""", html, re.IGNORECASE
    )
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//|<script|<link|<iframe", html, re.IGNORECASE)
    images = re.findall(r"<img [^>]*>", html)
    assert len(images) == 2 * len(NAMES)
    assert all(
        'src="data:image/png;base64,' in image and re.search(r'alt="[^"]+"', image) for image in images
    )
    plots = re.findall(r"<svg [^>]*>", html)
    assert len(plots) == 2 + 2 + 5
    assert all('role="img"' in plot and re.search(r'aria-label="[^"]+"', plot) for plot in plots)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for name in NAMES:
        assert name in html
    text = unescape(re.sub(r"<[^>]+>", "", html))
    for sentence in findings(results):
        assert sentence in text
    assert "CC-BY 4.0" in html
    assert "nan" not in re.sub(r"base64,[^\"]*", "", html).lower().split()


def test_demo_prompts_are_not_calibration_prompts():
    assert not set(demo_prompts()) & set(calibration_prompts())


@pytest.mark.parametrize("broken", ["layer_errors", "render_report", "write_results"])
def test_an_error_midway_leaves_nothing(tmp_path, monkeypatch, broken):
    def fail(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(demo_module, "render_report", lambda *_: "")  # it wants all variants, we draw two
    monkeypatch.setattr(demo_module, broken, fail)
    monkeypatch.setattr(demo_module, "NAMES", ("dense", "activation-2:4"))
    (tmp_path / "results.json").write_text("older")
    with pytest.raises(OSError, match="No space"):
        run_full_demo(tmp_path, images=1, steps=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "older"


def test_findings_hold_whatever_the_numbers_are(written):
    results = copy.deepcopy(written[1])
    rows = {row["name"]: row for row in results["variants"]}
    rows["activation-2:4+refit+lowrank"]["psnr"] = rows["activation-2:4+norm+lowrank"]["psnr"] - 2
    rows["activation-2:4+norm:all-layers"]["psnr"] = rows["activation-2:4+norm"]["psnr"] + 1
    rows["fp8+activation-2:4+refit+lowrank"]["psnr"] = rows["activation-2:4+refit+lowrank"]["psnr"] - 0.5
    said = " ".join(findings(results))
    assert "loses 2.0\N{NO-BREAK SPACE}dB" in said
    assert "gains 1.0\N{NO-BREAK SPACE}dB" in said
    assert "quantising costs 0.5\N{NO-BREAK SPACE}dB" in said
    for row in rows.values():
        row["psnr"] = None
    assert all("dB" not in sentence for sentence in findings(results))


# ------------------------------------------------------------------------------------ variants and sampling


def test_every_variant_leaves_the_dense_model_alone(pipeline):
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    for name in NAMES:
        variant = build_variant(name, pipeline, solutions=ASSETS / "solutions")
        assert variant.pipeline.transformer is not pipeline.transformer
    after = pipeline.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="unknown variant"):
        build_variant("best", pipeline, solutions=None)


def test_fp8_variants_are_the_same_layers_in_eight_bits(pipeline):
    names = ("activation-2:4+refit+lowrank", "fp8", "fp8+activation-2:4+refit+lowrank")
    plain, dense, both = (
        build_variant(name, pipeline, solutions=ASSETS / "solutions").layers for name in names
    )
    assert list(plain) == list(dense) == list(both)
    for name, layer in both.items():
        quantised = quantize_weight(plain[name].weight)
        assert torch.equal(layer.weight.view(torch.uint8), quantised.values.view(torch.uint8))
        assert torch.equal(layer.weight_scale, quantised.scale)
        assert torch.equal(layer.lowrank_b, plain[name].lowrank_b)
        assert (layer.pattern, layer.norm) == (plain[name].pattern, plain[name].norm)
        original = quantize_weight(pipeline.transformer.get_submodule(name).weight)
        assert torch.equal(dense[name].weight.view(torch.uint8), original.values.view(torch.uint8))
        assert (dense[name].pattern.n, dense[name].rank) == (dense[name].pattern.m, 0)


def test_live_calibration_of_fp8_sees_the_eight_bits(pipeline, monkeypatch):
    recipes = {}  # the real thing takes a minute, and `tests/test_calibrate_fp8.py` has it on a smaller model
    for name in ("activation-2:4+refit+lowrank", "fp8+activation-2:4+refit+lowrank"):
        monkeypatch.setattr(
            "rtlynx.evaluate.variants.calibrate",
            lambda _pipeline, _prompts, recipe, *_, name=name, **__: recipes.update({name: recipe}),
        )
        build_variant(name, pipeline, solutions=None, calibration_prompts=calibration_prompts(2))
    plain, fp8 = recipes.values()
    assert (plain.precision, fp8.precision) == ("bf16", "fp8")
    assert set(fp8.formats.values()) == {"dense"}  # the text stream's
    assert {**plain.to_dict(), "precision": "fp8", "formats": fp8.formats} == fp8.to_dict()


def test_pruned_weights_keep_two_of_four(pipeline):
    model = copy.deepcopy(pipeline.transformer)
    for name, layer in prune_weights(model).items():
        original = pipeline.transformer.get_submodule(name).weight
        assert torch.equal(layer.weight, original * nm_mask(original))


def test_a_picture_depends_on_its_seed_and_not_on_the_batch(pipeline):
    prompts, settings = demo_prompts(3), {"num_inference_steps": 2}
    together = sample_pictures(pipeline, prompts, seed=5, batch_size=3, pipeline_kwargs=settings)
    done = []
    apart = sample_pictures(
        pipeline, prompts, seed=5, batch_size=2, pipeline_kwargs=settings, advance=done.append
    )
    assert done == [2, 1]
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=0)
    alone = sample_pictures(pipeline, prompts[1:2], seed=6, pipeline_kwargs=settings)
    torch.testing.assert_close(alone, together[1:2], atol=1e-4, rtol=0)


def test_compare_agrees_with_the_demo(written, pipeline):
    sparse = zoo.load()
    rtlynx.sparsify(sparse, rtlynx.Recipe.immediate(grouping="adjacent"))
    figures = compare(
        pipeline, sparse, demo_prompts(2), steps=1, batch_size=2, pipeline_kwargs={"guidance_scale": 3.0}
    )
    row = next(row for row in written[1]["variants"] if row["name"] == "activation-2:4+norm")
    for key in ("psnr", "ssim", "layer_error"):
        assert figures[key] == pytest.approx(row[key], rel=1e-3)
    assert figures["sparse_layers"] == 48
    with pytest.raises(ValueError, match="dense pipeline and a sparse one"):
        compare(sparse, pipeline, demo_prompts(1))
    with pytest.raises(ValueError, match="no prompts"):
        compare(pipeline, sparse, [])
    with pytest.raises(TypeError, match="bare transformer"):
        compare(pipeline.transformer, sparse, demo_prompts(1))


def test_activation_energy_of_every_candidate(pipeline):
    kept = activation_energy_kept(pipeline, demo_prompts(1), pipeline_kwargs={"num_inference_steps": 1})
    assert len(kept) == 66
    assert all(0.5 < share < 1 for share in kept.values())
    assert kept["transformer_blocks.0.attn.to_q"] == kept["transformer_blocks.0.attn.to_v"]
    with pytest.raises(TypeError, match="bare transformer"):
        activation_energy_kept(pipeline.transformer, demo_prompts(1))
