"""Two processes that run cases or a script together, and what diffusers needs to be parallel without GPUs."""

import gc
import os
import runpy
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import diffusers.hooks.tensor_parallel
import diffusers.models.attention_dispatch
import torch
from diffusers import ContextParallelConfig, TensorParallelConfig
from safetensors.torch import load_file, save_file

PROCESSES = 2
# Seconds: of one exchange, of all cases together, and of those that compile on cards, too.
COLLECTIVE_TIMEOUT, TIMEOUT, CUDA_TIMEOUT = 40, 150, 400


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
    gc.freeze()  # what was imported before the fork is not searched in each collection
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

    def __init__(self, folder: Path):
        self.folder = folder

    def tensors(self, case):
        """A list, one dict for each process; fails where a process did."""
        said = self.said(case)
        assert said == [""] * PROCESSES, f"{case}: {said[0] or said[1]}"
        return [load_file(self.folder / f"{case}-{rank}.safetensors") for rank in range(PROCESSES)]

    def said(self, case):
        paths = [self.folder / f"{case}-{rank}.txt" for rank in range(PROCESSES)]
        assert all(path.is_file() for path in paths), f"the processes did not get as far as {case}"
        return [path.read_text() for path in paths]


def run_together(folder, cases, device="cpu"):
    """Run every case (name -> function of the folder) in two processes: over gloo, on "cuda" over NCCL."""
    # Forked, they need not import everything again; CUDA does not survive that.
    on_cards = device == "cuda"
    method, timeout = ("spawn", CUDA_TIMEOUT) if on_cards else ("fork", TIMEOUT)
    _start(_work, (folder, cases, device), method, timeout)
    return Results(folder)


def torchrun(folder, script, arguments, before=lambda: None):
    """What each of two processes says that run `script` as torchrun starts it, after `before()`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _start(_run_script, (folder, script, [str(one) for one in arguments], before, port), "fork")
    return [(folder / f"said-{rank}.txt").read_text() for rank in range(PROCESSES)]


def _run_script(rank, folder, script, arguments, before, port):
    gc.freeze()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    allow_cpu()
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


def _start(work, arguments, method, timeout=TIMEOUT):
    """Call `work(rank, *arguments)` in two processes, which are ended where they take too long."""
    context = torch.multiprocessing.start_processes(
        work, arguments, PROCESSES, join=False, start_method=method
    )
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=1) and time.monotonic() < deadline:
            pass
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
