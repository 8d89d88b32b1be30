"""What calibrating a full-size model takes: `python benchmarks/calibration.py --model flux1-dev`.

The whole model with random weights, calibrated by the default recipe on random calls, one block of each kind
at a time. The same block on twice as many calls tells what a call costs apart from what solving costs. Writes
results/calibration-<model>-<card>.json. Started by `torchrun --nproc-per-node 2`, processes share the calls,
and results/calibration-<model>-2-<card>.json says whether all end with the same bits.
"""

import hashlib
import os
import time
from functools import partial

import torch
import torch.distributed as dist
from script import FOLDER, options_parser

import rtlynx
from rtlynx.calibration.processes import distributed, rank, world
from rtlynx.models import sparse_layers
from rtlynx.timing.card import Card
from rtlynx.timing.full_models import MODELS, Size, build, normals
from rtlynx.timing.results import write

# A block of each kind by itself: all others stay dense.
BLOCKS = {
    "flux1-dev": {
        "double": ("single_transformer_blocks.*", "transformer_blocks.[1-9]*"),
        "single": ("transformer_blocks.*", "single_transformer_blocks.[1-9]*"),
    },
    "qwen-image": {"double": ("transformer_blocks.[1-9]*",)},
    "z-image": {"layer": ("noise_refiner.*", "layers.[1-9]*")},
}


def calibrated(model: torch.nn.Module, skip: tuple[str, ...], calls: list[dict], precision: str) -> dict:
    """Seconds and peak memory of one calibration; the model is dense again afterwards.

    `same` says whether all processes, which each solve on the moments of all calls, found the same bits.
    """
    recipe = rtlynx.Recipe(skip=skip, precision=precision, dense_steps=1)  # which keeps the original weights
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    report = rtlynx.calibrate(model, calls=calls, recipe=recipe, progress=False)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30
    digests = [digest(model)] * world()
    if distributed():
        dist.all_gather_object(digests, digests[0])
    rtlynx.densify(model)
    torch.cuda.empty_cache()
    run = {"layers": len(report.solutions), "calls": len(calls), "seconds": seconds, "peak_gib": peak}
    return run | {"same": len(set(digests)) == 1}


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of what calibration gave the sparse layers."""
    found = hashlib.sha256()
    for layer in sparse_layers(model).values():
        for _, tensor in sorted(layer.state_dict().items()):
            found.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--model", choices=list(BLOCKS), required=True)
    parser.add_argument("--calls", type=int, default=8, help="of the shorter run")
    parser.add_argument("--precision", choices=["bf16", "fp8"], default="bf16")
    options = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    card, of = Card(), MODELS[options.model]
    model = build(of)
    size = Size(text_tokens=of.text_tokens)
    draw = partial(of.calls, size)
    blocks = {}
    for kind, skip in BLOCKS[options.model].items():
        runs = []
        for count in (options.calls, 2 * options.calls):
            calls = [call for seed in range(count) for call in draw(normals(seed))][:count]
            runs.append(calibrated(model, skip, calls, options.precision))
            if rank() == 0:
                print(kind, runs[-1], flush=True)
        a_call = (runs[1]["seconds"] - runs[0]["seconds"]) / options.calls
        blocks[kind] = {
            "runs": runs,
            "seconds_a_call": a_call,
            "seconds_to_solve": runs[0]["seconds"] - options.calls * a_call,
            "peak_gib": max(run["peak_gib"] for run in runs),
        }
    document = {
        **card.describe(options.commit),
        "model": of.name,
        "precision": options.precision,
        "cards": world(),
        "image_tokens": size.image_tokens,
        "text_tokens": size.text_tokens,
        "blocks": blocks,
    }
    several = f"-{world()}" if distributed() else ""
    if rank() == 0:
        write(options.out or FOLDER / f"calibration-{of.name}{several}-{card.slug}.json", document)
    if distributed():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
