"""The diagrams of "How it works" and the badges of the README, as SVG; `update.py` writes them."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("docs/images")
GREEN, GREY, INK, PAPER = "#2f7d4f", "#e3e6ea", "#1f2933", "#ffffff"
GROUPS = ("#bfe3cd", "#bcd4f0", "#f4d6b0", "#dcc6ea")


class Drawing:
    """Rectangles, texts and arrows on white paper, so that it reads on a dark page too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" font-size="14" role="img">',
            f"<title>{title}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>',
        ]

    def box(
        self, x: float, y: float, width: float, height: float, *lines: str, fill: str = PAPER, ink: str = INK
    ) -> None:
        """A rectangle with centred lines of text."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" '
            f'stroke="{INK}" stroke-width="1"/>'
        )
        for index, line in enumerate(lines):
            down = y + height / 2 + (index - (len(lines) - 1) / 2) * 18
            self.text(x + width / 2, down, line, anchor="middle", ink=ink)

    def text(self, x: float, y: float, line: str, *, anchor: str = "start", ink: str = INK) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" dy="0.35em" text-anchor="{anchor}" fill="{ink}">{line}</text>'
        )

    def arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.parts.append(
            f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{INK}" stroke-width="1.5" '
            'marker-end="url(#tip)"/>'
        )

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def selection() -> str:
    """Two groups of four entries of one token: what is kept, and how it is stored."""
    drawing = Drawing(720, 260, "Selection of 2 of 4")
    values = ((0.3, -1.2, 0.1, 0.9), (-0.4, 0.2, 2.1, 0.5))
    for y, label in ((50, "X, one token"), (120, "S(X)"), (190, "stored: values"), (230, "2-bit indices")):
        drawing.text(15, y, label)
    for g, group in enumerate(values):
        left = 150 + g * 285
        kept = sorted(sorted(range(4), key=lambda i: -abs(group[i]))[:2])
        drawing.text(left + 130, 16, f"group {g}", anchor="middle")
        for i, value in enumerate(group):
            x, on = left + i * 66, i in kept
            drawing.box(x, 30, 62, 40, _number(value), fill=GREEN if on else GREY, ink=PAPER if on else INK)
            drawing.box(x, 100, 62, 40, _number(value) if on else "0", fill=GREEN if on else PAPER, ink=PAPER)
            if not on:
                drawing.text(x + 31, 120, "0", anchor="middle")
        for place, i in enumerate(kept):
            x = left + (place + 1) * 66
            drawing.box(x, 170, 62, 40, _number(group[i]), fill=GREEN, ink=PAPER)
            drawing.text(x + 31, 230, f"{i} = {i:02b}", anchor="middle")
    return str(drawing)


def data_flow() -> str:
    """One layer on the card: two kernels, and what goes between them."""
    drawing = Drawing(960, 300, "Data flow of a sparse layer")
    drawing.box(15, 120, 110, 60, "X", "M x K, dense")
    drawing.arrow(125, 150, 168, 150)
    steps = ("compress", "(one kernel)", "keep 2 of 4", "norm scale s", "T = X A / s")
    drawing.box(170, 60, 190, 180, *steps, fill=GROUPS[0])
    for y, first, second in (
        (40, "kept values, indices", "0.56 of the bytes of X"),
        (120, "s", "a number a token"),
        (200, "T", "M x rank"),
    ):
        drawing.arrow(360, y + 30, 408, y + 30)
        drawing.box(410, y, 180, 60, first, second)
        drawing.arrow(590, y + 30, 638, y + 30)
    product = ("GEMM", "(one kernel)", "S(X) W'^T, sparse", "+ T B^T, dense", "times s, + bias")
    drawing.box(640, 60, 180, 180, *product, fill=GROUPS[1])
    drawing.text(730, 24, "W', B, bias", anchor="middle")
    drawing.arrow(730, 34, 730, 58)
    drawing.arrow(820, 150, 858, 150)
    drawing.box(860, 120, 85, 60, "Y", "M x N")
    drawing.text(265, 268, "A", anchor="middle")
    drawing.arrow(265, 260, 265, 242)
    return str(drawing)


def grouping() -> str:
    """Which entries compete: adjacent and strided groups of an attention output of four heads."""
    drawing = Drawing(760, 250, "Adjacent and strided groups")
    left, pitch = 130, 38
    for head in range(4):
        drawing.text(left + (head * 4 + 2) * pitch, 22, f"head {head}", anchor="middle")
    for y, label, group_of in ((40, "adjacent", lambda i: i // 4), (110, "strided", lambda i: i % 4)):
        drawing.text(15, y + 20, label)
        for i in range(16):
            drawing.box(left + i * pitch, y, pitch - 3, 40, str(i), fill=GROUPS[group_of(i)])
    for g in range(4):
        x = left + g * 152
        drawing.box(x, 175, 24, 24, fill=GROUPS[g])
        drawing.text(x + 32, 187, f"group {g}")
    drawing.text(15, 187, "K = 16")
    drawing.text(15, 226, "Entries of one colour compete. Strided: entries K / 4 apart, one of each head.")
    return str(drawing)


def licence_badge() -> str:
    return _badge("licence", _project()["license"])


def python_badge() -> str:
    return _badge("python", _project()["requires-python"].removeprefix(">=") + "+")


def _badge(label: str, value: str) -> str:
    """Two words side by side, with the colours that badges have."""
    left, right = (12 + 6.5 * len(word) for word in (label, value))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right:g}" height="20" '
        'font-family="Verdana,sans-serif" font-size="11" fill="#fff" text-anchor="middle" role="img">',
        f"<title>{label}: {value}</title>",
    ]
    for x, width, word, colour in ((0, left, label, "#555"), (left, right, value, GREEN)):
        parts.append(f'<rect x="{x:g}" width="{width:g}" height="20" fill="{colour}"/>')
        parts.append(f'<text x="{x + width / 2:g}" y="14">{word}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "\u2212")


DIAGRAMS: dict[str, Callable[[], str]] = {
    "selection.svg": selection,
    "data-flow.svg": data_flow,
    "grouping.svg": grouping,
    "badge-licence.svg": licence_badge,
    "badge-python.svg": python_badge,
}
