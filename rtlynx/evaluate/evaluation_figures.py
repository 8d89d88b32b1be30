"""Figures of the pictures that an evaluation drew: one row a variant, and why a figure is missing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rtlynx.calibration.progress import ProgressBar
from rtlynx.evaluate.metrics import kid, picture_features
from rtlynx.evaluate.picture_folder import PictureFolder
from rtlynx.evaluate.picture_metrics import Metric, load_networks
from rtlynx.models.pipelines import ZOO_PREFIX
from rtlynx.storage.files import first_line

DENSE = "dense"  # the variant that others are compared with
# Fewer pictures tell nothing about a distribution.
FEWEST_FOR_KID = 64


def measure(
    folder: PictureFolder,
    titles: Mapping[str, str],
    prompts: Sequence[str],
    metrics: Sequence[Metric],
    *,
    model: str,
    device: str,
    download: bool,
    progress: bool,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure all pictures, one at a time.

    Parameters
    ----------
    folder : holds a picture of each prompt by each variant.
    titles : variant -> its title.
    model : tells whether there are real pictures to compare with.
    device : where metrics are computed.
    download : whether networks may be downloaded.

    Returns
    -------
    list of dict
        A row for each variant: what the folder knows of it, seconds (median), the mean of each metric, and
        the figures of each picture. An infinite figure (PSNR of equal pictures) is None.
    dict
        Name of each figure that is missing -> the reason.
    """
    networks, reasons = load_networks(metrics, device, download=download)
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in titles}
    with ProgressBar("measuring", len(prompts), show=progress) as advance:
        for number, prompt in enumerate(prompts):
            reference = folder.read(DENSE, number)[0].unsqueeze(0).to(device)
            for name in titles:
                drawn, seconds = folder.read(name, number)
                picture, found = drawn.unsqueeze(0).to(device), {"seconds": seconds}
                for metric in metrics:
                    if metric.name in reasons or (metric.against_dense and name == DENSE):
                        continue
                    try:
                        network = networks[metric.name]
                        (found[metric.name],) = metric.compute(network, picture, reference, [prompt])
                    except Exception as error:
                        if not metric.needs:
                            raise
                        # Of all kinds: the networks are other people's, and other figures remain.
                        why = f"{type(error).__name__}: {first_line(error)}"
                        reasons[metric.name] = f"{metric.needs} failed ({why})"
                figures[name].append(found)
            advance(1)
    kept = [metric.name for metric in metrics if metric.name not in reasons]
    rows = [
        {"name": name, "title": title, **folder.facts(name), **_figures(figures[name], kept)}
        for name, title in titles.items()
    ]
    missing = _no_kid(model, len(prompts))
    if missing:
        reasons["kid"] = missing
    else:
        rows = [{**row, **_kid(folder, row["name"], len(prompts))} for row in rows]
    if any(row["peak_memory_bytes"] is None for row in rows):
        reasons["peak_memory_bytes"] = "it is measured on CUDA devices alone"
    return rows, reasons


def _figures(each: Sequence[Mapping[str, float]], kept: Sequence[str]) -> dict[str, Any]:
    """Figures of one variant from those of each picture."""
    means = {
        name: _finite(statistics.fmean(one[name] for one in each)) if name in each[0] else None
        for name in kept
    }
    pictures = [
        {"seconds": round(one["seconds"], 4), **{name: _finite(one[name]) for name in kept if name in one}}
        for one in each
    ]
    seconds = statistics.median(one["seconds"] for one in each)
    return {"seconds": round(seconds, 4), **means, "pictures": pictures}


def _no_kid(model: str, count: int) -> str | None:
    """Why there is no kernel distance to real pictures, or None."""
    if not model.startswith(ZOO_PREFIX):
        return "only zoo models bring real pictures and a feature network"
    import rtlynx_zoo as zoo

    if not zoo.draws_emoji(model.removeprefix(ZOO_PREFIX)):
        return "the feature network and the real pictures are of emoji"
    if count < FEWEST_FOR_KID:
        return f"it takes at least {FEWEST_FOR_KID} pictures, not {count}"
    return None


def _kid(folder: PictureFolder, variant: str, count: int) -> dict[str, float | None]:
    from rtlynx_zoo.features import real_features

    pictures = torch.stack([folder.read(variant, number)[0] for number in range(count)])
    distance = kid(picture_features(pictures), real_features()[1], gamma=1.0)  # features of unit length
    return {"kid": distance.value, "kid_stderr": distance.stderr}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
