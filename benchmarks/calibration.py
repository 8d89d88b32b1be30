"""What calibrating a full-size model takes: `python benchmarks/calibration.py --model flux1-dev`.

The whole model with random weights, calibrated by the default recipe on random calls, one block of each kind
at a time. The same block on twice as many calls tells what a call costs apart from what solving costs. Writes
results/calibration-<model>-<card>.json. Started by `torchrun --nproc-per-node 2`, processes share the calls,
and results/calibration-<model>-2-<card>.json says whether all end with the same bits.

With `--work FOLDER` the whole model is calibrated at once, as users do it: the recommended recipe with
rotated values, permuted features and intercepts, on prompts with random embeddings. With `--distill-steps` it
is distilled, from weights that were only quantised. Either writes seconds and peak memory of each stage as
they come (results/calibration-whole-<model>-<card>.json, results/distillation-<model>-<card>.json). A
calibration that was cut off goes on where it was when the same command runs again; only the budget's
measuring starts anew.
"""

import argparse
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from script import FOLDER, options_parser

import rtlynx
from rtlynx.calibration import distill, run
from rtlynx.calibration.collect import Collector
from rtlynx.calibration.processes import distributed, rank, world
from rtlynx.calibration.recording import Recording
from rtlynx.calibration.solutions import SolutionStore
from rtlynx.math.fp8 import quantize_weight
from rtlynx.models import make_plan, sparse_layers
from rtlynx.models.plan import architecture_of
from rtlynx.nn.solution import Solution
from rtlynx.storage.files import write_json
from rtlynx.timing.card import Card
from rtlynx.timing.full_models import MODELS, FullModel, Size, build, normals
from rtlynx.timing.results import write

# A block of each kind by itself: all others stay dense.
FLUX_BLOCKS = {
    "double": ("single_transformer_blocks.*", "transformer_blocks.[1-9]*"),
    "single": ("transformer_blocks.*", "single_transformer_blocks.[1-9]*"),
}
BLOCKS = {
    "chroma": FLUX_BLOCKS,
    "flux1-dev": FLUX_BLOCKS,
    "flux2-klein": FLUX_BLOCKS,
    "qwen-image": {"double": ("transformer_blocks.[1-9]*",)},
    "sd3.5-large": {"double": ("transformer_blocks.[1-9]*",)},
    "z-image": {"layer": ("noise_refiner.*", "layers.[1-9]*")},
}
# The whole model: everything that calibration can do but the low-rank branch, which the recipe leaves out.
WHOLE = rtlynx.Recipe.recommended(rotate_values=True, permute_hidden=True, intercept=True)
# What is trained: every layer of the image.
DISTILLED = rtlynx.Recipe(rank=None, precision="fp8")
# Stage -> the functions whose calls it consists of; none of them calls another.
CALIBRATION_STAGES: dict[str, tuple[tuple[Any, str], ...]] = {
    "recording": ((Recording, "draw_some"),),
    "rotations and permutations": ((run, "find_bases"), (run, "reparameterize")),
    "moments": ((Collector, "collect"),),
    "solving": ((run._Calibration, "_solve_group"),),
    "keeping and reading solutions": ((SolutionStore, "put"), (SolutionStore, "has")),
    "budget": ((run._Calibration, "_choose"),),
    "applying": ((run, "apply_solutions"),),
}
DISTILLATION_STAGES: dict[str, tuple[tuple[Any, str], ...]] = {
    "recording": ((Recording, "draw_some"),),
    "loss of held-out calls": ((distill._Training, "_mean_loss"),),
    "training steps": ((distill._Training, "_step"),),
}


class RandomPipeline:
    """Samples a full-size model as its pipeline does, from random noise and random embeddings.

    The state stays the noise that it starts from: what a call takes does not depend on it.
    """

    def __init__(
        self,
        model: Any,
        of: FullModel,
        size: Size,
        draw: Callable[[int], Callable[..., torch.Tensor]] = normals,
    ) -> None:
        self.transformer, self.of, self.size, self.draw = model, of, size, draw
        self.timestep = architecture_of(model).timestep_argument

    @torch.no_grad()
    def __call__(self, prompt: list[str], generator: list[torch.Generator]) -> None:
        draw = self.draw(generator[0].initial_seed())
        calls = self.of.calls(self.size._replace(batch=len(prompt)), draw)
        for sigma in self.of.sampling.sigmas(self.size):
            for call in calls:
                at = {self.timestep: torch.full_like(call[self.timestep], sigma)}
                self.transformer(**{**call, **at}, return_dict=False)


class Stages:
    """Seconds, calls and peak memory of the functions of each stage, summed up over the runs of one command.

    Written at the end of every call, so that a run that is cut off leaves what it had measured.

    Raises
    ------
    ValueError
        If the file is of other settings.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.start = path, time.perf_counter()
        self.document: dict[str, Any] = {**about, "finished": False, "run_seconds": [], "stages": {}}
        if path.is_file():
            earlier = json.loads(path.read_text())
            unlike = sorted(key for key, value in about.items() if earlier.get(key) != value)
            if unlike or earlier.get("finished"):
                why = f"differs in {', '.join(unlike)}" if unlike else "is finished"
                raise ValueError(f"{path} {why}: move it away, or give another --out")
            self.document = earlier
        self.document["run_seconds"].append(0.0)

    @contextlib.contextmanager
    def watching(self, stages: Mapping[str, Sequence[tuple[Any, str]]]) -> Iterator[None]:
        """Time every call of these functions."""
        with contextlib.ExitStack() as stack:
            for stage, functions in stages.items():
                for owner, name in functions:
                    original = getattr(owner, name)
                    setattr(owner, name, self._timed(original, stage))
                    stack.callback(setattr, owner, name, original)
            yield

    def _timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            on_card = torch.cuda.is_available()
            if on_card:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if on_card:
                torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**30 if on_card else None
            self._add(stage, time.perf_counter() - start, peak)
            return result

        return timed

    def _add(self, stage: str, seconds: float, peak: float | None) -> None:
        new = {"calls": 0, "seconds": 0.0, "longest_seconds": 0.0, "peak_gib": None}
        row = self.document["stages"].setdefault(stage, new)
        row["calls"] += 1
        row["seconds"] += seconds
        row["longest_seconds"] = max(row["longest_seconds"], seconds)
        row["peak_gib"] = max(filter(None, (row["peak_gib"], peak)), default=None)
        self.write()

    def write(self, **more: Any) -> None:
        self.document["run_seconds"][-1] = time.perf_counter() - self.start
        self.document |= more
        write_json(self.path, self.document)


def calibrate_whole(
    pipeline: Any, prompts: Sequence[str], options: rtlynx.CalibrationOptions, stages: Stages
) -> None:
    """Calibrate by `WHOLE`, on `prompts`."""
    with stages.watching(CALIBRATION_STAGES):
        report = rtlynx.calibrate(pipeline, list(prompts), WHOLE, options, progress=False)
    stages.write(finished=True, layers=len(report.solutions), extra_gib=report.extra_bytes / 2**30)


def distill_quantised(
    pipeline: Any,
    prompts: Sequence[str],
    options: rtlynx.CalibrationOptions,
    settings: rtlynx.Distillation,
    stages: Stages,
) -> None:
    """Distil by `DISTILLED` from quantised weights, which need no calibration; the model stays dense."""
    model = pipeline.transformer
    plan = make_plan(model, DISTILLED)
    solutions = {}
    for layer in plan.sparse:
        values, scale = quantize_weight(model.get_submodule(layer.name).weight)
        solutions[layer.name] = Solution(weight=values, weight_scale=scale)
    with stages.watching(DISTILLATION_STAGES):
        recording = Recording(model, plan, options)
        recording.sample(pipeline, list(prompts), show=False)
        _, report = distill.distill_layers(plan, recording, solutions, settings, show=False)
    stages.write(finished=True, layers=report.layers)


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


def blocks_of(model: torch.nn.Module, of: FullModel, size: Size, options: argparse.Namespace) -> dict:
    """Kind of block -> what calibrating one takes."""
    draw = partial(of.calls, size)
    blocks = {}
    for kind, skip in BLOCKS[of.name].items():
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
    return blocks


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--model", choices=list(BLOCKS), required=True)
    parser.add_argument("--calls", type=int, default=8, help="of the shorter run of each block")
    parser.add_argument("--precision", choices=["bf16", "fp8"], default="bf16", help="of the blocks")
    parser.add_argument("--work", type=Path, help="calibrate the whole model, and keep its work here")
    parser.add_argument("--prompts", type=int, default=8, help="of a whole calibration or a distillation")
    parser.add_argument("--steps", type=int, default=4, help="recorded of each prompt")
    parser.add_argument("--distill-steps", type=int, help="distil for so many steps")
    parser.add_argument("--distill-rank", type=int, default=32, help="of the correction that is trained")
    parser.add_argument("--distill-batch", type=int, default=4, help="states a step, one at a time")
    options = parser.parse_args()
    if options.work and options.distill_steps:
        parser.error("a whole calibration and a distillation are measured apart: give one of both")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if options.work or options.distill_steps:
            parser.error(
                "several processes are measured block by block: leave out --work and --distill-steps"
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    card, of = Card(), MODELS[options.model]
    size = of.size
    about = {
        **card.describe(options.commit),
        "model": of.name,
        "image_tokens": size.image_tokens,
        "text_tokens": size.text_tokens,
    }
    what = "calibration-whole" if options.work else "distillation" if options.distill_steps else "calibration"
    several = f"-{world()}" if distributed() else ""
    path = options.out or FOLDER / f"{what}-{of.name}{several}-{card.slug}.json"
    prompts = [f"prompt {number}" for number in range(options.prompts)]
    calibration = rtlynx.CalibrationOptions(batch_size=1, steps_per_prompt=options.steps, folder=options.work)
    data = {"prompts": options.prompts, "steps_per_prompt": options.steps}
    if options.work or options.distill_steps:
        recipe = WHOLE if options.work else DISTILLED
        settings = None
        if options.distill_steps:
            settings = rtlynx.Distillation(
                steps=options.distill_steps,
                batch_size=options.distill_batch,
                micro_batch_size=1,
                on_policy_share=0.0,  # sampling is measured by recording
                guidance=4.0,
                rank=options.distill_rank,
                gradient_checkpointing=True,
            )
            data |= {"distill_batch": options.distill_batch, "distill_rank": options.distill_rank}
        try:
            stages = Stages(path, {**about, "recipe": recipe.to_dict(), **data})
        except ValueError as error:
            parser.error(str(error))
        pipeline = RandomPipeline(build(of), of, size)
        if settings is None:
            calibrate_whole(pipeline, prompts, calibration, stages)
        else:
            distill_quantised(pipeline, prompts, calibration, settings, stages)
        return
    blocks = blocks_of(build(of), of, size, options)
    if rank() == 0:
        write(path, {**about, "precision": options.precision, "cards": world(), "blocks": blocks})
    if distributed():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
