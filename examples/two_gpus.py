"""Draw one picture on two GPUs: each takes half of the tokens, or half of each weight.

torchrun --nproc-per-node 2 examples/two_gpus.py                  the small model that ships with rtlynx
torchrun --nproc-per-node 2 examples/two_gpus.py --model Qwen/Qwen-Image --prompt "a lynx in the snow"
"""

import argparse
import os
import time

import diffusers
import rtlynx_zoo as zoo
import torch
from diffusers import ContextParallelConfig, TensorParallelConfig

import rtlynx


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a diffusers model; without it, the small one that ships with rtlynx")
    parser.add_argument("--prompt", default="rocket")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--split", choices=["tokens", "weights"], default="tokens")
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if options.model:
        pipe = diffusers.DiffusionPipeline.from_pretrained(options.model, dtype=torch.bfloat16).to(device)
    else:
        pipe = zoo.load(dtype=torch.bfloat16).to(device)

    # Groups of four inputs stay inside a shard. With a calibrated folder: rtlynx.load in place of sparsify.
    recipe = rtlynx.Recipe.immediate(precision="fp8", tp_degree=count)
    if options.split == "weights":  # cut first, then made sparse
        pipe.transformer.enable_parallelism(config=TensorParallelConfig(tp_degree=count))
        rtlynx.sparsify(pipe, recipe)
    else:  # made sparse first, so that blocks stay fused
        rtlynx.sparsify(pipe, recipe)
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count))

    pipe.set_progress_bar_config(disable=rank > 0)
    start = time.perf_counter()
    seed = torch.Generator().manual_seed(0)  # the same noise on every process
    picture = pipe(options.prompt, num_inference_steps=options.steps, generator=seed).images[0]
    if rank == 0:
        picture.save("two_gpus.png")
        print(f"{count} processes drew two_gpus.png in {time.perf_counter() - start:.1f} s")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
