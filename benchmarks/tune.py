"""Find the fastest tile of the product for many shapes: `python benchmarks/tune.py`.

Times every candidate of `rtlynx.cuda.tuning` in sustained windows, rewrites the table that the package
reads (entries of shapes that were not timed stay) and keeps all times in results/tune-<card>.json.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import product

import torch
from script import FOLDER, options_parser
from torch import Tensor

import rtlynx.ops.sparse_linear  # noqa: F401  (registers torch.ops.rtlynx)
from rtlynx.cuda import tuning
from rtlynx.timing.card import Card
from rtlynx.timing.results import write
from rtlynx.timing.shapes import SHAPES, Shape, chosen, set_count
from rtlynx.timing.sustained import Graphs, attempt, measure

# Between the listed shapes: other token counts, and the widths that models have.
GRID = tuple(
    Shape(f"{m}x{k}x{n}", m, k, n)
    for m, (k, n) in product(
        (256, 512, 1024, 2048, 4608, 8192, 16384),
        ((3072, 3072), (3072, 12288), (12288, 3072), (3840, 3840), (3840, 10240), (10240, 3840)),
    )
)


def time_tiles(
    shape: Shape, rank: int, generator: torch.Generator, card: Card, seconds: float, rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Microseconds of the product, scale, bias and low-rank term in, by tile; and why tiles are missing."""
    _, m, k, n = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=generator.device, generator=generator, dtype=torch.bfloat16)

    def operands() -> tuple[Tensor | None, ...]:
        lowrank_a, lowrank_b = (normal(rank, k), normal(n, rank)) if rank else (None, None)
        blocks, scale, lowrank = torch.ops.rtlynx.compress(normal(m, k), lowrank_a, "adjacent", [], True)
        return blocks, scale, lowrank, normal(n, k), lowrank_b, normal(n)

    count = set_count(9 * m * k // 8 + 2 * n * k, card.l2_bytes)
    sets = [operands() for _ in range(count)]
    calls = [lambda given=given: torch.ops.rtlynx.gemm(*given, m) for given in sets]
    graphs, missing, timers = Graphs(), {}, {}
    for tile in tuning.CANDIDATES:
        with tuning.forced(tile):
            timer = attempt(missing, tile.name, lambda: graphs.timer(calls, replay_ms=15.0))
        if timer is not None:
            timers[tile.name] = timer
    measured = measure(timers, seconds, rounds, card.sample, missing, discard=seconds / 4)
    return {name: taken.us for name, taken in measured.items()}, missing


def merged(table: Iterable[Mapping], best: Mapping[tuple[int, int, int], str]) -> list[dict]:
    """`table` with the tiles of `best`, by (m, n, k), sorted."""
    entries = {(entry["m"], entry["n"], entry["k"]): entry["tile"] for entry in table}
    entries.update(best)
    return [{"m": m, "n": n, "k": k, "tile": tile} for (m, n, k), tile in sorted(entries.items())]


def rewrite_table(best: Mapping[tuple[int, int, int], str]) -> None:
    """Put `best` into the table that the package reads, one entry a line."""
    table = json.loads(tuning.TABLE.read_text())["tiles"] if tuning.TABLE.exists() else []
    lines = ",\n  ".join(json.dumps(entry) for entry in merged(table, best))
    tuning.TABLE.write_text(f'{{"tiles": [\n  {lines}\n]}}\n')
    print(f"wrote {tuning.TABLE}")


def main() -> None:
    parser = options_parser(__doc__, seconds=0.4)
    parser.add_argument(
        "--shapes", help="comma-separated names of listed shapes, instead of all and the grid"
    )
    parser.add_argument("--rank", type=int, default=64, help="of the low-rank term, 0 for none")
    options = parser.parse_args()
    shapes = chosen(options.shapes) if options.shapes else SHAPES + GRID
    card = Card()
    generator = torch.Generator("cuda")
    document = card.describe(options.commit) | {"rank": options.rank, "seed": generator.seed()}
    rows, best = [], {}
    for shape in shapes:
        times, missing = time_tiles(shape, options.rank, generator, card, options.seconds, options.rounds)
        torch.cuda.empty_cache()
        order = sorted(times, key=times.__getitem__)
        costs = {
            tile.name: tuning.modelled_cost(shape.m, shape.n, shape.k, tile) for tile in tuning.CANDIDATES
        }
        modelled = min(costs, key=costs.__getitem__)
        if order:
            best[shape.m, shape.n, shape.k] = order[0]
        rows.append(
            {"shape": shape.name, "M": shape.m, "K": shape.k, "N": shape.n, "modelled": modelled}
            | {"us": {name: round(times[name], 3) for name in order}, "missing": missing}
        )
        ranking = ", ".join(
            f"{name} {times[name]:.1f} us ({shape.teraflops(times[name]):.0f})" for name in order[:3]
        )
        print(f"{shape.name:18} {ranking or missing}; the model says {modelled}", flush=True)
    rewrite_table(best)
    write(options.out or FOLDER / f"tune-{card.slug}.json", document | {"rows": rows})


if __name__ == "__main__":
    main()
