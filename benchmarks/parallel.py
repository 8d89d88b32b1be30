"""One denoising step on several cards: `torchrun --nproc-per-node 2 benchmarks/parallel.py --model NAME`.

Compiled bf16, torchao's fp8 and ours, each on one card and, beside it, by Ulysses, ring and tensor parallel,
and with guidance split over the cards (rtlynx/timing/parallel.py). Writes
results/parallel-<cards>-<model>-<side>-<card>.json after each arrangement, so that a run that is ended keeps
what it has.
"""

import os
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from rich import print
from script import FOLDER, options_parser

from rtlynx.storage.files import write_json
from rtlynx.timing import parallel
from rtlynx.timing.card import Card
from rtlynx.timing.full_models import MODELS
from rtlynx.timing.overview import parallel_overview
from rtlynx.timing.processes import Processes


def main() -> None:
    parser = options_parser(__doc__, seconds=1.0)
    parser.add_argument("--model", choices=list(MODELS), required=True)
    parser.add_argument("--side", type=int, help="of the picture, default 1024 pixels; of a video its height")
    parser.add_argument("--attention", default="_native_cudnn", help="diffusers attention backend")
    parser.add_argument("--variants", help="comma-separated names, default all that are compiled")
    parser.add_argument(
        "--arrangements", help="comma-separated: ulysses, ring, tensor, guidance; default all"
    )
    parser.add_argument(
        "--no-graphs", action="store_true", help="GPU time between events around calls, not of a CUDA graph"
    )
    parser.add_argument(
        "--timeout", type=float, default=180, help="seconds that one card waits for another, before all end"
    )
    options = parser.parse_args()
    names = {"variants": options.variants, "arrangements": options.arrangements}
    chosen = {name: given and given.split(",") for name, given in names.items()}
    for name, known in (("variants", parallel.VARIANTS), ("arrangements", parallel.ARRANGEMENTS)):
        there = [one.name for one in known]
        if unknown := sorted(set(chosen[name] or ()).difference(there)):
            parser.error(f"no {name} are called {', '.join(unknown)}; there are {', '.join(there)}")
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        parser.error("it measures several cards: start it by torchrun --nproc-per-node 2")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    card = Card()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=options.timeout)
    )
    # One card alone may be compiled and measured while the others wait.
    of = Processes(device, 5 * options.timeout)
    full = MODELS[options.model]
    size = full.size if options.side is None else full.size._replace(side=options.side)
    file = options.out or FOLDER / f"parallel-{of.count}-{full.name}-{size.side}-{card.slug}.json"
    file.parent.mkdir(parents=True, exist_ok=True)

    document = parallel.run(
        full.name,
        card,
        of,
        seconds=options.seconds,
        rounds=options.rounds,
        size=size,
        **chosen,
        attention=options.attention,
        graphs=not options.no_graphs,
        commit=options.commit,
        report=partial(print, flush=True),
        keep=partial(write_json, file),
    )
    if of.rank == 0:
        print(parallel_overview(document))
        print(f"wrote {file}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
