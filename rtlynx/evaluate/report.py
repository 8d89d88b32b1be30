"""The demo's report: one self-contained HTML page whose words follow from the numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from torch import Tensor

from rtlynx.evaluate import plots
from rtlynx.evaluate.grid import png_bytes, to_image
from rtlynx.evaluate.html import NBSP, data_uri, page_template
from rtlynx.evaluate.layers import Distribution, gaussian_energy_kept
from rtlynx.models.plan import LayerPlan

TEMPLATE = Path(__file__).with_name("report.html.j2")

# What each variant is, in a line.
EXPLAINED = {
    "dense": "The model as trained: every product in full.",
    "weight-2:4": "Two of every four weights kept, by magnitude; activations untouched.",
    "activation-2:4": "Two of every four neighbouring activations kept in each token, nothing made up for.",
    "activation-2:4+norm": "The same, and each token scaled back to its norm.",
    "activation-2:4+norm+lowrank": (
        "The paper's recipe: the same, and a low-rank branch on the dense activations (rank 2% of a layer's "
        "inputs, at least 4), here solved in closed form."
    ),
    "activation-2:4+refit+lowrank": (
        "`Recipe()`: weights refitted to the selected activations, jointly with a low-rank "
        "branch of the same rank; groups span the heads at attention outputs."
    ),
    "fp8": (
        "Nothing dropped: the same layers with weights and activations in eight bits (e4m3), with a scale "
        "for each output channel and token."
    ),
    "fp8+activation-2:4+refit+lowrank": (
        "Both: what the row of that name keeps, and its refitted weights, in eight bits. From shipped "
        "solutions the weights are quantised afterwards; live calibration sees the eight bits."
    ),
    "recommended": (
        "`Recipe.recommended()`: each layer in eight bits, by 2:4 weights, by 2:4 activations or dropping "
        "nothing, by what it saves and what it costs at the model's output. Weights are refitted, and the "
        "last steps, as many as calibration chose, drop nothing."
    ),
    "activation-2:4+norm:all-layers": (
        "Selection and norm as above, and the layers of the text stream sparse too. In no other row do they "
        "drop activations."
    ),
}

ROLES = {
    "attention-in": "Query, key and value",
    "attention-out": "Attention output",
    "mlp-up": "MLP up",
    "mlp-down": "MLP down",
    "single-out": "Single-block output",
}


def render_report(
    results: Mapping[str, Any],
    pictures: Mapping[str, Tensor],
    layers: Sequence[LayerPlan],
    weights: Mapping[str, Distribution],
    activations: Mapping[str, Distribution],
) -> str:
    """The page.

    Parameters
    ----------
    results : what results.json holds.
    pictures : variant -> the pictures to show (n, 3, H, W) in [0, 1], of the first n prompts.
    layers : the layers that `weights` and `activations` describe, by name.
    """
    columns = results["prompts"][: len(next(iter(pictures.values())))]
    rows = [{**row, "explained": EXPLAINED.get(row["name"], "")} for row in results["variants"]]
    sparse = [row for row in rows if row["sparse_layers"]]
    readers: dict[str, list[str]] = {}
    for layer in layers:
        readers.setdefault(layer.candidate.reads, []).append(layer.name)
    gaussian = gaussian_energy_kept()
    return page_template(TEMPLATE, marked=_marked).render(
        results=results,
        rows=rows,
        best=_best(sparse),
        findings=findings(results),
        columns=columns,
        pictures={
            name: [data_uri("png", png_bytes(to_image(one))) for one in some]
            for name, some in pictures.items()
        },
        legend=[
            {"name": row["name"], "sign": plots.SIGNS[i % len(plots.SIGNS)], "number": i}
            for i, row in enumerate(sparse)
        ],
        error_plots=plots.error_plots({row["name"]: row["layers"] for row in sparse}),
        histograms=plots.histogram_plots(_by_role(layers, weights, activations)),
        energy_plots=plots.energy_plots(list(readers.values()), weights, activations, gaussian),
        kept={
            "weights": Distribution.merged(weights.values()).share,
            "activations": Distribution.merged(activations.values()).share,
            "gaussian": gaussian,
        },
    )


def findings(results: Mapping[str, Any]) -> list[str]:
    """What came out, in sentences that hold whatever the numbers are."""
    rows = {row["name"]: row for row in results["variants"]}
    said = []
    judged = [row for name, row in rows.items() if name != "dense" and row["psnr"] is not None]
    if judged:
        first, *_, last = sorted(judged, key=lambda row: -row["psnr"])
        said.append(
            f"Closest to the dense pictures is {first['name']}, at a PSNR of {first['psnr']:.1f}{NBSP}dB; "
            f"furthest is {last['name']}, at {last['psnr']:.1f}{NBSP}dB."
        )
    paper, ours = rows["activation-2:4+norm+lowrank"], rows["activation-2:4+refit+lowrank"]
    if paper["psnr"] is not None and ours["psnr"] is not None:
        gain = ours["psnr"] - paper["psnr"]
        verb = "gains" if gain >= 0.05 else "loses" if gain <= -0.05 else "changes"
        error = f"layer error {paper['layer_error']:.4f} to {ours['layer_error']:.4f}"
        said.append(
            f"At the same rank, refitted weights with strided attention outputs: our recipe {verb} "
            f"{abs(gain):.1f}{NBSP}dB against the paper's ({error})."
        )
    weight, activation = rows["weight-2:4"], rows["activation-2:4"]
    if weight["psnr"] is not None and activation["psnr"] is not None:
        agree = (weight["layer_error"] > activation["layer_error"]) == (weight["psnr"] < activation["psnr"])
        surprise = "" if agree else ": the smaller layer error is not the closer picture"
        said.append(
            f"Without any compensation, weight-2:4 has a layer error of {weight['layer_error']:.4f} and "
            f"draws at {weight['psnr']:.1f}{NBSP}dB, activation-2:4 of {activation['layer_error']:.4f} at "
            f"{activation['psnr']:.1f}{NBSP}dB{surprise}."
        )
    eight, both = rows["fp8"], rows["fp8+activation-2:4+refit+lowrank"]
    if eight["psnr"] is not None and both["psnr"] is not None and ours["psnr"] is not None:
        change = both["psnr"] - ours["psnr"]
        verb = "costs" if change <= -0.05 else "gains" if change >= 0.05 else "changes"
        said.append(
            f"Eight bits alone draw at {eight['psnr']:.1f}{NBSP}dB; beside our recipe quantising {verb} "
            f"{abs(change):.1f}{NBSP}dB."
        )
    recommended = rows["recommended"]
    if recommended["psnr"] is not None:
        said.append(
            f"The recommended recipe, which chooses formats and last steps, draws at "
            f"{recommended['psnr']:.1f}{NBSP}dB."
        )
    image_only, everything = rows["activation-2:4+norm"], rows["activation-2:4+norm:all-layers"]
    if image_only["psnr"] is not None and everything["psnr"] is not None:
        change = everything["psnr"] - image_only["psnr"]
        verb = "costs" if change <= -0.05 else "gains" if change >= 0.05 else "changes"
        said.append(
            f"Making the text stream sparse as well {verb} {abs(change):.1f}{NBSP}dB, and retrieval goes "
            f"from {image_only['retrieval']:.0%} to {everything['retrieval']:.0%}."
        )
    shares = [row["retrieval"] for name, row in rows.items() if name != "dense"]
    said.append(
        f"The dense model's picture is nearest to the real emoji that was asked for in "
        f"{rows['dense']['retrieval']:.0%} of cases; the other variants' in {min(shares):.0%} to "
        f"{max(shares):.0%}."
    )
    distances = [row["kid"] for row in rows.values() if row["kid"] is not None]
    errors = [row["kid_stderr"] for row in rows.values() if row["kid_stderr"] is not None]
    if errors and max(distances) - min(distances) < 2 * max(errors):
        said.append(f"KID does not tell the variants apart with {results['images']} pictures.")
    return said


def _marked(sentence: str) -> Markup:
    """Escaped text with the names of variants set as such."""
    names = "|".join(re.escape(name) for name in sorted(EXPLAINED, key=len, reverse=True) if ":" in name)
    return Markup(re.sub(f"({names})", r'<span class="name">\1</span>', str(escape(sentence))))


def _best(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Column -> best value among sparse variants, for emphasis. Not KID: a few dozen pictures cannot tell."""
    best: dict[str, Any] = {"kid": None}
    for key, choose in (
        ("layer_error", min),
        ("psnr", max),
        ("ssim", max),
        ("retrieval", max),
    ):
        values = [row[key] for row in rows if row[key] is not None]
        best[key] = choose(values) if values else None
    return best


def _by_role(
    layers: Sequence[LayerPlan],
    weights: Mapping[str, Distribution],
    activations: Mapping[str, Distribution],
) -> dict[str, tuple[Distribution, Distribution]]:
    found = {}
    for role, title in ROLES.items():
        names = [layer.name for layer in layers if layer.candidate.role == role]
        if names:
            pair = [Distribution.merged(some[name] for name in names) for some in (weights, activations)]
            found[title] = (pair[0], pair[1])
    return found
