"""Compression and quantisation against a plain copy of as many bytes, fused chains against compiled ones.

`python benchmarks/compress.py` writes results/compress-<card>.json.
"""

import struct
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from prologues import MATRIX, PROLOGUES, Prologue, Tail
from script import FOLDER, options_parser
from torch import Tensor

import rtlynx.ops.prologues  # noqa: F401  (registers torch.ops.rtlynx)
from rtlynx.cuda import jit
from rtlynx.math.formats import BF16_SPARSE, FP8_SPARSE, TILE_ROWS, Format
from rtlynx.math.fp8 import quantize_tokens
from rtlynx.timing import results
from rtlynx.timing.card import Card
from rtlynx.timing.results import write
from rtlynx.timing.shapes import SHAPES, set_count
from rtlynx.timing.sustained import Call, Graphs, Sample, Timer, attempt, measure

M, RANK = 4096, 64
WIDTHS = sorted({shape.k for shape in SHAPES})
# Formats -> groupings that are measured.
GROUPINGS = {BF16_SPARSE: ("adjacent", "strided"), FP8_SPARSE: ("adjacent",)}
COPY_BLOCKS = (64, 128, 256, 512)  # threads
COPY_MODES = (0, 1, 2)  # copy.cu says which


def normal_on(generator: torch.Generator) -> Callable[..., Tensor]:
    return lambda *size: torch.randn(
        *size, device=generator.device, generator=generator, dtype=torch.bfloat16
    )


def copy_calls(inputs: list[Tensor], threads: int, mode: int, out: int) -> list[Call]:
    """copy.cu on every input, into outputs of its own, of `out` bytes for 16."""
    defines = (("THREADS", threads), ("MODE", mode), ("OUT", out))
    folder = Path(__file__).parent
    kernel = jit.load(
        "copy.cu", "copy_bytes", defines, threads=threads, shared_bytes=0, pdl=True, folder=folder
    )
    blocks = inputs[0].nbytes // (threads * 256)

    def run(buffers: bytes, to: Tensor) -> Tensor:
        kernel.launch((blocks, 1, 1), torch.cuda.current_stream().cuda_stream, buffers)
        return to

    outputs = [torch.empty(x.nbytes * out // 16, dtype=torch.uint8, device=x.device) for x in inputs]
    return [
        lambda buffers=struct.pack("QQ", x.data_ptr(), to.data_ptr()), to=to: run(buffers, to)
        for x, to in zip(inputs, outputs, strict=True)
    ]


def fastest_copy(inputs: list[Tensor], graphs: Graphs, sample: Sample, out: int) -> tuple[str, Timer]:
    """The best of copy.cu's variants for these inputs; `out` bytes are written for 16."""
    timers = {
        f"{threads} threads, mode {mode}": graphs.timer(copy_calls(inputs, threads, mode, out))
        for threads in COPY_BLOCKS
        for mode in COPY_MODES
        if inputs[0].nbytes % (threads * 256) == 0  # whole blocks
    }
    if not timers:
        raise ValueError(f"{inputs[0].nbytes} bytes are not whole blocks of any number of threads")
    taken = measure(timers, 0.2, 2, sample, {}, discard=0.05)
    name = min(taken, key=lambda name: taken[name].us)
    return name, timers[name]


def make_timers(calls: dict[str, list[Call]], graphs: Graphs, missing: dict[str, str]) -> dict[str, Timer]:
    """A timer of each variant that runs; the others' reasons go into `missing`."""
    made = {
        name: attempt(missing, name, lambda variant=variant: graphs.timer(variant))
        for name, variant in calls.items()
    }
    return {name: timer for name, timer in made.items() if timer is not None}


def compress_calls(
    inputs: list[Tensor], lowrank_as: list[Tensor], grouping: str, format: Format
) -> dict[str, list[Call]]:
    compress, how = torch.ops.rtlynx.compress, (grouping, [], True, format.name)
    return {
        f"compress_{grouping}": [lambda x=x: compress(x, None, *how) for x in inputs],
        f"compress_{grouping}_lowrank": [
            lambda x=x, lowrank_a=lowrank_a: compress(x, lowrank_a, *how)
            for x, lowrank_a in zip(inputs, lowrank_as, strict=True)
        ],
    }


def compressed_bytes(format: Format) -> int:
    """What 16 bytes, of 8 entries in bf16, become."""
    return 8 * format.tile_bytes // (TILE_ROWS * format.tile_k)


def compress_row(
    k: int, format: Format, card: Card, normal: Callable[..., Tensor], seconds: float, rounds: int
) -> dict:
    """Compression of (M, k) with and without T, and the copy."""
    count = set_count(2 * M * k, card.l2_bytes)
    inputs = [normal(M, k) for _ in range(count)]
    lowrank_as = [normal(RANK, k).mul_(k**-0.5) for _ in range(count)]
    graphs, timers, missing = Graphs(), {}, {}
    out = compressed_bytes(format)
    copy = attempt(missing, "copy", lambda: fastest_copy(inputs, graphs, card.sample, out))
    if copy is not None:
        timers["copy"] = copy[1]
    for grouping in GROUPINGS[format]:
        timers |= make_timers(compress_calls(inputs, lowrank_as, grouping, format), graphs, missing)
    measured = measure(timers, seconds, rounds, card.sample, missing)
    row: dict = {"format": format.name, "M": M, "K": k, "copy_variant": None if copy is None else copy[0]}
    row |= {f"{name}_us": round(taken.us, 3) for name, taken in measured.items()}
    if "copy" in measured:
        row["copy_gb_per_s"] = round(M * k * (2 + out / 8) / measured["copy"].us * 1e-3, 1)
    row["speed_vs_copy"] = {
        name: results.ratio(row, "copy_us", f"{name}_us") for name in measured if name != "copy"
    }
    return row | {
        "windows": {name: results.window_details(taken) for name, taken in measured.items()},
        "missing": missing,
    }


def prologue_row(
    prologue: Prologue, card: Card, normal: Callable[..., Tensor], seconds: float, rounds: int
) -> dict:
    """One fused prologue, with and without T, and the compiled chain."""
    name, m, k, make, chain, fused, _ = prologue
    sets = [make(m, k, normal) for _ in range(set_count(2 * m * k, card.l2_bytes))]
    compiled = torch.compile(chain, dynamic=False)
    plain: Tail = (None, "adjacent", [], True)
    with_lowrank: Tail = (normal(RANK, k).mul_(k**-0.5), "adjacent", [], True)
    calls: dict[str, list[Call]] = {
        "chain": [lambda given=given: compiled(*given) for given in sets],
        "producer": [lambda given=given: fused(*given, plain) for given in sets],
        "producer_lowrank": [lambda given=given: fused(*given, with_lowrank) for given in sets],
    }
    missing: dict[str, str] = {}
    timers = make_timers(calls, Graphs(), missing)
    measured = measure(timers, seconds, rounds, card.sample, missing)
    row: dict = {"name": name, "M": m, "K": k}
    row |= {f"{variant}_us": round(measured[variant].us, 3) for variant in measured}
    return row | {
        "ratio": results.ratio(row, "producer_us", "chain_us"),
        "ratio_lowrank": results.ratio(row, "producer_lowrank_us", "chain_us"),
        "windows": {variant: results.window_details(taken) for variant, taken in measured.items()},
        "missing": missing,
    }


def quantizer_row(
    prologue: Prologue, card: Card, normal: Callable[..., Tensor], seconds: float, rounds: int
) -> dict:
    """A chain quantised in one kernel, compiled with the quantisation, and the copy of as many bytes."""
    m, k, chain, quantized = prologue.m, prologue.k, prologue.chain, prologue.quantized
    count = set_count(2 * m * k, card.l2_bytes)
    sets = [prologue.inputs(m, k, normal) for _ in range(count)]
    read = sum(one.numel() for one in sets[0] if one.ndim == 3) // (m * k)  # beside modulations
    bytes_read = [torch.empty(m, read * k, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
    compiled = torch.compile(lambda *given: quantize_tokens(chain(*given)), dynamic=False)
    calls: dict[str, list[Call]] = {
        "chain": [lambda given=given: compiled(*given) for given in sets],
        "quantizer": [lambda given=given: quantized(*given) for given in sets],
    }
    graphs, missing = Graphs(), {}
    timers = make_timers(calls, graphs, missing)
    copy = attempt(missing, "copy", lambda: fastest_copy(bytes_read, graphs, card.sample, 8 // read))
    if copy is not None:
        timers["copy"] = copy[1]
    measured = measure(timers, seconds, rounds, card.sample, missing)
    row: dict = {"name": prologue.name, "M": m, "K": k, "copy_variant": None if copy is None else copy[0]}
    row |= {f"{variant}_us": round(measured[variant].us, 3) for variant in measured}
    if "quantizer" in measured:
        row["quantizer_gb_per_s"] = round(m * k * (2 * read + 1) / measured["quantizer"].us * 1e-3, 1)
    return row | {
        "ratio": results.ratio(row, "quantizer_us", "chain_us"),
        "speed_vs_copy": results.ratio(row, "copy_us", "quantizer_us"),
        "windows": {variant: results.window_details(taken) for variant, taken in measured.items()},
        "missing": missing,
    }


def main() -> None:
    options = options_parser(__doc__, seconds=1.0).parse_args()
    card = Card()
    generator = torch.Generator("cuda")
    document = card.describe(options.commit) | {"rank": RANK, "seed": generator.seed()}
    normal = normal_on(generator)
    rows = []
    for format, k in product(GROUPINGS, WIDTHS):
        row = compress_row(k, format, card, normal, options.seconds, options.rounds)
        torch.cuda.empty_cache()
        rows.append(row)
        print(f"{format.name}, K = {k}, copy {row.get('copy_us')} us, {row.get('copy_gb_per_s')} GB/s")
        for name, speed in row["speed_vs_copy"].items():
            relation = "" if speed is None else f", {speed:.1%} of the copy's speed"
            print(f"  {name:28}{row[f'{name}_us']:9.2f} us{relation}", flush=True)
    producers = []
    for prologue in PROLOGUES:
        row = prologue_row(prologue, card, normal, options.seconds, options.rounds)
        torch.cuda.empty_cache()
        producers.append(row)
        figures = ", ".join(f"{key} {row[key]}" for key in row if key.endswith("_us") or "ratio" in key)
        print(f"{row['name']:12} {figures}", flush=True)
    quantizers = []
    for prologue in (*(MATRIX._replace(k=k) for k in WIDTHS), *PROLOGUES):
        row = quantizer_row(prologue, card, normal, options.seconds, options.rounds)
        torch.cuda.empty_cache()
        quantizers.append(row)
        figures = ", ".join(
            f"{key} {row[key]}" for key in row if key.endswith(("_us", "_per_s", "copy", "ratio"))
        )
        print(f"{row['name']:12} K = {row['K']}, quantised: {figures}", flush=True)
    every = rows + producers + quantizers
    for row in every:
        for name, reason in row["missing"].items():
            print(f"  {row.get('name', row['K'])} {name}: {reason}")
    document |= results.card_state(every) | {"rows": rows, "producers": producers, "quantizers": quantizers}
    write(options.out or FOLDER / f"compress-{card.slug}.json", document)


if __name__ == "__main__":
    main()
