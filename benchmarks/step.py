"""One denoising step of a full-size transformer, weights at random: `python benchmarks/step.py --model NAME`.

What `rtlynx bench --model` measures (rtlynx/timing/step.py).
Writes results/step-<model>-<card>.json; of other sizes or few variants only where `--out` or
`--renew` says so.
"""

import json
from functools import partial
from pathlib import Path

from rich import print
from script import FOLDER, options_parser

from rtlynx.timing import step
from rtlynx.timing.card import Card
from rtlynx.timing.full_models import MODELS, Size
from rtlynx.timing.overview import step_overview
from rtlynx.timing.results import write
from rtlynx.timing.step_variants import named


def main() -> None:
    parser = options_parser(__doc__, seconds=1.5)
    parser.add_argument("--model", choices=list(MODELS), required=True)
    parser.add_argument("--side", type=int, help="of the picture, default 1024 pixels; of a video its height")
    parser.add_argument("--width", type=int, help="of a video, in pixels, default the model's")
    parser.add_argument("--frames", type=int, help="of a video, default the model's")
    parser.add_argument("--batch", type=int, help="default 1")
    parser.add_argument("--text-tokens", type=int, help="default: a common prompt's")
    parser.add_argument("--attention", default="_native_cudnn", help="diffusers attention backend")
    # (Not separated by commas, which some names hold.)
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="default all but further designs")
    parser.add_argument(
        "--renew", type=Path, help="results of the same, measured in groups, whose other variants stay"
    )
    options = parser.parse_args()
    try:
        named(options.variants)
    except ValueError as unknown:
        parser.error(str(unknown))
    kept = options.renew and json.loads(options.renew.read_text())
    if kept and (kept["together"] or kept["model"] != options.model):
        parser.error(f"{options.renew} holds no variants of {options.model} measured in groups")
    common = MODELS[options.model].size
    if common.frames == 1 and (options.width or options.frames):
        parser.error(f"{options.model} draws square pictures: leave out --width and --frames")
    given = {name: one for name in Size._fields if (one := getattr(options, name, None)) is not None}
    size = common._replace(**given)
    card = Card()
    document = step.run(
        options.model,
        card,
        seconds=options.seconds,
        rounds=options.rounds,
        size=size,
        variants=options.variants,
        attention=options.attention,
        commit=options.commit,
        report=partial(print, flush=True),
    )
    if kept:
        document = step.renewed(kept, document)
    print(step_overview(document))
    if options.out or options.renew or (size == common and not options.variants):
        write(options.out or options.renew or FOLDER / f"step-{options.model}-{card.slug}.json", document)


if __name__ == "__main__":
    main()
