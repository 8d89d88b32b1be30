"""What sparsity costs by width: train flux-fashion at a width, make it sparse, measure.

    python studies/widths.py --data fashion.npz --width 512 --seed 0 --out widths.json
    python studies/plots.py widths.json

A call does one width and one seed of the training, `--seed`. Every width sees the same number of pictures, at
a peak learning rate that falls with the square root of the width. Rows are those of `quality.py`, with width,
seed and figures of the training; the file is gone on with. The trained model is not kept.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from jobs import jobs_for
from make_variant import Calibration
from measure import Study
from picture_figures import Judges, load_judges
from quality import device_name
from row_store import RowStore
from study_model import CLASS_GUIDANCE, study_of
from training.train import Data, Trainer
from variants import STEPS, chosen

import rtlynx

MODEL = "flux-fashion by width"
VARIANTS = "dense,dense:other-seed,fp8:refit,recommended"
LEARNING_RATE, WIDTH = 6e-4, 256  # of the zoo's model


def learning_rate(width: int) -> float:
    """Peak learning rate at `width`."""
    return LEARNING_RATE * math.sqrt(WIDTH / width)


def trained(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """A pipeline with the averaged weights, in the dtype of `options`, and figures of its training.

    Raises
    ------
    OSError, ValueError
        If the archive cannot be read or is another, or the model has no such width.
    """
    # cuDNN's attention backward has faulted (illegal memory access, torch 2.11): flash attention instead.
    torch.backends.cuda.enable_cudnn_sdp(False)
    settings = argparse.Namespace(
        architecture="flux-fashion",
        data=options.data,
        width=options.width,
        pictures=options.training_pictures,
        batch=options.batch,
        lr=learning_rate(options.width),
        seed=options.seed,
    )
    trainer = Trainer(settings, Data(options.data, torch.device(options.device)))
    trainer.run(math.inf)
    model = trainer.averaged_model()
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_steps": trainer.step,
        "training_seconds": round(trainer.seconds, 1),
        "training_loss": trainer.history[-1]["loss"] if trainer.history else None,
        "learning_rate": settings.lr,
    }
    pipeline = trainer.architecture.pipeline(model, FlowMatchEulerDiscreteScheduler())
    return pipeline.to(getattr(torch, options.dtype)), figures


def store_of(options: argparse.Namespace, calibration: Calibration, judges: Judges) -> RowStore:
    """The results file. Raises ValueError if it was made with other settings."""
    about = {
        "model": MODEL,
        "architecture": "FluxTransformer2DModel",
        "dtype": options.dtype,
        "guidance": CLASS_GUIDANCE,
        "calibration": {
            "steps": calibration.steps,
            "recorded": calibration.recorded,
            "most_prompts": calibration.prompts,
        },
        "training": {"pictures": options.training_pictures, "batch": options.batch},
        "torch": torch.__version__,
        "rtlynx": rtlynx.__version__,
        "perceptual_missing": judges.missing,
    }
    return RowStore(options.out, about, options.commit, device_name(options.device))


def run(options: argparse.Namespace, judges: Judges, say: Any = print) -> int:
    """Train and measure what is missing in the file of one width and seed; the number of rows added.

    Raises
    ------
    OSError, ValueError
        As `trained` and `store_of`.
    """
    calibration = Calibration(
        steps=options.calibration_steps,
        recorded=min(6, options.calibration_steps),
        prompts=options.calibration_prompts,
    )
    torch.backends.cudnn.allow_tf32 = False  # the judges' convolutions
    store = store_of(options, calibration, judges)
    jobs = jobs_for(chosen(VARIANTS), options.pictures, options.seeds, options.steps)
    which = {"width": options.width, "training_seed": options.seed}
    todo = [job for job in jobs if store.find({**job.key, **which}) is None]
    if not todo:
        say(f"{options.out} has width {options.width}, seed {options.seed}: nothing to do")
        return 0
    pipeline, figures = trained(options)
    say(", ".join(f"{name} {value}" for name, value in figures.items()))
    study = Study(study_of(MODEL, pipeline), judges, calibration, options.batch_size)
    for job in todo:
        row = study.row(job.variant, job.pictures, job.seeds)
        store.append({**row, **which, **figures})
        means = ", ".join(f"{name} {of['mean']}" for name, of in row["figures"].items())
        say(f"{job.variant.name}: {means}, output error {row['errors']['output_error']:.3g}")
    return len(todo)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the archive of training.fashion_data")
    parser.add_argument("--width", type=int, required=True, help="a multiple of 64")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--out", type=Path, required=True, help="results file, gone on with if it is there")
    parser.add_argument("--training-pictures", type=int, default=400_000, help="that each width sees")
    parser.add_argument("--batch", type=int, default=256, help="pictures of a training step")
    parser.add_argument("--pictures", type=int, default=2000, help="drawn of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the noise")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=500, help="pictures at a time")
    parser.add_argument("--calibration-prompts", type=int, help="no more than these, for trials")
    parser.add_argument("--calibration-steps", type=int, default=24)
    parser.add_argument("--commit", help="what the figures belong to")
    options = parser.parse_args(arguments)
    try:
        run(options, load_judges(options.device, clothing=True))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
