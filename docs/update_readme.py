"""Write the README's table of demo figures from the results in docs/demo: `python docs/update_readme.py`.

results.json is a plain `rtlynx demo`, results-24-steps.json the same with `--steps 24`.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def figures_table(results: dict, more_steps: dict) -> str:
    """The variants of a demo's results.json as a Markdown table, with how they were measured."""
    steps, more = results["steps"], more_steps["steps"]
    lines = [
        f"| variant | layer error | PSNR, {steps} steps | PSNR, {more} steps "
        "| SSIM | KID | retrieval | sparse layers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, other in zip(results["variants"], more_steps["variants"], strict=True):
        cells = [
            f"`{row['name']}`",
            _format(row["layer_error"], ".3f"),
            _format(row["psnr"], ".1f"),
            _format(other["psnr"], ".1f"),
            _format(row["ssim"], ".3f"),
            f"{row['kid']:.3f} ± {row['kid_stderr']:.3f}",
            _format(row["retrieval"], ".2f"),
            str(row["sparse_layers"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        f"{results['images']} pictures a variant, seed {results['seed']}, PSNR in dB, {results['model']} on "
        f"a {results['device']}, torch {results['torch']}; {steps} steps unless said "
        "([results.json](docs/demo/results.json), [results-24-steps.json](docs/demo/results-24-steps.json))."
    )
    return "\n".join(lines)


def _format(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)  # noqa: RUF001


def updated(readme: str) -> str:
    """`readme` with the text between the markers replaced."""
    results = json.loads((ROOT / "docs/demo/results.json").read_text())
    more_steps = json.loads((ROOT / "docs/demo/results-24-steps.json").read_text())
    table = f"{BEGIN}\n{figures_table(results, more_steps)}\n{END}"
    return re.sub(f"{BEGIN}.*{END}", lambda _: table, readme, flags=re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))


if __name__ == "__main__":
    main()
