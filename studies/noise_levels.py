"""Where on the way from noise to picture sparsity does its damage: `python studies/noise_levels.py`.

One model, calibrated once with every layer sparse in fp8, draws the same pictures again and again. The steps
at some noise levels run sparse, the others in dense fp8: one range sparse ("sparse-at"), one range dense
("dense-at"), and more and more ranges dense, either those first that do most damage alone ("worst-dense") or
those whose going dense helps most ("best-dense"). Errors are against the dense model's pictures. Ranges are
ordered by other prompts than those that are measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from make_variant import Calibration, build
from measure import Study
from picture_figures import load_judges
from quality import device_name
from study_model import load_study_model, noise_seed
from torch import Tensor
from variants import FREE, STEPS, Variant

import rtlynx
from rtlynx import Recipe
from rtlynx.evaluate.metrics import psnr, ssim
from rtlynx.storage.files import write_json

Range = tuple[float, float]
RECIPE = Recipe(rank=None, precision="fp8", dense_sigmas=((0, 1),), dense_precision="fp8", **FREE)


def ranges(count: int) -> list[Range]:
    """`count` ranges of noise levels, equal parts of 0 to 1, from noise to picture."""
    return [((count - i - 1) / count, (count - i) / count) for i in range(count)]


def others(dense: Sequence[Range], all_ranges: Sequence[Range]) -> list[Range]:
    """Those of `all_ranges` that are not in `dense`."""
    return [one for one in all_ranges if one not in dense]


class Curve:
    """Draws one calibrated pipeline with chosen ranges dense, and compares with the dense pictures."""

    def __init__(self, study: Study, pipeline: Any, pictures: int, choosing: int) -> None:
        self.study, self.pipeline = study, pipeline
        self.pictures, self.choosing = pictures, choosing
        self.reference = study.dense(pictures + choosing, STEPS, 0)

    def draw(self, dense: Sequence[Range]) -> Tensor:
        """Pictures of all prompts; those to choose by come last."""
        rtlynx.set_dense_steps(self.pipeline, dense_sigmas=dense)
        return self.study.draw(self.pipeline, self.pictures + self.choosing, STEPS, noise_seed(0))

    def row(self, kind: str, dense: Sequence[Range]) -> dict[str, Any]:
        """One line of the results; `choosing_error` is of the prompts that ranges are chosen by."""
        drawn, n = self.draw(dense), self.pictures
        return {
            "kind": kind,
            "dense": [list(one) for one in sorted(dense)],
            "psnr": psnr(drawn[:n], self.reference[:n]),
            "ssim": ssim(drawn[:n], self.reference[:n]),
            "choosing_error": float((drawn[n:] - self.reference[n:]).square().mean()),
        }


def measure(curve: Curve, count: int) -> list[dict[str, Any]]:
    """Rows of one model: all dense, all sparse, range by range, and the worst ranges together."""
    every = ranges(count)
    rows = [curve.row("dense", every), curve.row("sparse", [])]
    alone = {one: curve.row("sparse-at", others([one], every)) for one in every}
    without = {one: curve.row("dense-at", [one]) for one in every}
    rows += [{**row, "range": list(one)} for one, row in (*alone.items(), *without.items())]
    for kind, by in (("worst-dense", alone), ("best-dense", without)):
        order = sorted(every, key=lambda one: by[one]["choosing_error"], reverse=by is alone)
        rows += [curve.row(kind, order[:size]) for size in range(2, count // 2 + 1)]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="zoo:flux-emoji", help="zoo:NAME")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--ranges", type=int, default=14, help="parts of the way from noise to picture")
    parser.add_argument("--pictures", type=int, default=256, help="that are measured")
    parser.add_argument("--choosing", type=int, default=64, help="further ones, by which ranges are chosen")
    parser.add_argument("--calibration-prompts", type=int, help="no more than these, for trials")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="what the figures belong to")
    options = parser.parse_args(arguments)

    model = load_study_model(options.model, device=options.device, dtype=torch.bfloat16)
    calibration = Calibration(prompts=options.calibration_prompts)
    study = Study(model, load_judges(options.device), calibration)
    built = build(Variant("noise-levels", "sweep", recipe=RECIPE), model, calibration)
    curve = Curve(study, built.pipeline, options.pictures, options.choosing)
    document = {
        "model": options.model,
        "commit": options.commit,
        "device": device_name(options.device),
        "torch": torch.__version__,
        "rtlynx": rtlynx.__version__,
        "steps": STEPS,
        "pictures": options.pictures,
        "recipe": RECIPE.to_dict(),
        "rows": measure(curve, options.ranges),
    }
    write_json(options.out, document)


if __name__ == "__main__":
    main()
