"""Where on the way from noise to picture sparsity does its damage: `python studies/noise_levels.py`.

A model is calibrated once for each recipe and then draws the same pictures again and again, while the steps
at some noise levels run in dense fp8 and the others as the recipe says:

- curve, for the first recipe: one range of noise levels sparse ("sparse-at"), one dense ("dense-at"), and
  more and more ranges dense, those first whose going dense helps most on other prompts ("best-dense");
- "dense-below", for every recipe: all noise levels below one.

Errors are against the dense model's pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jobs import Setup
from make_variant import Built, Calibration, build
from measure import Study
from quality import device_name, header
from row_store import RowStore
from study_model import noise_seed
from variants import FREE, MIX, STEPS, TRAINING, Variant

import rtlynx
from rtlynx import Budget, Recipe
from rtlynx.evaluate.metrics import psnr, ssim
from rtlynx.recipe import NO_STEP

Range = tuple[float, float]
# Original weights for the steps that are chosen later.
_CHOSEN_LATER: dict[str, Any] = {"dense_sigmas": NO_STEP, "dense_precision": "fp8"}
EVERY_LAYER = Recipe(rank=None, precision="fp8", **FREE, **_CHOSEN_LATER)
FIRST = "every-layer"
_MIXES = {
    f"mix-{100 * share:g}": replace(MIX, budget=Budget(speedup_share=share), **FREE, **_CHOSEN_LATER)
    for share in (0.97, 0.95, 0.9)
}
_CLOSED_FORMS = {FIRST: EVERY_LAYER, **_MIXES}
_DISTILLED = "-distilled"
RECIPES = {**_CLOSED_FORMS, **{name + _DISTILLED: recipe for name, recipe in _CLOSED_FORMS.items()}}


def ranges(count: int) -> list[Range]:
    """`count` ranges of noise levels, equal parts of 0 to 1, from noise to picture."""
    return [((count - i - 1) / count, (count - i) / count) for i in range(count)]


class Curve:
    """Draws one calibrated pipeline with chosen ranges dense, and compares with the dense pictures.

    The last `choosing` pictures do not count: ranges are chosen by them.
    """

    def __init__(
        self, name: str, study: Study, built: Built, pictures: int, choosing: int, trained: int
    ) -> None:
        self.name, self.study, self.built, self.training_steps = name, study, built, trained
        self.pictures, self.count = pictures, pictures + choosing
        self.reference = study.dense(self.count, STEPS, 0)

    def row(self, kind: str, dense: Sequence[Range], of: Range | None = None) -> dict[str, Any]:
        """One row of the results; `choosing_error` is of the prompts that ranges are chosen by."""
        rtlynx.set_dense_steps(self.built.pipeline, dense_sigmas=dense)
        drawn = self.study.draw(self.built.pipeline, self.count, STEPS, noise_seed(0))
        recipe = {**(self.built.recipe or {}), "dense_sigmas": [list(one) for one in sorted(dense)]}
        modelled = replace(self.built, recipe=recipe).modelled_ms(self.study.model.architecture, STEPS)
        n = self.pictures
        return {
            "name": f"{self.name}:{kind}:{of if of is not None else len(dense)}",
            "recipe": self.name,
            "training_steps": self.training_steps,
            "kind": kind,
            "range": of,
            "dense": recipe["dense_sigmas"],
            "steps": STEPS,
            "pictures": n,
            "psnr": psnr(drawn[:n], self.reference[:n]),
            "ssim": ssim(drawn[:n], self.reference[:n]),
            "choosing_error": float((drawn[n:] - self.reference[n:]).square().mean()),
            "modelled_ms": modelled,
        }

    def below(self, count: int) -> Iterator[dict[str, Any]]:
        """More and more ranges dense, from the picture on; all of them at last."""
        upwards = ranges(count)[::-1]
        for size in (*range(count // 2 + 1), count):
            dense = [(0.0, upwards[size - 1][1])] if size else []
            yield self.row("dense-below", dense, dense[0] if dense else (0.0, 0.0))

    def curve(self, count: int) -> Iterator[dict[str, Any]]:
        """Range by range, and those together whose going dense helps most."""
        every = ranges(count)
        left = {}
        for one in every:
            yield self.row("sparse-at", [other for other in every if other != one], one)
            row = self.row("dense-at", [one], one)
            left[one] = row["choosing_error"]
            yield row
        order = sorted(every, key=left.__getitem__)
        for size in range(2, count // 2 + 1):
            yield self.row("best-dense", order[:size])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="zoo:flux-emoji", help="zoo:NAME")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to append to")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--ranges", type=int, default=12, help="parts of the way from noise to picture")
    parser.add_argument("--pictures", type=int, default=256, help="that are measured")
    parser.add_argument("--choosing", type=int, default=64, help="further ones, by which ranges are chosen")
    parser.add_argument("--no-curve", action="store_true", help="dense-below only")
    parser.add_argument("--calibration-prompts", type=int, help="no more than these, for trials")
    parser.add_argument("--training-steps", type=int, default=TRAINING.steps, help="of distillation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="what the figures belong to")
    options = parser.parse_args(arguments)

    calibration = Calibration(prompts=options.calibration_prompts)
    study = Setup(options.model, "bfloat16", calibration, batch_size=500).study(options.device)
    about = header(options.model, study, "bfloat16")
    store = RowStore(options.out, about, options.commit, device_name(options.device))
    for name in options.recipes:
        trained = options.training_steps if name.endswith(_DISTILLED) else 0
        distill = replace(TRAINING, steps=trained) if trained else None
        variant = Variant(name, "sweep", recipe=RECIPES[name], distill=distill)
        built = build(variant, study.model, calibration)
        curve = Curve(name, study, built, options.pictures, options.choosing, trained)
        for row in curve.below(options.ranges):
            store.append(row)
        if name == FIRST and not options.no_curve:
            for row in curve.curve(options.ranges):
                store.append(row)


if __name__ == "__main__":
    main()
