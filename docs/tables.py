"""Results files as Markdown tables, for the pages of this folder."""

import json
import os
import textwrap
from pathlib import Path
from typing import NamedTuple

from rtlynx.timing.overview import dense_steps
from rtlynx.timing.results import (
    BLOCK_GRAPHS,
    REFERENCE,
    WAYS,
    geomean,
    picture_size,
    plain_layer_speed,
    step_speed_up,
)
from rtlynx.timing.step_variants import (
    EVERY_LAYER,
    EVERY_WEIGHT,
    FP8_ATTENTION,
    FP8_MODULATION,
    MIXED,
    RECOMMENDED,
)

DEMO = Path("docs/demo")
ACTIVATIONS = "2:4 activations"  # the way of `WAYS` that there is in bf16, too
STEP_COLUMNS = ("gpu_ms", "linear_ms", "attention_ms", "rest_ms", "wall_ms", "peak_gib")


class Place(NamedTuple):
    """The page that a text stands on: how it links to files of the repository."""

    page: Path

    @property
    def in_docs(self) -> bool:
        return self.page.parts[0] == "docs"

    def path(self, file: Path) -> str:
        return Path(os.path.relpath(file, self.page.parent)).as_posix()

    def file(self, file: Path) -> str:
        """A link, or the bare name where the site does not hold the file."""
        if self.in_docs and file.parts[0] != "docs":
            return f"`{file.as_posix()}`"
        return f"[{file.name}]({self.path(file)})"


# Names in results files, as readers know them; longer ones come first.
WORDS = {
    RECOMMENDED: "recommended",
    EVERY_LAYER: "every layer by 2:4 activations",
    EVERY_WEIGHT: "every layer by 2:4 weights",
    MIXED: "sparse fp8",
    "rtlynx bf16-2:4": "sparse bf16",
    "rtlynx dense fp8": "dense fp8",
    "fp8 compiled (torchao)": "dense fp8 of torchao",
    "bf16 compiled": "compiled bf16",
    "bf16 eager": "eager bf16",
    BLOCK_GRAPHS: ", CUDA graphs",
    FP8_ATTENTION: ", fp8 attention",
    FP8_MODULATION: ", fp8 modulation",
    "fp8-2:4": "sparse fp8",
    "bf16-2:4": "sparse bf16",
    "chroma": "Chroma",
    "flux1-dev": "FLUX.1-dev",
    "flux2-dev": "FLUX.2-dev",
    "flux2-klein": "FLUX.2-klein",
    "qwen-edit": "Qwen-Image-Edit",
    "qwen-image": "Qwen-Image",
    "sd3.5-large": "SD 3.5 large",
    "z-image": "Z-Image",
    "wan2.2-14b": "Wan 2.2 14B",
    "ltx-2": "LTX-2",
    "hunyuan-video-1.5": "HunyuanVideo 1.5",
}


def in_words(text: str) -> str:
    """`text` with the names of results files replaced."""
    for name, word in WORDS.items():
        text = text.replace(name, word)
    return text


def read(file: Path) -> dict:
    """A results file."""
    return json.loads(file.read_text())


def plot_of(source: Path) -> Path:
    """The plot of a results file of layers."""
    return Path("docs/speed") / f"{source.stem}.png"


def figures_table(results: dict, more_steps: dict, place: Place) -> str:
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
            number(row["layer_error"], ".3f"),
            number(row["psnr"], ".1f"),
            number(other["psnr"], ".1f"),
            number(row["ssim"], ".3f"),
            f"{row['kid']:.3f} ± {row['kid_stderr']:.3f}",
            number(row["retrieval"], ".2f"),
            str(row["sparse_layers"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        f"{results['images']} pictures a variant, seed {results['seed']}, PSNR in dB, {results['model']} on "
        f"a {results['device']}, torch {results['torch']}; {steps} steps unless said "
        f"({place.file(DEMO / 'results.json')}, {place.file(DEMO / 'results-24-steps.json')})."
    )
    return "\n".join(lines)


def speed_section(results: dict, source: Path, place: Place) -> str:
    """Layers in bf16, in Markdown: table and how it was measured. `source` is the results file."""
    rank = results["rank"]
    lines = [
        "| layer | M, K, N | cuBLAS | cuSPARSELt: compress + GEMM | ours: compress + GEMM | GEMM, TFLOP/s "
        "| GEMM, speed-up | **both, speed-up** "
        f"| rank {rank}: whole layer | speed-up | at the paper's rank |",
        f"|{'---|' * 11}",
    ]
    for row in results["rows"]:
        cells = [
            *_beginning(row, "cusparselt_compress_us", "cusparselt_gemm_us"),
            *_plain_cells(row, ACTIVATIONS),
            factor(speedup(row, "ours_gemm_us")),
            f"**{factor(plain_layer_speed(row, ACTIVATIONS, 'cublas_us'))}**",
            number(row["ours_us"], ".0f"),
            factor(speedup(row, "ours_us")),
            f"{factor(speedup(row, 'ours_paper_rank_us'))} (rank {row['paper_rank']})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    mean, plain = results["geomean"], _mean_speedup(results["rows"], ACTIVATIONS, "cublas_us")
    lines.append(
        f"| geometric mean | | | | | | {factor(mean['gemm_vs_cublas'])} | **{factor(plain)}** | | "
        f"{factor(mean['linear_vs_cublas'])} | {factor(mean['linear_paper_rank_vs_cublas'])} |"
    )
    power, clock = number(results["power_w"], ".0f"), number(results["clock_mhz"], ".0f")
    lines += [
        "",
        "Microseconds, and speed-ups over cuBLAS bf16 (`F.linear` with bias). *GEMM* is the sparse product "
        "alone; our *compress* includes the norm scale; *both* are a whole layer without a branch. "
        f"*Rank {rank}* has a low-rank branch besides: T = X A in the same pass as compression, its product "
        "in the same sums as the sparse one. Our GEMM runs at "
        f"{factor(mean['gemm_vs_cusparselt'])} the speed of cuSPARSELt's best algorithm, whose X was masked "
        "beforehand. TFLOP/s count the operations of the dense product.",
        "",
        f"Medians over {results['rounds']} windows of {results['window_s']:g} s a variant, interleaved in "
        "one process, inputs and weights rotating past the cache, on one "
        f"{results['device']} (limit {number(results['power_limit_w'], '.0f')} W; while measuring, "
        f"{power} W and {clock} MHz in the median), torch {results['torch']}, CUDA {results['cuda']}, "
        f"commit {str(results['commit'])[:10]} ({place.file(source)}).",
    ]
    return "\n".join(lines)


def fp8_section(results: dict, source: Path, place: Place) -> str:
    """Layers quantised to fp8, in Markdown: without a branch, as recommended, before those with one."""
    rows, rank = results["rows"], results["rank"]
    # Older files do not have 2:4 weights.
    ways = [way for way, columns in WAYS.items() if all(set(columns) <= row.keys() for row in rows)]
    head = ["layer", "M, K, N", "cuBLAS bf16", "dense fp8: quantise + GEMM"]
    for way in ways:
        first = "compress" if way == ACTIVATIONS else "quantise"
        head += [f"{way}: {first} + GEMM", "TFLOP/s", "**over dense fp8**", "over bf16"]
    head += [f"2:4 activations, rank {rank}: whole layer", "over dense fp8", "over bf16"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = _beginning(row, "cublas_fp8_quant_us", "cublas_fp8_us")
        for way in ways:
            cells += [*_plain_cells(row, way), f"**{factor(plain_layer_speed(row, way, 'fp8_linear_us'))}**"]
            cells.append(factor(plain_layer_speed(row, way, "cublas_us")))
        cells += [number(row["ours_us"], ".0f"), factor(speedup(row, "ours_us", "fp8_linear_us"))]
        lines.append(f"| {' | '.join(cells)} | {factor(speedup(row, 'ours_us'))} |")
    means = ["geometric mean", "", "", ""]
    for way in ways:
        means += ["", "", f"**{factor(_mean_speedup(rows, way, 'fp8_linear_us'))}**"]
        means.append(factor(_mean_speedup(rows, way, "cublas_us")))
    mean = results["geomean"]
    means += ["", factor(mean["linear_vs_fp8_linear"]), factor(mean["linear_vs_cublas_bf16"])]
    products = " and ".join(
        f"{factor(geomean(speedup(row, WAYS[way][1], 'cublas_fp8_us') for row in rows))} ({way})"
        for way in ways
    )
    lines += [
        f"| {' | '.join(means)} |",
        "",
        "Microseconds, measured as in bf16 below; *dense fp8* is PyTorch's row-wise scaled product after a "
        f"compiled dynamic quantisation. Our products alone run at {products} the speed of that product. "
        f"*Rank {rank}* has a low-rank branch besides. Quantisation alone moves these layers' outputs by "
        f"{_range(rows, 'quantization_err')}; the kernels differ from float64 on the same "
        f"quantised operands by {_range(rows, 'rel_err')}. {measured_on(results)} "
        f"({place.file(source)}).",
    ]
    return "\n".join(lines)


def _beginning(row: dict, *peer: str) -> list[str]:
    """The cells that both tables begin with: the layer, cuBLAS bf16, and a peer in two parts."""
    return [
        row["shape"],
        f"{row['M']}, {row['K']}, {row['N']}",
        number(row["cublas_us"], ".0f"),
        " + ".join(number(row[part], ".0f") for part in peer),
    ]


def _plain_cells(row: dict, way: str) -> list[str]:
    """A layer without a branch: its parts, and TFLOP/s of its product."""
    times = [row[column] for column in WAYS[way]]
    flops = 2 * row["M"] * row["K"] * row["N"]
    return [
        " + ".join(number(one, ".0f") for one in times),
        number(times[1] and flops / times[1] * 1e-6, ",.0f"),
    ]


def _mean_speedup(rows: list[dict], way: str, over: str) -> float | None:
    return geomean(plain_layer_speed(row, way, over) for row in rows)


def _range(rows: list[dict], name: str) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    ends = dict.fromkeys(f"{end:.1e}" for end in (min(values), max(values))) if values else ("–",)  # noqa: RUF001
    return " to ".join(ends)


def compress_section(results: dict, source: Path, place: Place) -> str:
    """Compression beside a plain copy, and what is fused with it or with quantisation, in Markdown."""
    rank = results["rank"]
    lines = [
        f"| format | M, K | plain copy | adjacent | adjacent, rank {rank} | strided | strided, rank {rank} |",
        f"|{'---|' * 7}",
    ]
    names = [f"compress_{grouping}{t}" for grouping in ("adjacent", "strided") for t in ("", "_lowrank")]
    for row in results["rows"]:
        times = (number(row.get(f"{name}_us"), ".1f") for name in ("copy", *names))
        precision = row.get("format", "bf16-sparse").removesuffix("-sparse")  # (older files are of bf16)
        lines.append(f"| {precision} | {row['M']}, {row['K']} | {' | '.join(times)} |")
    lines += [
        "",
        "Microseconds. The copy moves as many bytes as compression reads and writes. A rank: T = X A is "
        "computed in the same pass.",
        "",
        f"| chain | M, K | compiled chain | fused with compression | at rank {rank} |",
        "|---|---|---|---|---|",
    ]
    for row in results["producers"]:
        times = (number(row.get(f"{name}_us"), ".1f") for name in ("chain", "producer", "producer_lowrank"))
        lines.append(f"| {row['name']} | {row['M']}, {row['K']} | {' | '.join(times)} |")
    if quantizers := results.get("quantizers"):
        lines += ["", *_quantizer_rows(quantizers)]
    lines += ["", f"Microseconds. {measured_on(results)} ({place.file(source)})."]
    return "\n".join(lines)


def _quantizer_rows(rows: list[dict]) -> list[str]:
    """Chains whose whole result is quantised."""
    lines = [
        "| chain | M, K | plain copy | compiled chain and quantisation | both in one kernel |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        times = (number(row.get(f"{name}_us"), ".1f") for name in ("copy", "chain", "quantizer"))
        lines.append(f"| {row['name']} | {row['M']}, {row['K']} | {' | '.join(times)} |")
    return lines


def host_section(results: dict, source: Path, place: Place) -> str:
    """Host time of a call, in Markdown."""
    lines = ["| call | median, µs | 9 of 10 below, µs |", "|---|---|---|"]
    for row in results["rows"]:
        lines.append(f"| `{row['call']}` | {row['median_us']:.0f} | {row['p90_us']:.0f} |")
    lines += ["", f"Eager calls without gradients. {measured_on(results)} ({place.file(source)})."]
    return "\n".join(lines)


def steps_section(results: dict, source: Path, place: Place) -> str:
    """One denoising step of a model, end to end, in Markdown."""
    variants = results["variants"]
    lines = [
        "| variant | GPU, ms | linear layers | attention | rest | wall, ms | peak, GiB "
        f"| speed over {in_words(REFERENCE)} | the same, wall |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in variants:
        told = dense_steps(variant)
        cells = [in_words(variant["name"]) + (f": {told}, mean" if told else "")]
        cells += [number(variant.get(key), ".1f") for key in STEP_COLUMNS]
        cells += [
            factor(step_speed_up(variants, variant["name"], time=time)) for time in ("gpu_ms", "wall_ms")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [
        f"- {in_words(one['name'])}: not measured: {one['reason']}" for one in variants if one["reason"]
    ]
    lines += [""] if lines[-1] else []
    also = "".join(f", {in_words(one['name'])} at {one['commit']}" for one in variants if "commit" in one)
    lines.append(
        f"{in_words(results['model'])}, {picture_size(results)}, batch {results['batch']}, "
        f"{results['text_tokens']} text tokens, attention: {results['attention']}; ours: {results['ours']}. "
        f"{measured_on(results)}{also} ({place.file(source)})."
    )
    return "\n".join(lines)


def sizes_section(results: dict, source: Path, place: Place) -> str:
    """Speed-ups of a step by size of its input, in Markdown."""
    known = {one["name"] for row in results["rows"] for one in row["variants"]}
    ours = [name for name in ("rtlynx bf16-2:4", MIXED, RECOMMENDED) if name in known]
    named = in_words(f"{REFERENCE}, ms | {' | '.join(ours)}")
    lines = [
        f"| picture | batch | text tokens | {named} | wall, ms |",
        f"|{'---|' * (5 + len(ours))}",
    ]
    for row in results["rows"]:
        times = {one["name"]: one["gpu_ms"] for one in row["variants"]}
        walls = {one["name"]: one["wall_ms"] for one in row["variants"]}
        cells = [f"{row['resolution']}²", str(row["batch"]), str(row["text_tokens"])]
        cells += [number(times.get(REFERENCE), ".1f")]
        cells += [factor(step_speed_up(row["variants"], name)) for name in ours]
        cells += [" / ".join(number(walls.get(name), ".0f") for name in (REFERENCE, *ours))]
        lines.append(f"| {' | '.join(cells)} |")
    # Rows that another commit measured.
    also = "".join(f", batch {row['batch']} at {row['commit']}" for row in results["rows"] if "commit" in row)
    lines += [
        "",
        "GPU time of a step, speed-ups over it, and the time of a step without a CUDA graph: "
        f"{in_words(' / '.join((REFERENCE, *ours)))}. {measured_on(results)}{also} ({place.file(source)}).",
    ]
    return "\n".join(lines)


def calibration_section(results: dict, source: Path, place: Place) -> str:
    """What calibrating a full-size model takes, a block of each kind, in Markdown."""
    lines = [
        "| block | layers | seconds to solve it | seconds a recorded call | peak, GiB |",
        "|---|---|---|---|---|",
    ]
    for kind, block in results["blocks"].items():
        seconds = number(block["seconds_to_solve"], ".1f"), number(block["seconds_a_call"], ".2f")
        cells = [kind, str(block["runs"][0]["layers"]), *seconds, number(block["peak_gib"], ".1f")]
        lines.append(f"| {' | '.join(cells)} |")
    same = ""
    if results.get("cards", 1) > 1:
        found = all(run["same"] for block in results["blocks"].values() for run in block["runs"])
        same = f"The cards share the calls and end with {'the same' if found else 'different'} bits. "
    lines += [
        "",
        f"{results['model']} with random weights, {results['image_tokens']:,} + {results['text_tokens']} "
        "tokens a call, refit and low-rank branch in every layer, solved in float32. "
        f"{same}{measured_on(results)} ({place.file(source)}).",
    ]
    return "\n".join(lines)


def stages_section(results: dict, source: Path, place: Place) -> str:
    """What calibrating or distilling a whole full-size model takes, stage by stage, in Markdown."""
    lines = ["| stage | calls | seconds | longest call, s | peak, GiB |", "|---|---|---|---|---|"]
    for stage, row in results["stages"].items():
        seconds = number(row["seconds"], ".1f"), number(row["longest_seconds"], ".2f")
        lines.append(
            f"| {stage} | {row['calls']} | {' | '.join(seconds)} | {number(row['peak_gib'], '.1f')} |"
        )
    runs = results["run_seconds"]
    of = "one run" if len(runs) == 1 else f"{len(runs)} runs, each going on where the one before was cut off"
    lines += [
        "",
        f"{results['model']} with random weights, {results['image_tokens']:,} + {results['text_tokens']} "
        f"tokens a call, {results['prompts']} prompts, {results['steps_per_prompt']} steps recorded of each. "
        f"{sum(runs):.0f} s in {of}{'' if results['finished'] else '; not finished'}. "
        f"{measured_on(results)} ({place.file(source)}).",
    ]
    if "distill_rank" in results:
        lines[-1] += (
            f" A training step: a correction of rank {results['distill_rank']} to each weight, "
            f"{results['distill_batch']} states, one at a time, activations computed again for the gradients."
        )
    return "\n".join(lines)


def card_of(results: dict) -> str:
    """Card or cards, and versions."""
    cards = cards_of(results) if results.get("cards", 1) > 1 else f"One {results['device']}"
    limit = number(results["power_limit_w"], ".0f")
    return f"{cards} (limit {limit} W), torch {results['torch']}, CUDA {results['cuda']}"


def cards_of(results: dict) -> str:
    """The card, with how many where there were several."""
    count = results.get("cards", 1)
    return results["device"] if count == 1 else f"{count} {results['device']}"


def measured_on(results: dict) -> str:
    """Card, versions, commit."""
    return f"{card_of(results)}, commit {str(results['commit'])[:10]}"


def folded(title: str, text: str) -> str:
    """A part of the site that opens on a click."""
    return f'??? note "{title}"\n\n{textwrap.indent(text, "    ")}'


def speedup(row: dict, name: str, over: str = "cublas_us") -> float | None:
    return row[over] / row[name] if row[over] and row[name] else None


def factor(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}x"  # noqa: RUF001


def number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)  # noqa: RUF001
