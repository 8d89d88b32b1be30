"""Several processes that share one study's jobs, spread over the GPUs of the machine.

Each builds the study for itself; dense pictures are drawn once and handed over as files. Rows come back to
the process that owns the results file. Calibrations and drawings of several processes on one card slow each
other down: the seconds in their rows are of use only beside rows of the same run.
"""

from __future__ import annotations

import queue
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from jobs import Job, Setup, attempted, estimate, keep, missing_jobs
from measure import Study
from row_store import RowStore

WAIT_SECONDS = 5.0  # between looks whether the processes still live


def run_workers(
    setup: Setup,
    study: Study,
    store: RowStore,
    jobs: Sequence[Job],
    workers: int,
    *,
    minutes: float | None = None,
    say: Any = print,
) -> int:
    """As `quality.run`, by `workers` processes; the number of rows added.

    Raises
    ------
    RuntimeError
        If a process died; the rows of the others are kept.
    """
    start = time.perf_counter()
    todo = missing_jobs(study, store, jobs, say)
    context = torch.multiprocessing.get_context("spawn")
    given, found = context.Queue(), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        write_dense(study, todo, Path(folder))
        deadline = None if minutes is None else minutes * 60 - (time.perf_counter() - start)
        for job in sorted(todo, key=_trained, reverse=True):  # by far the longest
            given.put(job)
        for _ in range(workers):
            given.put(None)
        processes = [
            context.Process(
                target=work,
                args=(number, setup, Path(folder), store.path, deadline, given, found),
            )
            for number in range(min(workers, len(todo)))
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, found, store, say)
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _trained(job: Job) -> bool:
    variant = job.variant
    by_itself = variant.recipe is not None and variant.recipe.lowrank_solver == "trained"
    return by_itself or variant.distill is not None


def _collect(processes: Sequence[Any], found: Any, store: RowStore, say: Any) -> int:
    added, working = 0, set(range(len(processes)))
    while working:
        try:
            answer = found.get(timeout=WAIT_SECONDS)
        except queue.Empty as error:
            died = {number: processes[number].exitcode for number in working if processes[number].exitcode}
            if died:
                raise RuntimeError(f"workers died, with exit codes {died}: see what they wrote") from error
            continue
        if isinstance(answer, int):
            working.discard(answer)
        else:
            job, row = answer
            added += keep(job, row, store, say)
    return added


def work(
    number: int, setup: Setup, folder: Path, results: Path, seconds: float | None, given: Any, found: Any
) -> None:
    """Process `number`: take jobs until there is none, or none that would end within `seconds`."""
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    study = setup.study(device_of(number))
    read_dense(study, folder)
    while (job := given.get()) is not None:
        expected = estimate(job, rows) or 0.0
        if seconds is not None and time.perf_counter() - start + expected > seconds:
            continue  # a shorter one may still do
        row = attempted(study, job, results)
        found.put((job, row))
        if isinstance(row, dict):
            rows.append(row)
    found.put(number)


def device_of(number: int) -> str:
    """The device of worker `number`: the GPUs in turn, or the CPU."""
    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if count else "cpu"


def write_dense(study: Study, jobs: Sequence[Job], folder: Path) -> None:
    """Dense pictures of every seed and number of steps that `jobs` compare with."""
    most: dict[tuple[int, int], int] = {}
    for job in jobs:
        for seed in job.seeds:
            key = job.variant.reference_steps, seed
            most[key] = max(most.get(key, 0), job.pictures)
    for (steps, seed), count in most.items():
        torch.save(study.dense(count, steps, seed), folder / f"{steps}-{seed}.pt")


def read_dense(study: Study, folder: Path) -> None:
    """What `write_dense` wrote, made known to a study of the same model."""
    for path in folder.glob("*.pt"):
        steps, seed = map(int, path.stem.split("-"))
        study.known_dense[steps, seed] = torch.load(path, mmap=True, weights_only=True)
