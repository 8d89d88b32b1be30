"""Sparse models of many recipes, to be saved."""

from helpers import copy_of, flux_call, tiny_flux

from rtlynx import Budget, CalibrationOptions, Recipe, calibrate, sparsify

RIDGE = 0.1
RECIPES = {
    "immediate": Recipe.immediate(),
    "immediate, all layers": Recipe.immediate(text_stream="sparse", grouping="strided", norm="paper"),
    "1:4": Recipe.immediate(n=1, norm="none"),
    "dense steps and rows": Recipe.immediate(dense_steps=2, text_rows="dense"),
    "skip": Recipe.immediate(skip=("*.proj_out",)),
    "paper": Recipe.paper(rank=4, ridge=RIDGE),
    "refit": Recipe(rank=None, ridge=RIDGE),
    "refit and low-rank": Recipe(rank=0.05, ridge=RIDGE, grouping="strided"),
    "refit, dense steps and rows": Recipe(ridge=RIDGE, dense_steps=2, text_rows="dense"),
    "budget": Recipe(rank=4, ridge=RIDGE, budget=Budget(speedup_share=0.5)),
    "fp8, immediate": Recipe.immediate(precision="fp8"),
    "fp8, dense steps and rows": Recipe.immediate(precision="fp8", dense_steps=2, text_rows="dense"),
    "dense steps and rows in fp8": Recipe(
        rank=4,
        ridge=RIDGE,
        precision="fp8",
        text_rows="dense",
        dense_last_steps=1,
        dense_precision="fp8",
        formats={"*.to_q": "fp8-dense"},
    ),
    "fp8, refit and low-rank": Recipe(rank=0.05, ridge=RIDGE, precision="fp8"),
    "intercept": Recipe(rank=4, ridge=RIDGE, intercept=True),
    "fp8, intercept": Recipe(rank=None, ridge=RIDGE, intercept=True, precision="fp8"),
    "rotated values": Recipe(rank=4, ridge=RIDGE, rotate_values=True, intercept=True),
    "rotated values, immediate": Recipe.immediate(rotate_values=True),
    "rotated values, dense steps and rows": Recipe(
        rank=None, ridge=RIDGE, rotate_values=True, intercept=True, dense_steps=2, text_rows="dense"
    ),
    "rotated values, fp8": Recipe(rank=None, ridge=RIDGE, rotate_values=True, precision="fp8"),
    "permuted features": Recipe(
        rank=4, ridge=RIDGE, rotate_values=True, permute_hidden=True, intercept=True, precision="fp8"
    ),
    "every format": Recipe(
        rank=4, ridge=RIDGE, formats={"*.to_q": "fp8-sparse", "*.to_k": "fp8-dense", "*.to_v": "dense"}
    ),
}


def make(recipe, build=tiny_flux, call=flux_call):
    if not recipe.needs_calibration:
        return sparsify(build(), recipe)

    def calibrated():
        model, calls = build(), [call(seed, timestep=1 - seed / 4) for seed in range(3)]
        calibrate(model, calls=calls, recipe=recipe, progress=False, options=CalibrationOptions())
        return model

    return copy_of((build, call, repr(recipe)), calibrated)
