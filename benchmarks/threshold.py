"""From how many tokens on the kernels beat plain PyTorch: `python benchmarks/threshold.py`.

The whole layer (compress, norm, rank 64, bias) by the kernels, and the same function densely: select, mask
and multiply in PyTorch; and the dense layer that it replaces, for scale.
Writes results/threshold-<card>.json, on which `rtlynx.ops.dispatch` relies.
"""

import torch
from script import FOLDER, options_parser
from torch.nn.functional import linear

from rtlynx.math import reference
from rtlynx.math.selection import Pattern
from rtlynx.ops import sparse_linear as ops
from rtlynx.timing.card import Card
from rtlynx.timing.results import write
from rtlynx.timing.sustained import Graphs, attempt, measure

TOKENS = (1, 8, 32, 64, 128, 256, 512)
K, N, RANK = 3072, 3072, 64
SETS = 8  # weights of 19 MB each


def main() -> None:
    options = options_parser(__doc__, seconds=0.4).parse_args()
    card = Card()

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    rows = []
    weights = [normal(N, K) / K**0.5 for _ in range(SETS)]
    bias, lowrank_a, lowrank_b = normal(N), normal(RANK, K) / K**0.5, normal(N, RANK)
    with torch.no_grad():
        for tokens in TOKENS:
            inputs = [normal(tokens, K) for _ in range(SETS)]
            variants = {
                "kernels": lambda x, w: ops.linear(x, w, bias, lowrank_a, lowrank_b, "adjacent", [], True),
                "masked in PyTorch": lambda x, w: reference.sparse_linear(
                    reference.compress(x, Pattern(), "scale"), w, bias, linear(x, lowrank_a), lowrank_b
                ),
                "dense": lambda x, w: linear(x, w, bias),
            }
            graphs, missing = Graphs(), {}
            timers = {}
            for name, variant in variants.items():
                calls = [
                    lambda x=x, w=w, variant=variant: variant(x, w)
                    for x, w in zip(inputs, weights, strict=True)
                ]
                timer = attempt(missing, name, lambda graphs=graphs, calls=calls: graphs.timer(calls))
                if timer is not None:
                    timers[name] = timer
            measured = measure(timers, options.seconds, options.rounds, card.sample, missing)
            times = {name: round(measurement.us, 2) for name, measurement in measured.items()}
            rows.append({"tokens": tokens, "us": times, "missing": missing})
            print(f"{tokens:5} tokens  " + "  ".join(f"{name} {us:.1f} us" for name, us in times.items()))
    document = card.describe(options.commit) | {"K": K, "N": N, "rank": RANK, "rows": rows}
    write(options.out or FOLDER / f"threshold-{card.slug}.json", document)


if __name__ == "__main__":
    main()
