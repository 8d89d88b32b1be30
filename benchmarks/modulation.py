"""Modulation with weights in eight bits beside bfloat16: `python benchmarks/modulation.py`.

Writes results/modulation-<card>.json. `dense` is PyTorch's SiLU and linear layer in bfloat16, `ours` the one
kernel that does both; `*_gbs` are the gigabytes of weight that they read in a second.
"""

from typing import NamedTuple

import torch
from script import FOLDER, options_parser
from torch.nn.functional import linear, silu

from rtlynx.math.fp8 import quantize_weight
from rtlynx.ops.fp8_weights import linear_fp8_weights
from rtlynx.timing import results
from rtlynx.timing.card import Card
from rtlynx.timing.shapes import set_count
from rtlynx.timing.sustained import Call, Graphs, attempt, measure


class Shape(NamedTuple):
    """Of one layer."""

    name: str
    k: int
    n: int


SHAPES = (
    Shape("flux-double", 3072, 18432),  # and qwen-image
    Shape("flux-single", 3072, 9216),
    Shape("z-image", 256, 15360),
    Shape("flux2-double", 6144, 36864),
)
BATCHES = (1, 2, 4, 8)


def calls_of(shape: Shape, batch: int, sets: int, generator: torch.Generator) -> dict[str, list[Call]]:
    """Variant -> a call of each of `sets` sets of operands."""

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=generator.device, generator=generator, dtype=torch.bfloat16)

    calls: dict[str, list[Call]] = {"dense": [], "ours": []}
    for _ in range(sets):
        x, weight, bias = normal(batch, shape.k), normal(shape.n, shape.k) * shape.k**-0.5, normal(shape.n)
        of = quantize_weight(weight)
        calls["dense"].append(lambda x=x, weight=weight, bias=bias: linear(silu(x), weight, bias))
        calls["ours"].append(lambda x=x, of=of, bias=bias: linear_fp8_weights(x, *of, bias, True))
    return calls


def row_of(shape: Shape, batch: int, card: Card, generator: torch.Generator, windows: tuple) -> dict:
    """Times of one shape and batch; `windows` are their length in seconds and how many there are."""
    weights, missing, graphs = shape.k * shape.n, dict[str, str](), Graphs()
    calls = calls_of(shape, batch, set_count(weights, card.l2_bytes), generator)
    made = {name: attempt(missing, name, lambda of=of: graphs.timer(of)) for name, of in calls.items()}
    timers = {name: timer for name, timer in made.items() if timer is not None}
    measured = measure(timers, *windows, card.sample, missing)
    row: dict = shape._asdict() | {"batch": batch}
    for name, one in measured.items():
        size = weights if name == "ours" else 2 * weights
        row |= {f"{name}_us": round(one.us, 3), f"{name}_gbs": round(size / one.us / 1e3, 1)}
    return row | {
        "speed_up": results.ratio(row, "dense_us", "ours_us"),
        "windows": {name: results.window_details(one) for name, one in measured.items()},
        "missing": missing,
    }


@torch.no_grad()
def main() -> None:
    options = options_parser(__doc__, seconds=0.5).parse_args()
    card, generator, rows = Card(), torch.Generator("cuda"), []
    for shape in SHAPES:
        for batch in BATCHES:
            rows.append(row_of(shape, batch, card, generator, (options.seconds, options.rounds)))
            torch.cuda.empty_cache()
            print({key: value for key, value in rows[-1].items() if key != "windows"}, flush=True)
    document = card.describe(options.commit) | {"seed": generator.initial_seed()}
    document |= results.card_state(rows) | {"rows": rows}
    results.write(options.out or FOLDER / f"modulation-{card.slug}.json", document)


if __name__ == "__main__":
    main()
