"""`rtlynx demo`: dense, dense fp8, the paper's recipe and ours draw the same prompts, in a minute."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rtlynx_zoo as zoo
from rtlynx_zoo.prompts import calibration_prompts, demo_prompts
from torch import Tensor

from rtlynx.calibration.progress import ProgressBar
from rtlynx.evaluate.grid import picture_grid, png_bytes
from rtlynx.evaluate.metrics import psnr, ssim
from rtlynx.evaluate.results import environment, write_results
from rtlynx.evaluate.sampling import sample_pictures
from rtlynx.evaluate.variants import LIVE_PROMPTS, Variant, build_variant

MODEL = "flux-emoji"
IMAGES, STEPS = 8, 8
GUIDANCE = 3.0
BATCH = 8
# Variant of `variants.NAMES` -> what it is called here.
LABELS = {
    "dense": "dense",
    "fp8": "dense fp8",
    "activation-2:4+norm+lowrank": "the paper's recipe",
    "recommended": "rtlynx, recommended",
}


def run_demo(
    out: str | Path,
    *,
    images: int = IMAGES,
    steps: int = STEPS,
    seed: int = 0,
    calibrate: bool = False,
    progress: bool = True,
    device: str = "cpu",
) -> dict[str, Any]:
    """Draw the same prompts from the same noise with the variants of `LABELS`, compare, and write two files.

    Parameters
    ----------
    out : folder, created if missing
        Gets pictures.png and results.json, both at the end or none.
    images : int in 1..64
        Pictures a variant.
    steps : int
        Sampling steps, each of two model passes (guidance).
    seed : int
        Picture i starts from noise of seed + i.
    calibrate : bool
        Calibrate live, on fewer prompts, instead of loading the shipped solutions.
    progress : bool, device : str
        Show progress bars; where the transformer runs, in float32.

    Returns
    -------
    dict
        What results.json holds. Dense pictures that ship with the model are not drawn again; their
        `seconds` are None.

    Raises
    ------
    ValueError, NotADirectoryError, FileNotFoundError, CheckpointError
        For numbers out of range, a model that is not here, an `out` that is a file, missing or damaged
        solutions. Nothing is written.
    """
    out, prompts = checked(out, images, steps)
    start = time.perf_counter()
    dense = zoo.load(MODEL, device=device)
    # All before the first picture: what is missing or damaged is said at once.
    variants = [demo_variant(name, dense, MODEL, calibrate=calibrate, progress=progress) for name in LABELS]
    drawn: dict[str, Tensor] = {}
    rows = []
    with ProgressBar("drawing", len(LABELS) * images, show=progress) as advance:
        for variant in variants:
            began = time.perf_counter()
            cached = _cached(variant, prompts, seed, steps)
            if cached is None:
                how = sampling(steps, seed)
                drawn[variant.name] = sample_pictures(variant.pipeline, prompts, **how, advance=advance)
                seconds = round(time.perf_counter() - began, 2)
            else:
                drawn[variant.name], seconds = cached, None
                advance(images)
            rows.append(_row(variant.name, drawn, seconds))
    results = {
        **settings(MODEL, device, steps, images, seed),
        "parameters": sum(parameter.numel() for parameter in dense.transformer.parameters()),
        "picture_size": drawn["dense"].shape[-1],
        "prompts": prompts,
        "variants": rows,
        "seconds": round(time.perf_counter() - start, 1),
    }
    notes = {row["label"]: f"PSNR {row['psnr']:.1f} dB" for row in rows if row["psnr"] is not None}
    pictures = {LABELS[name]: some for name, some in drawn.items()}
    files = {"pictures.png": png_bytes(picture_grid(pictures, prompts[:8], notes))}
    write_results(out, files, results)
    return results


def sentences(results: Mapping[str, Any]) -> list[str]:
    """Three sentences about `run_demo`'s results that hold whatever the numbers are."""
    of = {row["name"]: row["psnr"] for row in results["variants"]}
    fp8, paper, ours = (of[name] for name in list(LABELS)[1:])
    said = [
        "PSNR against the dense pictures: "
        + ", ".join(
            f"{row['label']} {row['psnr']:.1f} dB" if row["psnr"] is not None else f"{row['label']} identical"
            for row in results["variants"]
            if row["name"] != "dense"
        )
        + "."
    ]
    if None not in (fp8, paper, ours):
        said.append(
            f"Our recipe lies {_apart(ours - paper)} the paper's and {_apart(ours - fp8)} dense fp8, "
            "which drops no activations."
        )
    said.append(
        f"The model draws {results['picture_size']}x{results['picture_size']} emoji with "
        f"{results['parameters'] / 1e6:.1f}M parameters: it compares recipes, and does not show FLUX.1."
    )
    return said


def _apart(gain: float) -> str:
    return f"{abs(gain):.1f} dB {'above' if gain >= 0 else 'below'}"


def checked(out: str | Path, images: int, steps: int) -> tuple[Path, list[str]]:
    """The folder and the prompts, once all that a user gave is known to be usable."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} exists and is not a folder")
    if steps < 1:
        raise ValueError(f"steps is a whole number above 0, got {steps}")
    return out, demo_prompts(images)


def demo_variant(name: str, dense: Any, model: str, *, calibrate: bool, progress: bool) -> Variant:
    """One variant of `dense`, from the model's shipped solutions or calibrated here."""
    prompts = calibration_prompts(LIVE_PROMPTS) if calibrate else ()
    solutions = None if calibrate else zoo.folder(model) / "solutions"
    return build_variant(name, dense, solutions=solutions, calibration_prompts=prompts, progress=progress)


def sampling(steps: int, seed: int) -> dict[str, Any]:
    """Arguments of `sample_pictures` that all variants share."""
    pipeline = {"guidance_scale": GUIDANCE, "num_inference_steps": steps}
    return {"seed": seed, "batch_size": BATCH, "pipeline_kwargs": pipeline}


def settings(model: str, device: str, steps: int, images: int, seed: int) -> dict[str, Any]:
    """What was asked for, what drew, in which version."""
    return {
        "model": f"zoo:{model}",
        "device": device,
        "steps": steps,
        "images": images,
        "seed": seed,
        "guidance": GUIDANCE,
        **environment(),
    }


def _cached(variant: Variant, prompts: Sequence[str], seed: int, steps: int) -> Tensor | None:
    return zoo.dense_pictures(MODEL, prompts, seed, steps, GUIDANCE) if variant.name == "dense" else None


def _row(name: str, drawn: Mapping[str, Tensor], seconds: float | None) -> dict[str, Any]:
    mine, reference = drawn[name], drawn["dense"]
    return {
        "name": name,
        "label": LABELS[name],
        "psnr": psnr(mine, reference),
        "ssim": ssim(mine, reference),
        "seconds": seconds,
    }
