"""The command line as a user meets it: output, exit codes, errors in one line."""

import json
import sys
from functools import partialmethod

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from helpers import tiny_flux, tiny_z_image
from pipeline_helpers import TinyPipeline
from rtlynx_zoo.pipeline import EmojiPipeline


@pytest.fixture
def run(command):
    return command


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("red heart\n\nhot dog\n", encoding="utf-8")
    return file


QUICK = ("--pipeline", "num_inference_steps=2", "--option", "batch_size=1", "--option", "steps_per_prompt=1")


def test_version_and_help_exit_cleanly(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.strip()[0].isdigit()
    for command in ("demo", "calibrate", "convert", "evaluate", "inspect", "doctor", "precompile", "bench"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert f"Example: rtlynx {command}" in " ".join(out.split())


def test_doctor_runs_a_layer_and_says_what_is_missing(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RTLYNX_CACHE_DIR", str(tmp_path))
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    checks = {check["name"]: check for check in report["checks"]}
    assert code == 0
    assert report["ok"]
    assert checks["reference on cpu"]["ok"] is True
    assert checks["zoo:flux-emoji"]["ok"] is True
    assert "NVRTC" in checks["kernel compiler"]["detail"]
    assert "0 kernels" in checks["kernel cache"]["detail"]
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device" in checks["hopper kernels"]["detail"]


def test_inspect_lists_every_candidate_with_its_reason(run):
    code, out, _ = run("inspect", "zoo:flux-emoji", "--json")
    overview = json.loads(out)
    assert code == 0
    layers = {layer["name"]: layer for layer in overview["layers"]}
    assert overview["architecture"] == "FluxTransformer2DModel"
    assert len(layers) == 3 * 12 + 6 * 5
    assert layers["transformer_blocks.0.attn.add_q_proj"]["format"] == "fp8-dense"  # the text stream
    assert layers["single_transformer_blocks.0.proj_out"]["pattern"] == "2:4 adjacent"  # of rotated values
    assert overview["sparse_layers"] == 3 * 6 + 6 * 5


def test_inspect_measures_the_energy_that_activations_keep(run, monkeypatch):
    few = partialmethod(EmojiPipeline.__call__, num_inference_steps=2)
    monkeypatch.setattr(EmojiPipeline, "__call__", few)
    code, out, _ = run("inspect", "zoo:flux-emoji", "--activations", "1", "--json")
    assert code == 0
    kept = json.loads(out)["activation_energy_kept"]
    assert len(kept) == 66
    assert all(0.5 < share <= 1 for share in kept.values())


def test_convert_then_evaluate(run, tmp_path, prompts):
    folder = tmp_path / "sparse"
    code, out, _ = run("convert", "zoo:flux-emoji", "--out", folder, "--json")
    assert code == 0
    assert json.loads(out)["sparse_layers"] == 48
    code, out, _ = run(
        "evaluate", "zoo:flux-emoji", "--checkpoint", folder, "--prompts", prompts, "--images", "1",
        "--pipeline", "num_inference_steps=2", "--out", tmp_path / "evaluation", "--json",
    )  # fmt: skip
    results = json.loads(out)
    assert code == 0
    assert results["images"] == 1
    assert results["sparse"]["checkpoint"] == str(folder)
    sparse = results["variants"][2]
    assert sparse["psnr"] > 5
    assert 0 < sparse["ssim"] < 1


def test_convert_to_fp8(run, tmp_path):
    folder, formats = tmp_path / "fp8", json.dumps({"*.ff.net.2": "fp8-dense"})
    settings = ("--set", "precision=fp8", "--set", f"formats={formats}")
    assert run("convert", "zoo:flux-emoji", "--out", folder, *settings)[0] == 0
    code, out, _ = run("inspect", "zoo:flux-emoji", "--checkpoint", folder, "--json")
    assert code == 0
    overview = json.loads(out)
    found = [layer["format"] for layer in overview["layers"]]
    assert {format: found.count(format) for format in found} == {"fp8-sparse": 45, "fp8-dense": 21}
    assert overview["extra_bytes"] < -2e7
    code, out, _ = run("inspect", "zoo:flux-emoji", *settings)
    assert code == 0
    assert "MB less memory" in " ".join(out.split())


def test_calibrate_tells_which_forms_the_budget_chose(run, tmp_path, prompts):
    others = json.dumps(
        ["transformer_blocks.[012].*", "single_transformer_blocks.[1-5].*", "*.proj_*", "*.to_q"]
    )
    asked = (
        "calibrate", "zoo:flux-emoji", "--prompts", prompts, *QUICK, "--work", tmp_path / "work",
        "--set", "rank=4", "--set", "precision=auto", "--set", 'budget={"saving": 0.8}',
        "--set", f"skip={others}",
    )  # fmt: skip
    code, out, _ = run(*asked, "--out", tmp_path / "told")
    assert code == 0
    text = " ".join(out.split())
    assert "fp8-dense" in text
    assert "of the possible saving" in text
    code, out, _ = run(*asked, "--out", tmp_path / "auto", "--json")  # of what it kept in --work
    assert code == 0
    report = json.loads(out)
    costs, names = report["budget"]["costs"], [f"single_transformer_blocks.0.attn.to_{x}" for x in "kv"]
    assert [cost["format"] for cost in costs] == ["fp8-dense", "fp8-sparse"]
    assert all(cost["input"] == "single_transformer_blocks.0.input" for cost in costs)
    assert all(sorted(cost["layers"]) == names and cost["us_saved"] > 0 for cost in costs)
    assert set(report["budget"]["formats"]) == set(report["layers"])


def test_calibrate_saves_a_checkpoint_that_inspect_shows(run, tmp_path, prompts):
    folder = tmp_path / "calibrated"
    others = json.dumps(["transformer_blocks.*", "*.proj_*", "*.to_[qv]"])
    code, out, _ = run(
        "calibrate", "zoo:flux-emoji", "--out", folder, "--prompts", prompts, *QUICK,
        "--set", "rank=4", "--set", "text_rows=dense", "--set", "ridge=0.1", "--set", "dense_precision=bf16",
        "--set", f"skip={others}", "--plot", tmp_path / "plots" / "layers.svg", "--json",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0
    plot = (tmp_path / "plots" / "layers.svg").read_text()
    assert "error of the layer's output" in plot
    assert "error at the model's output" in plot
    assert "the calls that calibration recorded" in plot
    assert report["budget"]["speedup_share"] >= 0.9
    assert report["extra_bytes"] > 0  # eight bits save less than the original weights, kept beside, cost
    code, out, _ = run("inspect", "zoo:flux-emoji", "--checkpoint", folder, "--json")
    assert code == 0
    overview = json.loads(out)
    assert overview["recipe"]["text_rows"] == "dense"
    sparse = {layer["name"]: layer for layer in overview["layers"] if not layer["dense_reason"]}
    assert {name: layer["error"] for name, layer in sparse.items()} == {
        name: layer["error"] for name, layer in report["layers"].items()
    }
    halved = [layer for layer in sparse.values() if layer["format"] == "fp8-sparse"]
    assert 0 < len(halved) == overview["sparse_layers"] < len(sparse)  # some drop nothing
    assert {layer["rank"] for layer in halved} == {4}
    assert not overview["undecided"]


def test_inspect_says_that_a_budget_has_not_decided_yet(run):
    said = "Calibration decides, by the budget, which of these stay dense or take another format."
    code, out, _ = run("inspect", "zoo:flux-emoji")
    assert code == 0
    assert said in " ".join(out.split())
    code, out, _ = run("inspect", "zoo:flux-emoji", "--set", "precision=bf16", "--set", "budget=null")
    assert code == 0
    assert said not in " ".join(out.split())


def test_inspect_plots_the_layers(run, tmp_path):
    for name in ("new/layers.svg", "layers.png"):
        code, out, _ = run("inspect", "zoo:flux-emoji", "--plot", tmp_path / name)
        assert code == 0
        assert f"Plot: {tmp_path / name}" in out
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    plot = (tmp_path / "new" / "layers.svg").read_text()
    for said in (
        "attention-in",
        "single-out",
        "256 image tokens and 16 text tokens",
        "No errors: calibration",
    ):
        assert said in plot
    assert "error of the layer" not in plot
    code, out, _ = run(
        "inspect", "zoo:flux-emoji", "--plot", tmp_path / "layers.svg", "--tokens", "4096", "512", "--json"
    )
    assert code == 0
    assert len(json.loads(out)["layers"]) == 66
    assert "4096 image tokens and 512 text tokens" in (tmp_path / "layers.svg").read_text()


def test_plots_need_matplotlib_and_say_so(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    code, out, error = run("inspect", "zoo:flux-emoji", "--plot", tmp_path / "layers.svg")
    assert (code, out) == (1, "")
    assert error == "error: plots need matplotlib: pip install 'rtlynx[demo]'\n"
    assert run("inspect", "zoo:flux-emoji", "--json")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_local_folders_of_transformers_and_pipelines(run, tmp_path):
    tiny_z_image().save_pretrained(tmp_path / "transformer")
    code, out, _ = run("inspect", tmp_path / "transformer", "--json")
    assert code == 0
    assert json.loads(out)["architecture"] == "ZImageTransformer2DModel"
    code, out, _ = run("convert", tmp_path / "transformer", "--out", tmp_path / "sparse", "--json")
    assert code == 0
    assert json.loads(out)["sparse_layers"] == 14
    code, out, _ = run("inspect", tmp_path / "transformer", "--checkpoint", tmp_path / "sparse", "--json")
    assert code == 0
    assert json.loads(out)["sparse_layers"] == 14
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    DiTPipeline(dit, AutoencoderKL(block_out_channels=(32,)), DDIMScheduler()).save_pretrained(
        tmp_path / "pipe"
    )
    code, out, _ = run("inspect", tmp_path / "pipe", "--json")
    overview = json.loads(out)
    assert code == 0
    assert overview["architecture"] == "generic"
    assert overview["sparse_layers"] == 2 * 6
    assert {layer["rule"] for layer in overview["layers"]} == {"in a repeated block"}
    others = overview["other_layers"]
    assert others["transformer_blocks.1.norm1.linear"] == "makes modulation"
    assert others["proj_out_1"] == "outside the repeated blocks"
    code, out, _ = run("inspect", tmp_path / "pipe")
    assert code == 0
    assert "no candidates and stay dense: 6 makes modulation; 2 outside the" in " ".join(out.split())


@pytest.mark.parametrize("as_json", [True, False])
def test_distill_steps_are_taken_and_what_they_did_is_told(run, tmp_path, prompts, monkeypatch, as_json):
    monkeypatch.setattr("rtlynx.models.pipelines.load_model", lambda *_, **__: TinyPipeline(tiny_flux()))
    recipe = ("--set", "ridge=1", "--set", "precision=fp8", "--set", "budget=none")
    code, out, _ = run(
        "calibrate", "MODEL", "--out", tmp_path / "out", "--prompts", prompts, *recipe,
        "--distill", "steps=1", *(["--json"] if as_json else []),
    )  # fmt: skip
    assert code == 0
    if not as_json:
        assert "11 layers trained for 1 steps: loss" in " ".join(out.split())
        assert " - " in out  # the errors of trained layers
        return
    report = json.loads(out)
    assert report["distillation"]["steps"] == 1
    assert report["distillation"]["loss_after"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "zoo:none"), "flux-emoji"),
        (("inspect", "no/such/folder"), "no such model folder"),
        (("inspect", "zoo:flux-emoji", "--plot", "x.jpg"), "ending .png or .svg, got 'x.jpg'"),
        (("inspect", "zoo:flux-emoji", "--plot", "x.svg", "--tokens", "9", "0"), "two whole numbers above 0"),
        (("calibrate", "zoo:flux-emoji", "--out", "x", "--plot", "x/x.svg"), "inside --out x"),
        (("convert", "zoo:flux-emoji", "--out", "x", "--set", "ranks=3"), "did you mean 'rank'"),
        (("convert", "zoo:flux-emoji", "--out", "x", "--set", "n=5"), "1 <= n <= m"),
        (("convert", "zoo:flux-emoji", "--out", "x", "--set", "rank=4"), "calibrate"),
        (("calibrate", "zoo:flux-emoji", "--out", "x", "--set", "rank=0"), "rank"),
        (("calibrate", "zoo:flux-emoji", "--out", "x", "--prompts", "none.txt"), "none.txt"),
        (("calibrate", "zoo:flux-emoji", "--out", "x", "--option", "sed=1"), "did you mean 'seed'"),
        (("evaluate", "zoo:flux-emoji", "--checkpoint", "none"), "none is not a folder"),
    ],
)
def test_bad_input_is_one_line_exit_code_one_and_nothing_written(run, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, error = run(*arguments)
    assert code == 1
    assert out == ""
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    assert said in error
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_output_folder_is_refused_before_any_work(run, tmp_path, prompts):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    code, _, error = run("calibrate", "zoo:flux-emoji", "--out", folder, "--prompts", prompts, *QUICK)
    assert code == 1
    assert "holds other files" in error
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "zoo:flux-emoji"),
        ("inspect",),
        ("inspect", "zoo:flux-emoji", "--tokens", "4096", "512"),
        ("calibrate", "--sets", "1"),
    ],
)
def test_wrong_usage_exits_with_two(run, arguments):
    code, _, _ = run(*arguments)
    assert code == 2
