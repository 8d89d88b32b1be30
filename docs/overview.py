"""Models at a glance: a step of each, dense and sparse, and what the variants do to pictures."""

from collections.abc import Iterable
from pathlib import Path

from study_tables import RESULTS as STUDIES
from study_tables import rows_of
from tables import Place, card_of, factor, in_words, number, read

from rtlynx.timing.full_models import MODELS
from rtlynx.timing.overview import dense_steps
from rtlynx.timing.results import BLOCK_GRAPHS, REFERENCE, picture_size, step_speed_up
from rtlynx.timing.step_variants import (
    DENSE_FP8,
    EVERY_WEIGHT,
    FP8_ATTENTION,
    RECOMMENDED,
    TORCHAO,
)

RESULTS = Path("benchmarks/results")
# Full-size model -> the small one of its architecture whose pictures were measured.
STUDIED = {"flux1-dev": "flux-emoji", "qwen-image": "qwen-emoji", "z-image": "z-image-emoji"}
SPEED = Path("docs/speed")
CHARTS = {
    SPEED / "steps.png": tuple(STUDIED),
    SPEED / "steps-others.png": tuple(name for name in MODELS if name not in STUDIED),
}
# Variants of a step to show -> their rows in the study.
VARIANTS = {
    "bf16 eager": None,
    REFERENCE: None,
    TORCHAO: None,
    DENSE_FP8: "fp8:dense",
    DENSE_FP8 + FP8_ATTENTION: "attention:dense-fp8",
    RECOMMENDED: "recommended",
    RECOMMENDED + FP8_ATTENTION: "attention:recommended",  # as the steps' files have it
    EVERY_WEIGHT: "drop:fp8-weights+rotated",
    EVERY_WEIGHT + FP8_ATTENTION: None,
}
ON_SITE_ALONE = (EVERY_WEIGHT + FP8_ATTENTION,)  # the README is short
CHOOSE_STEPS, ATTENTION = Path("docs/guides/calibrate.md"), Path("docs/guides/attention.md")
Studies = dict[str, dict[str, dict]]


def current_steps(root: Path) -> dict[str, Path]:
    """The results file of each model to show: one with the recommended recipe, of most variants.

    Of two alike that of the newer card.
    """
    found = {}
    for model in MODELS:
        files = sorted((root / RESULTS).glob(f"step-{model}-*.json"))
        if files:
            found[model] = max(reversed(files), key=_completeness).relative_to(root)
    return found


def _completeness(file: Path) -> tuple[bool, int]:
    known = measured(read(file))
    return RECOMMENDED in known, len(known)


def measured(document: dict) -> dict[str, dict]:
    """The variants to show that were measured, by name."""
    rows = {row["name"]: row for row in document["variants"]}
    return {name: rows[name] for name in VARIANTS if rows.get(name, {}).get("gpu_ms") is not None}


def overview_section(root: Path, place: Place) -> str:
    """Chart and table of the models whose pictures were measured, on the site of the others too."""
    steps, parts, shown = current_steps(root), [], []
    for chart, models in CHARTS.items():
        known = [model for model in models if model in steps]
        if known and (place.in_docs or not shown):
            title = f"GPU and wall time of one step: {', '.join(map(in_words, known))}"
            parts += [f"![{title}]({place.path(chart)})", _table(root, place, known)]
            shown += known
    if not parts:
        return ""
    return "\n\n".join(
        [*parts, _sources(root, [steps[model] for model in shown], place), _verdict(root, place)]
    )


def _table(root: Path, place: Place, models: list[str]) -> str:
    """Variants of `models`: with the size of what is drawn, or with figures of a small model's pictures."""
    steps, studies = current_steps(root), _studies(root)
    pictures = any(model in STUDIED for model in models)
    head = ["model", *([] if pictures else ["size"]), "variant", "GPU, ms", "wall, ms"]
    head += ["wall with CUDA graphs, ms", "speed", "GiB", *(["PSNR, dB", "SSIM"] if pictures else [])]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for model in models:
        document = read(root / steps[model])
        rows = {row["name"]: row for row in document["variants"]}
        for name, row in measured(document).items():
            if name in ON_SITE_ALONE and not place.in_docs:
                continue
            told = dense_steps(row)
            title = f"**{in_words(name)}**" if name.startswith(RECOMMENDED) else in_words(name)
            times = row["gpu_ms"], row["wall_ms"], rows.get(name + BLOCK_GRAPHS, {}).get("wall_ms")
            cells = [in_words(model), *([] if pictures else [picture_size(document)])]
            cells += [f"{title} ({told})" if told else title, *(number(time, ".1f") for time in times)]
            cells += [factor(step_speed_up(rows.values(), name)), number(row.get("peak_gib"), ".1f")]
            cells += _picture(studies.get(STUDIED[model], {}), VARIANTS[name]) if pictures else []
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(root: Path, place: Place) -> str:
    """What sparsity adds to dense fp8 on the same kernels, and what it costs in pictures."""
    faster, costs, studies = [], [], _studies(root)
    for model, source in current_steps(root).items():
        speed = step_speed_up(read(root / source)["variants"], RECOMMENDED, DENSE_FP8)
        if speed is not None and (place.in_docs or model in STUDIED):
            faster.append(f"{factor(speed)} as fast ({in_words(model)})")
    for study, known in studies.items():
        if {"fp8:dense", "recommended"} <= set(known):
            dense, sparse = (known[name]["figures"]["psnr"]["mean"] for name in ("fp8:dense", "recommended"))
            costs.append(f"from {dense:.1f} to {sparse:.1f} dB ({study})")
    text = "**The alternative is dense fp8**: the same model, quantised by the same fused kernels. "
    text += "It drops nothing."
    if faster:
        text += f" A step by the recommended recipe is {_listed(faster)}."
    if costs:
        text += (
            " The recommended recipe runs dense fp8 in "
            f"[steps that calibration chooses]({place.path(CHOOSE_STEPS)}#choose-dense-steps). "
            f"Its pictures differ more: PSNR falls {_listed(costs)}."
        )
    return text


def _sources(root: Path, sources: Iterable[Path], place: Place) -> str:
    """Where the tables' figures are from, and what they do not say."""
    known = [(source, read(root / source)) for source in sources]
    cards = dict.fromkeys(card_of(document) for _, document in known)
    files, studies = ", ".join(place.file(source) for source, _ in known), _studies(root)
    return (
        "One step, of pictures of 1024x1024 where no size is given, batch 1; a dash: not measured. "
        f"{'; '.join(cards)} ({files}). *Speed* is GPU time against compiled bf16, *GiB* the peak of memory, "
        f"*fp8 attention* [a setting of its own]({place.path(ATTENTION)}). "
        f"PSNR and SSIM compare with dense pictures of the same noise, on a **64x64 emoji model "
        f"of the same architecture** ({_counts(studies, 'fp8:dense')} pictures for dense fp8, "
        f"{_counts(studies, 'recommended')} for the recommended recipe). Pictures of full-size models have "
        "not been measured."
    )


def _studies(root: Path) -> Studies:
    """Model of the study -> its rows by name."""
    files = {name: root / STUDIES / f"quality-{name}.json" for name in STUDIED.values()}
    return {name: rows_of(read(file)) for name, file in files.items() if file.is_file()}


def _counts(studies: Studies, name: str) -> str:
    """How many pictures of each model a row of the study has."""
    counts = {rows[name]["n"] for rows in studies.values() if name in rows}
    return " or ".join(f"{count:,}" for count in sorted(counts)) or "no"


def _picture(rows: dict[str, dict], name: str | None) -> list[str]:
    figures = rows[name]["figures"] if name in rows else {}
    means = {figure: figures[figure]["mean"] if figures else None for figure in ("psnr", "ssim")}
    return [number(means["psnr"], ".1f"), number(means["ssim"], ".3f")]


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
