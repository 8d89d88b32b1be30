"""Host time of a whole linear layer call, eager and without gradients: `python benchmarks/host.py`.

Everything that the caller waits for: checks, allocations, tensor maps, launches. The card never holds the
host up: it is synchronised between batches of calls, outside of what is timed.
Writes results/host-<card>.json.
"""

import gc
import sys
from collections.abc import Callable
from itertools import cycle
from statistics import median, quantiles
from time import perf_counter_ns

import torch
from script import FOLDER, options_parser
from targets import HOST_LAYER, HOST_REFERENCE
from torch.nn.functional import linear

from rtlynx.math.formats import FORMATS, FormatName
from rtlynx.math.fp8 import quantize_weight
from rtlynx.math.selection import Pattern, nm_mask, select
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.timing.card import Card
from rtlynx.timing.results import write

CALLS, BATCH = 10_000, 100
# Small, so that the card keeps up; and enough rows for the kernels to be chosen.
M, K, N, RANK = 512, 256, 256, 64


def host_us(
    calls: dict[str, Callable[[], object]], synchronize: Callable[[], object], count: int = CALLS
) -> dict[str, list[float]]:
    """Microseconds of `count` calls of each, in batches that take turns, after one batch to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()  # collections in between would count for whichever call meets them
    gc.disable()
    try:
        for batch in range(-1, -(-count // BATCH)):
            for name, call in calls.items():
                synchronize()
                for _ in range(BATCH):
                    start = perf_counter_ns()
                    call()
                    if batch >= 0:
                        times[name].append((perf_counter_ns() - start) / 1000)
    finally:
        gc.enable()
    return times


@torch.no_grad()
def layer(generator: torch.Generator, format: FormatName, rank: int = 0) -> SparseLinear:
    """A layer in this format, as a calibrated model has it; with a low-rank branch where `rank` says so."""

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=generator.device, generator=generator, dtype=torch.bfloat16)

    how = FORMATS[format]
    pattern, norm = (Pattern(), "scale") if how.sparse else (Pattern(1, 1), "none")
    made = SparseLinear(K, N, pattern=pattern, norm=norm, device=generator.device, dtype=torch.bfloat16)
    if rank:
        made.set_lowrank(normal(rank, K), normal(N, rank))
    if how.weight_sparse:
        made.set_quantized(quantize_weight(select(made.weight, nm_mask(made.weight))), sparse=True)
    elif how.quantized:
        made.quantize()
    made.prepare()
    return made


# Calls of a whole layer -> its format, and the rank of its branch.
LAYERS: dict[str, tuple[FormatName, int]] = {
    "SparseLinear": ("bf16-sparse", 0),
    "SparseLinear, rank 64": ("bf16-sparse", RANK),
    "SparseLinear, dense fp8": ("fp8-dense", 0),
    "SparseLinear, fp8 2:4 activations": ("fp8-sparse", 0),
    HOST_LAYER: ("fp8-weight-sparse", 0),
}


def main() -> None:
    options = options_parser(__doc__).parse_args()
    card = Card()
    generator = torch.Generator("cuda")
    generator.seed()
    inputs = cycle(
        [torch.randn(M, K, device="cuda", generator=generator, dtype=torch.bfloat16) for _ in range(2)]
    )
    layers = {name: layer(generator, *how) for name, how in LAYERS.items()}
    of = layers["SparseLinear, rank 64"]
    operands = of.weight, of.bias, of.lowrank_a, of.lowrank_b
    calls: dict[str, Callable[[], object]] = {
        HOST_REFERENCE: lambda: linear(next(inputs), *operands[:2]),
        "torch.ops.rtlynx.linear, rank 64": lambda: torch.ops.rtlynx.linear(
            next(inputs), *operands, "adjacent", [], True
        ),
        **{name: lambda made=made: made(next(inputs)) for name, made in layers.items()},
    }
    rows = []
    with torch.no_grad():
        times = host_us(calls, torch.cuda.synchronize)
    for name, of_call in times.items():
        tenths = quantiles(of_call, n=10)
        rows.append({"call": name, "median_us": round(median(of_call), 2), "p90_us": round(tenths[-1], 2)})
        print(f"{name:34}{rows[-1]['median_us']:8.2f} us, 9 of 10 below {rows[-1]['p90_us']:.2f} us")
    document = card.describe(options.commit) | {
        "python": sys.version.split()[0],
        "M": M,
        "K": K,
        "N": N,
        "calls": CALLS,
        "rows": rows,
    }
    write(options.out or FOLDER / f"host-{card.slug}.json", document)


if __name__ == "__main__":
    main()
