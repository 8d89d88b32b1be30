"""The report's plots, as inline SVG whose colours and fonts are the page's (light and dark)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rtlynx.evaluate.layers import HISTOGRAM_BINS, HISTOGRAM_RANGE, Distribution

# Placeholders that the page's style replaces: matplotlib takes no CSS variables.
INK, LINE, WEIGHTS, ACTIVATIONS = "#010101", "#020202", "#030303", "#040404"
_CSS = {
    INK: "currentColor",
    LINE: "var(--line)",
    WEIGHTS: "var(--weights)",
    ACTIVATIONS: "var(--activations)",
}
# One marker a sparse variant, in the order of the variants; the page's legend shows the same signs.
MARKERS = ("s", "o", "D", "^", "P", "v", "X", "*")
SIGNS = ("■", "●", "◆", "▲", "✚", "▼", "✖", "★")
_STACKS = {"transformer_blocks": "Double blocks", "single_transformer_blocks": "Single blocks"}
ROW_HEIGHT = 0.165  # inches
PANEL_WIDTH = 4.4  # inches: text stays readable when the panel fills a phone


@dataclass(frozen=True)
class Plot:
    """One panel: its heading and an `<svg>` element."""

    title: str
    svg: str


def error_plots(errors: Mapping[str, Mapping[str, float]]) -> list[Plot]:
    """Error of every layer, one panel a kind of block; a row a layer, a mark a variant.

    Parameters
    ----------
    errors : variant -> layer name -> relative squared error, in the order of `MARKERS`.
    """
    order = list(dict.fromkeys(name for by_layer in errors.values() for name in by_layer))
    positive = [value for by_layer in errors.values() for value in by_layer.values() if value > 0]
    if not positive:
        return []
    limits = min(positive) / 1.3, max(positive) * 1.3
    plots = []
    for stack, names in _stacks(order).items():
        figure, axes = _panel(PANEL_WIDTH, 0.75 + ROW_HEIGHT * len(names))
        row = {name: i for i, name in enumerate(names)}
        for number, by_layer in enumerate(errors.values()):
            points = [(value, row[name]) for name, value in by_layer.items() if name in row and value > 0]
            if points:
                x, y = zip(*points, strict=True)
                marker = MARKERS[number % len(MARKERS)]
                axes.plot(x, y, marker, color=_variant_colour(number), ms=4.4, mew=0, alpha=0.9)
        axes.set_xscale("log")
        axes.set_xlim(*limits)
        axes.set_xlabel("relative squared error of the output")
        _label_rows(axes, [_short_name(name) for name in names])
        label = f"Relative output error of each layer under each variant: {_title(stack)}."
        plots.append(Plot(_title(stack), _svg(figure, f"error-{stack}", label)))
    return plots


def histogram_plots(panels: Mapping[str, tuple[Distribution, Distribution]]) -> list[Plot]:
    """Distribution of weights and of activations, one panel a role of layer.

    Parameters
    ----------
    panels : title -> (weights, activations).
    """
    edges = np.linspace(-HISTOGRAM_RANGE, HISTOGRAM_RANGE, HISTOGRAM_BINS + 1)
    plots = []
    for number, (title, (weights, activations)) in enumerate(panels.items()):
        figure, axes = _panel(3.1, 2.1)
        for one, colour in ((weights, WEIGHTS), (activations, ACTIVATIONS)):
            counts = one.counts.numpy()
            density = counts / max(counts.sum(), 1) / (edges[1] - edges[0])
            axes.stairs(np.maximum(density, 1e-5), edges, color=colour, linewidth=1.3, baseline=None)
        axes.set_yscale("log")
        axes.set_ylim(1e-4, 10)
        axes.set_xlim(-HISTOGRAM_RANGE, HISTOGRAM_RANGE)
        axes.set_xticks([-4, -2, 0, 2, 4])
        axes.set_xlabel("value / root mean square")
        axes.set_ylabel("density")
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        label = (
            f"Histogram of weights and activations, {title}. 2:4 keeps {weights.share:.1%} of the energy of "
            f"the weights, {activations.share:.1%} of the activations."
        )
        plots.append(Plot(title, _svg(figure, f"histogram-{number}", label)))
    return plots


def energy_plots(
    inputs: Sequence[Sequence[str]],
    weights: Mapping[str, Distribution],
    activations: Mapping[str, Distribution],
    gaussian: float,
) -> list[Plot]:
    """Share of energy that 2:4 keeps, one panel a kind of block, a row an input.

    Parameters
    ----------
    inputs : names of the layers that read each input.
    weights, activations : layer name -> distribution.
    gaussian : the share that 2:4 keeps of independent normal entries, a dashed line.
    """
    readers = {names[0]: names for names in inputs}
    kept_weights = {
        first: 100 * Distribution.merged(weights[name] for name in names).share
        for first, names in readers.items()
    }
    kept_activations = {first: 100 * activations[first].share for first in readers}
    both = [*kept_weights.values(), *kept_activations.values(), 100 * gaussian]
    limits = min(both) - 2, min(101.0, max(both) + 2)
    plots = []
    for stack, firsts in _stacks(list(readers)).items():
        figure, axes = _panel(PANEL_WIDTH, 0.75 + ROW_HEIGHT * len(firsts))
        w, a = [kept_weights[one] for one in firsts], [kept_activations[one] for one in firsts]
        rows = range(len(firsts))
        axes.hlines(rows, w, a, color=LINE, linewidth=1.6)
        axes.plot(w, rows, "s", color=WEIGHTS, ms=4.6, mew=0)
        axes.plot(a, rows, "o", color=ACTIVATIONS, ms=5, mew=0)
        axes.axvline(100 * gaussian, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("energy kept, %")
        _label_rows(axes, [_shared_name(readers[one]) for one in firsts])
        label = (
            f"{_title(stack)}: 2:4 keeps {min(w):.0f} to {max(w):.0f}% of the energy of the weights and "
            f"{min(a):.0f} to {max(a):.0f}% of the activations."
        )
        plots.append(Plot(_title(stack), _svg(figure, f"energy-{stack}", label)))
    return plots


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(color=LINE, labelcolor=INK, labelsize=8.5, which="both")
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
        text.set_fontsize(9)
    return figure, axes


def _label_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    blocks = [label.partition(" · ")[0] for label in labels]
    for i in range(1, len(blocks)):
        if blocks[i] != blocks[i - 1]:
            axes.axhline(i - 0.5, color=LINE, linewidth=0.6, zorder=0)


def _variant_colour(number: int) -> str:
    return f"#0500{number:02x}"


def _stacks(names: Sequence[str]) -> dict[str, list[str]]:
    """Layer names by the stack of blocks that they are in, block by block."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.split(".")[0], []).append(name)
    return {stack: sorted(members, key=_block_number) for stack, members in found.items()}


def _block_number(name: str) -> int:
    digits = re.search(r"\.(\d+)\.", name)
    return int(digits[1]) if digits else 0


def _title(stack: str) -> str:
    return _STACKS.get(stack, stack)


def _short_name(name: str) -> str:
    """`transformer_blocks.0.attn.to_out.0` -> `0 · attn.to_out`."""
    _, _, rest = name.partition(".")
    block, _, layer = rest.partition(".")
    return f"{block} · {layer.removesuffix('.0')}" if layer else name


def _shared_name(names: Sequence[str]) -> str:
    """`0 · attn.to_q, to_k, to_v`: the first name, and the last part of the others."""
    return ", ".join([_short_name(names[0]), *(name.split(".")[-1] for name in names[1:])])


def _svg(figure: Figure, key: str, label: str) -> str:
    """`figure` as an `<svg>` element with ids of its own and the page's colours."""
    buffer = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Several plots share one page: their ids must differ.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", text)
    for placeholder, css in _CSS.items():
        text = text.replace(placeholder, css)
    text = re.sub(r"#0500([0-9a-f]{2})", lambda match: f"var(--v{int(match[1], 16)})", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
