"""Small calls that reach every path of the kernels, to be run under compute-sanitizer.

    compute-sanitizer --tool memcheck --kernel-name regex:'gemm|compress' python tests/gpu/sanitize.py

and likewise racecheck, initcheck and synccheck. Compares each result, too.
"""

from __future__ import annotations

import sys

import producer_cases
import torch
from cases import Case, check
from producer_cases import ProducerCase

PRODUCERS = ("adaln", "rmsnorm", "gelu", "silu_gate", "concat_gelu")
CASES = [
    Case(3000, 64, 2304, rank=5, bias="f32"),  # more tiles than CTAs, ragged in both directions
    Case(700, 4096, 400, rank=16, bias="bf16"),  # tiles cut along k among three
    Case(65, 192, 100, rank=64),  # the narrow tile; 64 + 1 rows
    Case(1, 128, 8, norm=False),
    Case(130, 256, 200, rank=(5, 40), norm=False),  # two layers with factors of their own
    Case(70, 256, 64, rank=32, grouping="strided"),
    Case(70, 384, 64, rank=130, grouping="strided", parts=(128, 256)),
    Case(70, 72, 64, rank=20, grouping="strided"),  # element by element
    Case(40, 192, 64, rank=128, layout="odd"),
    Case(130, 192, 64, data="rows"),  # norms in units of the rows
    Case(130, 192, 64, rank=64, data="rows"),
    Case(260, 192, 64, layout="batched"),
]


def main() -> int:
    torch.zeros(
        1 << 28, device="cuda"
    )  # memory that is written once, so that what torch hands out counts as such
    with torch.no_grad():
        for case in CASES:
            check(case)
        for name in PRODUCERS:
            for rank, grouping in ((0, "adjacent"), (33, "strided")):
                producer_cases.check(
                    ProducerCase(name, 130, 512, batch=2, rank=rank, grouping=grouping), served=True
                )
    torch.cuda.synchronize()
    print(f"{len(CASES) + 2 * len(PRODUCERS)} calls, all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
