"""Two processes that run cases or a script together, and what diffusers needs to be parallel without GPUs."""

import gc
import os
import re
import runpy
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import diffusers.hooks.tensor_parallel
import diffusers.models.attention_dispatch
import torch
from diffusers import ContextParallelConfig, TensorParallelConfig
from helpers import relative_error
from process_helpers import PROCESSES, TIMEOUT, in_two_processes
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import ProcessException

LIMIT = 1e-5  # float32, summed in another order
# Seconds: of one exchange, and of all cases where some compile on cards.
COLLECTIVE_TIMEOUT, CUDA_TIMEOUT = 40, 400


def allow_cpu():
    """A machine without an accelerator counts zero devices, and no list of diffusers has the CPU."""
    torch.accelerator.device_count = lambda: 1
    diffusers.hooks.tensor_parallel._SUPPORTED_TP_DEVICES += ("cpu",)
    diffusers.models.attention_dispatch._native_attention_forward_op = _attention


def _attention(_ctx, query, key, value, _mask, _dropout, _causal, _scale, _gqa, return_lse, **_settings):
    """Attention of (B, S, H, D) that can return its log-sum-exp, which ring attention needs."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    out = (scores.softmax(-1) @ value).transpose(1, 2)
    return (out, scores.logsumexp(-1).transpose(1, 2)) if return_lse else out


def tensor_parallel(model):
    model.enable_parallelism(config=TensorParallelConfig(tp_degree=PROCESSES))
    return model


def ulysses(model):
    """Also of token counts that do not split evenly."""
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=PROCESSES, ulysses_anything=True))
    return model


def even(model):
    """Ulysses of token counts that split evenly, which compiles."""
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=PROCESSES))
    return model


def ring(model):
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=PROCESSES))
    return model


def message(action):
    """What `action()` says that it refuses; the empty string if it does not refuse."""
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _work(rank, folder, cases, device):
    gc.freeze()  # what was imported before is not searched in each collection
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT),
    )
    if device == "cpu":
        allow_cpu()
    for name, case in cases.items():
        said, tensors = "", {}
        try:
            result = case(folder)
            if isinstance(result, str):
                said = result
            else:
                tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in result.items()}
        except Exception:
            said = traceback.format_exc()
        save_file(tensors, folder / f"{name}-{rank}.safetensors", {"said": said})
        (folder / f"{name}-{rank}.txt").write_text(said)
    torch.distributed.destroy_process_group()


class Results:
    """What each process gave in each case: tensors by name, and what it said."""

    def __init__(self, folder: Path, stopped: str = ""):
        self.folder, self.stopped = folder, stopped

    def tensors(self, case):
        """A list, one dict for each process; fails where a process did."""
        said = self.said(case)
        assert said == [""] * PROCESSES, f"{case}: {said[0] or said[1]}"
        return [load_file(self.folder / f"{case}-{rank}.safetensors") for rank in range(PROCESSES)]

    def said(self, case):
        paths = [self.folder / f"{case}-{rank}.txt" for rank in range(PROCESSES)]
        assert all(path.is_file() for path in paths), f"the processes did not end {case}: {self.stopped}"
        return [path.read_text() for path in paths]

    def check_refusal(self, case, words):
        """Each process refused the case, in `words` (a regular expression)."""
        for said in self.said(case):
            assert re.match(words, said), said or "it did not refuse"


def run_together(folder, cases, device="cpu"):
    """Run every case (name -> function of the folder) in two processes: over gloo, on "cuda" over NCCL.

    Where a process dies, the cases before keep their results.
    """
    method, timeout = ("spawn", CUDA_TIMEOUT) if device == "cuda" else ("forkserver", TIMEOUT)
    try:
        in_two_processes(_work, folder, cases, device, timeout=timeout, method=method)
    except (ProcessException, TimeoutError) as error:
        at = [
            next((name for name in cases if not (folder / f"{name}-{rank}.txt").is_file()), None)
            for rank in range(PROCESSES)
        ]
        if at == [None] * PROCESSES:
            raise
        where = "; ".join(f"process {rank} was at {name or 'the end'}" for rank, name in enumerate(at))
        return Results(folder, f"{error} ({where})")
    return Results(folder)


def torchrun(folder, script, arguments, before=None):
    """What each of two processes says that run `script` as torchrun starts it, after `before()`."""
    # As torchrun does it: the store is here, on a port that nobody else can take.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    in_two_processes(_run_script, folder, script, [str(one) for one in arguments], before, store.port)
    return [(folder / f"said-{rank}.txt").read_text() for rank in range(PROCESSES)]


def _run_script(rank, folder, script, arguments, before, port):
    gc.freeze()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    allow_cpu()
    if before is not None:
        before()
    sys.argv = [str(script), *arguments]
    with (folder / f"said-{rank}.txt").open("w") as said:
        sys.stdout = sys.stderr = said
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit:
            pass
        except Exception:
            traceback.print_exc()


def assert_close(result, expected, limit=LIMIT):
    """Of every process, nine tokens of ten: rounding may turn a near tie of entries in a token."""
    for theirs in result:
        error = (theirs["y"] - expected).double().norm(dim=-1) / expected.double().norm(dim=-1)
        assert error.detach().quantile(0.9) < limit
        assert relative_error(theirs["y"], expected) < 100 * limit
