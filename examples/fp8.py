"""Quantise the sparse layers to fp8 as well: what it does to the memory and to a picture.

python examples/fp8.py                           the small model that ships with rtlynx, on a CPU: slower
python examples/fp8.py --model Qwen/Qwen-Image --prompt "a lynx in the snow" --steps 50
"""

import argparse

import diffusers
import rtlynx_zoo as zoo
import torch

import rtlynx


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a diffusers model; without it, the small one that ships with rtlynx")
    parser.add_argument("--prompt", default="rocket")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()

    if options.model:
        pipe = diffusers.DiffusionPipeline.from_pretrained(options.model, dtype=torch.bfloat16).to("cuda")
    else:
        pipe = zoo.load(dtype=torch.bfloat16)

    def draw() -> torch.Tensor:
        seed = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": options.steps, "generator": seed, "output_type": "pt"}
        return pipe(options.prompt, **settings).images.float()

    def weights() -> int:
        return sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())

    dense, before = draw(), weights()
    # Without calibration, so that this takes seconds; `calibrate` takes the same recipe with rank and refit.
    rtlynx.sparsify(pipe, rtlynx.Recipe.immediate(precision="fp8"))
    difference = (draw() - dense).square().mean().sqrt()
    print(f"parameters: {before / 1e6:.1f} MB dense, {weights() / 1e6:.1f} MB with fp8 layers")
    print(f"root mean square difference of the pictures (0 to 1): {difference:.3f}")


if __name__ == "__main__":
    main()
