"""Whole linear layers against cuBLAS and cuSPARSELt: `python benchmarks/linear.py --dtype bf16`.

Writes results/linear-bf16-<card>.json; with `--shapes` only where `--out` says so. Figures are of one
process, windows interleaved on a loaded card, operands rotating past the cache.
"""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import results
import torch
from card import Card
from peers import TORCHAO, CuSparseLt, masked, product_calls
from shapes import Shape, chosen, paper_rank, set_count
from sustained import Call, Graphs, Sample, Timer, attempt, measure
from targets import linear_targets
from torch import Tensor
from torch.nn.functional import linear

import rtlynx.kernels.ops  # noqa: F401  (registers torch.ops.rtlynx)
from rtlynx.pattern import nm_mask

RANK = 64


class Operands(NamedTuple):
    """One layer: x (M, K), weight (N, K), bias (N,), and low-rank factors of the two ranks."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor
    paper_down: Tensor
    paper_up: Tensor


class TimerFactory(Protocol):
    def timer(self, calls: list[Call]) -> Timer: ...


def random_operands(shape: Shape, generator: torch.Generator) -> Operands:
    """Fresh operands whose sparse product, low-rank term and bias are of one order."""

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*size, device=generator.device, generator=generator, dtype=torch.bfloat16)
        return drawn.mul_(scale)

    rank, (_, m, k, n) = paper_rank(shape.k), shape
    return Operands(
        normal(m, k),
        normal(n, k, scale=k**-0.5),
        normal(n),
        normal(RANK, k, scale=k**-0.5),
        normal(n, RANK, scale=RANK**-0.5),
        normal(rank, k, scale=k**-0.5),
        normal(n, rank, scale=rank**-0.5),
    )


def layer(of: Operands, down: Tensor, up: Tensor) -> Tensor:
    return torch.ops.rtlynx.linear(of.x, of.weight, of.bias, down, up, "adjacent", [], True)


def compress(of: Operands, down: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.rtlynx.compress(of.x, down, "adjacent", [], True)


def our_calls(sets: list[Operands]) -> dict[str, Callable[[], list[Call]]]:
    """The calls of each of our variants, made when asked for: compression comes before the product alone."""

    def products() -> list[Call]:
        inputs = [compress(of, None)[0] for of in sets]
        return [
            lambda of=of, blocks=blocks: torch.ops.rtlynx.gemm(
                blocks, None, None, of.weight, None, None, of.x.shape[0], []
            )
            for of, blocks in zip(sets, inputs, strict=True)
        ]

    def products_with_lowrank() -> list[Call]:
        inputs = [compress(of, of.down) for of in sets]
        return [
            lambda of=of, given=given: torch.ops.rtlynx.gemm(
                *given, of.weight, of.up, of.bias, of.x.shape[0], []
            )
            for of, given in zip(sets, inputs, strict=True)
        ]

    calls = {
        "ours": lambda: [lambda of=of: layer(of, of.down, of.up) for of in sets],
        "ours_gemm": products,
        "ours_gemm_lowrank": products_with_lowrank,
        "ours_compress": lambda: [lambda of=of: compress(of, of.down) for of in sets],
        "ours_compress_plain": lambda: [lambda of=of: compress(of, None) for of in sets],
    }
    if sets[0].paper_down.shape != sets[0].down.shape:
        calls["ours_paper_rank"] = lambda: [
            lambda of=of: layer(of, of.paper_down, of.paper_up) for of in sets
        ]
    return calls


def relative_error(of: Operands, rows: int = 1024) -> float:
    """Of our whole layer against float64, on evenly spaced rows."""
    picked = torch.linspace(0, of.x.shape[0] - 1, min(rows, of.x.shape[0]), device=of.x.device).long()
    x = of.x[picked]
    kept = x.double() * nm_mask(x)
    scale = (x.double().square().sum(-1, keepdim=True) / kept.square().sum(-1, keepdim=True)).sqrt()
    wanted = scale * (kept @ of.weight.double().T) + of.bias.double()
    wanted += x.double() @ of.down.double().T @ of.up.double().T
    got = layer(of, of.down, of.up)[picked].double()
    return float((got - wanted).norm() / wanted.norm())


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
    makers: dict[str, Callable[[], Timer]] = {
        name: lambda calls=calls: graphs.timer(calls()) for name, calls in our_calls(sets).items()
    }
    makers["cublas"] = lambda: graphs.timer([lambda of=of: linear(of.x, of.weight, of.bias) for of in sets])
    if cusparselt is None:
        missing |= dict.fromkeys(("cusparselt_gemm", "cusparselt_compress"), "see cusparselt.reason")
    else:
        selected = [masked(of.x) for of in sets]
        makers |= cusparselt_makers(sets, selected, graphs, cusparselt)
    timers = {}
    for name in results.LINEAR_VARIANTS:
        timer = attempt(missing, name, makers[name]) if name in makers else None
        if timer is not None:
            timers[name] = timer
    measured = measure(timers, seconds, rounds, sample, missing)
    if "ours" in measured and "ours_paper_rank" not in makers:
        measured["ours_paper_rank"] = measured["ours"]  # the same rank
    rel_err = attempt(missing, "rel_err", lambda: relative_error(sets[0]))
    row = results.linear_row(shape, measured, rel_err, missing)
    chosen_by_peer = cusparselt and cusparselt.chosen
    return row | {"cusparselt_algorithm": chosen_by_peer and chosen_by_peer._asdict()}


def cusparselt_makers(
    sets: list[Operands], selected: list[Tensor], graphs: Graphs, cusparselt: CuSparseLt
) -> dict[str, Callable[[], Timer]]:
    def product() -> Timer:
        pairs = [(torch._cslt_compress(x), of.weight) for x, of in zip(selected, sets, strict=True)]
        wanted = linear(selected[0].float(), sets[0].weight.float())
        return cusparselt.timer(graphs, product_calls(pairs, cusparselt.best(graphs, pairs, wanted)))

    return {
        "cusparselt_gemm": product,
        "cusparselt_compress": lambda: cusparselt.timer(
            graphs, [lambda x=x: torch._cslt_compress(x) for x in selected]
        ),
    }


def table(rows: list[dict]) -> str:
    """What a reader at a terminal wants, one line a shape."""
    lines = [
        f"{'shape':16}{'cuBLAS':>9}{'cslt gemm':>10}{'compress':>9}{'gemm':>9}{'TFLOP/s':>8}{'+lowrank':>9}"
        f"{'compress':>9}{'plain':>8}{'layer':>9}{'gemm x':>8}{'layer x':>8}{'paper x':>8}{'error':>9}"
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
        ]
        text = "".join(
            f"{'-' if value is None else format(value, spec):>{width}}" for value, width, spec in cells
        )
        lines.append(f"{row['shape']:16}{text}")
    return "\n".join(lines)


def main() -> None:
    parser = results.options_parser(__doc__, seconds=1.0)
    parser.add_argument("--dtype", choices=["bf16"], default="bf16")
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
        "torchao": {"us": None, "reason": TORCHAO},
    }
    missing: dict[str, str] = {}
    cusparselt = attempt(missing, "cusparselt", lambda: CuSparseLt(Graphs, generator))
    document["cusparselt"]["reason"] = missing.get("cusparselt")
    if cusparselt is not None:
        document["cusparselt"] |= {"method": cusparselt.method, "reason": cusparselt.reason}
    rows = []
    for shape in shapes:
        count = set_count(2 * shape.m * shape.k, card.l2_bytes)  # X alone, the least that a variant reads
        sets = [random_operands(shape, generator) for _ in range(count)]
        rows.append(
            measure_shape(shape, sets, Graphs(), cusparselt, card.sample, options.seconds, options.rounds)
        )
        del sets
        torch.cuda.empty_cache()
        print(table(rows[-1:]).splitlines()[1], f"  {time.perf_counter() - started:.0f} s", flush=True)
        for name, reason in rows[-1]["missing"].items():
            print(f"  {name}: {reason}", flush=True)
    document |= results.card_state(rows)
    document |= {"rows": rows, "geomean": results.geomeans(rows)}
    document["targets"] = linear_targets(document)
    print(table(rows))
    print("geomean", document["geomean"])
    if options.out or options.shapes is None:
        results.write(out, document)


if __name__ == "__main__":
    main()
