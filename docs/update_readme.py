"""Write the README's generated parts: `python docs/update_readme.py`.

The demo's figures come from docs/demo: results.json is a plain `rtlynx demo`, results-24-steps.json the
same with `--steps 24`. "How fast" comes from what benchmarks/linear.py wrote, with a plot in docs/speed, and
ends with the targets of all results there are; before there are such results the README says nothing there.
"""

import hashlib
import json
import re
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
SPEED_BEGIN, SPEED_END = "<!-- speed: begin -->", "<!-- speed: end -->"
SPEED_RESULTS = Path("benchmarks/results/linear-bf16-h100.json")
FP8_RESULTS = Path("benchmarks/results/linear-fp8-h100.json")
TARGET_RESULTS = (
    SPEED_RESULTS,
    FP8_RESULTS,
    Path("benchmarks/results/compress-h100.json"),
    Path("benchmarks/results/host-h100.json"),
)
SPEED_PLOT = Path("docs/speed/linear-bf16-h100.png")


def figures_table(results: dict, more_steps: dict) -> str:
    """The variants of a demo's results.json as a Markdown table, with how they were measured."""
    steps, more = results["steps"], more_steps["steps"]
    lines = [
        f"| variant | layer error | PSNR, {steps} steps | PSNR, {more} steps "
        "| SSIM | KID | retrieval | sparse layers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, other in zip(results["variants"], more_steps["variants"], strict=True):
        cells = [
            f"`{row['name']}`",
            _format(row["layer_error"], ".3f"),
            _format(row["psnr"], ".1f"),
            _format(other["psnr"], ".1f"),
            _format(row["ssim"], ".3f"),
            f"{row['kid']:.3f} ± {row['kid_stderr']:.3f}",
            _format(row["retrieval"], ".2f"),
            str(row["sparse_layers"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        f"{results['images']} pictures a variant, seed {results['seed']}, PSNR in dB, {results['model']} on "
        f"a {results['device']}, torch {results['torch']}; {steps} steps unless said "
        "([results.json](docs/demo/results.json), [results-24-steps.json](docs/demo/results-24-steps.json))."
    )
    return "\n".join(lines)


def speed_section(results: dict) -> str:
    """ "How fast" in Markdown: plot, table and how it was measured."""
    lines = [
        "## How fast",
        "",
        f"![Speed relative to cuBLAS, shape by shape]({SPEED_PLOT})",
        "",
        "| layer | M, K, N | cuBLAS | cuSPARSELt: compress + GEMM | ours: compress + GEMM "
        "| GEMM, TFLOP/s | GEMM, speed-up | whole layer | **speed-up** | at the paper's rank |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = [
            *_times_of(row, "cusparselt_compress_us", "cusparselt_gemm_us"),
            _times(_speedup(row, "ours_gemm_us")),
            _format(row["ours_us"], ".0f"),
            f"**{_times(_speedup(row, 'ours_us'))}**",
            f"{_times(_speedup(row, 'ours_paper_rank_us'))} (rank {row['paper_rank']})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    mean = results["geomean"]
    lines.append(
        f"| geometric mean | | | | | | {_times(mean['gemm_vs_cublas'])} | | "
        f"**{_times(mean['linear_vs_cublas'])}** | {_times(mean['linear_paper_rank_vs_cublas'])} |"
    )
    power, clock = _format(results["power_w"], ".0f"), _format(results["clock_mhz"], ".0f")
    lines += [
        "",
        "Microseconds, and speed-ups over cuBLAS bf16 (`F.linear` with bias). *GEMM* is the sparse product "
        f"alone; our *compress* includes the norm scale and T = X A at rank {results['rank']}; *whole layer* "
        "starts from a dense X and includes the low-rank branch and the bias. Our GEMM runs at "
        f"{_times(mean['gemm_vs_cusparselt'])} the speed of cuSPARSELt's best algorithm, whose X was masked "
        "beforehand. TFLOP/s count the operations of the dense product.",
        "",
        f"Medians over {results['rounds']} windows of {results['window_s']:g} s a variant, interleaved in "
        "one process, inputs and weights rotating past the cache, on one "
        f"{results['device']} (limit {_format(results['power_limit_w'], '.0f')} W; while measuring, "
        f"{power} W and {clock} MHz in the median), torch {results['torch']}, CUDA {results['cuda']}, "
        f"commit {str(results['commit'])[:10]} ([{SPEED_RESULTS.name}]({SPEED_RESULTS})).",
    ]
    return "\n".join(lines)


def fp8_section(results: dict) -> str:
    """Layers quantised to fp8, in Markdown."""
    lines = [
        "### In fp8",
        "",
        "| layer | M, K, N | cuBLAS bf16 | dense fp8: quantise + GEMM | ours: compress + GEMM "
        "| GEMM, TFLOP/s | GEMM, speed-up over dense fp8 | whole layer | **speed-up over bf16** "
        "| **over dense fp8** |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = [
            *_times_of(row, "cublas_fp8_quant_us", "cublas_fp8_us"),
            _times(_speedup(row, "ours_gemm_us", "cublas_fp8_us")),
            _format(row["ours_us"], ".0f"),
            f"**{_times(_speedup(row, 'ours_us'))}**",
            f"**{_times(_speedup(row, 'ours_us', 'fp8_linear_us'))}**",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    mean = results["geomean"]
    lines += [
        f"| geometric mean | | | | | | {_times(mean['gemm_vs_cublas_fp8'])} | | "
        f"**{_times(mean['linear_vs_cublas_bf16'])}** | **{_times(mean['linear_vs_fp8_linear'])}** |",
        "",
        "As above; *dense fp8* is PyTorch's row-wise scaled product after a compiled dynamic quantisation. "
        "Quantisation alone moves these layers' outputs by "
        f"{_range(results['rows'], 'quantization_err')}; the kernels differ from float64 on the same "
        f"quantised operands by {_range(results['rows'], 'rel_err')}. Commit {str(results['commit'])[:10]} "
        f"([{FP8_RESULTS.name}]({FP8_RESULTS})).",
    ]
    return "\n".join(lines)


def _times_of(row: dict, peer_first: str, peer_gemm: str) -> list[str]:
    """The cells that both tables begin with: the layer, cuBLAS bf16, a peer in two parts, ours, TFLOP/s."""
    gemm, flops = row["ours_gemm_us"], 2 * row["M"] * row["K"] * row["N"]
    return [
        row["shape"],
        f"{row['M']}, {row['K']}, {row['N']}",
        _format(row["cublas_us"], ".0f"),
        f"{_format(row[peer_first], '.0f')} + {_format(row[peer_gemm], '.0f')}",
        f"{_format(row['ours_compress_us'], '.0f')} + {_format(gemm, '.0f')}",
        _format(gemm and flops / gemm * 1e-6, ",.0f"),
    ]


def _range(rows: list[dict], name: str) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    ends = dict.fromkeys(f"{end:.1e}" for end in (min(values), max(values))) if values else ("–",)  # noqa: RUF001
    return " to ".join(ends)


def targets_section(root: Path = ROOT) -> str:
    """Every target of every results file, met or missed."""
    lines = [
        "| target | wanted | measured | |",
        "|---|---|---|---|",
    ]
    for path in TARGET_RESULTS:
        if not (root / path).exists():
            continue
        for target in json.loads((root / path).read_text())["targets"]:
            wanted = f"{target['bound']} {_figure(target['wanted'], target['unit'])}"
            verdict = "met" if target["met"] else "**missed**"
            lines.append(
                f"| {target['what']} | {wanted} | {_figure(target['measured'], target['unit'])} | {verdict} |"
            )
    return "\n".join(lines)


def _figure(value: float | None, unit: str) -> str:
    if unit == "x":
        return _times(value)
    return f"{_format(value, ',.0f')} {unit.replace('us', 'µs')}"


def draw_speed(results: dict, path: Path, source: str) -> None:
    """Bars: whole layers' speed relative to cuBLAS; marks: the GEMM alone. `source` goes into the file."""
    rows = results["rows"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    series = (
        ("cuSPARSELt", "compress + GEMM", "#9aa5b1", -0.2, _cusparselt_whole, "cusparselt_gemm_us"),
        ("rtlynx", "whole layer", "#2f7d4f", 0.2, lambda row: row["ours_us"], "ours_gemm_us"),
    )
    for name, extent, colour, offset, whole, gemm in series:
        places = [index + offset for index in range(len(rows))]
        times = [whole(row) for row in rows]
        bars = [row["cublas_us"] / us if us else 0.0 for row, us in zip(rows, times, strict=True)]
        marks = [_speedup(row, gemm) or float("nan") for row in rows]
        axes.bar(places, bars, 0.38, color=colour, label=f"{name}: {extent}")
        style = {"color": colour, "markeredgecolor": "black", "markersize": 5}
        axes.plot(places, marks, "D", label=f"{name}: GEMM alone", **style)
    axes.axhline(1, color="black", linewidth=1)
    axes.text(1.01, 1, "cuBLAS", va="center", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_xticks(range(len(rows)), [row["shape"] for row in rows], rotation=25, ha="right")
    axes.set_ylabel("speed relative to cuBLAS")
    axes.set_title(f"One linear layer, bf16, {results['device']}")
    axes.legend(ncols=2, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Source": source, "Software": None})


def speed_source(root: Path = ROOT) -> str:
    """Digest of the results; the plot carries it, so that a test sees when it is stale."""
    return hashlib.sha256((root / SPEED_RESULTS).read_bytes()).hexdigest()


def _cusparselt_whole(row: dict) -> float | None:
    parts = row["cusparselt_compress_us"], row["cusparselt_gemm_us"]
    return None if None in parts else sum(parts)


def _speedup(row: dict, name: str, over: str = "cublas_us") -> float | None:
    return row[over] / row[name] if row[over] and row[name] else None


def _times(ratio: float | None) -> str:
    return f"{_format(ratio, '.2f')}x"


def _format(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)  # noqa: RUF001


def updated(readme: str, root: Path = ROOT) -> str:
    """`readme` with the texts between the markers replaced."""
    results = json.loads((root / "docs/demo/results.json").read_text())
    more_steps = json.loads((root / "docs/demo/results-24-steps.json").read_text())
    readme = _between(readme, BEGIN, END, figures_table(results, more_steps))
    speed = ""
    if (root / SPEED_RESULTS).exists():
        speed = speed_section(json.loads((root / SPEED_RESULTS).read_text()))
        if (root / FP8_RESULTS).exists():
            speed += f"\n\n{fp8_section(json.loads((root / FP8_RESULTS).read_text()))}"
        speed += f"\n\n### What we set out to reach\n\n{targets_section(root)}"
    return _between(readme, SPEED_BEGIN, SPEED_END, speed)


def _between(readme: str, begin: str, end: str, text: str) -> str:
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(f"the README needs one line {begin} and one {end}")
    middle = f"{text}\n" if text else ""
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{middle}{end}", readme, flags=re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))
    if (ROOT / SPEED_RESULTS).exists():
        draw_speed(json.loads((ROOT / SPEED_RESULTS).read_text()), ROOT / SPEED_PLOT, speed_source())


if __name__ == "__main__":
    main()
