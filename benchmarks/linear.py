"""Whole linear layers against their peers: `python benchmarks/linear.py --dtype bf16` or `fp8`.

Peers are cuBLAS bf16, cuSPARSELt and, of fp8, PyTorch's row-wise scaled product with compiled quantisation.
Writes results/linear-<dtype>-<card>.json; with `--shapes` only where `--out` says so. Figures are of one
process, windows interleaved on a loaded card, operands rotating past the cache.
"""

import time
from collections.abc import Callable
from typing import Protocol

import results
import torch
from card import Card
from operands import RANK, Operands, our_calls, random_operands, relative_errors
from peers import TORCHAO, CuSparseLt, dense_fp8_calls, product_calls, selected
from shapes import Shape, chosen, set_count
from sustained import Call, Graphs, Sample, Timer, attempt, measure
from targets import linear_targets
from torch import Tensor
from torch.nn.functional import linear


class TimerFactory(Protocol):
    def timer(self, calls: list[Call]) -> Timer: ...


def measure_shape(
    shape: Shape,
    sets: list[Operands],
    graphs: TimerFactory,
    cusparselt: CuSparseLt | None,
    sample: Sample,
    seconds: float,
    rounds: int,
) -> dict:
    """One row of the results: every variant that runs, in interleaved windows."""
    missing: dict[str, str] = {}
    calls = our_calls(sets)
    calls["cublas"] = lambda: [lambda of=of: linear(of.x, of.weight, of.bias) for of in sets]
    if sets[0].quantized is not None:
        calls |= dense_fp8_calls(sets)
    makers: dict[str, Callable[[], Timer]] = {
        name: lambda make=make: graphs.timer(make()) for name, make in calls.items()
    }
    if cusparselt is None:
        missing |= dict.fromkeys(("cusparselt_gemm", "cusparselt_compress"), "see cusparselt.reason")
    else:
        makers |= cusparselt_makers(sets, graphs, cusparselt)
    variants = results.LINEAR_VARIANTS
    if sets[0].quantized is not None:
        variants += results.FP8_VARIANTS
    timers = {}
    for name in variants:
        timer = attempt(missing, name, makers[name]) if name in makers else None
        if timer is not None:
            timers[name] = timer
    measured = measure(timers, seconds, rounds, sample, missing)
    if "ours" in measured and "ours_paper_rank" not in makers:
        measured["ours_paper_rank"] = measured["ours"]  # the same rank
    errors = attempt(missing, "rel_err", lambda: relative_errors(sets[0]))
    row = results.linear_row(shape, variants, measured, errors, missing)
    chosen_by_peer = cusparselt and cusparselt.chosen
    return row | {"cusparselt_algorithm": chosen_by_peer and chosen_by_peer._asdict()}


def cusparselt_makers(
    sets: list[Operands], graphs: Graphs, cusparselt: CuSparseLt
) -> dict[str, Callable[[], Timer]]:
    def inputs() -> list[Tensor]:
        return [selected(of) for of in sets]

    def product() -> Timer:
        pairs = [(torch._cslt_compress(x), of.held) for x, of in zip(inputs(), sets, strict=True)]
        wanted = linear(selected(sets[0]).float(), sets[0].held.float())
        return cusparselt.timer(graphs, product_calls(pairs, cusparselt.best(graphs, pairs, wanted)))

    return {
        "cusparselt_gemm": product,
        "cusparselt_compress": lambda: cusparselt.timer(
            graphs, [lambda x=x: torch._cslt_compress(x) for x in inputs()]
        ),
    }


def table(rows: list[dict]) -> str:
    """What a reader at a terminal wants, one line a shape."""
    lines = [
        f"{'shape':16}{'cuBLAS':>9}{'cslt gemm':>10}{'compress':>9}{'gemm':>9}{'TFLOP/s':>8}{'+lowrank':>9}"
        f"{'compress':>9}{'plain':>8}{'layer':>9}{'gemm x':>8}{'layer x':>8}{'paper x':>8}{'error':>9}"
        f"{'fp8 gemm':>9}{'quantise':>9}"
    ]
    for row in rows:
        shape = Shape(row["shape"], row["M"], row["K"], row["N"])
        gemm = row["ours_gemm_us"]
        cells = [
            (row["cublas_us"], 9, ".1f"),
            (row["cusparselt_gemm_us"], 10, ".1f"),
            (row["cusparselt_compress_us"], 9, ".1f"),
            (gemm, 9, ".1f"),
            (None if gemm is None else shape.teraflops(gemm), 8, ".0f"),
            (row["ours_gemm_lowrank_us"], 9, ".1f"),
            (row["ours_compress_us"], 9, ".1f"),
            (row["ours_compress_plain_us"], 8, ".1f"),
            (row["ours_us"], 9, ".1f"),
            (results.ratio(row, "cublas_us", "ours_gemm_us"), 8, ".3f"),
            (results.ratio(row, "cublas_us", "ours_us"), 8, ".3f"),
            (results.ratio(row, "cublas_us", "ours_paper_rank_us"), 8, ".3f"),
            (row["rel_err"], 9, ".1e"),
            (row.get("cublas_fp8_us"), 9, ".1f"),
            (row.get("cublas_fp8_quant_us"), 9, ".1f"),
        ]
        text = "".join(
            f"{'-' if value is None else format(value, spec):>{width}}" for value, width, spec in cells
        )
        lines.append(f"{row['shape']:16}{text}")
    return "\n".join(lines)


def main() -> None:
    parser = results.options_parser(__doc__, seconds=1.0)
    parser.add_argument("--dtype", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--shapes", help="comma-separated names, default all twelve")
    options = parser.parse_args()
    shapes, started = chosen(options.shapes), time.perf_counter()

    card = Card()
    out = options.out or results.FOLDER / f"linear-{options.dtype}-{card.slug}.json"
    generator = torch.Generator("cuda")
    document = {
        **card.describe(options.commit),
        "dtype": options.dtype,
        "rank": RANK,
        "window_s": options.seconds,
        "rounds": options.rounds,
        "seed": generator.seed(),
        "cusparselt": {"version": torch.backends.cusparselt.version(), "method": None, "reason": None},
        "torchao": {"us": None, "reason": TORCHAO[options.dtype]},
    }
    missing: dict[str, str] = {}
    cusparselt = attempt(missing, "cusparselt", lambda: CuSparseLt(Graphs, generator, options.dtype))
    document["cusparselt"]["reason"] = missing.get("cusparselt")
    if cusparselt is not None:
        document["cusparselt"] |= {"method": cusparselt.method, "reason": cusparselt.reason}
    rows = []
    for shape in shapes:
        count = set_count(2 * shape.m * shape.k, card.l2_bytes)  # X alone, the least that a variant reads
        sets = [random_operands(shape, generator, options.dtype) for _ in range(count)]
        rows.append(
            measure_shape(shape, sets, Graphs(), cusparselt, card.sample, options.seconds, options.rounds)
        )
        del sets
        torch.cuda.empty_cache()
        print(table(rows[-1:]).splitlines()[1], f"  {time.perf_counter() - started:.0f} s", flush=True)
        for name, reason in rows[-1]["missing"].items():
            print(f"  {name}: {reason}", flush=True)
    document |= results.card_state(rows)
    document |= {"rows": rows, "geomean": results.geomeans(rows, options.dtype)}
    document["targets"] = linear_targets(document)
    print(table(rows))
    print("geomean", document["geomean"])
    if options.out or options.shapes is None:
        results.write(out, document)


if __name__ == "__main__":
    main()
