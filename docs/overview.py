"""The three models at a glance: a step of each in dense and sparse fp8, and what either does to pictures."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from study_tables import RESULTS as STUDIES
from study_tables import rows_of
from tables import Place, card_of, factor, number, read

from rtlynx.timing.overview import dense_steps
from rtlynx.timing.results import BLOCK_GRAPHS, REFERENCE, step_speed_up
from rtlynx.timing.step_variants import DENSE_FP8, FP8_ATTENTION, MIXED, RECOMMENDED, TORCHAO

CHART = Path("docs/speed/steps.png")
RESULTS = Path("benchmarks/results")
Studies = dict[str, dict[str, dict]]
CHOOSE_STEPS, ATTENTION = Path("docs/guides/calibrate.md"), Path("docs/guides/attention.md")


class Model(NamedTuple):
    """A full-size model, and the small one of its architecture whose pictures were measured."""

    title: str
    step: str
    study: str


MODELS = (
    Model("FLUX.1-dev", "flux1-dev", "flux-emoji"),
    Model("Qwen-Image", "qwen-image", "qwen-emoji"),
    Model("Z-Image", "z-image", "z-image-emoji"),
)
# Variant of a step -> how it is called here, and its row in the study.
VARIANTS = {
    REFERENCE: ("bf16, compiled", None),
    TORCHAO: ("dense fp8, torchao", None),
    DENSE_FP8: ("dense fp8, rtlynx", "fp8:dense"),
    RECOMMENDED: ("**sparse fp8, rtlynx**", "recommended"),
    MIXED: ("sparse fp8, one mix in all steps", "saving:auto-90%"),
}
# Of which a file has one.
OURS = (RECOMMENDED, MIXED)


def current_steps(root: Path) -> dict[str, Path]:
    """The results file of each model to show: of the newest card on which dense fp8 was measured, too.

    A model without such a file is shown by the oldest that it has.
    """
    found = {}
    for model in MODELS:
        files = sorted((root / RESULTS).glob(f"step-{model.step}-*.json"))
        complete = [file for file in files if _row(read(file), DENSE_FP8).get("gpu_ms") is not None]
        if files:
            found[model.step] = (complete or files[:1])[-1].relative_to(root)
    return found


def overview_section(root: Path, place: Place) -> str:
    """The table of models and variants, in Markdown, with where its figures are from."""
    steps, studies = current_steps(root), _studies(root)
    lines = [
        "| model | variant | GPU, ms | wall, ms | wall with CUDA graphs, ms | speed | PSNR, dB | SSIM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        if model.step not in steps:
            continue
        document = read(root / steps[model.step])
        rows = document["variants"]
        for name, (title, study) in VARIANTS.items():
            if name in OURS and not _row(document, name):
                continue
            row, graphs = _row(document, name), _row(document, name + BLOCK_GRAPHS)
            times = row.get("gpu_ms"), row.get("wall_ms"), graphs.get("wall_ms")
            told = dense_steps(row)
            named = f"{title} ({told})" if told else title
            cells = [model.title, named, *(number(time, ".1f") for time in times)]
            cells += [factor(step_speed_up(rows, name)), *_picture(studies.get(model.study, {}), study)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _sources(root, steps.values(), studies, place)])


# Of files of attention in fp8: variant -> how it is called here, and its row in the study.
IN_FP8_ATTENTION = {
    REFERENCE: ("bf16, compiled", None),
    TORCHAO: ("dense fp8, torchao", None),
    DENSE_FP8: ("dense fp8", "fp8:dense"),
    DENSE_FP8 + FP8_ATTENTION: ("dense fp8, fp8 attention", "attention:dense-fp8"),
    RECOMMENDED: ("**sparse fp8, recommended**", "recommended"),
    RECOMMENDED + FP8_ATTENTION: ("**sparse fp8, recommended, fp8 attention**", "attention:recommended"),
}


def attention_section(root: Path, place: Place) -> str:
    """The recommended recipe and attention in fp8, where they were measured in one process, in Markdown."""
    studies, lines, sources = _studies(root), [], []
    for model in MODELS:
        for source in sorted((root / RESULTS).glob(f"attention-step-{model.step}-*.json")):
            document = read(source)
            for name, (title, study) in IN_FP8_ATTENTION.items():
                row = _row(document, name)
                if not row:
                    continue
                told = dense_steps(row)
                cells = [model.title, f"{title} ({told})" if told else title]
                cells += [number(row.get(time), ".1f") for time in ("gpu_ms", "wall_ms")]
                cells += [factor(step_speed_up(document["variants"], name))]
                cells += _picture(studies.get(model.study, {}), study)
                lines.append(f"| {' | '.join(cells)} |")
            sources.append(f"{card_of(document)}, {place.file(source.relative_to(root))}")
    if not lines:
        return ""
    head = [
        f"The recommended recipe as it is now, and [attention in fp8]({place.path(ATTENTION)}), in one "
        f"process ({'; '.join(sources)}):",
        "",
        "| model | variant | GPU, ms | wall, ms | speed | PSNR, dB | SSIM |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines])


def _rows_with_attention(root: Path, model: Model) -> list[dict]:
    """Rows of a model's latest file of steps with attention in fp8."""
    files = sorted((root / RESULTS).glob(f"attention-step-{model.step}-*.json"))
    return read(files[-1])["variants"] if files else []


def verdict_section(root: Path, place: Place) -> str:
    """What sparsity adds to dense fp8 on the same kernels, and what it costs in pictures."""
    steps, studies = current_steps(root), _studies(root)
    faster: dict[str, list[str]] = {name: [] for name in OURS}
    costs = []
    for model in MODELS:
        rows = read(root / steps[model.step])["variants"] if model.step in steps else []
        for name in OURS:
            speed = step_speed_up(rows, name, DENSE_FP8)
            if speed is None:
                speed = step_speed_up(_rows_with_attention(root, model), name, DENSE_FP8)
            if speed is not None:
                faster[name].append(f"{factor(speed)} ({model.title})")
        known = studies.get(model.study, {})
        if {"fp8:dense", "recommended"} <= set(known):
            dense, sparse = (known[name]["figures"]["psnr"]["mean"] for name in ("fp8:dense", "recommended"))
            costs.append(f"from {dense:.1f} to {sparse:.1f} dB ({model.study})")
    text = "**The alternative is dense fp8**: the same model, quantised by the same fused kernels. "
    text += "It drops nothing."
    if faster[RECOMMENDED]:
        text += f" The recommended recipe makes its step faster by {_listed(faster[RECOMMENDED])}."
    if faster[MIXED]:
        text += f" One mix of sparse and dense fp8 in all steps makes it faster by {_listed(faster[MIXED])}."
    if costs:
        text += (
            " The recommended recipe runs dense fp8 in "
            f"[steps that calibration chooses]({place.path(CHOOSE_STEPS)}#choose-dense-steps), in no more "
            f"modelled time than one mix. Its pictures differ more: PSNR falls {_listed(costs)}."
        )
    return text


def _sources(root: Path, sources: Iterable[Path], studies: Studies, place: Place) -> str:
    """Where the table's figures are from, and what they do not say."""
    known = [(source, read(root / source)) for source in sources]
    cards = dict.fromkeys(card_of(document) for _, document in known)
    files = ", ".join(place.file(source) for source, _ in known)
    return (
        f"One step at 1024x1024, batch 1; a dash: not measured. {'; '.join(cards)} ({files}). *Speed* is GPU "
        "time against compiled bf16. PSNR and SSIM compare with dense pictures of the same noise, on a "
        f"**64x64 emoji model of the same architecture** ({_counts(studies, 'fp8:dense')} pictures for dense "
        f"fp8, {_counts(studies, 'recommended')} for sparse). Pictures of full-size models have not been "
        "measured."
    )


def _studies(root: Path) -> Studies:
    """Model of the study -> its rows by name."""
    files = {model.study: root / STUDIES / f"quality-{model.study}.json" for model in MODELS}
    return {name: rows_of(read(file)) for name, file in files.items() if file.is_file()}


def _counts(studies: Studies, name: str) -> str:
    """How many pictures of each model a row of the study has."""
    counts = {rows[name]["n"] for rows in studies.values() if name in rows}
    return " or ".join(f"{count:,}" for count in sorted(counts)) or "no"


def _picture(rows: dict[str, dict], name: str | None) -> list[str]:
    figures = rows[name]["figures"] if name in rows else {}
    means = {figure: figures[figure]["mean"] if figures else None for figure in ("psnr", "ssim")}
    return [number(means["psnr"], ".1f"), number(means["ssim"], ".3f")]


def _row(document: dict, name: str) -> dict:
    return next((row for row in document["variants"] if row["name"] == name), {})


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
