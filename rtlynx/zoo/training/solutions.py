"""Make the calibrated checkpoints that `rtlynx demo` loads: `python -m rtlynx.zoo.training.solutions`.

Calibrates a zoo model from its calibration prompts, once by the paper's recipe and once by ours, and writes
both into `solutions` in the model's folder. Minutes on a GPU, about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import rtlynx
from rtlynx import zoo
from rtlynx.evaluate.variants import CALIBRATED
from rtlynx.zoo.prompts import calibration_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=zoo.names(), default="flux-emoji")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--steps", type=int, default=24, help="sampling steps of each prompt")
    parser.add_argument("--recorded", type=int, default=6, help="of these, how many are recorded")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="default: solutions in the model's folder")
    arguments = parser.parse_args()
    out = arguments.out or zoo.folder(arguments.model) / "solutions"

    options = rtlynx.CalibrationOptions(
        batch_size=arguments.batch_size,
        steps_per_prompt=arguments.recorded,
        pipeline_kwargs={"num_inference_steps": arguments.steps},
    )
    for name, recipe in CALIBRATED.items():
        pipeline = zoo.load(arguments.model, device=arguments.device)
        start = time.perf_counter()
        report = rtlynx.calibrate(pipeline, calibration_prompts(arguments.prompts), recipe, options)
        seconds = time.perf_counter() - start
        torch.nn.Module.to(pipeline.transformer, torch.bfloat16)  # shipped in bfloat16, like the model
        rtlynx.save(pipeline, out / name)
        before = [one.error_before for one in report.solutions.values()]
        after = [one.error for one in report.solutions.values()]
        figures = {
            "recipe": name,
            "layers": len(after),
            "error_before": sum(before) / len(before),
            "error": sum(after) / len(after),
            "seconds": round(seconds, 1),
            "device": arguments.device,
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
