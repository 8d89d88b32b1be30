"""Figures of pictures against dense and against real ones, over all, and by what a picture shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import perceptual
import torch
from rtlynx_zoo.features import load_feature_network, real_features
from rtlynx_zoo.prompts import category
from torch import Tensor

from rtlynx.evaluate.metrics import psnr, retrieval, ssim

FEATURE_SIZE = 64  # the box's feature network sees 64x64
WORST = 8
# Names of emoji whose picture holds letters or digits, Latin or Japanese.
LETTERS = re.compile(
    r"^(?:[A-Z]{1,4}!? button|[A-Z]{2,4}!? arrow|Japanese .* button|input .*|keycap [0-9]+|ATM sign|ZZZ"
    r"|hundred points|\d\w\w place medal|tear-off calendar)\b"
)


@dataclass(frozen=True)
class Judges:
    """Networks that look at pictures.

    features : pictures (n, 3, 64, 64) -> (n, 128) of unit length, None where pictures are of another size.
    stages : the perceptual network, None where `missing` says why.
    """

    features: Callable[[Tensor], Tensor] | None
    stages: Callable[[Tensor], list[Tensor]] | None
    missing: str | None
    device: str = "cpu"


def load_judges(device: str, size: int = FEATURE_SIZE) -> Judges:
    """The networks that are there, on `device`."""
    features = load_feature_network(device) if size == FEATURE_SIZE else None
    try:
        return Judges(features, perceptual.load(device), None, device)
    except perceptual.Unavailable as reason:
        return Judges(features, None, str(reason), device)


def picture_figures(
    pictures: Tensor, reference: Tensor, prompts: Sequence[str], judges: Judges
) -> dict[str, Any]:
    """Figures of one variant and seed.

    Parameters
    ----------
    pictures, reference : Tensor (n, 3, H, W) in [0, 1], of the variant and of the dense model.
    prompts : what each shows.

    Returns
    -------
    dict
        psnr (None where a picture equals its reference), ssim, perceptual, frechet, retrieval (None where a
        network is missing or too few pictures), groups: name -> n, mse, perceptual, retrieval; worst,
        worst_rows: prompts and rows of the largest squared error, worst first.
    """
    pictures, reference = pictures.to(judges.device), reference.to(judges.device)
    same = torch.equal(pictures, reference)
    errors = (pictures - reference).square().mean((1, 2, 3))
    distances = found = None
    if judges.stages is not None:
        distances = perceptual.distances(judges.stages, pictures, reference, device=judges.device)
    if judges.features is not None:
        found = _features(judges, pictures)
    figures: dict[str, Any] = {
        "psnr": None if same else psnr(pictures, reference),
        "ssim": ssim(pictures, reference),
        "perceptual": None if distances is None else float(distances.mean()),
        "frechet": None if found is None else frechet_to_real(found, prompts),
        "retrieval": None if found is None else retrieval(found, prompts),
    }
    groups = {}
    for name, rows in picture_groups(reference, prompts).items():
        some = [prompts[i] for i in rows]
        groups[name] = {
            "n": len(rows),
            "mse": float(errors[rows].mean()),
            "perceptual": None if distances is None else float(distances[rows].mean()),
            "retrieval": None if found is None else retrieval(found[rows], some),
        }
    worst = [] if same else errors.argsort(descending=True)[:WORST].tolist()
    return {**figures, "groups": groups, "worst": [prompts[i] for i in worst], "worst_rows": worst}


def picture_groups(reference: Tensor, prompts: Sequence[str]) -> dict[str, list[int]]:
    """Rows of the pictures that show faces, text, thin strokes; "all" of them. Empty groups are left out.

    Thin strokes: the quarter of the dense pictures that a 3x3 opening and closing of their grey values
    changes most, so whose lines are thinner than three pixels.
    """
    strokes = thin_strokes(reference)
    bar = float(strokes.quantile(0.75))
    rows = {
        "all": list(range(len(prompts))),
        "faces": [i for i, prompt in enumerate(prompts) if _is_face(prompt)],
        "text": [i for i, prompt in enumerate(prompts) if LETTERS.search(prompt)],
        "thin strokes": [i for i, stroke in enumerate(strokes.tolist()) if stroke > bar],
    }
    return {name: some for name, some in rows.items() if some}


def thin_strokes(pictures: Tensor) -> Tensor:
    """Mean change (n,) of the grey pictures (n, 3, H, W) by morphological opening and by closing, 3x3."""
    grey = pictures.mean(1, keepdim=True)

    def dilate(x: Tensor) -> Tensor:
        return torch.nn.functional.max_pool2d(x, 3, stride=1, padding=1)

    def erode(x: Tensor) -> Tensor:
        return -dilate(-x)

    opened, closed = dilate(erode(grey)), erode(dilate(grey))
    return ((grey - opened) + (closed - grey)).mean((1, 2, 3))


def frechet_to_real(features: Tensor, prompts: Sequence[str]) -> float | None:
    """Fréchet distance of features (n, d) to those of the real pictures of the same prompts.

    The feature network is the box's: not comparable with published FIDs. Biased by the number of pictures
    like any Fréchet distance, so to be compared at equal n. None where n does not exceed d.
    """
    names, real = real_features()
    if any(prompt not in names for prompt in prompts) or len(features) <= features.shape[1]:
        return None
    place = {name: i for i, name in enumerate(names)}
    return frechet(features, real[[place[prompt] for prompt in prompts]])


def frechet(one: Tensor, other: Tensor) -> float:
    """||m1 - m2||² + tr(C1 + C2 - 2 (C1 C2)^1/2) of the normal fits of two sets (n, d) and (m, d)."""
    x, y = one.double(), other.double()
    c1, c2 = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # (C1 C2)^1/2 and the symmetric (C1^1/2 C2 C1^1/2)^1/2 have the same trace.
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    return float((shift + c1.trace() + c2.trace() - 2 * cross).clamp_min(0))


@torch.no_grad()
def _features(judges: Judges, pictures: Tensor) -> Tensor:
    assert judges.features is not None
    parts = [judges.features(part.to(judges.device)).cpu() for part in pictures.split(256)]
    return torch.cat(parts)


def _is_face(prompt: str) -> bool:
    try:
        return category(prompt) == "Smileys & Emotion" and "face" in prompt
    except ValueError:  # no emoji of the box
        return False
