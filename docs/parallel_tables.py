"""Several cards as tables: what a step exchanges, by formula, and what was measured."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from overview import RESULTS, current_steps
from tables import Place, factor, in_words, measured_on, number, read

from rtlynx.timing.communication import (
    ARRANGEMENTS,
    INFINIBAND,
    NVLINK,
    TRAFFIC,
    ceiling,
    hosts_seconds,
)
from rtlynx.timing.full_models import Size
from rtlynx.timing.results import picture_size, speed_up
from rtlynx.timing.step_variants import MIXED, RECOMMENDED

LARGE = 2048  # pixels


class OneCard(NamedTuple):
    """A step of one card that was measured: its model, tokens of all its forwards, GPU time, and file.

    recommended : whether by the recommended recipe as it is.
    """

    title: str
    model: str
    tokens: int
    gpu_ms: float
    source: Path
    recommended: bool


def plan_section(root: Path, place: Place) -> str:
    """What a step sends on 2 and on 8 cards, and the most that these give."""
    steps = list(_one_card(root))
    if not steps:
        return ""
    lines = [
        "| step, ms on one card | arrangement | GB that a card sends, of 2 / of 8 | ms by NVLink "
        "| at most, 2 cards | 8 cards | 2 hosts of 8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in steps:
        of = TRAFFIC[step.model]
        for name, sent in ARRANGEMENTS.items():
            bytes_sent = {cards: sent(of, step.tokens, cards) for cards in (2, 8)}
            most = [ceiling(step.gpu_ms / 1e3, cards, n / NVLINK) for cards, n in bytes_sent.items()]
            hosts = None
            if name == "Ulysses":
                hosts = ceiling(step.gpu_ms / 1e3, 16, hosts_seconds(of, step.tokens, 8, 2))
            cells = [f"{step.title}, {number(step.gpu_ms, '.0f')}", name]
            cells += [" / ".join(number(n / 1e9, ".2f") for n in bytes_sent.values())]
            cells += [" / ".join(number(n / NVLINK * 1e3, ".1f") for n in bytes_sent.values())]
            lines.append(f"| {' | '.join([*cells, *map(factor, (*most, hosts))])} |")
    older = any(f"{LARGE}²" in step.title and not step.recommended for step in steps)
    large = f" {LARGE}² was measured with every layer by 2:4 activations." if older else ""
    files = ", ".join(dict.fromkeys(place.file(step.source) for step in steps))
    lines += [
        "",
        f"From formulas (`rtlynx/timing/communication.py`), with NVLink at {NVLINK / 1e9:.0f} GB/s and "
        f"InfiniBand at {INFINIBAND / 1e9:.0f} GB/s each way, and measured steps of one card in the "
        f"recommended recipe, or in the one before it ({files}). *At most*: all that is computed splits "
        f"evenly and runs at the speed that it has on one card.{large} Two hosts: Ulysses inside, ring "
        "across.",
    ]
    return "\n".join(lines)


def _one_card(root: Path) -> Iterator[OneCard]:
    for model, source in current_steps(root).items():
        results = read(root / source)
        if model in TRAFFIC:
            yield from _rows_of(results, results["variants"], model, source)
        for sizes in sorted((root / RESULTS).glob(f"sizes-{model}-*.json")):
            for row in read(sizes)["rows"]:
                if model in TRAFFIC and row["resolution"] == LARGE:
                    yield from _rows_of(row, row["variants"], model, sizes.relative_to(root))


def _rows_of(size: dict, variants: list[dict], model: str, source: Path) -> Iterator[OneCard]:
    times = {row["name"]: row["gpu_ms"] for row in variants}
    recommended = times.get(RECOMMENDED)
    gpu_ms = recommended or times.get(MIXED)
    if gpu_ms is None or size["batch"] != 1:
        return
    tokens = Size(size["resolution"]).image_tokens + size["text_tokens"]
    if model == "qwen-image":  # a negative prompt of a quarter of the text, too
        tokens += Size(size["resolution"]).image_tokens + size["text_tokens"] // 4
    title = f"{in_words(model)}, {size['resolution']}²"
    yield OneCard(title, model, tokens, gpu_ms, source, recommended is not None)


def measured_section(results: dict, source: Path, place: Place) -> str:
    """A step on several cards, each arrangement beside one card."""
    lines = [
        "| variant | arrangement | GPU, ms | one card beside it | **speed-up** | wall, ms | by wall "
        "| NCCL, ms | peak a card, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        beside, kernels = row.get("beside", {}), row.get("kernels_ms") or {}
        cells = [in_words(row["name"]), row["arrangement"], number(row["gpu_ms"], ".1f")]
        cells += [number(beside.get("gpu_ms"), ".1f"), f"**{factor(speed_up(row))}**"]
        cells += [number(row["wall_ms"], ".1f"), factor(speed_up(row, "wall_ms"))]
        cells += [number(kernels.get("communication"), ".1f")]
        cells += [" + ".join(number(peak, ".1f") for peak in row.get("peak_gib", ())) or number(None, "")]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [
        f"- {in_words(one['name'])}, {one['arrangement']}: not measured: {one['reason']}"
        for one in results["rows"]
        if one["reason"]
    ]
    lines += [""] if lines[-1] else []
    by_events = sum(one["gpu_time"] == "events" for one in results["rows"])
    how = "GPU time is that of a CUDA graph of the step, NCCL's kernels included"
    if by_events:
        how += f"; in {by_events} rows, where none could be captured, that between events around calls"
    lines.append(
        f"{in_words(results['model'])}, {picture_size(results)}, batch {results['batch']}. "
        f"{how}. The slowest card counts. {measured_on(results)} "
        f"({place.file(source)})."
    )
    return "\n".join(lines)
