"""Performance goals as tables: what is wanted, what there is today, what is tried next."""

from collections.abc import Iterable

from tables import factor, in_words, number

# Group -> what it is about.
STEP, LAYER, COMPRESSION, HOST = "A step", "A layer", "Compression", "Host time"
# Section of benchmarks/NOTES.md that a target names -> the next idea, told there.
NEXT = {
    "What bounds the GEMM": "activations from registers; fewer bytes from L2",
    "Where it stands": "a faster GEMM; fewer instructions in the selection",
    "Compression, version by version": "fewer instructions in the selection; Aᵀ by TMA",
    "Producers, version by version": "two halves of the grid out of step",
    "fp8": "2:4 weights, which need no selection",
    "A whole step": "attention and modulation in fp8 together; fewer passes over the stream",
    "Several cards": "queries, keys and values in e4m3 through the all-to-all; a tile for fewer rows",
    "Host time": "measure `rtlynx.compile`; one launch for layers that read one input",
}


def goals_section(documents: Iterable[dict], group: str) -> str:
    """The goals of one group of all results files, as a Markdown table; those not reached come first."""
    lines = ["| goal | today | what is next |", "|---|---|---|"]
    targets: dict[object, dict] = {}
    for document in documents:
        for target in document.get("targets", ()):
            if _group(target, document) != group:
                continue
            # Several runs of a step have the same goals: the best counts.
            about, _, goal = target["what"].rpartition(", speed over ")
            key = (document["model"], goal, target["wanted"]) if about and group == STEP else len(targets)
            if key not in targets or targets[key]["measured"] < target["measured"]:
                targets[key] = target
    for target in sorted(targets.values(), key=lambda target: target["met"]):
        wanted, today = (_figure(target[key], target["unit"]) for key in ("wanted", "measured"))
        if today == wanted and not target["met"]:  # rounding must not hide what is missing
            today = f"{target['measured']:.3f}x"
        following = "reached" if target["met"] else _next(target, group)
        lines.append(f"| {in_words(target['what'])}: {target['bound']} {wanted} | {today} | {following} |")
    return "\n".join(lines)


def _group(target: dict, document: dict) -> str:
    if "wall time" in target["what"] or "host time" in target["what"]:
        return HOST
    if "model" in document:
        return STEP
    return COMPRESSION if "producers" in document else LAYER


def _next(target: dict, group: str) -> str:
    """What is tried next, by the section of the notes that the target names."""
    section = target["why"].removeprefix("benchmarks/NOTES.md, ")
    return NEXT["Host time" if group == HOST else section]


def _figure(value: float | None, unit: str) -> str:
    if unit == "x":
        return factor(value)
    return f"{number(value, ',.0f')}&nbsp;{unit.replace('us', 'µs')}"
