"""Two processes for a test: apart from the one that starts them, and clear where one of them dies."""

import os
import signal
import threading
from functools import partial

import pytest
import torch
from parallel_helpers import run_together
from process_helpers import PROCESSES, in_two_processes


def _look(rank, folder):
    # A process that is made from this one has this one's threads' locks, but not its threads.
    parent = os.getppid()
    tasks = len(os.listdir(f"/proc/{parent}/task"))
    (folder / f"{rank}.txt").write_text(f"{parent} {tasks} {os.getpid()}")


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_processes_come_from_one_without_threads(tmp_path):
    ready = threading.Event()
    thread = threading.Thread(target=ready.wait)
    thread.start()
    try:
        in_two_processes(_look, tmp_path)
    finally:
        ready.set()
        thread.join()
    (parent, tasks, one), (same, _, other) = (
        map(int, (tmp_path / f"{rank}.txt").read_text().split()) for rank in range(PROCESSES)
    )
    assert parent == same != os.getpid()
    assert len({one, other, os.getpid()}) == 3
    assert tasks == 1


def _sum(folder):
    x = torch.ones(1)
    torch.distributed.all_reduce(x)
    return {"x": x}


def _die(rank, folder):
    if torch.distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSEGV)
    return _sum(folder)


def test_who_dies_is_named_and_results_before_are_kept(tmp_path):
    results = run_together(tmp_path, {"sum": _sum, "death": partial(_die, 1), "after": _sum})
    assert [one["x"].item() for one in results.tensors("sum")] == [PROCESSES] * PROCESSES
    for case in ("death", "after"):
        why = rf"did not end {case}: process 1 .*SIGSEGV \(process 0 was at .*; process 1 was at death\)"
        with pytest.raises(AssertionError, match=why):
            results.tensors(case)


def _sleep(rank):
    threading.Event().wait()


def test_processes_that_hang_are_ended():
    with pytest.raises(TimeoutError, match="were not done after"):
        in_two_processes(_sleep, timeout=0.2)


def _raise(rank):
    raise ValueError(f"{rank} does not like it")


def test_an_error_is_shown():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="does not like it"):
        in_two_processes(_raise)
