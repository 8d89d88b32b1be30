"""Goals for pictures of the small models as a table: what is wanted, what there is, what is tried next."""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from study_tables import RESULTS
from tables import Place, read

sys.path.append(str(Path(__file__).resolve().parent.parent / "studies"))
import picture_targets
from measured_rows import DoesNotApply, Results
from picture_targets import Candidate, PictureTarget

# What is asked of a model -> the next idea.
NEXT: dict[Callable[..., PictureTarget], str] = {
    picture_targets.every_layer: "longer distillation, on more of the model's own states",
    picture_targets.with_dense_steps: "longer distillation, which has been measured for 500 steps",
    picture_targets.recommended: "distillation on top of it",
    picture_targets.at_noise_floor: "distillation on top of it",
    picture_targets.by_frechet: "measure it; a smaller share of the saving",
}


def goals_section(root: Path, _place: Place) -> str:
    """The goals as a Markdown table; those not reached come first."""
    lines = ["| goal | today | what is next |", "|---|---|---|"]
    for model, target, following in sorted(_goals(root), key=lambda goal: goal[1].met):
        bound = "most" if target.at_most else "least"
        wanted = target.shown(target.wanted)
        following = "reached" if target.met else following
        lines.append(f"| {model}, {target.what}: at {bound} {wanted} | {_today(target)} | {following} |")
    return "\n".join(lines)


def _today(target: PictureTarget) -> str:
    if target.measured is None:
        return "not measured"
    found = target.shown(target.measured)
    if not target.met and found == target.shown(target.wanted):  # rounding must not hide what is missing
        found = target.shown(target.measured, more=1)
    return f"{found} ({target.pictures:,} pictures)"


def _goals(root: Path) -> Iterator[tuple[str, PictureTarget, str]]:
    """Model, target and the next idea, of all that is asked of each model."""
    for file in sorted((root / RESULTS).glob("quality-*.json")):
        of = Results(read(file))
        every, with_steps = _by_noise_level(file.with_name(file.name.replace("quality-", "noise-levels-")))
        others = {picture_targets.every_layer: every, picture_targets.with_dense_steps: with_steps}
        for target_of, following in NEXT.items():
            more = [others[target_of]] if target_of in others else []
            try:
                yield of.model, target_of(of, *more), following
            except DoesNotApply:
                continue


def _by_noise_level(file: Path) -> tuple[list[Candidate], list[Candidate]]:
    """Rows of a study of noise levels: every layer sparse in all steps, and in all but cheap last ones."""
    rows = read(file)["rows"] if file.is_file() else []
    below = [row for row in rows if row["kind"] == "dense-below" and row["recipe"].startswith("every-layer")]
    starts = {row["recipe"]: row for row in below if row["range"][1] == 0}
    cheap = [
        row
        for row in below
        if picture_targets.costs_little(row["modelled_ms"], starts[row["recipe"]]["modelled_ms"])
    ]
    return [*map(_candidate, starts.values())], [*map(_candidate, cheap)]


def _candidate(row: Mapping[str, Any]) -> Candidate:
    return Candidate(row["name"], row["psnr"], row["modelled_ms"], row["pictures"])
