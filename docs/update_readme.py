"""Write the generated parts of the README and of the site's pages: `python docs/update_readme.py`.

The study's come from studies/results, with plots in docs/study (`python studies/plots.py RESULTS --to
docs/study`). The demo's figures come from docs/demo: results.json is a plain `rtlynx demo`,
results-24-steps.json the same with `--steps 24`. Speed comes from benchmarks/results, with plots in
docs/speed; of a file that is not there nothing is said. The pages' diagrams come from diagrams.py.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import diagrams
import speed_plots
import study_tables
import tables
from tables import Place

from rtlynx.storage.files import sha256_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results")
STUDY = study_tables.RESULTS / "quality-flux-emoji.json"
BF16, FP8 = RESULTS / "linear-bf16-h100.json", RESULTS / "linear-fp8-h100.json"
# The texts with generated parts, and which: each between `<!-- name: begin -->` and `<!-- name: end -->`.
TEXTS = {
    Path("README.md"): ("study", "claims", "speed", "steps"),
    Path("docs/quality.md"): ("study", "claims", "sweeps", "figures"),
    Path("docs/speed.md"): ("speed", "steps", "sizes", "calibration", "parts", "targets"),
}


def figures(root: Path, place: Place) -> str:
    files = (root / tables.DEMO / name for name in ("results.json", "results-24-steps.json"))
    return tables.figures_table(*(_read(file) for file in files), place)


def study(root: Path, place: Place) -> str:
    """The main comparison: on the site of every model, in the README of the one in the box."""
    parts = []
    for source, results in _studied(root):
        if not place.in_docs and source != STUDY:
            continue
        if place.in_docs:
            parts.append(f"### {study_tables.model_title(results)}")
        names = study_tables.CAPTIONS if place.in_docs else ("pictures", "front")
        parts.append(study_tables.main_section(results, source, place))
        parts.append(study_tables.plots_section(source, place, names, root))
    return "\n\n".join(part for part in parts if part)


def claims(root: Path, place: Place) -> str:
    """The study's claims: with their figures on the site alone."""
    documents = [results for _, results in _studied(root)]
    section = study_tables.claims_section if place.in_docs else study_tables.verdicts_section
    return section(documents) if documents else ""


def sweeps(root: Path, place: Place) -> str:
    """What was varied, of every model that has more than the main comparison."""
    parts = []
    for _, results in _studied(root):
        swept = study_tables.sweeps_section(results)
        if swept:
            parts.append(f"### {study_tables.model_title(results)}\n\n{swept}")
    return "\n\n".join(parts)


def _studied(root: Path) -> list[tuple[Path, dict]]:
    folder = root / study_tables.RESULTS
    return [(file.relative_to(root), _read(file)) for file in sorted(folder.glob("quality-*.json"))]


def speed(root: Path, place: Place) -> str:
    """Layers: on the site of every card there are results of, in the README of the H100."""
    parts = []
    for pattern, section, name in (
        ("linear-bf16-*.json", tables.speed_section, "bf16"),
        ("linear-fp8-*.json", tables.fp8_section, "fp8"),
    ):
        for source in _found(root, pattern):
            results = _read(root / source)
            if place.in_docs:
                title = f"### {name}, {results['device']}"
            elif source not in (BF16, FP8):
                continue
            else:
                title = "## How fast" if name == "bf16" else "### In fp8"
            parts.append(f"{title}\n\n{section(results, source, place)}")
    if parts and not place.in_docs:
        count = tables.targets_count(documents(root))
        parts.append(f"### What we set out to reach\n\n{tables.targets_section(documents(root))}")
        parts.append(f"{count}. [Every other figure](docs/speed.md).")
    return "\n\n".join(parts)


def steps(root: Path, place: Place) -> str:
    """A denoising step end to end."""

    def titled(results: dict, source: Path, place: Place) -> str:
        title = f"### {results['model']}, {results['device']}"
        return f"{title}\n\n{tables.steps_section(results, source, place)}"

    return _sections(root, place, "step-*.json", "## One denoising step", titled)


def sizes(root: Path, place: Place) -> str:
    """Other sizes of pictures and prompts, where they were measured."""
    return _sections(root, place, "sizes-*.json", "## Other sizes", tables.sizes_section)


def calibration(root: Path, place: Place) -> str:
    """Time and memory of a calibration at full size."""
    return _sections(
        root, place, "calibration-*.json", "## Calibration at full size", tables.calibration_section
    )


def _sections(root: Path, place: Place, pattern: str, title: str, section: Callable[..., str]) -> str:
    """A section of each results file that is there; nothing before there is one."""
    parts = [section(_read(root / source), source, place) for source in _found(root, pattern)]
    return "\n\n".join([title, *parts]) if parts else ""


def kernel_parts(root: Path, place: Place) -> str:
    """Compression, producers and host time."""
    parts = []
    for pattern, section, title in (
        ("compress-*.json", tables.compress_section, "### Compression and what can be fused with it"),
        ("host-*.json", tables.host_section, "### Host time"),
    ):
        for source in _found(root, pattern):
            parts.append(f"{title}\n\n{section(_read(root / source), source, place)}")
    return "\n\n".join(parts)


def targets(root: Path, place: Place) -> str:
    return tables.targets_section(documents(root))


def documents(root: Path) -> list[dict]:
    """All results files that have targets, layers first."""
    patterns = ("linear-bf16-*.json", "linear-fp8-*.json", "compress-*.json", "host-*.json", "step-*.json")
    return [_read(root / source) for pattern in patterns for source in _found(root, pattern)]


PARTS: dict[str, Callable[[Path, Place], str]] = {
    "study": study,
    "claims": claims,
    "sweeps": sweeps,
    "figures": figures,
    "speed": speed,
    "steps": steps,
    "sizes": sizes,
    "calibration": calibration,
    "parts": kernel_parts,
    "targets": targets,
}


def updated(text: str, file: Path, root: Path = ROOT) -> str:
    """`text` of `file` with what stands between its markers replaced."""
    place = Place(in_docs=file.parts[0] == "docs")
    for name in TEXTS[file]:
        text = _between(text, f"<!-- {name}: begin -->", f"<!-- {name}: end -->", PARTS[name](root, place))
    return text


def _between(text: str, begin: str, end: str, part: str) -> str:
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the text needs one line {begin} and one {end}")
    middle = f"{part}\n" if part else ""
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{middle}{end}", text, flags=re.DOTALL)


def plotted(root: Path = ROOT) -> list[Path]:
    """Results files that have a plot."""
    return _found(root, "linear-bf16-*.json")


def _found(root: Path, pattern: str) -> list[Path]:
    return sorted(path.relative_to(root) for path in (root / RESULTS).glob(pattern))


def _read(file: Path) -> dict:
    return json.loads(file.read_text())


def main() -> None:
    for file in TEXTS:
        path = ROOT / file
        path.write_text(updated(path.read_text(), file))
    for source in plotted():
        speed_plots.draw_speed(_read(ROOT / source), ROOT / tables.plot_of(source), sha256_of(ROOT / source))
    for name, drawing in diagrams.DIAGRAMS.items():
        (ROOT / diagrams.FOLDER / name).write_text(drawing())


if __name__ == "__main__":
    main()
