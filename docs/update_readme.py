"""Write the README's table of demo figures from docs/demo/results.json: `python docs/update_readme.py`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def figures_table(results: dict) -> str:
    """The variants of a demo's results.json as a Markdown table, with how they were measured."""
    lines = [
        "| variant | layer error | PSNR, dB | SSIM | KID | retrieval | sparse layers |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["variants"]:
        cells = [
            f"`{row['name']}`",
            _format(row["layer_error"], ".3f"),
            _format(row["psnr"], ".1f"),
            _format(row["ssim"], ".3f"),
            f"{row['kid']:.3f} ± {row['kid_stderr']:.3f}",
            _format(row["retrieval"], ".2f"),
            str(row["sparse_layers"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        f"{results['images']} pictures a variant, {results['steps']} steps, seed {results['seed']}, "
        f"{results['model']}, on {results['device']}, torch {results['torch']}: "
        "[docs/demo/results.json](docs/demo/results.json)."
    )
    return "\n".join(lines)


def _format(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)  # noqa: RUF001


def updated(readme: str, results: dict) -> str:
    """`readme` with the text between the markers replaced."""
    table = f"{BEGIN}\n{figures_table(results)}\n{END}"
    return re.sub(f"{BEGIN}.*{END}", lambda _: table, readme, flags=re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    results = json.loads((ROOT / "docs/demo/results.json").read_text())
    readme.write_text(updated(readme.read_text(), results))


if __name__ == "__main__":
    main()
