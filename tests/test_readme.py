"""What the README says is what the committed results file says, and its code runs."""

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
import update_readme
from plots import PLOTS

from rtlynx.storage.files import sha256_of

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
IN_README, ON_SITE = (tables.Place(in_docs=in_docs) for in_docs in (False, True))


def test_the_table_is_the_results_file():
    assert update_readme.updated(README, Path("README.md")) == README
    results = json.loads((ROOT / update_readme.STUDY).read_text())
    ours = next(row for row in results["rows"] if row["name"] == "refit+lowrank+strided")
    assert f"| `refit+lowrank+strided` | {ours['figures']['psnr']['mean']:.2f} |" in README


def test_the_studys_plots_are_of_their_results_files():
    sources = sorted((ROOT / study_tables.RESULTS).glob("quality-*.json"))
    assert sources
    for source in sources:
        for name in PLOTS:
            with Image.open(ROOT / study_tables.plots_of(source) / f"plot-{name}.png") as plot:
                assert plot.text["Source"] == sha256_of(source), (
                    "run python studies/plots.py studies/results/quality-*.json --to docs/study"
                )


def test_the_plot_is_of_the_results_file():
    assert update_readme.plotted()
    for source in update_readme.plotted():
        with Image.open(ROOT / tables.plot_of(source)) as plot:
            assert plot.text["Source"] == sha256_of(ROOT / source), "run python docs/update_readme.py"


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
            {
                "what": "speed",
                "bound": "at least",
                "wanted": 1.5,
                "measured": 1.25,
                "unit": "x",
                "met": False,
            },
            {"what": "host", "bound": "at most", "wanted": 30.0, "measured": 29.0, "unit": "us", "met": True},
            {"what": "rest", "bound": "at least", "wanted": 2.0, "measured": None, "unit": "x", "met": False},
        ],
    }


def updated(readme, root):
    return update_readme.updated(readme, Path("README.md"), root)


def test_how_fast_appears_with_its_results(tmp_path):
    begin, end = "<!-- speed: begin -->", "<!-- speed: end -->"
    others = "".join(f"<!-- {name}: begin --><!-- {name}: end -->" for name in ("study", "claims", "steps"))
    readme = f"{others}\n\n{begin}\nold\n{end}\n\nrest\n"

    before = updated(readme, tmp_path)
    assert before.endswith(f"{begin}\n{end}\n\nrest\n")

    results = tmp_path / update_readme.BF16
    results.parent.mkdir(parents=True)
    results.write_text(json.dumps(invented_speed()))
    after = updated(before, tmp_path)
    assert after == updated(after, tmp_path)
    lines = after.splitlines()
    assert "## How fast" in lines
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
    assert "a card" in after
    assert "1 of 3 targets are met. [Every other figure](docs/speed.md)." in lines
    lines = update_readme.targets(tmp_path, ON_SITE).splitlines()
    assert "| speed | at least 1.50x | 1.25x | **missed** |" in lines
    assert "| host | at most 30 µs | 29 µs | met |" in lines
    assert "| rest | at least 2.00x | – | **missed** |" in lines  # noqa: RUF001
    assert "commit 0123456789 " in after


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
    results = {"rows": [row, unmeasured], "geomean": means, "commit": "0123456789ab"}
    section = tables.fp8_section(results, update_readme.FP8, IN_README)
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
    with pytest.raises(ValueError, match="speed: begin"):
        update_readme.updated(README.replace("<!-- speed: begin -->", ""), Path("README.md"))


def test_every_public_name_that_the_readme_uses_exists():
    used = set(re.findall(r"\brtlynx\.([A-Za-z_]+)\(", README))
    assert len(used) >= 5
    assert used <= set(rtlynx.__all__)


def test_every_recipe_setting_in_the_readme_is_one():
    block = re.search(r"<!-- recipe -->\n```python\n(.*?)```", README, re.DOTALL)
    scope = {"rtlynx": rtlynx}
    exec(block.group(1), scope)
    assert isinstance(scope["recipe"], rtlynx.Recipe)


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)|src=\"(?!https?:)([^\"]+)\"", README):
        assert (ROOT / (target[0] or target[1])).exists(), target


def test_quantised_chains_are_a_table_where_they_were_measured():
    source = ROOT / "benchmarks/results/compress-h100.json"
    document = json.loads(source.read_text())
    row = {"name": "adaln", "M": 4096, "K": 3072, "copy_us": 13.04, "chain_us": 40.0}
    section = tables.compress_section(document | {"quantizers": [row]}, source, ON_SITE)
    assert "| adaln | 4096, 3072 | 13.0 | 40.0 | – |" in section  # noqa: RUF001
    assert "in one kernel" not in tables.compress_section(document | {"quantizers": []}, source, ON_SITE)
