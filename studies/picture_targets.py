"""What pictures of the small models are to reach, beside what was measured.

`claims.py` and the page of goals (docs/picture_goals.py) both show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from measured_rows import DoesNotApply, Missing, Results
from variants import PICTURES, SEEDS

# PSNR in dB, at least.
EVERY_LAYER = {"flux-emoji": 29.0, "qwen-emoji": 29.0, "z-image-emoji": 24.0}
WITH_DENSE_STEPS = dict.fromkeys(EVERY_LAYER, 33.0)
RECOMMENDED = dict.fromkeys(EVERY_LAYER, 33.0)
# Those that are to draw as near to dense as dense pictures of other noise do.
AT_NOISE_FLOOR = ("qwen-emoji", "z-image-emoji")
# Whose pictures are to be as near to real ones as dense pictures are: it does not know them by heart.
BY_FRECHET = ("flux-fashion",)
MORE_TIME = 1.04  # modelled, that dense last steps may take
MORE = f"{100 * (MORE_TIME - 1):.0f} % more modelled time"
# A row of fewer pictures reaches nothing; where rows of the main comparison's size exist, they decide.
FEWEST, WHOLE = PICTURES["sweep"], PICTURES["main"] * len(SEEDS["main"])

# Rows of quality.py. Every layer sparse, by weights.
WEIGHTS = (
    "drop:fp8-weights",
    "drop:fp8-weights+rotated",
    "distilled:fp8-weights+rotated",
    "distilled:fp8-weights+rotated+2000-steps",
)
WEIGHTS_AND_STEPS = ("drop:fp8-weights+rotated+last-3", "distilled:fp8-weights+rotated+last-3")
# One mix in all steps, in whose modelled time the others are to draw nearer.
MIXED, RECOMMENDED_ROWS = "saving:auto-90%", ("recommended", "distilled:recommended")
DENSE = ("dense", "dense:other-seed")

_OVER_ALL_STEPS = "its errors add up over all steps, and the last ones undo few of them"
_FEW_STEPS = "dense steps pay up to half of the noise there, and so little time buys the last tenth of it"
_LOW_CEILING = "its errors add up over all steps, and dense fp8 itself draws little nearer than this"
_EVERY, _STEPS = "every layer in sparse fp8", "every layer in sparse fp8, last steps dense"
# What stands in the way, of models that do not reach a figure.
_WHY = {
    (_EVERY, "z-image-emoji"): _OVER_ALL_STEPS,
    (_STEPS, "qwen-emoji"): _FEW_STEPS,
    (_STEPS, "z-image-emoji"): _FEW_STEPS,
    ("recommended", "z-image-emoji"): _LOW_CEILING,
    ("noise floor", "z-image-emoji"): _LOW_CEILING,
}


class Candidate(NamedTuple):
    """A row that may reach a figure; `ms` is modelled."""

    name: str
    psnr: float
    ms: float | None
    pictures: int


class PictureTarget(NamedTuple):
    """`what` is to be at least `wanted`, or at most.

    measured, pictures : the figure that counts and of how many pictures it is; None and 0 where there is none
    by : the row
    why : what stands in the way, where that is known
    """

    what: str
    wanted: float
    measured: float | None
    pictures: int
    by: str
    why: str = ""
    unit: str = " dB"
    at_most: bool = False

    @property
    def met(self) -> bool:
        if self.measured is None or self.pictures < FEWEST:
            return False
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted

    def shown(self, figure: float, more: int = 0) -> str:
        """A figure of its kind, with `more` digits."""
        return f"{figure:.{more + (1 if self.unit else 2)}f}{self.unit}"


def rows_of(of: Results, names: Iterable[str]) -> list[Candidate]:
    """Those of `names` that were measured."""
    rows = (of.rows[name] for name in names if name in of.rows)
    return [Candidate(row["name"], _psnr(row), row["modelled_ms"], row["n"]) for row in rows]


def _psnr(row: dict) -> float:
    return row["figures"]["psnr"]["mean"]


def _target(
    what: str, kind: str, of: Results, wanted: float, candidates: Sequence[Candidate]
) -> PictureTarget:
    """By the best of `candidates`, of those with enough pictures where there are such."""
    some: Sequence[Candidate] = ()
    for least in (WHOLE, FEWEST, 0):
        some = some or [one for one in candidates if one.pictures >= least]
    best = max(some, key=lambda one: one.psnr, default=Candidate("", 0.0, None, 0))
    measured = best.psnr if some else None
    return PictureTarget(what, wanted, measured, best.pictures, best.name, _WHY.get((kind, of.model), ""))


def _wanted(figures: dict[str, float], of: Results) -> float:
    if of.model not in figures:
        raise DoesNotApply("no figure was set for this model")
    return figures[of.model]


def every_layer(of: Results, others: Sequence[Candidate] = ()) -> PictureTarget:
    """Every layer sparse in all steps; `others` are rows of other files."""
    wanted = _wanted(EVERY_LAYER, of)
    return _target(_EVERY, _EVERY, of, wanted, [*rows_of(of, WEIGHTS), *others])


def with_dense_steps(of: Results, others: Sequence[Candidate] = ()) -> PictureTarget:
    """Every layer sparse but in the last steps; `others` are rows of other files that cost as little."""
    wanted, rows = _wanted(WITH_DENSE_STEPS, of), rows_of(of, WEIGHTS_AND_STEPS)
    cheap = [one for one in rows if costs_little(one.ms, of.ms(WEIGHTS[0]))]
    if rows and not cheap:
        cheap = rows_of(of, WEIGHTS)  # at that price no step runs dense
    return _target(f"{_STEPS}, at {MORE}", _STEPS, of, wanted, [*cheap, *others])


def costs_little(ms: float | None, beside: float | None) -> bool:
    """Whether a schedule takes little more modelled time than the same layers in all steps."""
    return ms is not None and beside is not None and ms <= MORE_TIME * beside


def recommended(of: Results) -> PictureTarget:
    """The recommended recipe in the time of what was recommended before."""
    wanted = _wanted(RECOMMENDED, of)
    what = f"`recommended`, distilled or not, in the modelled time of `{MIXED}`"
    return _target(what, "recommended", of, wanted, _fast_enough(of))


def at_noise_floor(of: Results) -> PictureTarget:
    """The same beside dense pictures of other noise."""
    if of.model not in AT_NOISE_FLOOR:
        raise DoesNotApply("no figure was set for this model")
    what = "`recommended`, distilled or not, beside dense pictures of other noise"
    return _target(what, "noise floor", of, of.figure("dense:other-seed"), _fast_enough(of))


def _fast_enough(of: Results) -> list[Candidate]:
    most = of.ms(MIXED)
    return [one for one in rows_of(of, RECOMMENDED_ROWS) if one.ms is not None and one.ms <= most]


def by_frechet(of: Results) -> PictureTarget:
    """The mean Fréchet distance of the recommended recipe beside the largest of the dense model's seeds."""
    if of.model not in BY_FRECHET:
        raise DoesNotApply("it is asked of the model alone that does not know its pictures by heart")
    wanted = max(one for name in DENSE for one in of.row(name)["figures"]["frechet"]["by_seed"])
    what = "`recommended`, Fréchet distance beside the largest of the dense model's seeds"
    row, why = of.rows.get("recommended"), _WHY.get(("Fréchet", of.model), "")
    mean, pictures = (None, 0) if row is None else (row["figures"]["frechet"]["mean"], row["n"])
    return PictureTarget(what, wanted, mean, pictures, "recommended", why, unit="", at_most=True)


def measured(target: PictureTarget) -> tuple[float, int]:
    """Its figure and number of pictures.

    Raises
    ------
    Missing
        Without a row of enough pictures.
    """
    if target.measured is None or target.pictures < FEWEST:
        raise Missing(f"such a row, of {FEWEST} pictures or more")
    return target.measured, target.pictures
