"""A figure of the search for dense last steps: what was compared, and what was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rtlynx.calibration.options import CalibrationReport
from rtlynx.evaluate.layer_plots import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHOSEN, _OTHER = "#d1600f", "#6b6b6b"


def plot_dense_steps(report: CalibrationReport) -> Figure:
    """Plot error over modelled time of the numbers of dense last steps that calibration compared.

    Parameters
    ----------
    report : CalibrationReport
        Of a calibration whose recipe has `dense_sigmas="auto"`.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        If matplotlib is missing.
    ValueError
        If the calibration compared none.
    """
    if report.choice is None or not report.choice.candidates:
        raise ValueError("the calibration compared no numbers of dense last steps")
    return figure_of(report.choice.compared())


def figure_of(compared: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure of what `rtlynx.calibration.budget.Choice.compared` gives."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for one in compared:
        if one["error"] is None or not math.isfinite(one["error"]):
            continue  # what it drew is not finite
        chosen = one["chosen"]
        colour = _CHOSEN if chosen else _OTHER
        place = 100 * one["time"], one["error"]
        axes.plot(*place, "o", color=colour, markersize=8 if chosen else 5, gid="chosen" if chosen else None)
        label = f"{one['last_steps']}{', chosen' if chosen else ''}"
        axes.annotate(label, place, (6, 3), textcoords="offset points", fontsize=9, color=colour)
    axes.set_yscale("log")
    axes.margins(x=0.15, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#d8d8d8", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("modelled time of a picture's layers, % of dense bf16")
    axes.set_ylabel("squared error of pictures")
    axes.set_title(f"Last of {compared[0]['steps']} steps in dense fp8", fontsize=10.5)
    return figure
