"""Draw the same prompts from the same noise with several models, and compare what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.calibration.calls import Call, calls_by_step, chosen_steps
from rtlynx.calibration.progress import ProgressBar
from rtlynx.evaluate.layers import layer_errors, mean_error
from rtlynx.evaluate.metrics import psnr, ssim
from rtlynx.models.pipelines import check_call, draw, tensor_of
from rtlynx.models.plan import architecture_of
from rtlynx.models.sparsify import comparable, sparse_layers, target_model

# Sampling steps of each batch at which layer inputs are compared.
COMPARED_STEPS = 2


def sample_pictures(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    batch_size: int = 1,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """One picture a prompt; picture i starts from noise of seed + i, whatever the batch.

    Parameters
    ----------
    pipeline : diffusers pipeline whose `output_type="pt"` (or only output) gives pictures in [0, 1].
    pipeline_kwargs : passed to the pipeline (num_inference_steps, guidance_scale, height ...).
    advance : called with the number of pictures done since the last call.

    Returns
    -------
    Tensor (n, 3, H, W), float32, on the CPU
    """
    check_call(pipeline, pipeline_kwargs or {})
    pictures = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        pictures.append(_draw(pipeline, part, seed + start, pipeline_kwargs))
        if advance is not None:
            advance(len(part))
    return torch.cat(pictures)


def sample_and_record(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    steps: int | None = None,
    recorded: int = COMPARED_STEPS,
    seed: int = 0,
    batch_size: int = 1,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] | None = None,
) -> tuple[Tensor, list[Call]]:
    """`sample_pictures`, and the transformer's calls at `recorded` of the steps that ran for each batch.

    `steps` is the pipeline's `num_inference_steps`.
    """
    settings = dict(pipeline_kwargs or {})
    if steps is not None:
        settings["num_inference_steps"] = steps
    pictures, calls, _ = _sample_by_step(pipeline, prompts, recorded, seed, batch_size, settings, advance)
    return pictures, calls


def _sample_by_step(
    pipeline: Any,
    prompts: Sequence[str],
    recorded: int,
    seed: int,
    batch_size: int,
    settings: Mapping[str, Any],
    advance: Callable[[int], None] | None,
) -> tuple[Tensor, list[Call], int]:
    """Pictures, calls, and how many steps ran."""
    check_call(pipeline, settings)
    model = target_model(pipeline)
    pictures: list[Tensor] = []
    calls: list[Call] = []
    ran = 0
    for number, start in enumerate(range(0, len(prompts), batch_size)):
        part = prompts[start : start + batch_size]

        def draw_part(part: Sequence[str] = part, start: int = start) -> None:
            pictures.append(_draw(pipeline, part, seed + start, settings))

        by_step = calls_by_step(model, architecture_of(model), draw_part, pipeline=pipeline)
        for step in sorted(chosen_steps(number, len(by_step), recorded)):
            calls += by_step[step]
        ran = max(ran, len(by_step))
        if advance is not None:
            advance(len(part))
    return torch.cat(pictures), calls, ran


def compare(
    dense_pipeline: Any,
    sparse_pipeline: Any,
    prompts: Sequence[str],
    *,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw the same prompts from the same noise with a dense and a sparse pipeline, and compare.

    Parameters
    ----------
    dense_pipeline, sparse_pipeline : diffusers pipelines over the same base model.
    prompts : sequence of str
        Better none that the sparse model was calibrated on.
    steps : int, optional
        The pipeline's `num_inference_steps`; default: what `pipeline_kwargs` or the pipeline say.
    batch_size : int
        Pictures at a time.

    Returns
    -------
    dict
        psnr (dB, None where a picture is identical), ssim, layer_error (mean over sparse layers of
        ‖Y − Ŷ‖² / ‖Y‖² on the dense model's own inputs for these prompts), sparse_layers, images, steps
        (that ran), seconds_dense, seconds_sparse.

    Raises
    ------
    TypeError, ValueError
        For bare models, no prompts, a sparse model in the dense pipeline's place or the reverse.
    """
    if not prompts:
        raise ValueError("no prompts to compare on")
    if isinstance(dense_pipeline, nn.Module) or isinstance(sparse_pipeline, nn.Module):
        raise TypeError("a bare transformer cannot draw prompts: give a pipeline folder")
    dense, sparse = target_model(dense_pipeline), target_model(sparse_pipeline)
    layers = sparse_layers(sparse)
    if sparse_layers(dense) or not layers:
        raise ValueError("compare wants a dense pipeline and a sparse one, in this order")
    reference_model = comparable(dense, sparse)
    settings = dict(pipeline_kwargs or {})
    if steps is not None:
        settings["num_inference_steps"] = steps
    for pipeline in (dense_pipeline, sparse_pipeline):
        check_call(pipeline, settings)
    with ProgressBar("drawing", 2 * len(prompts), show=progress) as advance:
        start = time.perf_counter()
        reference, calls, ran = _sample_by_step(
            dense_pipeline, prompts, COMPARED_STEPS, seed, batch_size, settings, advance
        )
        middle = time.perf_counter()
        pictures = sample_pictures(
            sparse_pipeline,
            prompts,
            seed=seed,
            batch_size=batch_size,
            pipeline_kwargs=settings,
            advance=advance,
        )
        end = time.perf_counter()
    return {
        "psnr": psnr(pictures, reference),
        "ssim": ssim(pictures, reference),
        "layer_error": mean_error(layer_errors(reference_model, {"sparse": layers}, calls)["sparse"]),
        "sparse_layers": len(layers),
        "images": len(prompts),
        "steps": ran,
        "seconds_dense": round(middle - start, 2),
        "seconds_sparse": round(end - middle, 2),
    }


def _draw(
    pipeline: Any, prompts: Sequence[str], seed: int, pipeline_kwargs: Mapping[str, Any] | None
) -> Tensor:
    """One batch; its picture i starts from noise of seed + i."""
    seeds = range(seed, seed + len(prompts))
    drawn = draw(pipeline, prompts, seeds, {**(pipeline_kwargs or {}), "output_type": "pt"})
    pictures = tensor_of(pipeline, drawn)
    if pictures.ndim > 4:
        raise TypeError(
            f"{type(pipeline).__name__} draws no pictures, but an array of {pictures.ndim} dimensions: "
            "only pictures are compared"
        )
    return pictures
