"""Write the generated parts of the README and of the site's pages: `python docs/update.py`.

The study's come from studies/results, with plots in docs/study (`python studies/plots.py RESULTS --to
docs/study`). The demo's figures come from docs/demo: results.json is `rtlynx demo` with all its variants,
results-24-steps.json the same with `--steps 24`. Speed comes from benchmarks/results, with plots in
docs/speed; of a file that is not there nothing is said. The command line's reference comes from the commands,
diagrams and badges from diagrams.py.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

import cli_reference
import diagrams
import goals
import kernel_tables
import overview
import parallel_tables
import picture_goals
import speed_plots
import study_tables
import supported_models
import tables
from tables import Place, folded, read

from rtlynx.storage.files import sha256_of
from rtlynx.timing.results import picture_size

ROOT = Path(__file__).resolve().parent.parent
RESULTS = overview.RESULTS
# The texts with generated parts, and which: each between `<!-- name: begin -->` and `<!-- name: end -->`.
TEXTS = {
    Path("README.md"): ("overview",),
    Path("docs/results/quality.md"): (
        "front",
        "fronts",
        "pictures",
        "noise-levels",
        "claims",
        "study",
        "sweeps",
        "figures",
    ),
    Path("docs/results/speed.md"): (
        "overview",
        "steps",
        "layers",
        "step-parts",
        "sizes",
        "calibration",
        "parts",
    ),
    Path("docs/results/goals.md"): (
        *(
            "goals-pictures",
            "goals-step",
            "goals-layer",
            "goals-compression",
            "goals-host",
            "goals-calibration",
        ),
    ),
    Path("docs/guides/attention.md"): ("attention",),
    Path("docs/guides/parallel.md"): ("plan", "parallel"),
    Path("docs/reference/cli.md"): ("cli",),
    Path("docs/reference/models.md"): ("models", "on-top"),
}


def figures(root: Path, place: Place) -> str:
    files = (root / tables.DEMO / name for name in ("results.json", "results-24-steps.json"))
    table = tables.figures_table(*(read(file) for file in files), place)
    return folded("Figures of the demo", table)


def front(root: Path, place: Place) -> str:
    """Quality over modelled speed, of the first model."""
    return "".join(_plots(root, place, ("front",))[:1])


def fronts(root: Path, place: Place) -> str:
    """The same of the other models."""
    return "\n\n".join(_plots(root, place, ("front",))[1:])


def pictures(root: Path, place: Place) -> str:
    return "\n\n".join(_plots(root, place, ("pictures",), also=("worst", "worst-recommended")))


def noise_levels(root: Path, place: Place) -> str:
    """Quality by the noise levels that run sparse or dense."""
    return "\n\n".join(_plots(root, place, ("noise-levels",), pattern="noise-levels-*.json"))


def _plots(
    root: Path,
    place: Place,
    names: tuple[str, ...],
    also: tuple[str, ...] = (),
    pattern: str = "quality-*.json",
) -> list[str]:
    """The plots of each model: the first one's in sight, those of the others and further ones folded."""
    parts = []
    for index, (source, results) in enumerate(_studied(root, pattern)):
        shown = study_tables.plots_section(source, place, names, root)
        further = study_tables.plots_section(source, place, also, root)
        title = study_tables.model_title(results)
        if index:
            shown = folded(title, "\n\n".join(part for part in (shown, further) if part))
        elif further:
            shown += "\n\n" + folded(f"{title}: pictures furthest from dense", further)
        parts.append(shown)
    return parts


def study(root: Path, place: Place) -> str:
    """The main comparison and what layers say of it, of each model."""
    parts = []
    for source, results in _studied(root):
        section = study_tables.main_section(results, source, place)
        plots = study_tables.plots_section(source, place, study_tables.LAYER_PLOTS, root)
        parts.append(folded(study_tables.model_title(results), f"{section}\n\n{plots}"))
    return "\n\n".join(parts)


def claims(root: Path, place: Place) -> str:
    """The study's claims: answers, then their figures."""
    documents = [results for _, results in _studied(root)]
    if not documents:
        return ""
    answers = folded("The figures behind each answer", study_tables.claims_section(documents))
    return f"{study_tables.verdicts_section(documents)}\n\n{answers}"


def sweeps(root: Path, place: Place) -> str:
    """What was varied, of every model that has more than the main comparison."""
    parts = []
    for _, results in _studied(root):
        swept = study_tables.sweeps_section(results)
        if swept:
            parts.append(folded(study_tables.model_title(results), swept))
    return "\n\n".join(parts)


def _studied(root: Path, pattern: str = "quality-*.json") -> list[tuple[Path, dict]]:
    folder = root / study_tables.RESULTS
    return [(file.relative_to(root), read(file)) for file in sorted(folder.glob(pattern))]


def layers(root: Path, place: Place) -> str:
    """Single layers of every card that there are results of."""
    parts = []
    for pattern, section, name in (
        ("linear-fp8-*.json", tables.fp8_section, "fp8"),
        ("linear-bf16-*.json", tables.speed_section, "bf16"),
    ):
        for source in _found(root, pattern):
            results = read(root / source)
            other = "other numbers of rows, " if "-rows-" in source.name else ""
            title = f"Single layers in {name}, {other}{results['device']}"
            plot = (
                f"![{title}: speed relative to cuBLAS, shape by shape]({place.path(tables.plot_of(source))})"
            )
            parts += [plot, folded(title, section(results, source, place))]
    return "\n\n".join(parts)


def steps(root: Path, place: Place) -> str:
    """A denoising step end to end: what the chart shows first, then earlier results."""
    current = overview.current_steps(root).values()
    earlier = [source for source in _found(root, "step-*.json") if source not in current]
    parts = []
    for title, sources in (("", current), ("Earlier: ", earlier)):
        for source in sources:
            results = read(root / source)
            title_of = f"{title}{tables.in_words(results['model'])}, {results['device']}"
            parts.append(folded(title_of, tables.steps_section(results, source, place)))
    return "\n\n".join(parts)


def sizes(root: Path, place: Place) -> str:
    """Other sizes of pictures and prompts, where they were measured."""
    return _sections(root, place, "sizes-*.json", "Other sizes", tables.sizes_section)


def step_parts(root: Path, place: Place) -> str:
    """What is no product and no attention in a step, beside its bytes, where it was measured."""

    def title(results: dict) -> str:
        return f"{tables.in_words(results['model'])}, {results['device']}"

    return _each(root, place, "parts-*.json", title, kernel_tables.step_parts_section)


def attention(root: Path, place: Place) -> str:
    """Attention of libraries beside each other, where it was measured."""
    title, section = "Libraries beside each other", kernel_tables.attention_section
    return _sections(root, place, "attention-*.json", title, section)


def calibration(root: Path, place: Place) -> str:
    """Time and memory of calibration and distillation at full size."""
    whole, stages = "calibration-whole-*.json", tables.stages_section
    parts = (
        _sections(root, place, whole, "Calibration of a whole model", stages),
        _sections(root, place, "distillation-*.json", "Distillation of a whole model", stages),
        _sections(
            root,
            place,
            "calibration-*.json",
            "Calibration at full size, by blocks",
            tables.calibration_section,
            but=whole,
        ),
    )
    return "\n\n".join(part for part in parts if part)


def parallel(root: Path, place: Place) -> str:
    """A step on several cards, where it was measured."""

    def title(results: dict) -> str:
        return f"{tables.in_words(results['model'])}, {picture_size(results)}, {tables.cards_of(results)}"

    return _each(root, place, "parallel-*.json", title, parallel_tables.measured_section)


def kernel_parts(root: Path, place: Place) -> str:
    """Compression, prologues and host time."""
    compression = "Compression and the prologues fused with it"
    parts = (
        _sections(root, place, "compress-*.json", compression, tables.compress_section),
        _sections(root, place, "host-*.json", "Host time of a call", tables.host_section),
    )
    return "\n\n".join(part for part in parts if part)


def _sections(
    root: Path, place: Place, pattern: str, title: str, section: Callable[..., str], but: str = ""
) -> str:
    """A folded section of each results file that is there and whose name does not match `but`."""
    return _each(root, place, pattern, lambda results: f"{title}, {tables.cards_of(results)}", section, but)


def _each(
    root: Path,
    place: Place,
    pattern: str,
    title_of: Callable[[dict], str],
    section: Callable[..., str],
    but: str = "",
) -> str:
    """As `_sections`, each with a title of its own."""
    sources = [source for source in _found(root, pattern) if not fnmatch(source.name, but)]
    found = [(source, read(root / source)) for source in sources]
    return "\n\n".join(
        folded(title_of(results), section(results, source, place)) for source, results in found
    )


def goals_of(group: str) -> Callable[[Path, Place], str]:
    return lambda root, place: goals.goals_section(root, group)


PARTS: dict[str, Callable[[Path, Place], str]] = {
    "overview": overview.overview_section,
    "front": front,
    "fronts": fronts,
    "pictures": pictures,
    "noise-levels": noise_levels,
    "claims": claims,
    "study": study,
    "sweeps": sweeps,
    "figures": figures,
    "steps": steps,
    "layers": layers,
    "step-parts": step_parts,
    "attention": attention,
    "sizes": sizes,
    "calibration": calibration,
    "parts": kernel_parts,
    "plan": parallel_tables.plan_section,
    "parallel": parallel,
    "goals-pictures": picture_goals.goals_section,
    "goals-step": goals_of("step"),
    "goals-layer": goals_of("layer"),
    "goals-compression": goals_of("compression"),
    "goals-host": goals_of("host"),
    "goals-calibration": goals_of("calibration"),
    "models": supported_models.models_section,
    "on-top": supported_models.on_top_section,
    "cli": lambda root, place: cli_reference.reference(),
}


def updated(text: str, file: Path, root: Path = ROOT) -> str:
    """`text` of `file` with what stands between its markers replaced."""
    for name in TEXTS[file]:
        part = PARTS[name](root, Place(file))
        text = _between(text, f"<!-- {name}: begin -->", f"<!-- {name}: end -->", part)
    return text


def _between(text: str, begin: str, end: str, part: str) -> str:
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the text needs one line {begin} and one {end}")
    middle = f"{part}\n" if part else ""
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{middle}{end}", text, flags=re.DOTALL)


def plotted(root: Path = ROOT) -> list[Path]:
    """Results files of layers, which have a plot each."""
    return [*_found(root, "linear-bf16-*.json"), *_found(root, "linear-fp8-*.json")]


def charts(root: Path = ROOT) -> dict[Path, dict[str, Path]]:
    """Chart of steps -> the results file of each model that it shows."""
    current = overview.current_steps(root)
    shown = {
        chart: {model: current[model] for model in models if model in current}
        for chart, models in overview.CHARTS.items()
    }
    return {chart: sources for chart, sources in shown.items() if sources}


def digest(sources: Iterable[Path], root: Path = ROOT) -> str:
    """Of several results files."""
    return hashlib.sha256("".join(sha256_of(root / source) for source in sources).encode()).hexdigest()


def _found(root: Path, pattern: str) -> list[Path]:
    return sorted(path.relative_to(root) for path in (root / RESULTS).glob(pattern))


def main() -> None:
    for file in TEXTS:
        path = ROOT / file
        path.write_text(updated(path.read_text(), file))
    for source in plotted():
        speed_plots.draw_speed(read(ROOT / source), ROOT / tables.plot_of(source), sha256_of(ROOT / source))
    for chart, sources in charts().items():
        steps_of = {model: read(ROOT / source) for model, source in sources.items()}
        speed_plots.draw_steps(steps_of, ROOT / chart, digest(sources.values()))
    for name, drawing in diagrams.DIAGRAMS.items():
        (ROOT / diagrams.FOLDER / name).write_text(drawing())


if __name__ == "__main__":
    main()
