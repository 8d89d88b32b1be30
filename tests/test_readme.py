"""The README is short, its figures are those of the results files, its links lead somewhere."""

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

import rtlynx

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs"))

import goals
import overview
import speed_plots
import study_tables
import tables
import update
from plots import FAMILIES, PLOTS, family_of

from rtlynx.models.plan import ARCHITECTURES
from rtlynx.storage.files import sha256_of
from rtlynx.timing.results import REFERENCE
from rtlynx.timing.step_variants import DENSE_FP8, MIXED, RECOMMENDED

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
IN_README = tables.Place(Path("README.md"))
ON_SITE = tables.Place(Path("docs/results/speed.md"))


def test_it_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 150
    titles = [line for line in README.splitlines() if line.startswith("## ")]
    assert titles.index("## Install") < titles.index("## How it works")


def test_its_figures_are_those_of_the_results_files():
    assert update.updated(README, Path("README.md")) == README
    study = json.loads((ROOT / study_tables.RESULTS / "quality-flux-emoji.json").read_text())
    shown = (("fp8:dense", "dense fp8, rtlynx"), ("saving:auto-90%", "sparse fp8, one mix in all steps"))
    for name, title in shown:
        psnr = study_tables.rows_of(study)[name]["figures"]["psnr"]["mean"]
        assert re.search(rf"\| FLUX.1-dev \| {title} \|.*\| {psnr:.1f} \|", README)


def test_figures_of_speed_and_pictures_stand_in_generated_parts_alone():
    by_hand = re.sub(r"<!-- overview: begin -->.*<!-- overview: end -->", "", README, flags=re.DOTALL)
    assert not re.findall(r"\d+\.\d+x|\d dB|\d ms|\d µs", by_hand)


def test_the_studys_plots_are_of_their_results_files():
    sources = sorted((ROOT / study_tables.RESULTS).glob("quality-*.json"))
    assert sources
    for source in sources:
        for name in PLOTS:
            with Image.open(ROOT / study_tables.plots_of(source) / f"plot-{name}.png") as plot:
                assert plot.text["Source"] == sha256_of(source), (
                    "run python studies/plots.py studies/results/quality-*.json --to docs/study"
                )


def test_the_plots_of_noise_levels_are_of_their_results_files():
    sources = sorted((ROOT / study_tables.RESULTS).glob("noise-levels-*.json"))
    assert sources
    for source in sources:
        with Image.open(ROOT / study_tables.plots_of(source) / "plot-noise-levels.png") as plot:
            assert plot.text["Source"] == sha256_of(source), (
                "run python studies/plots.py studies/results/noise-levels-*.json --to docs/study"
            )


def test_the_plots_of_speed_are_of_their_results_files():
    assert update.plotted()
    digests = {tables.plot_of(source): sha256_of(ROOT / source) for source in update.plotted()}
    for file, digest in {**digests, overview.CHART: update.steps_digest()}.items():
        with Image.open(ROOT / file) as plot:
            assert plot.text["Source"] == digest, "run python docs/update.py"


def test_every_variant_of_the_study_belongs_to_one_family_of_points():
    families = {name: family_of(name).title for name in ("fp8:dense", "paper:by-hand", "fp8:refit", "refit")}
    assert list(families.values()) == ["dense fp8", "the paper's recipe", "ours, sparse fp8", "ours in bf16"]
    assert family_of("bf16-budget:0.01") is family_of("saving:refit-80%") is FAMILIES[-1]
    assert family_of("rank:paper-2%") is family_of("paper")


# ------------------------------------------------------------------------- models at a glance


def invented_step(model, card, **gpu_ms):
    """Results of one step: variant -> GPU ms; wall time is 1 ms more."""
    rows = [
        {"name": name, "gpu_ms": ms, "wall_ms": ms and ms + 1, "reason": None} for name, ms in gpu_ms.items()
    ]
    how = {"resolution": 1024, "batch": 1, "text_tokens": 512, "attention": "sdpa", "ours": "ours"}
    card = {"device": f"NVIDIA {card}", "power_limit_w": 700.0, "torch": "2", "cuda": "13", "commit": "abc"}
    return {"model": model, **how, **card, "variants": rows, "targets": []}


@pytest.fixture
def measured(tmp_path):
    """Writes results of a step into a repository of its own, which it gives."""
    (tmp_path / update.RESULTS).mkdir(parents=True)

    def write(model, card, **gpu_ms):
        file = tmp_path / update.RESULTS / f"step-{model}-{card.lower()}.json"
        file.write_text(json.dumps(invented_step(model, card, **gpu_ms)))
        return tmp_path

    return write


def test_the_newest_card_that_dense_fp8_was_measured_on_is_shown(measured):
    measured("flux1-dev", "H100", **{REFERENCE: 100.0, RECOMMENDED: 60.0})
    root = measured("flux1-dev", "H200", **{REFERENCE: 90.0, DENSE_FP8: 60.0, RECOMMENDED: 50.0})
    measured("z-image", "H100", **{REFERENCE: 80.0, RECOMMENDED: 40.0})
    measured("z-image", "H200", **{REFERENCE: 80.0, DENSE_FP8: None})
    shown = {model: file.stem[-4:] for model, file in overview.current_steps(root).items()}
    assert shown == {"flux1-dev": "h200", "z-image": "h100"}
    lines = overview.overview_section(root, IN_README).splitlines()
    assert "| FLUX.1-dev | dense fp8, rtlynx | 60.0 | 61.0 | – | 1.50x | – | – |" in lines  # noqa: RUF001
    assert not any("100.0" in line for line in lines)
    verdict = overview.verdict_section(root, IN_README)
    assert "The recommended recipe makes its step faster by 1.20x (FLUX.1-dev)." in verdict
    earlier = update.steps(root, ON_SITE)
    assert '??? note "Earlier: FLUX.1-dev, NVIDIA H100"' in earlier


def test_the_recommended_recipe_is_shown_as_the_mean_of_its_steps(measured):
    times = {REFERENCE: 90.0, DENSE_FP8: 60.0, MIXED: 50.0}
    root = measured("z-image", "H200", **times)
    assert "| sparse fp8, one mix in all steps | 50.0 |" in overview.overview_section(root, IN_README)
    assert "**sparse fp8, rtlynx**" not in overview.overview_section(root, IN_README)
    said = overview.verdict_section(root, IN_README)
    assert "One mix of sparse and dense fp8 in all steps makes it faster by 1.20x (Z-Image)." in said
    kinds = {f"{RECOMMENDED}, sparse step": 44.0, f"{RECOMMENDED}, dense step": 60.0}
    root = measured("z-image", "H200", **times, **kinds, **{RECOMMENDED: 45.0})
    file = root / update.RESULTS / "step-z-image-h200.json"
    results = json.loads(file.read_text())
    results["variants"][-1] |= {"steps": 16, "dense_steps": 1}
    file.write_text(json.dumps(results))
    text = overview.overview_section(root, IN_README)
    shown = "**sparse fp8, rtlynx** (1 of 16 steps dense)"
    assert f"| Z-Image | {shown} | 45.0 | 46.0 | – | 2.00x | – | – |" in text  # noqa: RUF001
    assert "44.0" not in text
    table = tables.steps_section(results, update.RESULTS / file.name, ON_SITE)
    name = "sparse fp8 (recommended)"
    assert f"| {name}, sparse step | 44.0 |" in table
    assert f"| {name}: 1 of 16 steps dense, mean | 45.0 |" in table


def test_nothing_is_said_where_nothing_was_measured(tmp_path):
    assert update.PARTS["overview"](tmp_path, IN_README) == ""


def test_the_chart_shows_models_with_and_without_dense_fp8(tmp_path):
    steps = {
        "flux1-dev": invented_step(
            "flux1-dev", "H200", **{REFERENCE: 90.0, DENSE_FP8: 60.0, RECOMMENDED: 50.0}
        ),
        "z-image": invented_step("z-image", "H100", **{REFERENCE: 80.0, RECOMMENDED: 40.0}),
    }
    speed_plots.draw_steps(steps, tmp_path / "steps.png", "digest")
    with Image.open(tmp_path / "steps.png") as image:
        assert image.text["Source"] == "digest"
        assert image.width > 800
        blue = tuple(bytes.fromhex(speed_plots.BLUE[1:]))  # dense fp8: of one model alone
        columns = [x for x in range(image.width) if image.convert("RGB").getpixel((x, 200)) == blue]
    assert columns
    assert max(columns) < image.width / 2


# ------------------------------------------------------------------------------- layers


def target(what, wanted, measured, unit, *, met=False, bound="at least"):
    why = None if met else "benchmarks/NOTES.md, What bounds the GEMM"
    of = {"what": what, "bound": bound, "wanted": wanted, "measured": measured, "unit": unit}
    return {**of, "met": met, "why": why}


def invented_speed() -> dict:
    """Results of two layers in the form of benchmarks/linear.py, one of them without cuSPARSELt."""
    row = {
        "shape": "a",
        "M": 4096,
        "K": 3072,
        "N": 4096,
        "ours_us": 80.0,
        "ours_gemm_us": 50.0,
        "ours_compress_us": 20.0,
        "ours_paper_rank_us": 80.0,
        "cublas_us": 100.0,
        "cusparselt_gemm_us": 75.0,
        "cusparselt_compress_us": 150.0,
        "paper_rank": 64,
    }
    other = row | {"shape": "b", "cusparselt_gemm_us": None, "cusparselt_compress_us": None}
    return {
        "device": "a card",
        "power_limit_w": 700.0,
        "clock_mhz": None,
        "power_w": 650.0,
        "torch": "2.11",
        "cuda": "13.0",
        "commit": "0123456789abcdef",
        "rank": 64,
        "rounds": 2,
        "window_s": 1.0,
        "rows": [row, other],
        "geomean": {
            "linear_vs_cublas": 1.25,
            "linear_paper_rank_vs_cublas": 1.25,
            "gemm_vs_cublas": 2.0,
            "gemm_vs_cusparselt": None,
        },
        "targets": [
            target("speed", 1.5, 1.25, "x"),
            target("host time", 30.0, 29.0, "us", met=True, bound="at most"),
            target("rest", 2.0, None, "x"),
            target("nearly", 0.85, 0.8478, "x"),
        ],
    }


def test_layers_appear_with_their_results():
    source = update.RESULTS / "linear-bf16-x.json"
    lines = tables.speed_section(invented_speed(), source, ON_SITE).splitlines()
    first, second, mean = (
        next(line for line in lines if line.startswith(f"| {x} |")) for x in ("a", "b", "geometric mean")
    )
    flops = 2 * 4096 * 3072 * 4096
    assert first == (
        f"| a | 4096, 3072, 4096 | 100 | 150 + 75 | 20 + 50 | {flops / 50e6:,.0f} | 2.00x | 80 | **1.25x** "
        "| 1.25x (rank 64) |"
    )
    assert "| – + – |" in second  # noqa: RUF001
    assert "| 2.00x | | **1.25x** | 1.25x |" in mean
    assert "a card" in lines[-1]
    assert "commit 0123456789 " in lines[-1]


def test_goals_come_with_what_is_next_and_the_missing_first():
    document = invented_speed()
    lines = goals.goals_section([document], goals.LAYER).splitlines()
    assert lines[2:] == [
        "| speed: at least 1.50x | 1.25x | activations from registers; fewer bytes from L2 |",
        "| rest: at least 2.00x | – | activations from registers; fewer bytes from L2 |",  # noqa: RUF001
        "| nearly: at least 0.85x | 0.848x | activations from registers; fewer bytes from L2 |",
    ]
    host = goals.goals_section([document], goals.HOST).splitlines()
    assert host[2:] == ["| host time: at most 30&nbsp;µs | 29&nbsp;µs | reached |"]


def test_every_goal_has_its_place_and_what_is_next():
    documents = update.documents(ROOT)
    groups = (goals.STEP, goals.LAYER, goals.COMPRESSION, goals.HOST)
    shown = [goals.goals_section(documents, group).splitlines()[2:] for group in groups]
    assert all(shown)
    wanted = {
        (document.get("model"), target["what"].rpartition(", speed over ")[2], target["wanted"])
        if ", speed over " in target["what"] and "model" in document
        else (id(document), target["what"])
        for document in documents
        for target in document.get("targets", ())
    }
    assert sum(map(len, shown)) == len(wanted)  # of one goal the best run
    assert len(shown[0]) == len(set(shown[0]))
    notes = (ROOT / "benchmarks" / "NOTES.md").read_text()
    assert all(f"\n## {section}\n" in notes for section in goals.NEXT)


def test_fp8_appears_with_its_results():
    row = invented_speed()["rows"][0] | {
        "cublas_fp8_us": 60.0,
        "cublas_fp8_quant_us": 20.0,
        "fp8_linear_us": 80.0,
        "ours_gemm_us": 30.0,
        "ours_us": 50.0,
        "rel_err": 2e-3,
        "quantization_err": 3e-2,
    }
    unmeasured = row | dict.fromkeys(("cublas_fp8_us", "fp8_linear_us", "quantization_err"))
    means = {"gemm_vs_cublas_fp8": 2.0, "linear_vs_cublas_bf16": 2.0, "linear_vs_fp8_linear": None}
    results = invented_speed() | {"rows": [row, unmeasured], "geomean": means}
    section = tables.fp8_section(results, update.RESULTS / "linear-fp8-x.json", IN_README)
    first, second = (line for line in section.splitlines() if line.startswith("| a |"))
    assert first.startswith("| a | 4096, 3072, 4096 | 100 | 20 + 60 | 20 + 30 |")
    assert first.endswith("| 2.00x | 50 | **2.00x** | **1.60x** |")
    assert second.endswith("| – | 50 | **2.00x** | **–** |")  # noqa: RUF001
    assert "outputs by 3.0e-02;" in section


def test_the_plot_shows_layers_that_a_peer_cannot_do(tmp_path):
    plot = tmp_path / "speed" / "plot.png"
    speed_plots.draw_speed(invented_speed(), plot, "digest")
    with Image.open(plot) as image:
        assert image.text["Source"] == "digest"
        assert image.width > 800


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="overview: begin"):
        update.updated(README.replace("<!-- overview: begin -->", ""), Path("README.md"))


def test_every_public_name_that_the_readme_uses_exists():
    used = set(re.findall(r"\brtlynx\.([A-Za-z_]+)[.(]", README))
    assert len(used) >= 3
    assert used <= set(rtlynx.__all__)


def test_the_models_of_the_support_matrix_are_those_known_by_name():
    rows = re.findall(r"^\| ([\w ,.-]+) \| yes \| (\w+) \| ([\w ]+) \|", README, re.MULTILINE)
    classes = {
        "FLUX.1": "FluxTransformer2DModel",
        "FLUX.2": "Flux2Transformer2DModel",
        "Chroma": "ChromaTransformer2DModel",
        "HunyuanVideo 1.5, LTX-Video 0.9, LTX-2": "HunyuanVideo15Transformer3DModel "
        "LTXVideoTransformer3DModel LTX2VideoTransformer3DModel",
        "Stable Diffusion 3, 3.5": "SD3Transformer2DModel",
        "Qwen-Image": "QwenImageTransformer2DModel",
        "Wan 2.1, 2.2": "WanTransformer3DModel",
        "Z-Image": "ZImageTransformer2DModel",
    }
    known = {one: (fused, rows_) for name, fused, rows_ in rows for one in classes[name].split()}
    assert set(known) == set(ARCHITECTURES)
    for name, (fused, text_rows) in known.items():
        assert (fused == "yes") == bool(ARCHITECTURES[name].fused)
        assert (text_rows == "yes") == (ARCHITECTURES[name].text_rows is not None)


def test_linked_files_and_headings_exist():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert len(links) > 15
    for file, _, heading in (link.partition("#") for link in links):
        if file.startswith("../../actions/"):  # GitHub's own pages
            continue
        assert (ROOT / file).exists(), file
        if heading:
            titles = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}


def test_quantised_chains_are_a_table_where_they_were_measured():
    source = ROOT / "benchmarks/results/compress-h100.json"
    document = json.loads(source.read_text())
    row = {"name": "adaln", "M": 4096, "K": 3072, "copy_us": 13.04, "chain_us": 40.0}
    section = tables.compress_section(document | {"quantizers": [row]}, source, ON_SITE)
    assert "| adaln | 4096, 3072 | 13.0 | 40.0 | – |" in section  # noqa: RUF001
    assert "in one kernel" not in tables.compress_section(document | {"quantizers": []}, source, ON_SITE)
