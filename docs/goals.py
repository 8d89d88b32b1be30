"""Performance goals as tables: what is wanted, what there is today, what is tried next."""

import sys
from collections.abc import Iterator
from pathlib import Path

from overview import RESULTS
from tables import factor, in_words, number, read

from rtlynx.timing.card import card_slug

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import targets
from targets import Target

# Group -> section of benchmarks/NOTES.md that a target names -> the next idea, told there.
NEXT = {
    "step": {
        targets.STEP: "measure norm and rotation in one kernel before bf16 attention; fewer passes",
        targets.LORA: "our own product for dense fp8 layers, with low-rank stages",
        targets.CARDS: "queries, keys and values in e4m3 through the all-to-all; a tile for fewer rows",
    },
    "layer": {
        targets.PRODUCT: "activations from registers; fewer bytes from L2",
        targets.LAYER: "a faster GEMM; fewer instructions in the selection",
        targets.FP8: "tiles for few tokens; a measurement on an H200",
    },
    "compression": {
        targets.COMPRESSION: "fewer instructions in the selection; Aᵀ by TMA",
        targets.PRODUCERS: "two halves of the grid out of step",
    },
    "host": {
        targets.HOST: "one format for all layers of a kind of block; one launch for preparation and product"
    },
    "calibration": {
        targets.CALIBRATION: "an input's moments are gone before its last format is solved: measure again"
    },
}
# Results files -> their targets.
KINDS = {
    "step-*.json": targets.step_targets,
    "parallel-*.json": targets.parallel_targets,
    "linear-*.json": targets.linear_targets,
    "compress-*.json": targets.compress_targets,
    "host-*.json": targets.host_targets,
    "calibration-whole-*.json": targets.calibration_targets,
}


def goals_section(root: Path, group: str) -> str:
    """The goals of one group as a Markdown table; those not reached come first."""
    lines = ["| goal | today | what is next |", "|---|---|---|"]
    for target in sorted(_targets(root, group), key=lambda target: target.met):
        wanted, today = (_figure(value, target.unit) for value in (target.wanted, target.measured))
        if today == wanted and not target.met:  # rounding must not hide what is missing
            today = _figure(target.measured, target.unit, 3)
        by = f" ({in_words(target.by).strip(', ')})" if target.by else ""
        following = "reached" if target.met else NEXT[group][target.section]
        bound = "at most" if target.at_most else "at least"
        lines.append(f"| {in_words(target.what)}: {bound} {wanted} | {today}{by} | {following} |")
    return "\n".join(lines)


def _targets(root: Path, group: str) -> Iterator[Target]:
    """Each goal once: as the newest card has it, at its best."""
    found: dict[tuple[str, float], tuple[tuple, Target]] = {}
    for card, target in _of_files(root):
        figure = target.measured or 0.0
        rank = target.measured is not None, card, -figure if target.at_most else figure
        key = target.what, target.wanted
        if target.section in NEXT[group] and (key not in found or found[key][0] < rank):
            found[key] = rank, target
    return (target for _, target in found.values())


def _of_files(root: Path) -> Iterator[tuple[str, Target]]:
    """The card and targets of each results file, and the targets of models before they are measured."""
    for model in targets.STEP_SPEED_UPS:
        yield from (("", target) for target in targets.step_targets({"model": model, "variants": []}))
    for pattern, targets_of in KINDS.items():
        for file in sorted((root / RESULTS).glob(pattern)):
            document = read(file)
            yield from ((card_slug(document["device"]), target) for target in targets_of(document))


def _figure(value: float | None, unit: str, digits: int | None = None) -> str:
    """`digits` behind the point, where others than usual: two of a factor, none of a rate."""
    if value is None:
        return factor(value)
    if unit == "x":
        return factor(value) if digits is None else f"{value:.{digits}f}x"
    return f"{number(value, f',.{digits or 0}f')}&nbsp;{unit}"
