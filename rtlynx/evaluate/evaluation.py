"""`rtlynx evaluate`: a model draws dense, in dense fp8 and sparse, and a page compares them."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rtlynx._version import __version__
from rtlynx.calibration import CalibrationOptions, calibrate
from rtlynx.calibration.progress import ProgressBar
from rtlynx.evaluate.evaluation_figures import DENSE, measure
from rtlynx.evaluate.evaluation_page import SHOWN, render_page
from rtlynx.evaluate.picture_folder import PictureFolder
from rtlynx.evaluate.picture_metrics import METRICS, Metric
from rtlynx.evaluate.results import environment, write_results
from rtlynx.evaluate.sampling import sample_pictures
from rtlynx.io.checkpoint import load, read_index, save
from rtlynx.models.fingerprint import model_fingerprint
from rtlynx.models.pipelines import ZOO_PREFIX, check_call, load_model
from rtlynx.models.sparsify import sparse_layers, sparsify, target_model
from rtlynx.recipe import Recipe

CHECKPOINT = "checkpoint"  # in the folder of the evaluation, where it calibrated
DENSE_FP8 = Recipe.dense_fp8()


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated, on what.

    Parameters
    ----------
    model : str
        "zoo:NAME", or a local diffusers pipeline folder; dense.
    prompts : sequence of str
        Picture i is of prompt i.
    recipe : Recipe, optional
        How the sparse variant is made; default `Recipe.recommended()`. Leave it out with `checkpoint`.
    checkpoint : Path, optional
        A checkpoint of that model, in place of a recipe.
    calibration_prompts : sequence of str
        For a recipe that needs calibration; none of them is drawn.
    calibration : CalibrationOptions
        How it is calibrated. Its `pipeline_kwargs` are not used.
    seed : int
        Picture i starts from noise of seed + i.
    pipeline_kwargs : mapping
        Passed to the pipeline (num_inference_steps, guidance_scale, height ...), in calibration too.
    device : str
        Weights are float32 on the CPU, else bfloat16.

    Raises
    ------
    ValueError
        For no prompts, a recipe and a checkpoint, a recipe that needs calibration and no prompts for it, a
        prompt that is both drawn and calibrated on.
    """

    model: str
    prompts: Sequence[str]
    recipe: Recipe | None = None
    checkpoint: Path | None = None
    calibration_prompts: Sequence[str] = ()
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    seed: int = 0
    pipeline_kwargs: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not self.prompts:
            raise ValueError("prompts are a list of at least one string")
        if self.recipe is not None and self.checkpoint is not None:
            raise ValueError("give a recipe or a checkpoint, not both: a checkpoint holds its recipe")
        if self.checkpoint is None and self.recipe is None:
            object.__setattr__(self, "recipe", Recipe.recommended())
        if not self.calibrates:
            return
        if not self.calibration_prompts:
            raise ValueError(
                "this recipe needs calibration: give prompts for it, other than those drawn, or a checkpoint"
            )
        calibrated_on = set(self.calibration_prompts)
        both = next((one for one in self.prompts if one in calibrated_on), None)
        if both is not None:
            raise ValueError(
                f"{both!r} is drawn and calibrated on, which would flatter: leave it out of one of the lists"
            )

    @property
    def calibrates(self) -> bool:
        """Whether the sparse variant is calibrated here."""
        return self.recipe is not None and self.recipe.needs_calibration

    def to_dict(self) -> dict[str, Any]:
        """All that decides what is drawn, how and with what, in JSON values; long lists as digests."""
        source: dict[str, Any] = {}
        if self.checkpoint is not None:
            source["checkpoint"] = read_index(self.checkpoint)["sha256"]
        else:
            assert self.recipe is not None
            source["recipe"] = self.recipe.to_dict()
        if self.calibrates:
            options = asdict(self.calibration)
            chosen = {key: options[key] for key in options if key not in ("folder", "pipeline_kwargs")}
            source["calibration"] = {**chosen, "prompts": _digest(self.calibration_prompts)}
        zoo = self.model.startswith(ZOO_PREFIX)
        return {
            "model": self.model if zoo else str(Path(self.model).resolve()),
            **source,
            "prompts": _digest(self.prompts),
            "seed": self.seed,
            "pipeline": dict(self.pipeline_kwargs),
            "device": device_name(self.device),
            "rtlynx": __version__,
            "torch": torch.__version__,
        }


class Variant(NamedTuple):
    """One column of the page.

    change : makes a dense pipeline into this variant, in place, and returns facts to keep; None for dense.
    """

    name: str
    title: str
    change: Callable[[Any], dict[str, Any]] | None


def evaluate_model(
    settings: EvaluationSettings,
    out: str | Path,
    *,
    images: int = 8,
    metrics: Sequence[Metric] = METRICS,
    download: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw the same prompts from the same noise dense, in dense fp8 and sparse; measure; write a page.

    Parameters
    ----------
    out : folder, created if missing
        Gets every picture as soon as it is drawn, the checkpoint if one is calibrated here, and at the end
        results.json and report.html. Run it again to continue, also with more images.
    images : int
        The first so many of the prompts are drawn.
    metrics : sequence of Metric
    download : bool
        Download the networks of metrics where they are missing.
    progress : bool
        Show progress bars.

    Returns
    -------
    dict
        What results.json holds.

    Raises
    ------
    ValueError, TypeError
        If the model is sparse already, no pipeline, or draws NaN.
    CheckpointError, NotADirectoryError, FileNotFoundError
        If `out` is a file, or holds something else or an evaluation with other settings; for a missing or
        damaged model or checkpoint.

    Notes
    -----
    One transformer is in memory at any time. fp8 and refitted weights replace the dense ones, so the model is
    loaded anew between the two. Memory peaks while a transformer is changed, when the new weights (half the
    dense bytes in fp8, as many in bfloat16) are beside the dense ones; calibration adds its moments
    (`CalibrationOptions.memory_gb`). Networks of metrics are loaded when the transformer is gone.
    """
    out = Path(out)
    if images < 1:
        raise ValueError(f"images is a whole number above 0, got {images}")
    prompts = list(settings.prompts[:images])
    folder = PictureFolder(out, settings.to_dict())
    variants = _variants(settings, out, progress=progress)
    _draw_all(settings, variants, folder, prompts, progress=progress)
    _free()
    how: dict[str, Any] = {"device": settings.device, "download": download, "progress": progress}
    titles = {variant.name: variant.title for variant in variants}
    rows, reasons = measure(folder, titles, prompts, metrics, model=settings.model, **how)
    results = {
        "model": settings.model,
        "sparse": _source(settings),
        "images": len(prompts),
        "seed": settings.seed,
        "pipeline": folder.settings["pipeline"],
        "simulated": not rows[-1]["kernels"],
        "variants": rows,
        "unavailable": reasons,
        "prompts": prompts,
        "device": device_name(settings.device),
        **environment(),
    }
    shown = [
        {one.name: folder.read(one.name, i)[0] for one in variants} for i in range(min(SHOWN, len(prompts)))
    ]
    write_results(out, {"report.html": render_page(results, shown, metrics).encode()}, results)
    return results


def _variants(settings: EvaluationSettings, out: Path, *, progress: bool) -> list[Variant]:
    def dense_fp8(pipeline: Any) -> dict[str, Any]:
        sparsify(pipeline, DENSE_FP8)
        return {}

    def sparse(pipeline: Any) -> dict[str, Any]:
        saved = out / CHECKPOINT
        if settings.checkpoint is not None:
            load(pipeline, settings.checkpoint)
        elif not settings.calibrates:
            sparsify(pipeline, settings.recipe)
        elif saved.exists():  # of a run that was interrupted later
            load(pipeline, saved)
        else:
            options = CalibrationOptions(
                **{**vars(settings.calibration), "pipeline_kwargs": dict(settings.pipeline_kwargs)}
            )
            start = time.perf_counter()
            report = calibrate(
                pipeline, settings.calibration_prompts, settings.recipe, options, progress=progress
            )
            seconds = time.perf_counter() - start
            save(pipeline, saved)
            compared = [] if report.choice is None else report.choice.compared()
            return {"calibration_seconds": round(seconds, 1), "dense_steps": [*map(_finite, compared)]}
        return {}

    return [
        Variant(DENSE, "Dense", None),
        Variant("dense-fp8", "Dense fp8", dense_fp8),
        Variant("sparse", "Sparse", sparse),
    ]


# -------------------------------------------------------------------------------------------------- drawing


def _draw_all(
    settings: EvaluationSettings,
    variants: Sequence[Variant],
    folder: PictureFolder,
    prompts: Sequence[str],
    *,
    progress: bool,
) -> None:
    """Draw what is missing, with one transformer in memory at any time."""
    pipeline, changed = None, False
    for variant in variants:
        missing = folder.missing(variant.name, len(prompts))
        if not missing and "peak_memory_bytes" in folder.facts(variant.name):
            continue
        if pipeline is None or changed:
            if changed:
                pipeline = None
                _free()
            pipeline, changed = _load_dense(settings), False
            folder.claim(model_fingerprint(target_model(pipeline)))
        if variant.change is not None:
            changed = True
            folder.record(variant.name, variant.change(pipeline))
        folder.record(variant.name, _layers(target_model(pipeline), settings.device))
        _draw(settings, variant, pipeline, folder, missing, progress=progress)


def _load_dense(settings: EvaluationSettings) -> Any:
    pipeline = load_model(settings.model, device=settings.device)
    if isinstance(pipeline, nn.Module):
        raise TypeError(f"{settings.model} is a bare transformer and draws nothing: give a pipeline folder")
    layers = sparse_layers(target_model(pipeline))
    if layers:
        raise ValueError(
            f"{settings.model} is sparse already ({len(layers)} layers): give the dense model, and what "
            "makes it sparse as a checkpoint"
        )
    check_call(pipeline, settings.pipeline_kwargs)
    return pipeline


def _draw(
    settings: EvaluationSettings,
    variant: Variant,
    pipeline: Any,
    folder: PictureFolder,
    missing: Sequence[int],
    *,
    progress: bool,
) -> None:
    on_cuda = torch.device(settings.device).type == "cuda"

    def draw(number: int) -> Tensor:
        prompt, seed = settings.prompts[number], settings.seed + number
        (picture,) = sample_pictures(pipeline, [prompt], seed=seed, pipeline_kwargs=settings.pipeline_kwargs)
        if not torch.isfinite(picture).all():
            raise ValueError(f"{variant.title} drew NaN or Inf for {prompt!r}: there is nothing to compare")
        return picture

    with ProgressBar(f"drawing: {variant.title}", len(missing) + 1, show=progress) as advance:
        if on_cuda:
            _free()  # of dense weights that others took the place of
            torch.cuda.reset_peak_memory_stats(settings.device)
        draw(0)  # kernels are compiled and memory is allocated now: not timed
        peak = torch.cuda.max_memory_allocated(settings.device) if on_cuda else None
        folder.record(variant.name, {"peak_memory_bytes": peak})
        advance(1)
        for number in missing:
            start = time.perf_counter()
            picture = draw(number)  # on the CPU when it returns, so the device is done
            folder.write(variant.name, number, picture, time.perf_counter() - start)
            advance(1)


@torch.no_grad()  # no kernel serves weights that want gradients
def _layers(model: nn.Module, device: str) -> dict[str, Any]:
    """How many layers of which format, and whether the kernels serve those that drop activations."""
    layers = sparse_layers(model).values()
    dropping = [layer for layer in layers if layer.pattern.n < layer.pattern.m]
    served = torch.device(device).type == "cuda" and all(
        layer.supported(torch.empty(16, layer.in_features, dtype=torch.bfloat16, device=device))
        for layer in dropping
    )
    return {"layers": dict(Counter(layer.format.name for layer in layers)), "kernels": served}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------- descriptions


def _source(settings: EvaluationSettings) -> dict[str, Any]:
    """Where the sparse variant comes from."""
    if settings.checkpoint is not None:
        recipe = Recipe.from_dict(read_index(settings.checkpoint)["recipe"])
        return {"checkpoint": str(settings.checkpoint), "recipe": recipe.to_dict()}
    assert settings.recipe is not None
    calibrated = len(settings.calibration_prompts) if settings.calibrates else 0
    return {"recipe": settings.recipe.to_dict(), "calibration_prompts": calibrated}


def device_name(device: str) -> str:
    """ "cpu", or what the card is called."""
    parsed = torch.device(device)
    return torch.cuda.get_device_name(parsed) if parsed.type == "cuda" else str(parsed)


def _finite(compared: Mapping[str, Any]) -> dict[str, Any]:
    """A candidate of dense steps, whose error is None where what it drew is not finite."""
    return {**compared, "error": compared["error"] if math.isfinite(compared["error"]) else None}


def _digest(texts: Sequence[str]) -> str:
    whole = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
    return f"{len(texts)} ({whole[:12]})"
