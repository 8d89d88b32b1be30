"""Quality of every variant of one model: `python studies/quality.py --model zoo:flux-emoji --out FILE.json`.

One variant at a time is built, drawn, measured and appended to the file, which is written whole each time; a
run that is cut off goes on where it stopped. The first variant is timed, and the plan of the rest printed
from it.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from make_variant import Calibration
from measure import Study
from picture_figures import load_judges
from row_store import RowStore
from study_model import StudyModel, load_study_model
from variants import STEPS, Variant, chosen

import rtlynx


@dataclass(frozen=True)
class Job:
    """A variant with the pictures and seeds that this run gives it."""

    variant: Variant
    pictures: int
    seeds: tuple[int, ...]

    @property
    def key(self) -> dict[str, Any]:
        """What makes a row of the file this job's."""
        return {
            "name": self.variant.name,
            "pictures": self.pictures,
            "seeds": list(self.seeds),
            "steps": self.variant.steps,
        }

    @property
    def picture_steps(self) -> int:
        return self.pictures * len(self.seeds) * self.variant.steps


def jobs_for(
    variants: Sequence[Variant], pictures: int | None, seeds: Sequence[int] | None, steps: int
) -> list[Job]:
    """Jobs of `variants`; None leaves what their group has, `steps` stands in for the study's 28."""
    jobs = []
    for variant in variants:
        mine = replace(
            variant,
            steps=_steps(variant.steps, steps),
            reference_steps=_steps(variant.reference_steps, steps),
        )
        jobs.append(Job(mine, pictures or variant.pictures, variant.seeds if seeds is None else tuple(seeds)))
    return jobs


def run(
    study: Study, store: RowStore, jobs: Sequence[Job], *, minutes: float | None = None, say: Any = print
) -> int:
    """Do what is missing of `jobs`, as far as `minutes` reach; the number of rows added.

    A variant that fails is noted in the file under "failures" and tried again by the next run.
    """
    start, added = time.perf_counter(), 0
    todo = [job for job in jobs if _skipped(job, study.model, store, say) is None]
    say(f"{len(todo)} of {len(jobs)} variants to do")
    if "distributions" not in store.document and todo:
        store.note("distributions", study.distributions(todo[0].variant.reference_steps))
    for number, job in enumerate(todo):
        left = None if minutes is None else minutes * 60 - (time.perf_counter() - start)
        expected = estimate(job, store.rows)
        if left is not None and (left <= 0 or (expected is not None and expected > left)):
            say(f"stopped before {job.variant.name}: {len(todo) - number} variants are left")
            break
        try:
            atlas = atlas_path(store.path, job.variant.name) if job.variant.group == "main" else None
            row = study.row(job.variant, job.pictures, job.seeds, atlas)
        except (ValueError, RuntimeError) as error:
            say(f"{job.variant.name} failed: {error}")
            store.fail(job.variant.name, f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        store.append(row)
        added += 1
        say(f"{job.variant.name}: {_figure(row)}, {row['seconds']:.0f} s")
        if number == 0:
            say_plan(todo[1:], store.rows, say)
    return added


def estimate(job: Job, rows: Sequence[dict[str, Any]]) -> float | None:
    """Seconds that a job takes, from the rows of the file; None without any.

    Drawing by pictures and steps; beside it the median of the rows that are calibrated as it is, or are not.
    """
    if not rows:
        return None
    rate = statistics.median(row["drawing_seconds"] / (row["n"] * row["steps"]) for row in rows)
    recipe = job.variant.recipe
    calibrated = job.variant.weights is not None or (recipe is not None and recipe.needs_calibration)
    alike = [row for row in rows if (row["calibration_seconds"] is not None) == calibrated] or rows
    beside = statistics.median(row["seconds"] - row["drawing_seconds"] for row in alike)
    return rate * job.picture_steps + beside


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


def atlas_path(results: Path, name: str) -> Path:
    """Where the first pictures of a main variant go."""
    return results.with_suffix("") / f"{name.replace(':', '-')}.png"


def _steps(wanted: int, steps: int) -> int:
    return steps if wanted == STEPS else min(wanted, steps)


def _skipped(job: Job, model: StudyModel, store: RowStore, say: Any) -> str | None:
    if store.find(job.key) is not None:
        return "done"
    missing = job.variant.missing_for(model.architecture)
    if missing is not None:
        say(f"{job.variant.name} is left out: {missing}")
    return missing


def _figure(row: dict[str, Any]) -> str:
    value = row["figures"]["psnr"]["mean"]
    return "equal to dense" if value is None else f"PSNR {value:.2f} dB"


def header(source: str, study: Study, dtype: str, device: str, commit: str | None) -> dict[str, Any]:
    """What the file says of its making."""
    of = study.calibration
    on_gpu = torch.device(device).type == "cuda"
    return {
        "model": source,
        "architecture": study.model.architecture,
        "dtype": dtype,
        "guidance": study.model.settings.get("guidance_scale"),
        "calibration": {"steps": of.steps, "recorded": of.recorded, "most_prompts": of.prompts},
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "rtlynx": rtlynx.__version__,
        "commit": commit,
        "perceptual_missing": study.judges.missing,
    }


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
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=250, help="pictures at a time")
    parser.add_argument("--minutes", type=float, help="begin no variant that would end later")
    parser.add_argument("--calibration-prompts", type=int, help="no more than these, for trials")
    parser.add_argument("--calibration-steps", type=int, default=24)
    parser.add_argument(
        "--train-steps", type=int, help="no more than these, for trials; the paper's are 2,000"
    )
    parser.add_argument("--commit", help="what the figures belong to")
    parser.add_argument("--plan", action="store_true", help="print what is to do and stop")
    options = parser.parse_args(arguments)

    try:
        jobs = jobs_for(
            chosen(options.variants, options.group), options.pictures, options.seeds, options.steps
        )
        torch.backends.cudnn.allow_tf32 = False  # the judges' convolutions
        model = load_study_model(options.model, device=options.device, dtype=getattr(torch, options.dtype))
        calibration = Calibration(
            steps=options.calibration_steps,
            recorded=min(6, options.calibration_steps),
            prompts=options.calibration_prompts,
            train_steps=options.train_steps,
        )
        study = Study(model, load_judges(options.device), calibration, options.batch_size)
        store = RowStore(
            options.out, header(options.model, study, options.dtype, options.device, options.commit)
        )
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if study.judges.missing is not None:
        print(f"no perceptual distance: {study.judges.missing}")
    if options.plan:
        say_plan([job for job in jobs if store.find(job.key) is None], store.rows)
        return
    run(study, store, jobs, minutes=options.minutes)


if __name__ == "__main__":
    main()
