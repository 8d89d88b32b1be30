"""Where sparsity stops paying: `python benchmarks/sizes.py --model flux1-dev`.

One denoising step of a full-size transformer as benchmarks/step.py measures it, at other resolutions, batches
and prompt lengths, compiled bf16 beside the recommended recipe. Writes results/sizes-<model>-<card>.json.
"""

from functools import partial

import torch
from rich import print
from script import FOLDER, options_parser

from rtlynx.timing import step
from rtlynx.timing.card import Card
from rtlynx.timing.full_models import MODELS, FullModel, Size
from rtlynx.timing.overview import step_overview
from rtlynx.timing.results import REFERENCE, write
from rtlynx.timing.step_variants import RECOMMENDED

VARIANTS = (REFERENCE, RECOMMENDED)
PICTURES = [model.name for model in MODELS.values() if model.size.frames == 1]


def sizes_of(model: FullModel) -> list[Size]:
    """Smaller and larger pictures, a short prompt, a batch; the usual size is benchmarks/step.py's."""
    usual = model.size
    return [
        *(usual._replace(side=side) for side in (512, 256, 768)),
        usual._replace(text_tokens=max(8, usual.text_tokens // 16)),
        usual._replace(side=2048),
        usual._replace(batch=4),
    ]


def main() -> None:
    parser = options_parser(__doc__, seconds=1.0)
    parser.add_argument("--model", choices=PICTURES, required=True)
    options = parser.parse_args()
    card, of = Card(), MODELS[options.model]
    document = {**card.describe(options.commit), "model": of.name, "window_s": options.seconds}
    path = options.out or FOLDER / f"sizes-{of.name}-{card.slug}.json"
    rows: list[dict] = []
    for size in sizes_of(of):
        torch.compiler.reset()  # or it would compile for any size from the second one on, which is slower
        taken = step.run(
            of.name,
            card,
            seconds=options.seconds,
            rounds=options.rounds,
            size=size,
            variants=VARIANTS,
            commit=options.commit,
            report=partial(print, flush=True),
        )
        print(step_overview(taken))
        rows.append({key: taken[key] for key in ("resolution", "batch", "text_tokens", "variants")})
        write(path, {**document, "rows": rows})  # at every size: a run may be cut off


if __name__ == "__main__":
    main()
