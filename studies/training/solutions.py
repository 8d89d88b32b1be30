"""Make the calibrated checkpoints that `rtlynx demo` loads: `cd studies && python -m training.solutions`.

Calibrates a zoo model from its calibration prompts by the paper's recipe, by ours with the same branch, and
by the recommended one, and writes them into `solutions` in the model's folder. Minutes on a GPU; on two cores
half an hour, and hours for the recommended one, which measures each form of each layer.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import rtlynx_zoo as zoo
import torch
from rtlynx_zoo.prompts import calibration_prompts

import rtlynx
from rtlynx.evaluate.variants import CALIBRATED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=zoo.names(), default="flux-emoji")
    parser.add_argument("--recipes", choices=CALIBRATED, nargs="+", default=list(CALIBRATED))
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
    for name in arguments.recipes:
        pipeline = zoo.load(arguments.model, device=arguments.device)
        start = time.perf_counter()
        report = rtlynx.calibrate(pipeline, calibration_prompts(arguments.prompts), CALIBRATED[name], options)
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
