"""Goals for pictures of the small models as a table: what is wanted, what there is, what is tried next."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from study_tables import RESULTS as STUDIES
from tables import Place, read

MODELS = ("flux-emoji", "qwen-emoji", "z-image-emoji")
EVERY_LAYER = {"flux-emoji": 29.0, "qwen-emoji": 29.0, "z-image-emoji": 24.0}
WITH_DENSE_STEPS, MORE_TIME = 33.0, 1.04
# Rows of studies/quality.py: one mix in all steps, in whose modelled time the others are to draw nearer.
MIXED, RECOMMENDED = "saving:auto-90%", ("recommended", "distilled:recommended")
# Every layer sparse, by weights.
WEIGHTS = (
    "drop:fp8-weights",
    "drop:fp8-weights+rotated",
    "distilled:fp8-weights+rotated",
    "distilled:fp8-weights+rotated+2000-steps",
)
WEIGHTS_AND_STEPS = ("drop:fp8-weights+rotated+last-3", "distilled:fp8-weights+rotated+last-3")


class Goal(NamedTuple):
    """PSNR in dB that is wanted at least, and the best that was measured; None where nothing was."""

    what: str
    wanted: float
    found: float | None
    following: str

    @property
    def met(self) -> bool:
        return self.found is not None and self.found >= self.wanted


def goals_section(root: Path, _place: Place) -> str:
    """The goals as a Markdown table; those not reached come first."""
    lines = ["| goal | today | what is next |", "|---|---|---|"]
    for goal in sorted(_goals(root), key=lambda goal: goal.met):
        found = "not measured" if goal.found is None else f"{goal.found:.1f} dB"
        if not goal.met and found == f"{goal.wanted:.1f} dB":  # rounding must not hide what is missing
            found = f"{goal.found:.2f} dB"
        following = "reached" if goal.met else goal.following
        lines.append(f"| {goal.what}: at least {goal.wanted:.0f} dB | {found} | {following} |")
    return "\n".join(lines)


def _goals(root: Path) -> Iterator[Goal]:
    for model in MODELS:
        rows = read(root / STUDIES / f"noise-levels-{model}.json")["rows"]
        below = [
            row for row in rows if row["kind"] == "dense-below" and row["recipe"].startswith("every-layer")
        ]
        starts = {row["recipe"]: row for row in below if row["range"][1] == 0}
        measured = {row["name"]: row for row in read(root / STUDIES / f"quality-{model}.json")["rows"]}
        every = [row["psnr"] for row in starts.values()]
        every += [measured[name]["figures"]["psnr"]["mean"] for name in WEIGHTS if name in measured]
        yield Goal(
            f"{model}, every layer in sparse fp8",
            EVERY_LAYER[model],
            max(every, default=None),
            "longer distillation, on more of the model's own states",
        )
        within = [row["psnr"] for row in below if _costs_little(row, starts[row["recipe"]])]
        within += [
            measured[name]["figures"]["psnr"]["mean"]
            for name in WEIGHTS_AND_STEPS
            if name in measured and _costs_little(measured[name], measured[WEIGHTS[0]])
        ]
        yield Goal(
            f"{model}, every layer in sparse fp8, last steps dense, at 4 % more modelled time",
            WITH_DENSE_STEPS,
            max(within, default=None),
            "measure 2:4 weights with dense last steps, distilled",
        )
        most = measured[MIXED]["modelled_ms"]
        found = [
            measured[name]["figures"]["psnr"]["mean"]
            for name in RECOMMENDED
            if name in measured and measured[name]["modelled_ms"] <= most
        ]
        yield Goal(
            f"{model}, `recommended`, distilled or not, in the modelled time of `{MIXED}`",
            WITH_DENSE_STEPS,
            max(found, default=None),
            "distillation on top of it",
        )


def _costs_little(row: Mapping[str, Any], start: Mapping[str, Any]) -> bool:
    times = row["modelled_ms"], start["modelled_ms"]
    return None not in times and times[0] <= MORE_TIME * times[1]
