"""`rtlynx demo --full`: ten variants draw the same prompts; a report with the error of every layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rtlynx_zoo as zoo
from rtlynx_zoo.features import real_features
from torch import Tensor, nn

from rtlynx.calibration.calls import Call
from rtlynx.calibration.progress import ProgressBar
from rtlynx.evaluate.demo import MODEL, checked, demo_variant, sampling, settings
from rtlynx.evaluate.grid import picture_grid, png_bytes
from rtlynx.evaluate.layers import (
    Distribution,
    activation_distributions,
    layer_errors,
    mean_error,
    weight_distributions,
)
from rtlynx.evaluate.metrics import KernelDistance, kid, picture_features, psnr, retrieval, ssim
from rtlynx.evaluate.report import render_report
from rtlynx.evaluate.results import write_results
from rtlynx.evaluate.sampling import sample_and_record, sample_pictures
from rtlynx.evaluate.variants import LIVE_PROMPTS, NAMES, Variant
from rtlynx.models.plan import make_plan
from rtlynx.models.sparsify import comparable
from rtlynx.recipe import Recipe

# Two dozen pictures, and as many steps as keep it well under ten minutes on two cores.
IMAGES, STEPS = 24, 10
GRID_COLUMNS = 8
RECORDED_STEPS = 2  # of each batch, where layer inputs are compared
DISTRIBUTION_CALLS = 4


def run_full_demo(
    out: str | Path,
    *,
    images: int = IMAGES,
    steps: int = STEPS,
    seed: int = 0,
    calibrate: bool = False,
    progress: bool = True,
    device: str = "cpu",
    model: str = MODEL,
) -> dict[str, Any]:
    """Draw the same prompts from the same noise with every variant, measure, and write three files.

    Parameters
    ----------
    out : folder, created if missing
        Gets results.json, grid.png and report.html, all at the end or none.
    images, steps, seed, calibrate, progress, device
        As of `rtlynx.evaluate.demo.run_demo`.
    model : str
        One of `rtlynx_zoo.names()`.

    Returns
    -------
    dict
        What results.json holds.

    Raises
    ------
    ValueError, NotADirectoryError, FileNotFoundError, CheckpointError
        For numbers out of range, an unknown model or one that is not here, an `out` that is a file, missing
        or damaged solutions. Nothing is written.
    """
    out, prompts = checked(out, images, steps)
    start = time.perf_counter()
    dense = zoo.load(model, device=device)
    variants = [demo_variant(name, dense, model, calibrate=calibrate, progress=progress) for name in NAMES]
    drawn = _draw(variants, prompts, steps=steps, seed=seed, progress=progress)
    transformer = dense.transformer
    rows = _rows(transformer, variants, drawn, prompts, progress=progress)
    layers = make_plan(transformer, Recipe.immediate(grouping="adjacent")).sparse
    weights = weight_distributions(transformer, layers)
    spread = drawn.calls[:: max(1, len(drawn.calls) // DISTRIBUTION_CALLS)]
    activations = activation_distributions(transformer, layers, spread)
    results: dict[str, Any] = {
        **settings(model, device, steps, images, seed),
        "variants": rows,
        "transformer": type(transformer).__name__,
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "prompts": prompts,
        "real_pictures": len(real_features()[0]),
        "kid_of_real_pictures": _kid_of_real(prompts).value if images > 1 else None,
        "calibration": _calibration(variants, live=calibrate),
        "energy_kept": {one.name: _energy_kept(weights, activations, one.name) for one in layers},
    }
    results["seconds"] = round(time.perf_counter() - start, 1)
    shown = {name: some[:GRID_COLUMNS] for name, some in drawn.pictures.items()}
    report = render_report(results, shown, layers, weights, activations)
    write_results(out, {"grid.png": _grid(drawn, rows, prompts), "report.html": report.encode()}, results)
    return results


def _energy_kept(
    weights: Mapping[str, Distribution], activations: Mapping[str, Distribution], name: str
) -> dict[str, float]:
    return {"weights": weights[name].share, "activations": activations[name].share}


def _rows(
    transformer: nn.Module, variants: Sequence[Variant], drawn: _Drawn, prompts: list[str], *, progress: bool
) -> list[dict[str, Any]]:
    # Layers of a variant whose values were rotated stand for those of a dense model rotated alike.
    twins = [comparable(transformer, variant.pipeline.transformer) for variant in variants]
    errors: dict[str, dict[str, float]] = {}
    kinds = {id(twin): twin for twin in twins}
    with ProgressBar("measuring layers", len(drawn.calls) * len(kinds), show=progress) as advance:
        for kind, twin in kinds.items():
            some = {
                variant.name: variant.layers
                for variant, other in zip(variants, twins, strict=True)
                if id(other) == kind
            }
            errors |= layer_errors(twin, some, _counted(drawn.calls, advance))
    return [_row(variant, drawn, prompts, errors[variant.name]) for variant in variants]


def _grid(drawn: _Drawn, rows: list[dict[str, Any]], prompts: list[str]) -> bytes:
    notes = {row["name"]: f"PSNR {row['psnr']:.1f} dB" for row in rows if row["psnr"] is not None}
    return png_bytes(picture_grid(drawn.pictures, prompts[:GRID_COLUMNS], notes))


class _Drawn(NamedTuple):
    """What drawing gave: pictures and seconds by variant, and some calls of the dense transformer."""

    pictures: dict[str, Tensor]
    seconds: dict[str, float]
    calls: list[Call]


def _draw(
    variants: Sequence[Variant], prompts: list[str], *, steps: int, seed: int, progress: bool
) -> _Drawn:
    drawn = _Drawn({}, {}, [])
    with ProgressBar("drawing", len(variants) * len(prompts), show=progress) as advance:
        for variant in variants:
            common = sampling(steps, seed) | {"advance": advance}
            began = time.perf_counter()
            if variant.name == "dense":
                pictures, calls = sample_and_record(
                    variant.pipeline, prompts, recorded=RECORDED_STEPS, **common
                )
                drawn.calls.extend(calls)
            else:
                pictures = sample_pictures(variant.pipeline, prompts, **common)
            drawn.pictures[variant.name] = pictures
            drawn.seconds[variant.name] = time.perf_counter() - began
    return drawn


def _calibration(variants: Sequence[Variant], *, live: bool) -> dict[str, Any]:
    """Whether variants were calibrated here, on how many prompts and how long."""
    seconds = {variant.name: variant.calibration_seconds for variant in variants}
    return {
        "live": live,
        "prompts": LIVE_PROMPTS if live else None,
        "seconds": {name: round(one, 1) for name, one in seconds.items() if one is not None},
    }


def _row(variant: Variant, drawn: _Drawn, prompts: list[str], errors: dict[str, float]) -> dict[str, Any]:
    """One variant's entry in results.json."""
    mine, reference = drawn.pictures[variant.name], drawn.pictures["dense"]
    features = picture_features(mine)
    distance = _kid(features)
    return {
        "name": variant.name,
        "layer_error": mean_error(errors),
        "psnr": psnr(mine, reference),
        "ssim": ssim(mine, reference),
        "kid": distance.value if distance else None,
        "kid_stderr": distance.stderr if distance else None,
        "retrieval": retrieval(features, prompts),
        "sparse_layers": len(variant.layers),
        "seconds": round(drawn.seconds[variant.name], 2),
        "layers": errors,
    }


def _kid(features: Tensor) -> KernelDistance | None:
    """Kernel distance to all real pictures; features are of unit length. None for a single picture."""
    return kid(features, real_features()[1], gamma=1.0) if len(features) > 1 else None


def _kid_of_real(prompts: list[str]) -> KernelDistance:
    """What perfect pictures of these prompts would score: their real pictures against all."""
    names, features = real_features()
    rows = [names.index(prompt) for prompt in prompts]
    return kid(features[rows], features, gamma=1.0)


def _counted(calls: Iterable[Call], advance: Callable[[int], None]) -> Iterator[Call]:
    for call in calls:
        yield call
        advance(1)
