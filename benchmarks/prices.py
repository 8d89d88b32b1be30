"""What a budget counts with: `python benchmarks/prices.py` writes rtlynx/calibration/prices.json.

Times products and preparations (selection, quantisation, packing) of all formats over a grid of sizes, about
a minute on a Hopper card, writes them to results/prices-<card>.json, and fits to them the laws that
rtlynx/calibration/prices.py reads. With `--from-results` it fits the laws to files of benchmarks/results that
are there and measures nothing: prices-<card>.json, or what linear.py, compress.py and threshold.py wrote.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from script import FOLDER, options_parser

from rtlynx.calibration.prices import FILE, PreparationLaw, ProductLaw
from rtlynx.timing import results
from rtlynx.timing.card import Card
from rtlynx.timing.operands import RANK, our_calls, random_operands
from rtlynx.timing.peers import dense_fp8_calls
from rtlynx.timing.shapes import Shape, set_count
from rtlynx.timing.sustained import Call, Graphs, attempt, measure

TOKENS, INPUTS, OUTPUTS = (256, 1024, 4608), (1536, 3072, 12288), (3072, 12288)
DISCARD_S = 0.1  # of a window: the one before has loaded the card
# Left out of the fit, which they test.
HELD_OUT = ("paper-a", "paper-b", "paper-c")
FEW_TOKENS = 512  # and below: without such a row, what a launch takes is not known
LEAST_OUTPUTS = tuple(step * 0.25e6 for step in range(21))


class Row(NamedTuple):
    """One measured time; `n` is None for a preparation, `held_out` says that no law is fitted to it."""

    format: str
    m: int
    k: int
    n: int | None
    rank: int
    us: float
    held_out: bool = False


def rows_of(name: str) -> list[Row]:
    """The rows of a file of benchmarks/results."""
    document = json.loads((FOLDER / name).read_text())
    if name.startswith("prices-"):
        return [Row(**row) for row in document["rows"]]
    if name.startswith("linear-"):
        return _linear_rows(document)
    if name.startswith("compress-"):
        # These chains read one tensor of the width that they write, as a plain quantisation does.
        plain = [row for row in document["quantizers"] if row["name"] in ("matrix", "gelu", "concat-gelu")]
        return [Row("fp8-dense", row["M"], row["K"], None, 0, row["quantizer_us"]) for row in plain]
    if name.startswith("threshold-"):
        size = document["K"], document["N"]
        return [Row("dense", row["tokens"], *size, 0, row["us"]["dense"]) for row in document["rows"]]
    raise ValueError(f"{name} is none of prices-, linear-, compress- and threshold-*.json")


def _linear_rows(document: dict) -> list[Row]:
    rows, rank = [], document["rank"]
    for row in document["rows"]:
        (m, k, n), out = (row[axis] for axis in "MKN"), row["shape"] in HELD_OUT
        sparse = f"{document['dtype']}-sparse"
        rows += [
            Row(sparse, m, k, n, 0, row["ours_gemm_us"], out),
            Row(sparse, m, k, n, rank, row["ours_gemm_lowrank_us"], out),
            Row(sparse, m, k, None, 0, row["ours_compress_plain_us"], out),
            Row(sparse, m, k, None, rank, row["ours_compress_us"], out),
        ]
        if document["dtype"] == "bf16":
            rows.append(Row("dense", m, k, n, 0, row["cublas_us"], out))
        else:
            rows.append(Row("fp8-dense", m, k, n, 0, row["cublas_fp8_us"], out))
    return rows


def measured_rows(card: Card, generator: torch.Generator, seconds: float, rounds: int) -> list[Row]:
    """Every part over the grid; a part that does not run is left out and named on stderr."""
    rows: list[Row] = []
    for m in TOKENS:
        for k in INPUTS:
            for n in OUTPUTS:
                shape = Shape("", m, k, n)
                rows += _measured(shape, card, generator, seconds, rounds, preparations=n == OUTPUTS[0])
                torch.cuda.empty_cache()
                print(f"{m} tokens, {k} -> {n}: {len(rows)} times", flush=True)
    return rows


def _measured(
    shape: Shape,
    card: Card,
    generator: torch.Generator,
    seconds: float,
    rounds: int,
    *,
    preparations: bool,
) -> list[Row]:
    count = set_count(2 * shape.m * shape.k, card.l2_bytes)
    graphs, timers, missing, of = Graphs(), {}, {}, {}
    for dtype in ("bf16", "fp8"):
        sets = [random_operands(shape, generator, dtype) for _ in range(count)]
        calls, sparse = our_calls(sets), f"{dtype}-sparse"
        parts = [
            (sparse, shape.n, 0, calls["ours_gemm"]),
            (sparse, shape.n, RANK, calls["ours_gemm_lowrank"]),
        ]
        if preparations:
            parts.append((sparse, None, 0, calls["ours_compress_plain"]))
            parts.append((sparse, None, RANK, calls["ours_compress"]))
        if dtype == "bf16":
            parts.append(("dense", shape.n, 0, partial(_dense, sets)))
        else:
            parts.append(("fp8-dense", shape.n, 0, dense_fp8_calls(sets)["cublas_fp8"]))
            parts.append(("fp8-weight-sparse", shape.n, 0, calls["ours_weight_sparse_gemm"]))
            if preparations:
                parts.append(("fp8-dense", None, 0, calls["ours_quantize"]))
        for format, n, rank, make in parts:
            name = f"{format} {shape.m} {shape.k} {n} rank {rank}"
            timer = attempt(missing, name, lambda make=make: graphs.timer(make(), replay_ms=10.0))
            if timer is not None:
                timers[name], of[name] = timer, (format, shape.m, shape.k, n, rank)
    taken = measure(timers, seconds, rounds, card.sample, missing, discard=DISCARD_S)
    for name, reason in missing.items():
        print(f"  {name}: {reason}", file=sys.stderr)
    return [Row(*of[name], round(measurement.us, 3)) for name, measurement in taken.items()]


def _dense(sets: Sequence) -> list[Call]:
    return [partial(torch.nn.functional.linear, of.x, of.weight, of.bias) for of in sets]


def nonnegative_fit(columns: Sequence[Sequence[float]], wanted: np.ndarray, us: np.ndarray) -> list[float]:
    """Coefficients, none below 0, whose error in `wanted` is least squared as a share of `us`."""
    matrix = np.array(columns, dtype=float) / us[:, None]
    kept, found = list(range(matrix.shape[1])), np.zeros(matrix.shape[1])
    while kept:
        solved = np.linalg.lstsq(matrix[:, kept], wanted / us, rcond=None)[0]
        if (solved >= 0).all():
            found[kept] = solved
            break
        kept.pop(int(solved.argmin()))
    return [float(value) for value in found]


def product_law(rows: Sequence[Row], like: ProductLaw | None) -> ProductLaw:
    """The law of one format's products; `like` has what only products of few tokens tell."""
    us = np.array([row.us for row in rows])
    found: list[tuple[float, ProductLaw]] = []
    for least in LEAST_OUTPUTS if like is None else (like.least_outputs,):
        outputs = [max(row.m * row.n, least) for row in rows]
        columns = [
            (out * row.k * 1e-9, out * 1e-6, row.m * row.n * row.rank * 1e-9, 1.0)
            for out, row in zip(outputs, rows, strict=True)
        ]
        if like is None:
            work, output, lowrank, launch = nonnegative_fit(columns, us, us)
        else:
            launch = like.launch_us
            work, output, lowrank = nonnegative_fit([c[:3] for c in columns], us - launch, us)
        law = ProductLaw(launch, work, output, lowrank, least)
        found.append((sum(error**2 for error in errors(law, rows)), law))
    return min(found, key=lambda pair: pair[0])[1]


def preparation_law(rows: Sequence[Row], launch: float | None) -> PreparationLaw:
    """The law of one format's preparations, with a launch that is known or fitted."""
    us = np.array([row.us for row in rows])
    entries = [row.m * row.k * 1e-6 for row in rows]
    columns = [
        (size, size * row.k * 1e-3, size * row.rank * 1e-3, 1.0)
        for size, row in zip(entries, rows, strict=True)
    ]
    if launch is not None:
        return PreparationLaw(launch, *nonnegative_fit([c[:3] for c in columns], us - launch, us))
    *each, launch = nonnegative_fit(columns, us, us)
    return PreparationLaw(launch, *each)


def errors(law: ProductLaw | PreparationLaw, rows: Iterable[Row]) -> list[float]:
    """What the law says over what was measured, less 1."""
    return [us_of(law, row) / row.us - 1 for row in rows]


def us_of(law: ProductLaw | PreparationLaw, row: Row) -> float:
    if isinstance(law, ProductLaw):
        return law.us(row.m, row.k, row.n, row.rank)
    return law.us(row.m, row.k, row.rank)


def document(sources: Sequence[str]) -> dict:
    """The prices file that `sources`, files of benchmarks/results, give.

    The dense product comes first: a format that was not measured at few tokens takes its launch from there.
    """
    heads = {name: json.loads((FOLDER / name).read_text()) for name in sources}
    devices = {head["device"] for head in heads.values()}
    if len(devices) > 1:
        raise ValueError(f"prices are of one card, and these are of {', '.join(sorted(devices))}")
    rows = [row for name in sources for row in rows_of(name)]
    laws: dict[str, dict] = {"products": {}, "preparations": {}}
    worst: dict[str, dict] = {"products": {}, "preparations": {}}
    for format in ("dense", "bf16-sparse", "fp8-dense", "fp8-sparse", "fp8-weight-sparse"):
        for kind in laws:
            of = [row for row in rows if row.format == format and (row.n is None) == (kind == "preparations")]
            fitted = [row for row in of if not row.held_out]
            if format == "dense" and kind == "preparations":
                continue
            if format == "fp8-weight-sparse" and not fitted:
                continue  # its inputs are fp8-dense's; older files do not have its products
            if not fitted:
                raise ValueError(f"no time of {format} {kind} in {', '.join(sources)}")
            like = None if any(row.m <= FEW_TOKENS for row in fitted) else laws["products"]["dense"]
            if kind == "preparations":
                law = preparation_law(fitted, like and like.launch_us)
            else:
                law = product_law(fitted, like)
            laws[kind][format] = law
            held_out = [row for row in of if row.held_out]
            worst[kind][format] = {
                "fitted": _largest(law, fitted),
                "held_out": _largest(law, held_out) if held_out else None,
            }
    return {
        "device": devices.pop(),
        "made_by": "benchmarks/prices.py",
        "sources": {name: head["commit"] for name, head in heads.items()},
        "largest_relative_error": worst,
        **{
            kind: {format: _rounded(law) for format, law in by_format.items()}
            for kind, by_format in laws.items()
        },
    }


def _largest(law: ProductLaw | PreparationLaw, rows: Sequence[Row]) -> float:
    return round(max(abs(error) for error in errors(law, rows)), 3)


def _rounded(law: ProductLaw | PreparationLaw) -> dict[str, float]:
    return {field: float(f"{value:.4g}") for field, value in asdict(law).items()}


def main() -> None:
    parser = options_parser(__doc__, seconds=0.25)
    parser.set_defaults(rounds=1)
    parser.add_argument("--from-results", nargs="+", metavar="FILE", help="of benchmarks/results; no card")
    options = parser.parse_args()
    sources = options.from_results
    if sources is None:
        card = Card()
        rows = measured_rows(card, torch.Generator("cuda"), options.seconds, options.rounds)
        sources = [f"prices-{card.slug}.json"]
        measured = card.describe(options.commit) | {"window_s": options.seconds, "rounds": options.rounds}
        results.write(FOLDER / sources[0], measured | {"rows": [row._asdict() for row in rows]})
    results.write(options.out or FILE, document(sources))


if __name__ == "__main__":
    main()
