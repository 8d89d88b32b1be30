"""What is no product and no attention in a step, part by part: `python benchmarks/parts.py --model NAME`.

Each part's time beside what the bytes that it must move take at 3 TB/s. Times are of a profiler, not of
sustained windows. Writes results/parts-<model>-<card>.json, with every kernel and the part it was counted to.
"""

import torch
from script import FOLDER, options_parser

from rtlynx.timing import step_parts
from rtlynx.timing.card import Card
from rtlynx.timing.results import write
from rtlynx.timing.step_variants import DENSE_FP8, EVERY_WEIGHT, FP8_ATTENTION, FP8_MODULATION, RECOMMENDED

# Bytes are counted for attention in eight bits.
VARIANTS = [
    *(one + FP8_ATTENTION for one in (DENSE_FP8, RECOMMENDED, EVERY_WEIGHT)),
    RECOMMENDED + FP8_ATTENTION + FP8_MODULATION,
]


@torch.no_grad()
def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--model", choices=step_parts.COUNTED, required=True)
    parser.add_argument("--variant", choices=VARIANTS, default=step_parts.VARIANT)
    options = parser.parse_args()
    card = Card()
    document = card.describe(options.commit) | step_parts.run(options.model, options.variant)
    for row in document["parts"]:
        print(row)
    write(options.out or FOLDER / f"parts-{options.model}-{card.slug}.json", document)


if __name__ == "__main__":
    main()
