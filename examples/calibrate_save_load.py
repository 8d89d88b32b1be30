"""Calibrate a pipeline on prompts, save what was found, and load it onto the same base model.

python examples/calibrate_save_load.py            the small model that ships with rtlynx, some minutes
python examples/calibrate_save_load.py --model black-forest-labs/FLUX.1-dev --prompts prompts.txt --steps 28
"""

import argparse
from pathlib import Path

import diffusers
import rtlynx_zoo as zoo
import torch

import rtlynx


def load(model: str | None) -> diffusers.DiffusionPipeline:
    if model is None:
        return zoo.load()
    return diffusers.DiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16).to("cuda")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a diffusers model; without it, the small one that ships with rtlynx")
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line; use hundreds")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--skip", nargs="*", default=[], help="glob patterns of layers that stay dense")
    parser.add_argument("--out", default="lynx", help="folder for the checkpoint")
    options = parser.parse_args()
    prompts = ["hot dog", "rocket", "fox", "red heart", "pizza", "snail", "cactus", "ghost"]
    if options.prompts:
        prompts = options.prompts.read_text().splitlines()

    pipe = load(options.model)
    how = rtlynx.CalibrationOptions(pipeline_kwargs={"num_inference_steps": options.steps})
    report = rtlynx.calibrate(pipe, prompts, rtlynx.Recipe(skip=options.skip), how)
    before = sum(one.error_before for one in report.solutions.values())
    after = sum(one.error for one in report.solutions.values())
    print(f"{len(report.solutions)} layers; compensation leaves {after / before:.0%} of their error")
    rtlynx.save(pipe, options.out)
    del pipe  # two large models may not fit

    other = load(options.model)  # the base model again, dense
    rtlynx.load(other, options.out)
    picture = other(prompts[0], num_inference_steps=options.steps, generator=torch.Generator().manual_seed(0))
    picture.images[0].save("calibrated.png")
    print("wrote calibrated.png")


if __name__ == "__main__":
    main()
