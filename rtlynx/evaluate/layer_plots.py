"""A figure of the layers of a model: error, time saved and chosen format of each, by role and depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from rtlynx.calibration.budget import inputs_of
from rtlynx.calibration.options import CalibrationReport
from rtlynx.calibration.prices import ModelPrices, packaged_prices
from rtlynx.math.formats import DENSE, FormatName
from rtlynx.models.architecture import FEW_TOKENS, Role, Stream
from rtlynx.models.plan import LayerPlan, Plan, make_plan
from rtlynx.models.sparsify import state_of, target_model
from rtlynx.recipe import Recipe
from rtlynx.storage.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOKENS = (4096, 512)  # image and text tokens of FLUX.1 and Qwen-Image at 1024 x 1024 pixels
PLOT_FORMATS = (".png", ".svg")
# Colour and marker, both, so that formats differ in grey print too.
_SIGNS: dict[FormatName, tuple[str, str]] = {
    "fp8-sparse": ("#d1600f", "o"),
    "fp8-weight-sparse": ("#8a3fa0", "D"),
    "bf16-sparse": ("#23864f", "^"),
    "fp8-dense": ("#2463b0", "s"),
    "dense": ("#6b6b6b", "x"),
}
_LINE = "#d8d8d8"
_DEEP = 24  # blocks, from which on a panel needs the whole width


@dataclass(frozen=True)
class LayerPoint:
    """One candidate layer in the figure.

    Attributes
    ----------
    name : str
    role, stream : Role, Stream
        What the layer does, and whose tokens it sees.
    depth : int
        Number of its block, counted over all stacks of blocks.
    format : FormatName
        What was chosen.
    error : float or None
        Relative squared error of the layer's output, where a calibration measured it.
    output_error : float or None
        Relative squared error that the layers of its input alone, together, add to the model's output, where
        a budget measured it.
    saved : float
        Modelled time that it saves in one call, as a share of the time of all candidates in dense bfloat16:
        of what the layers of its input save, a share by the time that each takes in dense bfloat16.
    """

    name: str
    role: Role
    stream: Stream
    depth: int
    format: FormatName
    error: float | None
    output_error: float | None
    saved: float


@dataclass(frozen=True)
class _Column:
    """One figure of every layer."""

    title: str
    attribute: str
    is_error: bool

    @property
    def scale(self) -> str:
        return "log" if self.is_error else "linear"

    @property
    def unit(self) -> float:
        return 1.0 if self.is_error else 100.0


_ERROR = _Column("error of the layer's output", "error", is_error=True)
_OUTPUT_ERROR = _Column("error at the model's output", "output_error", is_error=True)
_SAVED = _Column("modelled time saved, % of all layers' time", "saved", is_error=False)


def plot_layers(
    model_or_pipeline: Any,
    report: CalibrationReport | None = None,
    *,
    recipe: Recipe | None = None,
    tokens: tuple[int, int] | None = None,
) -> Figure:
    """Plot error, time saved and chosen format of every layer over the depth of a model.

    Rows are the roles of layers, columns are figures. A column without figures is left out, and a line below
    says why.

    Parameters
    ----------
    model_or_pipeline : nn.Module or diffusers pipeline
        Sparse: what became of its layers. Dense, also on "meta": what `recipe` plans.
    report : CalibrationReport, optional
        Of the calibration that made the model sparse. It adds the error at the model's output.
    recipe : Recipe, optional
        For a dense model. Default `Recipe.recommended()`.
    tokens : (int, int), optional
        Image and text tokens in one call, by which time is modelled. Default: those of `report` where it has
        them, else 4096 and 512.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        If matplotlib is missing.
    ValueError
        If the model is sparse and a recipe is given, or dense and a report is given, the report is of another
        model, `tokens` are not two whole numbers above 0, or the recipe does not fit the model.
    """
    require_matplotlib()
    plan, points = layer_points(model_or_pipeline, report, recipe=recipe, tokens=tokens)
    columns = [
        column
        for column in (_ERROR, _OUTPUT_ERROR, _SAVED)
        if any(getattr(point, column.attribute) is not None for point in points)
    ]
    model = target_model(model_or_pipeline)
    undecided = state_of(model) is None and plan.recipe.budget is not None
    notes = [
        *_notes(columns, undecided=undecided, dense=any(point.format == "dense" for point in points)),
        *_time_notes(plan, report, tokens),
        f"Blocks: {', '.join(_spans(plan))}.",
    ]
    return _draw(points, columns, _title(model, points), notes, _stack_starts(plan))


def layer_points(
    model_or_pipeline: Any,
    report: CalibrationReport | None = None,
    *,
    recipe: Recipe | None = None,
    tokens: tuple[int, int] | None = None,
) -> tuple[Plan, list[LayerPoint]]:
    """The plan and the figures that `plot_layers` draws, in model order; arguments and errors are its own."""
    model = target_model(model_or_pipeline)
    state = state_of(model)
    if state is not None and recipe is not None:
        raise ValueError(f"{type(model).__name__} is sparse and has its own recipe: leave out recipe")
    if state is None and report is not None:
        raise ValueError(f"{type(model).__name__} is dense: give the model that was calibrated")
    plan = make_plan(model, recipe or Recipe.recommended()) if state is None else state.plan
    planned = {layer.name for layer in plan.layers}
    if report is not None and (not planned.issuperset(report.solutions) or not report.solutions):
        raise ValueError(f"the report is of another model than this {type(model).__name__}")
    counts = _tokens(plan, report, tokens)
    saved = _saved(plan, counts)
    found = () if report is None else report.costs
    costs = {(name, one.format): one.error for one in found for name in one.layers}
    errors = {} if state is None else state.errors
    depths = {block: depth for depth, block in enumerate(_blocks(plan))}

    def point(layer: LayerPlan) -> LayerPoint:
        return LayerPoint(
            layer.name,
            layer.candidate.role,
            layer.candidate.stream,
            depths[layer.candidate.block],
            layer.format.name,
            errors.get(layer.name),
            costs.get((layer.name, layer.format.name)),
            saved.get(layer.name, 0.0),
        )

    return plan, [point(layer) for layer in plan.layers]


def save_plot(figure: Figure, file: str | Path) -> None:
    """Write a figure as PNG or SVG, by the ending of `file`: whole or not at all.

    Raises
    ------
    ValueError, FileExistsError
        As `check_plot_file`.
    OSError
        If it cannot be written.
    """
    path = check_plot_file(file)
    from matplotlib import rc_context

    kind = path.suffix.lower().removeprefix(".")
    # SVG without a date and with fixed ids: the same figure gives the same file.
    with atomic_file(path) as temporary, rc_context({"svg.fonttype": "none", "svg.hashsalt": "rtlynx"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(temporary, format=kind, dpi=150, metadata=metadata, facecolor="white")


def check_plot_file(file: str | Path) -> Path:
    """`file` as a path, if a plot can be written there; to ask before long work.

    Raises
    ------
    ImportError
        If matplotlib is missing.
    ValueError
        If the ending is neither .png nor .svg.
    FileExistsError
        If it exists and is not a file.
    """
    path = Path(file)
    if path.suffix.lower() not in PLOT_FORMATS:
        raise ValueError(f"a plot is a file with the ending {' or '.join(PLOT_FORMATS)}, got {str(file)!r}")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} exists and is not a file")
    require_matplotlib()
    return path


def require_matplotlib() -> None:
    """ImportError, with what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        # `from None` and no `name`: the command line then prints this line as it is.
        raise ImportError("plots need matplotlib: pip install 'rtlynx[demo]'") from None


def _tokens(plan: Plan, report: CalibrationReport | None, tokens: tuple[int, int] | None) -> dict[str, int]:
    """Layer name -> tokens in one call; layers that did not run have none."""
    if tokens is None and report is not None and report.tokens:
        return {layer.name: report.tokens.get(layer.name, 0) for layer in plan.layers}
    given = TOKENS if tokens is None else tuple(tokens)
    if len(given) != 2 or not all(type(count) is int and count > 0 for count in given):
        raise ValueError(f"tokens are two whole numbers above 0 (image, text), got {tokens!r}")
    image, text = given
    by_stream = {"image": image, "text": text, "audio": text, "joint": image + text}
    return {layer.name: by_stream[layer.candidate.stream] for layer in plan.layers}


def _saved(plan: Plan, tokens: Mapping[str, int]) -> dict[str, float]:
    """Name of a changed layer -> what it saves, over the time of all candidates in dense bfloat16."""
    prices = ModelPrices(plan, tokens)
    alone = {layer.name: prices.us([layer.dense("")]) for layer in plan.layers}
    total, saved = sum(alone.values()), {}
    for readers in inputs_of(plan.layers).values():
        changed = [layer for layer in readers if layer.format is not DENSE]
        before, share = (sum(alone[layer.name] for layer in some) for some in (readers, changed))
        for layer in changed if share else ():
            saved[layer.name] = (before - prices.us(readers)) * alone[layer.name] / share / total
    return saved


def _blocks(plan: Plan) -> list[str]:
    return list(dict.fromkeys(layer.candidate.block for layer in plan.layers))


def _stacks(plan: Plan) -> dict[str, list[int]]:
    """Name of a stack of blocks -> depths of its blocks."""
    stacks: dict[str, list[int]] = {}
    for depth, block in enumerate(_blocks(plan)):
        stacks.setdefault(block.rpartition(".")[0] or "of the model", []).append(depth)
    return stacks


def _stack_starts(plan: Plan) -> list[int]:
    return [depths[0] for depths in _stacks(plan).values()][1:]


def _spans(plan: Plan) -> list[str]:
    return [
        f"{depths[0]} to {depths[-1]} {stack}" if len(depths) > 1 else f"{depths[0]} {stack}"
        for stack, depths in _stacks(plan).items()
    ]


def _title(model: nn.Module, points: Iterable[LayerPoint]) -> str:
    points = list(points)
    counts = Counter(point.format for point in points)
    formats = ", ".join(f"{counts[format]} {format}" for format in _SIGNS if counts[format])
    saved = f"{sum(point.saved for point in points):.0%} less than in dense bf16"
    return f"{type(model).__name__}: {formats}\nmodelled time of these layers: {saved}"


def _notes(columns: Sequence[_Column], *, undecided: bool, dense: bool) -> list[str]:
    """Why figures are not there."""
    notes = []
    if undecided:
        notes.append(
            "The budget has not decided yet: calibration may leave layers dense or take another format."
        )
    if _ERROR not in columns:
        notes.append("No errors: calibration measures them. Checkpoints of version 0.1 do not keep them.")
    elif _OUTPUT_ERROR not in columns:
        notes.append("No error at the model's output: only the report of a calibration with a budget has it.")
    if dense and _ERROR in columns:
        notes.append("Dense layers have no error: their crosses are at the lower edge.")
    return notes


def _time_notes(plan: Plan, report: CalibrationReport | None, tokens: tuple[int, int] | None) -> list[str]:
    """By what time is modelled."""
    image, text = tokens or TOKENS
    calls = f"{image} image tokens and {text} text tokens"
    if tokens is None and report is not None and report.tokens:
        calls = "the calls that calibration recorded"
    notes = [f"Time is modelled by times of an {packaged_prices().device}, for {calls}."]
    if ModelPrices(plan, _tokens(plan, report, tokens)).stands_for_full_size:
        notes.append("Small models count as if they were of full size.")
    return notes


def _draw(
    points: Sequence[LayerPoint],
    columns: Sequence[_Column],
    title: str,
    notes: Sequence[str],
    stack_starts: Sequence[int],
) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    present = {point.role for point in points}
    roles = [role for role in get_args(Role) if role in present]
    blocks = 1 + max(point.depth for point in points)
    # Many blocks need the whole width of a page: the columns then stand below each other.
    deep = blocks > _DEEP
    across, down = (1, len(columns)) if deep else (len(columns), 1)
    width, height = (10.0, 0.85) if deep else (max(6.6, 3.3 * across) / across, 1.2)
    size = width * across, height * down * len(roles) + 1.2 + 0.16 * len(notes)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down * len(roles), across, sharex=True, squeeze=False).reshape(down, -1, across)
    for number, column in enumerate(columns):
        panels = grid[number, :, 0] if deep else grid[0, :, number]
        for role, axes in zip(roles, panels, strict=True):
            axes.sharey(panels[0])
            axes.set_yscale(column.scale)
            axes.margins(y=0.12)
            _style(axes)
            for start in stack_starts:
                axes.axvline(start - 0.5, color="#9a9a9a", linewidth=0.9, linestyle=(0, (4, 3)))
            _mark(axes, [point for point in points if point.role == role], column, 3.6 if deep else 4.2)
            if deep or number == 0:
                upright: dict[str, Any] = {"rotation": 0, "ha": "right", "va": "center"} if deep else {}
                axes.set_ylabel(role, fontsize=9, **upright)
        panels[0].set_title(column.title, fontsize=9.5)
        panels[-1].set_xlabel("block", fontsize=9)
        panels[-1].tick_params(labelbottom=True)
    grid[0, 0, 0].set_xlim(-0.7, blocks - 0.3)
    grid[0, 0, 0].xaxis.set_major_locator(MaxNLocator(10, integer=True))
    figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize=8.5)
    _legend(figure, points, title)
    return figure


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(color=_LINE, labelsize=8.5, which="both")
    axes.grid(axis="y", color=_LINE, linewidth=0.5)
    axes.set_axisbelow(True)


def _mark(axes: Axes, points: Sequence[LayerPoint], column: _Column, size: float) -> None:
    """One marker a layer. Those without error, dense ones above all, are at the lower edge."""
    groups: dict[tuple[FormatName, bool, bool], list[tuple[float, float]]] = {}
    for point, shift in _shifted(points):
        value = getattr(point, column.attribute)
        if point.format == "dense" and column.is_error:
            value = 0.0
        if value is not None:
            edge = column.is_error and not value > 0  # which a logarithmic axis does not have
            key = point.format, point.stream in FEW_TOKENS, edge
            place = point.depth + shift, 0.04 if edge else value * column.unit
            groups.setdefault(key, []).append(place)
    for (format, hollow, edge), places in groups.items():
        colour, marker = _SIGNS[format]
        axes.plot(
            *zip(*places, strict=True),
            marker,
            color=colour,
            markersize=size,
            markerfacecolor="white" if hollow else colour,
            markeredgewidth=0.9,
            clip_on=False,
            transform=axes.get_xaxis_transform() if edge else axes.transData,
        )


def _shifted(points: Sequence[LayerPoint]) -> list[tuple[LayerPoint, float]]:
    """Each layer with its place inside its block, so that neighbours of one role do not hide each other."""
    members: dict[int, list[LayerPoint]] = {}
    for point in points:
        members.setdefault(point.depth, []).append(point)
    return [
        (point, 0.6 * ((number + 0.5) / len(inside) - 0.5))
        for inside in members.values()
        for number, point in enumerate(inside)
    ]


def _legend(figure: Figure, points: Sequence[LayerPoint], title: str) -> None:
    """The title is the legend's: so they never overlap, however narrow the figure is."""
    from matplotlib.lines import Line2D

    used = {point.format for point in points}

    def sign(label: str, colour: str, marker: str, face: str) -> Line2D:
        return Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle="", label=label)

    handles = [
        sign(format, colour, marker, colour) for format, (colour, marker) in _SIGNS.items() if format in used
    ]
    hollow = [stream for stream in FEW_TOKENS if any(point.stream == stream for point in points)]
    if hollow:
        handles.append(sign(f"hollow: {' and '.join(hollow)} stream", "#333333", "o", "white"))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(handles),
        title=title,
        title_fontsize=11,
        alignment="left",
        fontsize=9,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.2,
    )
