"""Whole linear layers against their peers: `python benchmarks/linear.py --dtype bf16` or `fp8`.

What `rtlynx bench` measures (rtlynx/timing/linear_layers.py).
Writes results/linear-<dtype>-<card>.json; with `--shapes` or `--rows` only where `--out` says so
(other numbers of rows: results/linear-<dtype>-rows-<card>.json).
"""

from functools import partial

from script import FOLDER, options_parser

from rtlynx.timing import linear_layers
from rtlynx.timing.card import Card
from rtlynx.timing.results import write
from rtlynx.timing.shapes import chosen


def main() -> None:
    parser = options_parser(__doc__, seconds=1.0)
    parser.add_argument("--dtype", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--shapes", help="comma-separated names, default all twelve")
    parser.add_argument("--rows", help="comma-separated, of X, instead of those of the shapes")
    options = parser.parse_args()
    shapes, card = chosen(options.shapes), Card()
    if options.rows:
        shapes = tuple(shape._replace(m=int(rows)) for rows in options.rows.split(",") for shape in shapes)
    document = linear_layers.run(
        options.dtype,
        shapes,
        card,
        seconds=options.seconds,
        rounds=options.rounds,
        commit=options.commit,
        report=partial(print, flush=True),
    )
    print(linear_layers.table(document["rows"]))
    print("geomean", document["geomean"])
    if options.out or not (options.shapes or options.rows):
        write(options.out or FOLDER / f"linear-{options.dtype}-{card.slug}.json", document)


if __name__ == "__main__":
    main()
