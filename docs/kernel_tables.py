"""Tables of single kernels: parts of a step beside their bytes, attention of several libraries."""

from pathlib import Path

from tables import Place, in_words, measured_on, number

# Parts of rtlynx/timing/step_parts.py, as readers know them.
PART_WORDS = {
    "prepare": "norm and modulation, GELU or SiLU gate: to e4m3",
    "attention_inputs": "queries, keys, values: norm, rotation, e4m3",
    "attention_output": "attention's output: to what the product reads",
    "gates": "gate and residual",
    "modulation": "modulation of one token",
    "copies": "copies",
    "other": "other",
}
# Variants of benchmarks/attention.py that compute attention from queries, keys and values in bfloat16.
ATTENTION_WORDS = {
    "flash": "PyTorch, FlashAttention-2",
    "cudnn": "PyTorch, cuDNN in bf16",
    "flash_3": "FlashAttention-3",
    "flash_4": "FlashAttention-4",
    "sage": "SageAttention",
    "fp8": "ours, cuDNN in e4m3",
}


def step_parts_section(results: dict, source: Path, place: Place) -> str:
    """What is no product and no attention in a step, in Markdown."""
    rows = results["parts"]
    lines = [
        "| part | launches | ms | MB that it must move | ms of these | time over that |",
        "|---|---|---|---|---|---|",
    ]
    sums = {key: sum(row[key] for row in rows) for key in ("launches", "ms", "bytes", "bytes_ms")}
    for row in (*rows, {"part": "all", **sums}):
        counted = row["bytes"] > 0
        over = row["ms"] / row["bytes_ms"] if counted and row["launches"] else None
        cells = [
            PART_WORDS.get(row["part"], row["part"]),
            str(row["launches"]),
            number(row["ms"] if row["launches"] else None, ".2f"),
            number(row["bytes"] / 1e6 if counted else None, ",.0f"),
            number(row["bytes_ms"] if counted else None, ".2f"),
            number(over, ".2f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    speed = results["bytes_per_second"] / 1e12
    lines += [
        "",
        f"{in_words(results['variant'])}: GPU milliseconds of a step by a profiler, of "
        f"{results['kernels_ms']:.1f} in all kernels, and bytes over {speed:g} TB/s. *Must move*: each "
        "tensor is read once and written once, attention gives e4m3, and norms, gates and activations are "
        "never stored. Kernels are told apart by their names. "
        f"{measured_on(results)} ({place.file(source)}).",
    ]
    return "\n".join(lines)


def attention_section(results: dict, source: Path, place: Place) -> str:
    """Attention of libraries from bfloat16 to bfloat16, in Markdown."""
    rows = results["rows"]
    heads = [f"{in_words(row['name'])}: {row['tokens']:,} x {row['heads']} x {row['width']}" for row in rows]
    lines = [f"| µs (relative error) | {' | '.join(heads)} |", f"|{'---|' * (1 + len(rows))}"]
    for name, words in ATTENTION_WORDS.items():
        cells = []
        for row in rows:
            error = row["rel_err"].get(name)
            cells.append(number(row.get(f"{name}_us"), ",.0f") + (f" ({error:.2g})" if error else ""))
        lines.append(f"| {words} | {' | '.join(cells)} |")
    lines += [
        "",
        "Random inputs; what a library does to queries, keys and values first is in its time. The error is "
        "against float64. A dash: not installed, or it refused. "
        f"{measured_on(results)}, cuDNN {results['cudnn']}, its Python package {results['cudnn_frontend']} "
        f"({place.file(source)}).",
    ]
    return "\n".join(lines)
