"""What the study compares, as data: how each variant is made, on how many pictures and seeds."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from baselines import BASELINES
from rotations import ROTATIONS

from rtlynx import Distillation
from rtlynx.recipe import RECOMMENDED_SPEEDUP_SHARE, Budget, Recipe

Group = Literal["main", "sweep"]
PICTURES: dict[Group, int] = {"main": 1000, "sweep": 256}
SEEDS: dict[Group, tuple[int, ...]] = {"main": (0, 1, 2), "sweep": (0,)}
STEPS, FEW_STEPS = 28, 8
RANK = 0.02  # of the inputs: the paper's 64 at 3,072
CALIBRATION_PROMPTS = 512

# Layers that stay dense by hand. The paper names Z-Image's (attention out and MLP up of its single-stream
# layers); of FLUX it says "some single-stream layers", read here as the output projection, which holds the
# attention output. It skips none of Qwen-Image's, which has no single-stream blocks.
BY_HAND: dict[str, tuple[str, ...]] = {
    "FluxTransformer2DModel": ("single_transformer_blocks.*.proj_out",),
    "ZImageTransformer2DModel": (
        "layers.*.attention.to_out.0",
        "layers.*.feed_forward.w1",
        "layers.*.feed_forward.w3",
    ),
}


@dataclass(frozen=True)
class Variant:
    """One row of the study.

    sweep : which sweep it belongs to, "" in the main comparison.
    recipe : of `rtlynx.calibrate` or `rtlynx.sparsify`, None for dense and pruned weights.
    weights : name of a baseline of `baselines.BASELINES`.
    prompts : calibration prompts. sequential : whether blocks see what sparse blocks before them give.
    layers : "by hand" leaves `BY_HAND` dense; "by budget" reaches the same modelled time by the budget rule.
    cache : threshold of first-block caching.
    steps : sampling steps; reference_steps : of the dense pictures it is compared with.
    other_noise : whether it starts from other noise than its reference.
    dtype : of the model, where it is not the study's.
    distill : training of the sparse layers that follows calibration.
    attention : "fp8" computes it in eight bits, on a card by cuDNN, which takes the zoo's heads of 64.
    rotation : name of a basis of values of `rotations.ROTATIONS`, in place of the library's own.
    bf16_sigmas : noise levels of the steps in which it then stays as it is, as of `rtlynx.fp8_attention`.
    rank_of_width : rank of every layer, as a share of the model's width. The library's "auto" gives one rank
        to all layers of a full-size model.
    """

    name: str
    group: Group
    sweep: str = ""
    recipe: Recipe | None = None
    weights: str | None = None
    prompts: int = CALIBRATION_PROMPTS
    sequential: bool = False
    layers: Literal["", "by hand", "by budget"] = ""
    cache: float | None = None
    steps: int = STEPS
    reference_steps: int = STEPS
    other_noise: bool = False
    dtype: Literal["", "float32"] = ""
    rank_of_width: float | None = None
    distill: Distillation | None = None
    attention: Literal["", "fp8"] = ""
    rotation: str = ""
    bf16_sigmas: tuple[tuple[float, float], ...] | Literal["dense"] = "dense"

    @property
    def pictures(self) -> int:
        return PICTURES[self.group]

    @property
    def seeds(self) -> tuple[int, ...]:
        return SEEDS[self.group]

    def missing_for(self, architecture: str) -> str | None:
        """Why a model of this class has no such variant, or None where it has."""
        if self.layers and architecture not in BY_HAND:
            return f"the paper leaves no layer of {architecture} dense by hand"
        if self.cache is not None and architecture == "ZImageTransformer2DModel":
            return "diffusers has no caching for Z-Image"
        return None


def _adjacent(**changes: Any) -> Recipe:
    return Recipe(**{"grouping": "adjacent", "rank": RANK, **changes})


def _paper(**changes: Any) -> Recipe:
    return Recipe.paper(**{"rank": RANK, **changes})


NAIVE = Recipe.immediate(grouping="adjacent", norm="none")
NORM = Recipe.immediate(grouping="adjacent")
OURS = Recipe(rank=RANK)
BF16 = Recipe(rank=None, budget=Budget(speedup_share=RECOMMENDED_SPEEDUP_SHARE))
# In all steps; layers are sparse fp8, dense fp8 or dense.
MIX = replace(BF16, precision="auto")
# What costs nothing at inference.
FREE: dict[str, Any] = {"rotate_values": True, "permute_hidden": True, "intercept": True}
TRAINING = Distillation(steps=500, batch_size=32)
ALL_OF_OURS = Recipe(rank=RANK, text_rows="dense", dense_steps=2)


def _main() -> Iterator[Variant]:
    yield Variant("dense", "main")
    yield Variant("dense:other-seed", "main", other_noise=True)
    for baseline in BASELINES:
        yield Variant(f"weight-2:4:{baseline}", "main", weights=baseline)
    recipes = {
        "activation-2:4": NAIVE,
        "activation-2:4+norm": NORM,
        "paper:trained": _paper(lowrank_solver="trained"),
        "paper": _paper(),
    }
    for name, recipe in recipes.items():
        yield Variant(name, "main", recipe=recipe)
    yield Variant("paper:by-hand", "main", recipe=_paper(), layers="by hand")
    yield Variant("paper:by-budget", "main", recipe=_paper(), layers="by budget")
    recipes = {
        "refit": _adjacent(rank=None),
        "refit+lowrank": _adjacent(),
        "refit+lowrank+strided": OURS,
        "all-of-ours": ALL_OF_OURS,
        "recommended": Recipe.recommended(),
    }
    for name, recipe in recipes.items():
        yield Variant(name, "main", recipe=recipe)


def _sweep(sweep: str, name: str, recipe: Recipe | None = None, **settings: Any) -> Variant:
    return Variant(f"{sweep}:{name}", "sweep", sweep, recipe, **settings)


def _leaving(saving: float) -> Iterator[Variant]:
    """The library's budget rule: as few layers as keep this share of what all of them save."""
    percent, budget = f"{100 * saving:g}%", Budget(speedup_share=saving)
    yield _sweep("saving", f"norm-{percent}", Recipe.immediate(budget=budget))
    yield _sweep("saving", f"refit-{percent}", replace(BF16, budget=budget))
    yield _sweep("saving", f"refit-rows-dense-{percent}", replace(BF16, text_rows="dense", budget=budget))
    yield _sweep("saving", f"ours-{percent}", Recipe(budget=budget), rank_of_width=RANK)
    yield _sweep("saving", f"auto-{percent}", replace(MIX, budget=budget))


def _below(sigma: float) -> Iterator[Variant]:
    """Dense fp8 below this noise level, above it every input sparse, or fewer; what costs nothing is on."""
    dense: dict[str, Any] = {"dense_sigmas": ((0, sigma),), "dense_precision": "fp8", **FREE}
    yield _sweep("schedule", f"every-below-{sigma:g}", Recipe(rank=None, precision="fp8", **dense))
    for share in (0.95, 0.9):
        recipe = replace(MIX, budget=Budget(speedup_share=share), **dense)
        yield _sweep("schedule", f"{100 * share:g}%-below-{sigma:g}", recipe)


def _dropping_weights() -> Iterator[Variant]:
    """Layers that drop weights in place of activations: all, or with the rest of the recommended recipe."""
    every = Recipe(rank=None, precision="fp8", drop="weights", intercept=True)
    rotated = replace(every, rotate_values=True)
    yield _sweep("drop", "fp8-weights", every)
    yield _sweep("drop", "fp8-weights+rotated", rotated)
    last = replace(rotated, dense_last_steps=3, dense_precision="fp8")
    yield _sweep("drop", "fp8-weights+rotated+last-3", last)
    yield _sweep("distilled", "fp8-weights+rotated", rotated, distill=TRAINING)
    longer = replace(TRAINING, steps=4 * TRAINING.steps)
    yield _sweep("distilled", "fp8-weights+rotated+2000-steps", rotated, distill=longer)
    yield _sweep("distilled", "fp8-weights+rotated+last-3", last, distill=TRAINING)
    for drop in ("weights", "activations"):
        yield _sweep("drop", f"recommended-{drop}", Recipe.recommended(drop=drop))


def _rotations() -> Iterator[Variant]:
    """Parts of `free:fp8-refit+rotated+intercept`: groups, rotation and the metric of the output."""
    every = Recipe(rank=None, precision="fp8", intercept=True)
    yield _sweep("rotation", "none", replace(every, grouping="adjacent"))
    yield _sweep("rotation", "none-strided", every)
    for name in ROTATIONS:
        yield _sweep("rotation", name, replace(every, rotate_values=True), rotation=name)


def _sweeps() -> Iterator[Variant]:
    yield Variant("dense:float32", "sweep", "floor", dtype="float32")
    for ridge in (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0):
        yield _sweep("ridge", f"{ridge:g}", Recipe(rank=RANK, ridge=ridge))
    for prompts in (32, 64, 128, 256, 512, 1024):
        yield _sweep("prompts", str(prompts), OURS, prompts=prompts)
    for rank in (None, 0.005, 0.01, 0.02, 0.03, 0.05):
        percent = f"{100 * (rank or 0):g}%"
        yield _sweep("rank", f"ours-{percent}", Recipe(rank=rank))
        paper = _paper(rank=rank) if rank else NORM
        yield _sweep("rank", f"paper-{percent}", paper)
    few = {"steps": FEW_STEPS, "reference_steps": FEW_STEPS}
    yield _sweep("steps", "dense-8-against-28", steps=FEW_STEPS)
    for name, recipe in {"norm": NORM, "paper": _paper(), "ours": OURS, "all-of-ours": ALL_OF_OURS}.items():
        yield _sweep("steps", f"{name}-8", recipe, **few)
    yield _sweep("rank", "ours-width-2%", OURS, rank_of_width=RANK)
    yield _sweep("rank", "paper-width-2%", _paper(), rank_of_width=RANK)
    for saving in (0.95, 0.9, 0.8, 0.6):
        yield from _leaving(saving)
    for n, m in ((1, 4), (4, 8), (8, 16)):
        yield _sweep("pattern", f"norm-{n}:{m}", Recipe.immediate(n=n, m=m, grouping="adjacent"))
        yield _sweep("pattern", f"ours-{n}:{m}", Recipe(n=n, m=m, rank=RANK))
    for name, recipe in {"norm": NORM, "refit": _adjacent(rank=None)}.items():
        yield _sweep("layers", f"{name}-by-hand", recipe, layers="by hand")
        yield _sweep("layers", f"{name}-by-budget", recipe, layers="by budget")
    yield _sweep("grouping", "norm-strided", Recipe.immediate())
    yield _sweep("text", "norm-stream-sparse", Recipe.immediate(grouping="adjacent", text_stream="sparse"))
    yield _sweep("text", "paper-stream-sparse", _paper(text_stream="sparse"))
    yield _sweep("text", "ours-stream-sparse", Recipe(rank=RANK, text_stream="sparse"))
    yield _sweep("text", "ours-rows-dense", Recipe(rank=RANK, text_rows="dense"))
    for steps in (1, 2, 3, 4):
        yield _sweep("dense-steps", str(steps), Recipe(rank=RANK, dense_steps=steps))
    for steps in (1, 2, 4):
        last: dict[str, Any] = {"dense_last_steps": steps, "dense_precision": "fp8"}
        yield _sweep("last-steps", f"refit-{steps}", Recipe(rank=None, precision="fp8", **last))
        yield _sweep("last-steps", f"90%-{steps}", replace(MIX, **last))
    for sigma in (0.25, 0.4, 0.5):
        yield from _below(sigma)
    yield _sweep("order", "one-shot", OURS)
    yield _sweep("order", "sequential", OURS, sequential=True)
    yield _sweep("factors", "ours-own", Recipe(rank=RANK, lowrank_sharing="own"))
    yield _sweep("factors", "paper-shared", _paper(lowrank_sharing="shared"))
    dense_fp8 = Recipe.immediate(n=1, m=1, grouping="adjacent", norm="none", precision="fp8")
    yield _sweep("fp8", "dense", dense_fp8)
    yield _sweep("fp8", "norm", Recipe.immediate(precision="fp8"))
    yield _sweep("fp8", "refit", Recipe(rank=None, precision="fp8"))
    yield _sweep("fp8", "ours", Recipe(rank=RANK, precision="fp8"))
    yield _sweep("fp8", "all-of-ours", Recipe(rank=RANK, precision="fp8", text_rows="dense", dense_steps=2))
    yield _sweep("attention", "dense", attention="fp8")
    yield _sweep("attention", "dense-fp8", dense_fp8, attention="fp8")
    last_4 = ((0.0, 4 / STEPS),)  # sigma falls from 1 to 1 / STEPS in equal steps
    yield _sweep("attention", "dense-fp8-last-4-bf16", dense_fp8, attention="fp8", bf16_sigmas=last_4)
    recommended = Recipe.recommended()
    yield _sweep("attention", "recommended", recommended, attention="fp8")
    yield _sweep("attention", "recommended-all-steps", recommended, attention="fp8", bf16_sigmas=())
    yield _sweep("modulation", "dense", replace(NAIVE, formats={"*": "dense"}, modulation="fp8"))
    yield _sweep("modulation", "dense-fp8", replace(dense_fp8, modulation="fp8"))
    yield _sweep("modulation", "recommended", Recipe.recommended(modulation="fp8"))
    rotated: dict[str, Any] = {"rotate_values": True}
    both = {**rotated, "intercept": True}
    last = {**rotated, "dense_precision": "fp8"}
    yield _sweep("free", "refit+intercept", _adjacent(rank=None, intercept=True))
    yield _sweep("free", "refit+rotated", _adjacent(rank=None, **rotated))
    yield _sweep("free", "refit+permuted", _adjacent(rank=None, permute_hidden=True))
    yield _sweep("free", "refit+rotated+intercept", _adjacent(rank=None, **both))
    yield _sweep("free", "fp8-refit+rotated+intercept", Recipe(rank=None, precision="fp8", **both))
    yield _sweep("free", "fp8-refit+rotated+permuted+intercept", Recipe(rank=None, precision="fp8", **FREE))
    every = Recipe(rank=None, precision="fp8", dense_last_steps=4, **last)
    yield _sweep("free", "fp8-refit+rotated+last-4", every)
    mix, mix_dense_last = replace(MIX, **both), replace(MIX, dense_last_steps=2, **last)
    yield _sweep("free", "fp8-90%+rotated+intercept", mix)
    yield _sweep("free", "fp8-90%+rotated+permuted+intercept", replace(MIX, **FREE))
    yield _sweep("free", "fp8-90%+rotated+last-2", mix_dense_last)
    yield from _rotations()
    yield from _dropping_weights()
    free = Recipe(rank=None, precision="fp8", **FREE)
    distilled = {
        "refit": Recipe(rank=None, precision="fp8"),
        "free": free,
        "recommended": Recipe.recommended(),
        "recommended-activations": Recipe.recommended(drop="activations"),
        "fp8-90%+rotated+intercept": mix,
        "fp8-90%+rotated+last-2": mix_dense_last,
    }
    for name, recipe in distilled.items():
        yield _sweep("distilled", name, recipe, distill=TRAINING)
    yield _sweep("distilled", "free-plain-loss", free, distill=replace(TRAINING, guidance=1.0))
    for error in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2):
        budget = Budget(error=error)
        yield _sweep("fp8-budget", f"{error:g}", Recipe(rank=RANK, precision="auto", budget=budget))
        yield _sweep("bf16-budget", f"{error:g}", Recipe(rank=RANK, budget=budget))
    for threshold in (0.05, 0.1, 0.2):
        yield _sweep("cache", f"dense-{threshold:g}", cache=threshold)
        for name, recipe in {"fp8": dense_fp8, "ours": OURS, "90%": MIX}.items():
            yield _sweep("cache", f"{name}-{threshold:g}", recipe, cache=threshold)


VARIANTS: tuple[Variant, ...] = (*_main(), *_sweeps())


def chosen(globs: str = "*", group: str = "all") -> list[Variant]:
    """Variants of a group whose names match one of the comma-separated globs, in order.

    Raises ValueError where a glob matches none.
    """
    of_group = [variant for variant in VARIANTS if group in ("all", variant.group)]
    patterns = globs.split(",")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(variant.name, pattern) for variant in of_group):
            raise ValueError(f"no variant of group {group!r} is called {pattern!r}")
    return [v for v in of_group if any(fnmatch.fnmatchcase(v.name, pattern) for pattern in patterns)]
