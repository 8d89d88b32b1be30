"""Whole linear layers against their peers.

Peers are cuBLAS bf16, cuSPARSELt and, of fp8, PyTorch's row-wise scaled product with compiled quantisation.
Figures are of one process, windows interleaved on a loaded card, operands rotating past the cache.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from rtlynx.timing import results
from rtlynx.timing.card import Card
from rtlynx.timing.operands import RANK, Operands, our_calls, random_operands, relative_errors
from rtlynx.timing.peers import TORCHAO, CuSparseLt, dense_fp8_calls, product_calls, selected
from rtlynx.timing.shapes import Shape, set_count
from rtlynx.timing.sustained import (
    Call,
    Graphs,
    Sample,
    Timer,
    TimerFactory,
    attempt,
    measure,
)


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
    calls["cublas"] = lambda: [partial(linear, of.x, of.weight, of.bias) for of in sets]
    if sets[0].quantized is not None:
        calls |= dense_fp8_calls(sets)
    makers: dict[str, Callable[[], Timer]] = {
        name: partial(_timer_of, graphs, make) for name, make in calls.items()
    }
    if cusparselt is None:
        missing |= dict.fromkeys(("cusparselt_gemm", "cusparselt_compress"), "see cusparselt.reason")
    else:
        makers |= cusparselt_makers(sets, graphs, cusparselt)
    variants: tuple[str, ...] = results.LINEAR_VARIANTS
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


def _timer_of(graphs: TimerFactory, make: Callable[[], list[Call]]) -> Timer:
    return graphs.timer(make())


def cusparselt_makers(
    sets: list[Operands], graphs: TimerFactory, cusparselt: CuSparseLt
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
            graphs, [partial(torch._cslt_compress, x) for x in inputs()]
        ),
    }


def table(rows: list[dict]) -> str:
    """What a reader at a terminal wants, one line a shape: peers, layers without a branch, those with one."""
    lines = [
        f"{'':16}{'':9}{'cuSPARSELt':>19}{'dense fp8':>18}{'2:4 weights':>26}{'2:4 activations':>34}"
        f"{f'rank {RANK}':>35}",
        f"{'shape':16}{'cuBLAS':>9}{'compress':>10}{'gemm':>9}{'quantise':>9}{'gemm':>9}{'quantise':>9}"
        f"{'gemm':>9}{'layer x':>8}{'compress':>9}{'gemm':>9}{'TFLOP/s':>8}{'layer x':>8}"
        f"{'compress':>9}{'gemm':>9}{'layer':>9}{'layer x':>8}{'paper x':>8}{'error':>9}",
    ]
    for row in rows:
        shape = Shape(row["shape"], row["M"], row["K"], row["N"])
        gemm = row["ours_gemm_us"]
        cells = [
            (row["cublas_us"], 9, ".1f"),
            (row["cusparselt_compress_us"], 10, ".1f"),
            (row["cusparselt_gemm_us"], 9, ".1f"),
            (row.get("cublas_fp8_quant_us"), 9, ".1f"),
            (row.get("cublas_fp8_us"), 9, ".1f"),
            (row.get("ours_quantize_us"), 9, ".1f"),
            (row.get("ours_weight_sparse_gemm_us"), 9, ".1f"),
            (results.plain_layer_speed(row, "2:4 weights"), 8, ".3f"),
            (row["ours_compress_plain_us"], 9, ".1f"),
            (gemm, 9, ".1f"),
            (None if gemm is None else shape.teraflops(gemm), 8, ".0f"),
            (results.plain_layer_speed(row, "2:4 activations"), 8, ".3f"),
            (row["ours_compress_us"], 9, ".1f"),
            (row["ours_gemm_lowrank_us"], 9, ".1f"),
            (row["ours_us"], 9, ".1f"),
            (results.ratio(row, "cublas_us", "ours_us"), 8, ".3f"),
            (results.ratio(row, "cublas_us", "ours_paper_rank_us"), 8, ".3f"),
            (row["rel_err"], 9, ".1e"),
        ]
        text = "".join(
            f"{'-' if value is None else format(value, spec):>{width}}" for value, width, spec in cells
        )
        lines.append(f"{row['shape']:16}{text}")
    return "\n".join(lines)


def run(
    dtype: str,
    shapes: Sequence[Shape],
    card: Card,
    *,
    seconds: float,
    rounds: int = 2,
    commit: str | None = None,
    report: Callable[[str], object] = print,
) -> dict:
    """Measure `shapes` on `card`: the document of a results file, without targets.

    Parameters
    ----------
    dtype : "bf16" | "fp8"
    seconds : length of a window.
    rounds : windows of each variant.
    commit : what the figures belong to, where it cannot be found out.
    report : takes a line whenever a shape is done, and one for each variant that did not run.
    """
    started, generator = time.perf_counter(), torch.Generator("cuda")
    document = {
        **card.describe(commit),
        "dtype": dtype,
        "rank": RANK,
        "window_s": seconds,
        "rounds": rounds,
        "seed": generator.seed(),
        "cusparselt": {"version": torch.backends.cusparselt.version(), "method": None, "reason": None},
        "torchao": {"us": None, "reason": TORCHAO[dtype]},
    }
    missing: dict[str, str] = {}
    cusparselt = attempt(missing, "cusparselt", lambda: CuSparseLt(Graphs, generator, dtype))
    document["cusparselt"]["reason"] = missing.get("cusparselt")
    if cusparselt is not None:
        document["cusparselt"] |= {"method": cusparselt.method, "reason": cusparselt.reason}
    rows = []
    for shape in shapes:
        count = set_count(2 * shape.m * shape.k, card.l2_bytes)  # X alone, the least that a variant reads
        sets = [random_operands(shape, generator, dtype) for _ in range(count)]
        rows.append(measure_shape(shape, sets, Graphs(), cusparselt, card.sample, seconds, rounds))
        del sets
        torch.cuda.empty_cache()
        report(f"{table(rows[-1:]).splitlines()[-1]}   {time.perf_counter() - started:.0f} s")
        for name, reason in rows[-1]["missing"].items():
            report(f"  {name}: {reason}")
    return document | results.card_state(rows) | {"rows": rows, "geomean": results.geomeans(rows, dtype)}
