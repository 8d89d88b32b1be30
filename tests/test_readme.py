"""The README is short, its figures are those of the results files, its links lead somewhere."""

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

import rtlynx

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs"))

import speed_plots
import study_tables
import tables
import update
from plots import FAMILIES, PLOTS, family_of

from rtlynx.models.plan import ARCHITECTURES
from rtlynx.storage.files import sha256_of

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
    for name, title in (("fp8:dense", "dense fp8"), ("recommended", r"\*\*recommended\*\*.*")):
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
    digests |= {chart: update.digest(sources.values()) for chart, sources in update.charts().items()}
    for file, digest in digests.items():
        with Image.open(ROOT / file) as plot:
            assert plot.text["Source"] == digest, "run python docs/update.py"


def test_every_variant_of_the_study_belongs_to_one_family_of_points():
    families = {name: family_of(name).title for name in ("fp8:dense", "paper:by-hand", "fp8:refit", "refit")}
    assert list(families.values()) == ["dense fp8", "the paper's recipe", "ours, sparse fp8", "ours in bf16"]
    assert family_of("bf16-budget:0.01") is family_of("saving:refit-80%") is FAMILIES[-1]
    assert family_of("rank:paper-2%") is family_of("paper")


# ------------------------------------------------------------------------------- layers


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
        "ours_compress_plain_us": 12.5,
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
    }


def test_layers_appear_with_their_results():
    source = update.RESULTS / "linear-bf16-x.json"
    lines = tables.speed_section(invented_speed(), source, ON_SITE).splitlines()
    first, second, mean = (
        next(line for line in lines if line.startswith(f"| {x} |")) for x in ("a", "b", "geometric mean")
    )
    flops = 2 * 4096 * 3072 * 4096
    assert first == (
        f"| a | 4096, 3072, 4096 | 100 | 150 + 75 | 12 + 50 | {flops / 50e6:,.0f} | 2.00x | **1.60x** "
        "| 80 | 1.25x | 1.25x (rank 64) |"
    )
    assert "| – + – |" in second  # noqa: RUF001
    assert "| 2.00x | **1.60x** | | 1.25x | 1.25x |" in mean
    assert "a card" in lines[-1]
    assert "commit 0123456789 " in lines[-1]


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

    def lines_of(results):
        section = tables.fp8_section(results, update.RESULTS / "linear-fp8-x.json", IN_README)
        assert len({line.count("|") for line in section.splitlines() if line.startswith("|")}) == 1
        return section, [line for line in section.splitlines() if line.startswith(("| a |", "| geo"))]

    section, (first, second, mean) = lines_of(results)
    teraflops = f"{2 * 4096 * 3072 * 4096 / 30e6:,.0f}"
    activations = f"12 + 30 | {teraflops} | **1.88x** | 2.35x | 50 | 1.60x | 2.00x |"
    assert first == f"| a | 4096, 3072, 4096 | 100 | 20 + 60 | {activations}"
    assert second.endswith("| **–** | 2.35x | 50 | – | 2.00x |")  # noqa: RUF001
    assert mean.endswith("|  |  | **–** | 2.35x |  | – | 2.00x |")  # noqa: RUF001
    assert "outputs by 3.0e-02;" in section
    by_weights = {"ours_quantize_us": 10.0, "ours_weight_sparse_gemm_us": 30.0}
    rows = [row | by_weights, unmeasured | dict.fromkeys(by_weights)]
    section, (first, second, _) = lines_of(results | {"rows": rows})
    # What is recommended comes first, and rank 64 last.
    weights = f"10 + 30 | {teraflops} | **2.00x** | 2.50x"
    assert first == f"| a | 4096, 3072, 4096 | 100 | 20 + 60 | {weights} | {activations}"
    assert "| – + – | – | **–** | – | 12 + 30 |" in second  # noqa: RUF001


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
    assert "| bf16 | 4096, 3072 | " in section  # of a file from before there was fp8
    row = {"format": "fp8-sparse", "M": 4096, "K": 3072, "copy_us": 10.0, "compress_adjacent_us": 10.5}
    section = tables.compress_section(document | {"rows": [row]}, source, ON_SITE)
    assert "| fp8 | 4096, 3072 | 10.0 | 10.5 | – | – | – |" in section  # noqa: RUF001
    assert "in one kernel" not in tables.compress_section(document | {"quantizers": []}, source, ON_SITE)
