"""The page of an evaluation: one self-contained HTML file whose words follow from the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from rtlynx.evaluate.dense_steps_plot import figure_of
from rtlynx.evaluate.grid import png_bytes, to_image
from rtlynx.evaluate.html import NBSP, data_uri, number, page_template
from rtlynx.evaluate.picture_metrics import Metric

TEMPLATE = Path(__file__).with_name("evaluation_page.html.j2")
# Prompts on the page, and most bytes of a picture and of a difference: 8 * (3 * 330 + 2 * 165) kB in base64
# are 14 MB.
SHOWN = 8
PICTURE_BYTES, DIFFERENCE_BYTES = 330_000, 165_000
# Pictures up to this side are shown pixel by pixel, and stored without loss.
SMALL = 256
QUALITIES = (90, 80, 70, 60, 50, 40, 30, 20, 10)
AMPLIFIED = 4


def render_page(
    results: Mapping[str, Any], shown: Sequence[Mapping[str, Tensor]], metrics: Sequence[Metric]
) -> str:
    """The page.

    Parameters
    ----------
    results : what results.json holds.
    shown : for each of the first prompts, variant -> its picture (3, H, W) in [0, 1].
    metrics : those that were asked for.
    """
    measured = [metric for metric in metrics if metric.name not in results["unavailable"]]
    titles = {metric.name: metric.title.partition(",")[0] for metric in metrics}
    titles |= {"kid": "KID", "peak_memory_bytes": "Peak memory"}
    return page_template(TEMPLATE).render(
        results=results,
        name=results["model"].rstrip("/").rpartition("/")[2],
        findings=findings(results),
        metrics=measured,
        best={metric.name: _best(results["variants"], metric) for metric in measured},
        missing={titles[name]: reason for name, reason in results["unavailable"].items()},
        prompts=[
            {
                "text": results["prompts"][number],
                "pictures": {name: picture_uri(one) for name, one in pictures.items()},
                "differences": {
                    name: picture_uri(AMPLIFIED * (one - pictures["dense"]).abs(), DIFFERENCE_BYTES)
                    for name, one in pictures.items()
                    if name != "dense"
                },
                "small": max(pictures["dense"].shape[1:]) <= SMALL,
                "height": pictures["dense"].shape[1],
                "width": pictures["dense"].shape[2],
                "figures": {row["name"]: row["pictures"][number] for row in results["variants"]},
            }
            for number, pictures in enumerate(shown)
        ],
        amplified=AMPLIFIED,
        dense_steps=_dense_steps(results),
    )


def _dense_steps(results: Mapping[str, Any]) -> str | None:
    """The figure of the dense steps that calibration compared here, as the address of an image."""
    compared = next((row["dense_steps"] for row in results["variants"] if row.get("dense_steps")), None)
    if compared is None:
        return None
    buffer = BytesIO()
    figure_of(compared).savefig(buffer, format="png", dpi=150, facecolor="white")
    return data_uri("png", buffer.getvalue())


def findings(results: Mapping[str, Any]) -> list[str]:
    """Three sentences, on fidelity, speed and quality, that hold whatever the figures are."""
    rows = {row["name"]: row for row in results["variants"]}
    return [
        _fidelity(rows),
        _speed(rows, simulated=results["simulated"]),
        _quality(rows),
    ]


def _fidelity(rows: Mapping[str, Mapping[str, Any]]) -> str:
    sparse, fp8 = rows["sparse"], rows["dense-fp8"]
    if "psnr" not in sparse:
        return "How near the pictures are to the dense ones was not measured."
    if sparse["psnr"] is None:
        return "At least one sparse picture equals the dense one in every pixel."
    said = f"The sparse pictures have a PSNR of {sparse['psnr']:.1f}{NBSP}dB against the dense ones"
    if fp8["psnr"] is None:
        return f"{said}; dense fp8 draws at least one picture that equals the dense one in every pixel."
    gap = sparse["psnr"] - fp8["psnr"]
    judged = "nearer than" if gap >= 0.05 else "further away than" if gap <= -0.05 else "as near as"
    by = f"{abs(gap):.1f}{NBSP}dB " if judged != "as near as" else ""
    return f"{said}, {by}{judged} those of dense fp8 ({fp8['psnr']:.1f}{NBSP}dB)."


def _speed(rows: Mapping[str, Mapping[str, Any]], *, simulated: bool) -> str:
    if simulated:
        return (
            "PyTorch simulated sparsity and fp8 on this machine: the pictures are those that the kernels "
            "would draw, the seconds say nothing about their speed."
        )
    dense, fp8, sparse = (rows[name]["seconds"] for name in ("dense", "dense-fp8", "sparse"))
    said = (
        f"A picture takes {_seconds(dense)} dense, {_seconds(fp8)} in dense fp8 and {_seconds(sparse)} "
        f"sparse: the sparse model is {dense / sparse:.2f} times as fast as dense and {fp8 / sparse:.2f} "
        "times as fast as dense fp8"
    )
    before, now = (rows[name]["peak_memory_bytes"] for name in ("dense", "sparse"))
    if before is None or now is None:
        return f"{said}."
    return f"{said}, and peaks at {now / 1e9:.1f}{NBSP}GB instead of {before / 1e9:.1f}{NBSP}GB."


def _quality(rows: Mapping[str, Mapping[str, Any]]) -> str:
    dense, sparse = rows["dense"], rows["sparse"]
    judges = {"clip_score": "CLIP score", "image_reward": "ImageReward"}
    said = [
        f"{title} goes from {number(dense[name], 2)} dense to {number(sparse[name], 2)} sparse"
        for name, title in judges.items()
        if dense.get(name) is not None and sparse.get(name) is not None
    ]
    if said:
        return f"{' and '.join(said)}."
    if sparse.get("kid") is not None:
        return (
            f"KID against real pictures goes from {number(dense['kid'], 3)} dense to "
            f"{number(sparse['kid'], 3)} sparse."
        )
    return "No network judged whether the pictures are good: the reasons are below the table."


def picture_uri(picture: Tensor, most_bytes: int = PICTURE_BYTES) -> str:
    """A picture (3, H, W), clipped to [0, 1], as a data URI: PNG where it is small, else WebP that fits."""
    image = to_image(picture)
    if max(image.size) <= SMALL:
        return data_uri("png", png_bytes(image))
    for quality in QUALITIES:
        data = _webp(image, quality)
        if len(data) <= most_bytes:
            break
    return data_uri("webp", data)


def _webp(image: Image.Image, quality: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def _seconds(value: float) -> str:
    return f"{value:.3g}{NBSP}s"


def _best(rows: Sequence[Mapping[str, Any]], metric: Metric) -> str | None:
    """The variant with the better figure of dense fp8 and sparse, as printed; None where they are equal."""
    values = {
        row["name"]: round(row[metric.name], metric.digits)
        for row in rows
        if row["name"] != "dense" and row[metric.name] is not None
    }
    if len(set(values.values())) < 2:
        return None
    choose = max if metric.better == "higher" else min
    return choose(values, key=values.__getitem__)
