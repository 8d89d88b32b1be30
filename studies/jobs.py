"""Jobs of the study: a variant with its pictures and seeds, done one at a time, and kept."""

from __future__ import annotations

import statistics
import traceback
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
from variants import STEPS, Variant


@dataclass(frozen=True)
class Setup:
    """What a process needs to make the study for itself."""

    source: str
    dtype: str
    calibration: Calibration
    batch_size: int

    def study(self, device: str) -> Study:
        torch.backends.cudnn.allow_tf32 = False  # the judges' convolutions
        model = load_study_model(self.source, device=device, dtype=getattr(torch, self.dtype))
        judges = load_judges(device, clothing=model.draws_classes)
        return Study(model, judges, self.calibration, self.batch_size)


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


def missing_jobs(study: Study, store: RowStore, jobs: Sequence[Job], say: Any = print) -> list[Job]:
    """Those of `jobs` without a row in the file; notes the model's distributions where they are not there."""
    todo = [job for job in jobs if _skipped(job, study.model, store, say) is None]
    say(f"{len(todo)} of {len(jobs)} variants to do")
    if "distributions" not in store.document and todo:
        store.note("distributions", study.distributions(todo[0].variant.reference_steps))
    return todo


def attempted(study: Study, job: Job, results: Path) -> dict[str, Any] | str:
    """The job's row, or why it failed."""
    atlas = atlas_path(results, job.variant.name) if job.variant.group == "main" else None
    try:
        return study.row(job.variant, job.pictures, job.seeds, atlas)
    except Exception as error:  # the others go on
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".splitlines()[0]


def keep(job: Job, row: dict[str, Any] | str, store: RowStore, say: Any = print) -> int:
    """Write what `attempted` gave; the number of rows added."""
    if isinstance(row, str):
        say(f"{job.variant.name} failed: {row}")
        store.fail(job.variant.name, row)
        return 0
    store.append(row)
    say(f"{job.variant.name}: {_figure(row)}, {row['seconds']:.0f} s")
    return 1


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
