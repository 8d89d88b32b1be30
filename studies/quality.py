"""Quality of every variant of one model: `python studies/quality.py --model zoo:flux-emoji --out FILE.json`.

One variant at a time is built, drawn, measured and appended to the file, which is written whole each time; a
run that is cut off goes on where it stopped. The first variant is timed, and the plan of the rest printed
from it.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jobs import Job, Setup, attempted, estimate, jobs_for, keep, missing_jobs
from make_variant import Calibration
from measure import Study
from row_store import RowStore
from variants import STEPS, chosen
from workers import run_workers

import rtlynx


def run(
    study: Study, store: RowStore, jobs: Sequence[Job], *, minutes: float | None = None, say: Any = print
) -> int:
    """Do what is missing of `jobs`, as far as `minutes` reach; the number of rows added.

    A variant that fails is noted in the file under "failures" and tried again by the next run.
    """
    start, added = time.perf_counter(), 0
    todo = missing_jobs(study, store, jobs, say)
    for number, job in enumerate(todo):
        left = None if minutes is None else minutes * 60 - (time.perf_counter() - start)
        expected = estimate(job, store.rows)
        if left is not None and (left <= 0 or (expected is not None and expected > left)):
            say(f"stopped before {job.variant.name}: {len(todo) - number} variants are left")
            break
        added += keep(job, attempted(study, job, store.path), store, say)
        if number == 0:
            say_plan(todo[1:], store.rows, say)
    return added


def say_plan(jobs: Sequence[Job], rows: Sequence[dict[str, Any]], say: Any = print) -> None:
    """Time expected of each job and of all."""
    total = 0.0
    for job in jobs:
        seconds = estimate(job, rows)
        total += seconds or 0.0
        size = f"{job.pictures} pictures x {len(job.seeds)} seeds x {job.variant.steps} steps"
        say(f"  {job.variant.name:32} {size}" + ("" if seconds is None else f", about {seconds:.0f} s"))
    if rows:
        say(f"  in all about {total / 60:.0f} minutes")


def header(source: str, study: Study, dtype: str) -> dict[str, Any]:
    """What the file says of its making."""
    of = study.calibration
    return {
        "model": source,
        "architecture": study.model.architecture,
        "dtype": dtype,
        "guidance": study.model.settings.get("guidance_scale"),
        "calibration": {"steps": of.steps, "recorded": of.recorded, "most_prompts": of.prompts},
        "torch": torch.__version__,
        "rtlynx": rtlynx.__version__,
        "perceptual_missing": study.judges.missing,
    }


def device_name(device: str) -> str:
    """The card, or the processor's architecture."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else platform.machine()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="zoo:flux-emoji", help="zoo:NAME")
    parser.add_argument("--out", type=Path, required=True, help="results file, gone on with if it is there")
    parser.add_argument("--variants", default="*", help="comma-separated globs of names")
    parser.add_argument("--group", choices=("all", "main", "sweep"), default="all")
    parser.add_argument("--pictures", type=int, help="default: 1,000 of main variants, 256 of sweeps")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2 of main variants, 0 of sweeps")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=500, help="pictures at a time")
    parser.add_argument("--workers", type=int, default=1, help="processes, spread over the machine's GPUs")
    parser.add_argument("--minutes", type=float, help="begin no variant that would end later")
    parser.add_argument("--calibration-prompts", type=int, help="no more than these, for trials")
    parser.add_argument("--calibration-steps", type=int, default=24)
    parser.add_argument(
        "--train-steps",
        type=int,
        help="no more than these, for trials; the paper's are 2,000, distillation's 500",
    )
    parser.add_argument("--commit", help="what the figures belong to")
    parser.add_argument("--plan", action="store_true", help="print what is to do and stop")
    options = parser.parse_args(arguments)

    try:
        jobs = jobs_for(
            chosen(options.variants, options.group), options.pictures, options.seeds, options.steps
        )
        setup = Setup(
            options.model,
            options.dtype,
            Calibration(
                steps=options.calibration_steps,
                recorded=min(6, options.calibration_steps),
                prompts=options.calibration_prompts,
                train_steps=options.train_steps,
            ),
            options.batch_size,
        )
        study = setup.study(options.device)
        store = RowStore(
            options.out,
            header(options.model, study, options.dtype),
            options.commit,
            device_name(options.device),
        )
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if study.judges.missing is not None:
        print(f"no perceptual distance: {study.judges.missing}")
    if options.plan:
        say_plan([job for job in jobs if store.find(job.key) is None], store.rows)
        return
    if options.workers > 1:
        run_workers(setup, study, store, jobs, options.workers, minutes=options.minutes)
    else:
        run(study, store, jobs, minutes=options.minutes)


if __name__ == "__main__":
    main()
