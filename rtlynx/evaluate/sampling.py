"""Draw the same prompts from the same noise with several models, and compare what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.calibration.calls import Call, chosen_steps, record_calls
from rtlynx.evaluate.layers import layer_errors, mean_error
from rtlynx.evaluate.metrics import psnr, ssim
from rtlynx.models.plan import architecture_of
from rtlynx.models.sparsify import sparse_layers, target_model
from rtlynx.pipelines import quiet, sampling_steps
from rtlynx.progress import ProgressBar

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
    pipeline : diffusers pipeline whose `output_type="pt"` gives pictures in [0, 1].
    pipeline_kwargs : passed to the pipeline (num_inference_steps, guidance_scale, height ...).
    advance : called with the number of pictures done since the last call.

    Returns
    -------
    Tensor (n, 3, H, W), float32, on the CPU
    """
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
    steps: int,
    recorded: int = COMPARED_STEPS,
    seed: int = 0,
    batch_size: int = 1,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] | None = None,
) -> tuple[Tensor, list[Call]]:
    """`sample_pictures`, and the transformer's calls at `recorded` of the `steps` steps of each batch."""
    settings = {**(pipeline_kwargs or {}), "num_inference_steps": steps}
    model = target_model(pipeline)
    pictures: list[Tensor] = []
    calls: list[Call] = []
    for number, start in enumerate(range(0, len(prompts), batch_size)):
        part = prompts[start : start + batch_size]

        def draw(part: Sequence[str] = part, start: int = start) -> None:
            pictures.append(_draw(pipeline, part, seed + start, settings))

        calls += record_calls(model, architecture_of(model), draw, chosen_steps(number, steps, recorded))
        if advance is not None:
            advance(len(part))
    return torch.cat(pictures), calls


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
        Default: `num_inference_steps` of `pipeline_kwargs`, else the pipeline's own default.
    batch_size : int
        Pictures at a time.

    Returns
    -------
    dict
        psnr (dB, None where a picture is identical), ssim, layer_error (mean over sparse layers of
        ‖Y − Ŷ‖² / ‖Y‖² on the dense model's own inputs for these prompts), sparse_layers, images, steps,
        seconds_dense, seconds_sparse.

    Raises
    ------
    TypeError, ValueError
        For bare models, no prompts, a sparse model in the dense pipeline's place or the reverse.
    """
    if not prompts:
        raise ValueError("no prompts to compare on")
    if isinstance(dense_pipeline, nn.Module) or isinstance(sparse_pipeline, nn.Module):
        raise TypeError("a bare transformer cannot draw prompts: give a pipeline folder")
    dense, layers = target_model(dense_pipeline), sparse_layers(target_model(sparse_pipeline))
    if sparse_layers(dense) or not layers:
        raise ValueError("compare wants a dense pipeline and a sparse one, in this order")
    settings = dict(pipeline_kwargs or {})
    steps = steps or sampling_steps(dense_pipeline, settings)
    settings.pop("num_inference_steps", None)
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    with ProgressBar("drawing", 2 * len(prompts), show=progress) as advance:
        common["advance"] = advance
        start = time.perf_counter()
        reference, calls = sample_and_record(
            dense_pipeline, prompts, steps=steps, pipeline_kwargs=settings, **common
        )
        middle = time.perf_counter()
        settings["num_inference_steps"] = steps
        pictures = sample_pictures(sparse_pipeline, prompts, pipeline_kwargs=settings, **common)
        end = time.perf_counter()
    return {
        "psnr": psnr(pictures, reference),
        "ssim": ssim(pictures, reference),
        "layer_error": mean_error(layer_errors(dense, {"sparse": layers}, calls)["sparse"]),
        "sparse_layers": len(layers),
        "images": len(prompts),
        "steps": steps,
        "seconds_dense": round(middle - start, 2),
        "seconds_sparse": round(end - middle, 2),
    }


def _draw(
    pipeline: Any, prompts: Sequence[str], seed: int, pipeline_kwargs: Mapping[str, Any] | None
) -> Tensor:
    """One batch; its picture i starts from noise of seed + i."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    settings = {**(pipeline_kwargs or {}), "output_type": "pt"}
    with quiet(pipeline):
        return pipeline(list(prompts), generator=generators, **settings).images.float().cpu()
