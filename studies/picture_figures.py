"""Figures of pictures against dense and against real ones, over all, and by what a picture shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import perceptual
import torch
from rtlynx_zoo import fashion
from rtlynx_zoo.features import load_feature_network, real_features
from rtlynx_zoo.prompts import FASHION_CLASSES, category
from torch import Tensor

from rtlynx.evaluate.metrics import psnr, retrieval, ssim

WORST = 8
NEIGHBOURS = 3  # of Kynkäänniemi et al.
ROWS_AT_ONCE = 1000  # of a matrix of distances
# Names of emoji whose picture holds letters or digits, Latin or Japanese.
LETTERS = re.compile(
    r"^(?:[A-Z]{1,4}!? button|[A-Z]{2,4}!? arrow|Japanese .* button|input .*|keycap [0-9]+|ATM sign|ZZZ"
    r"|hundred points|\d\w\w place medal|tear-off calendar)\b"
)


def real_of_prompts(prompts: Sequence[str]) -> Tensor | None:
    """Features (n, 128) of the real emoji of `prompts`, None where one is no emoji."""
    names, real = real_features()
    place = {name: i for i, name in enumerate(names)}
    if any(prompt not in place for prompt in prompts):
        return None
    return real[[place[prompt] for prompt in prompts]]


@dataclass(frozen=True)
class Judges:
    """Networks that look at pictures.

    features : pictures (n, 3, H, W) -> (n, d), None without a network.
    stages : the perceptual network, None where `missing` says why.
    real : prompts -> features (m, d) of the real pictures to compare with, None where there are none.
    recognised : features (n, d) and prompts -> share of the pictures that show what was prompted.
    """

    features: Callable[[Tensor], Tensor] | None
    stages: Callable[[Tensor], list[Tensor]] | None
    missing: str | None
    device: str = "cpu"
    real: Callable[[Sequence[str]], Tensor | None] = real_of_prompts
    recognised: Callable[[Tensor, Sequence[str]], float] = retrieval


def load_judges(device: str, *, clothing: bool = False) -> Judges:
    """The networks that are there, on `device`; of emoji, or of `clothing`.

    Raises
    ------
    FileNotFoundError
        If the classifier of clothing is not here.
    """
    stages, missing = None, None
    try:
        stages = perceptual.load(device)
    except perceptual.Unavailable as reason:
        missing = str(reason)
    if not clothing:
        return Judges(load_feature_network(device), stages, missing, device)
    return clothing_judges(fashion.load_classifier(device), fashion.real_features(), stages, missing, device)


def clothing_judges(
    classifier: fashion.FashionClassifier, real: Tensor, stages: Any, missing: str | None, device: str
) -> Judges:
    """Judges of flux-fashion's pictures: a classifier and its features (m, 64) of the real test pictures.

    Prompts are classes, so all real pictures count, whatever the prompts; a picture is recognised where the
    classifier gives it its class.
    """
    rows = {name: row for row, name in enumerate(FASHION_CLASSES)}

    def recognised(features: Tensor, prompts: Sequence[str]) -> float:
        with torch.no_grad():
            found = classifier.classify(features.to(device)).argmax(1).tolist()
        return sum(row == rows[prompt] for row, prompt in zip(found, prompts, strict=True)) / len(prompts)

    return Judges(classifier, stages, missing, device, lambda prompts: real, recognised)


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
        psnr (None where a picture equals its reference), ssim, perceptual, frechet, precision, recall,
        retrieval (None where a network is missing or too few pictures), groups: name -> n, mse, perceptual,
        retrieval; worst, worst_rows: prompts and rows of the largest squared error, worst first.
    """
    pictures, reference = pictures.to(judges.device), reference.to(judges.device)
    same = torch.equal(pictures, reference)
    errors = (pictures - reference).square().mean((1, 2, 3))
    distances = found = real = spread = None
    if judges.stages is not None:
        distances = perceptual.distances(judges.stages, pictures, reference, device=judges.device)
    if judges.features is not None:
        found, real = _features(judges, pictures), judges.real(prompts)
    if found is not None and real is not None and min(len(found), len(real)) > NEIGHBOURS:
        spread = precision_recall(found.to(judges.device), real.to(judges.device))
    figures: dict[str, Any] = {
        "psnr": None if same else psnr(pictures, reference),
        "ssim": ssim(pictures, reference),
        "perceptual": None if distances is None else float(distances.mean()),
        "frechet": None if found is None or real is None else frechet_to_real(found, real),
        "precision": None if spread is None else spread.precision,
        "recall": None if spread is None else spread.recall,
        "retrieval": None if found is None else judges.recognised(found, prompts),
    }
    groups = {}
    for name, rows in picture_groups(reference, prompts).items():
        some = [prompts[i] for i in rows]
        groups[name] = {
            "n": len(rows),
            "mse": float(errors[rows].mean()),
            "perceptual": None if distances is None else float(distances[rows].mean()),
            "retrieval": None if found is None else judges.recognised(found[rows], some),
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


def frechet_to_real(features: Tensor, real: Tensor) -> float | None:
    """Fréchet distance of features (n, d) to those of real pictures (m, d).

    The feature networks are our own: not comparable with published FIDs. Biased by the number of pictures
    like any Fréchet distance, so to be compared at equal n. None where n does not exceed d.
    """
    return frechet(features, real) if len(features) > features.shape[1] else None


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


class PrecisionRecall(NamedTuple):
    """Share of generated pictures that could be real ones, and of real ones that could be generated."""

    precision: float
    recall: float


def precision_recall(features: Tensor, real: Tensor, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019).

    A set's manifold is the union of balls around its members, each as wide as the distance to its k-th
    nearest neighbour. Precision is the share of `features` on the manifold of `real`, recall the reverse.

    Parameters
    ----------
    features, real : Tensor (n, d) and (m, d)
        The first min(n, m) of each are compared: both figures depend on how many there are.

    Raises
    ------
    ValueError
        If a set has no more than k members.
    """
    count = min(len(features), len(real))
    if count <= k:
        raise ValueError(f"the {k}-th nearest neighbour takes more than {k} pictures, got {count}")
    one, other = features[:count].double(), real[:count].double()
    return PrecisionRecall(_on_manifold(one, other, k), _on_manifold(other, one, k))


def _on_manifold(points: Tensor, members: Tensor, k: int) -> float:
    """Share of `points` (n, d) within a ball around one of `members` (n, d)."""
    radii = []
    for part in members.split(ROWS_AT_ONCE):
        # Smallest but k: the member itself, at no distance, comes first.
        radii.append(_distances(part, members).kthvalue(k + 1, dim=1).values)
    radius = torch.cat(radii)
    inside = [(_distances(part, members) <= radius).any(1) for part in points.split(ROWS_AT_ONCE)]
    return float(torch.cat(inside).double().mean())


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """Squared distances (n, m)."""
    products = one @ other.T
    return (one.square().sum(1)[:, None] + other.square().sum(1) - 2 * products).clamp_min(0)


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
