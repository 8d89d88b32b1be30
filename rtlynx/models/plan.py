"""From a recipe and a model to what happens to each of its linear layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from rtlynx.cuda.sm90.compress import MAX_COLUMNS_FP8
from rtlynx.math.formats import (
    BF16_SPARSE,
    DENSE,
    FORMATS,
    FP8_DENSE,
    FP8_SPARSE,
    FP8_WEIGHT_SPARSE,
    FP8_WEIGHTS,
    Format,
    FormatName,
)
from rtlynx.math.reference import Norm
from rtlynx.math.selection import Pattern
from rtlynx.models.architecture import (
    FEW_TOKENS,
    STRIDED_ROLES,
    Architecture,
    Attention,
    Candidate,
    Mlp,
    Reparameterizable,
)
from rtlynx.models.chroma import CHROMA
from rtlynx.models.flux import FLUX
from rtlynx.models.flux2 import FLUX2
from rtlynx.models.generic import GENERIC
from rtlynx.models.guards import foreign_reason, refuse_prepared
from rtlynx.models.hunyuan_video15 import HUNYUAN_VIDEO15
from rtlynx.models.ltx import LTX
from rtlynx.models.ltx2 import LTX2
from rtlynx.models.qwen_image import QWEN_IMAGE
from rtlynx.models.reparameterize import fixed_reason, hidden_groups
from rtlynx.models.sd3 import SD3
from rtlynx.models.wan import WAN
from rtlynx.models.z_image import Z_IMAGE
from rtlynx.recipe import Recipe

_KNOWN = (
    CHROMA,
    FLUX,
    FLUX2,
    HUNYUAN_VIDEO15,
    LTX,
    LTX2,
    QWEN_IMAGE,
    SD3,
    WAN,
    Z_IMAGE,
)
ARCHITECTURES = {one.class_name: one for one in _KNOWN}


def architecture_of(model: nn.Module) -> Architecture:
    """What is known of `model` by its class (or a base class), else the generic rule."""
    for base in type(model).__mro__:
        if base.__name__ in ARCHITECTURES:
            return ARCHITECTURES[base.__name__]
    return GENERIC


# Why nothing is gained by another basis.
_READS_ALL = "no layer that reads it drops activations"
# What a budget chooses among beside dense, by the format that a layer is planned in.
_AUTO_FORMATS: dict[FormatName, tuple[FormatName, ...]] = {
    "fp8-sparse": ("fp8-dense", "fp8-sparse"),
    "fp8-weight-sparse": ("fp8-dense", "fp8-weight-sparse"),
}


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one candidate.

    dense_reason : None where a `SparseLinear` takes its place.
    splits_text : whether its input holds text and image tokens, and which are which is known.
    weight_sparse : whether a quantised layer drops weights.
    """

    candidate: Candidate
    in_features: int
    out_features: int
    pattern: Pattern
    norm: Norm
    rank: int
    text_rows_dense: bool
    dense_reason: str | None
    quantized: bool = False
    splits_text: bool = False
    weight_sparse: bool = False

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def keeps_all(self) -> bool:
        """Whether the layer drops no activation."""
        return self.pattern.n == self.pattern.m

    @property
    def drops_nothing(self) -> bool:
        """Whether the layer drops neither activations nor weights."""
        return self.keeps_all and not self.weight_sparse

    @property
    def format(self) -> Format:
        """What the layer becomes."""
        if self.dense_reason is not None:
            return DENSE
        if self.candidate.role == "modulation":
            return FP8_WEIGHTS
        if not self.quantized:
            return BF16_SPARSE
        if self.weight_sparse:
            return FP8_WEIGHT_SPARSE
        return FP8_DENSE if self.keeps_all else FP8_SPARSE

    def refits(self, recipe: Recipe) -> bool:
        """Whether calibration solves for the weight of the layer."""
        return recipe.refit and self.format is not FP8_DENSE

    def has_dense_calls(self, recipe: Recipe) -> bool:
        """Whether some rows or steps run dense, by an original weight apart from that of the layer."""
        # What is dense fp8 already is not kept in e4m3 once more.
        same = self.format is FP8_DENSE and recipe.dense_precision == "fp8"
        same = same or self.format is FP8_WEIGHTS  # in all steps
        return (self.text_rows_dense or recipe.has_dense_steps) and not same

    def in_format(self, format: FormatName, reason: str = "") -> LayerPlan:
        """A layer that is planned sparse, in another format; `reason` says why where that is dense."""
        if format == "dense":
            return self.dense(reason)
        if format in ("fp8-dense", "fp8-weight-sparse"):
            drops = FORMATS[format].weight_sparse
            return replace(
                self, pattern=Pattern(1, 1), norm="none", rank=0, quantized=True, weight_sparse=drops
            )
        return replace(self, quantized=FORMATS[format].quantized, weight_sparse=False)

    def dense(self, reason: str) -> LayerPlan:
        """The same layer, left dense."""
        return replace(self, dense_reason=reason)


@dataclass(frozen=True)
class Plan:
    """A decision for every candidate layer of a model.

    modulation : layers whose weights alone are quantised, beside the candidates.
    rotated : attentions whose values are rotated.
    permuted : MLPs whose hidden features are permuted.
    unrotated, unpermuted : attention or MLP -> why that is not done, where the recipe asks for it.
    """

    recipe: Recipe
    architecture: Architecture
    layers: tuple[LayerPlan, ...]
    modulation: tuple[LayerPlan, ...] = ()
    rotated: tuple[Attention, ...] = ()
    permuted: tuple[Mlp, ...] = ()
    unrotated: Mapping[str, str] = field(default_factory=dict, compare=False)
    unpermuted: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def sparse(self) -> tuple[LayerPlan, ...]:
        """The layers that a `SparseLinear` takes the place of, in model order."""
        return tuple(layer for layer in self.layers if layer.dense_reason is None)

    @property
    def replaced(self) -> tuple[LayerPlan, ...]:
        """All layers that one of rtlynx takes the place of: `sparse` and `modulation`."""
        return (*self.sparse, *self.modulation)

    @property
    def reparameterized(self) -> tuple[Reparameterizable, ...]:
        """All that gets another basis, in the order in which it is done."""
        return (*self.rotated, *self.permuted)

    def layer(self, name: str) -> LayerPlan | None:
        """The decision for one layer; None where it is no candidate."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def reading(self, reads: Mapping[str, str]) -> Plan:
        """The same plan where more is known of which layers read one tensor (name -> `Candidate.reads`)."""
        layers = []
        for layer in self.layers:
            key = reads.get(layer.name, layer.candidate.reads)
            layers.append(replace(layer, candidate=replace(layer.candidate, reads=key)))
        return replace(self, layers=tuple(layers))

    @property
    def traced_reads(self) -> dict[str, str]:
        """Layer -> `Candidate.reads`, where a call told what `Architecture.rules` does not; else empty."""
        reads = {layer.name: layer.candidate.reads for layer in self.layers}
        traced = self.architecture.decide is not None and any(key != name for name, key in reads.items())
        return reads if traced else {}

    @property
    def knows_shared_inputs(self) -> bool:
        """Whether it is known which layers read one tensor."""
        return self.architecture.decide is None or bool(self.traced_reads)

    def leave_dense(self, reasons: dict[str, str]) -> Plan:
        """The same plan with further layers left dense (name -> reason)."""
        layers = (
            layer.dense(reasons[layer.name]) if layer.name in reasons else layer for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def leave_basis(self, reasons: Mapping[str, str]) -> Plan:
        """The same plan with further attentions and MLPs in the basis that they have (name -> reason)."""

        def left(known: Mapping[str, str], of: tuple[Reparameterizable, ...]) -> dict[str, str]:
            return {**known, **{one.name: reasons[one.name] for one in of if one.name in reasons}}

        return replace(
            self,
            rotated=tuple(one for one in self.rotated if one.name not in reasons),
            permuted=tuple(one for one in self.permuted if one.name not in reasons),
            unrotated=left(self.unrotated, self.rotated),
            unpermuted=left(self.unpermuted, self.permuted),
        )

    def in_formats(self, formats: Mapping[str, FormatName]) -> Plan:
        """The same plan with sparse layers in other formats (name -> format)."""
        layers = (
            layer.in_format(formats[layer.name]) if layer.name in formats else layer for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def alternatives(self) -> list[LayerPlan]:
        """Each sparse layer in every format that it may take: several where the budget is to choose.

        Dense is always one of them; what is to drop nothing has one more. (bf16-sparse is none: fp8-dense
        takes less time and loses less.)
        """
        if self.recipe.precision != "auto":
            return list(self.sparse)
        found: list[LayerPlan] = []
        for layer in self.sparse:
            formats = _AUTO_FORMATS.get(layer.format.name, ())
            if self.recipe.fixed_format(layer.name) or not formats:
                found.append(layer)
                continue
            if self.recipe.drop == "auto" and layer.format is FP8_SPARSE:
                formats = (*formats, "fp8-weight-sparse")
            found += [layer.in_format(format) for format in formats]
        return found


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Decide for every candidate layer of `model`.

    Raises
    ------
    ValueError
        If the model has no linear layer that could be sparse, or a `skip` or `formats` pattern matches none,
        or adapters, fused projections, group offloading or compiled blocks came before, or it is a graph.
    TypeError
        If what is known to be a linear layer in this architecture is something else (quantised).
    """
    if isinstance(model, nn.Linear):
        raise ValueError("a single linear layer cannot be replaced in place: use SparseLinear.from_linear")
    refuse_prepared(model)
    architecture = architecture_of(model)
    candidates = architecture.candidates(model)
    _refuse_replaced(model, architecture, recipe)
    if not candidates:
        kinds = {type(module).__name__ for module in model.modules() if _like_linear(module)}
        instead = f" (it has {', '.join(sorted(kinds))})" if kinds else ""
        raise ValueError(f"{type(model).__name__} has no linear layers that can be made sparse{instead}")
    modulation = _modulation(model, architecture, recipe)
    names = [candidate.name for candidate in candidates] + [layer.name for layer in modulation]
    for setting, globs in (("skip", recipe.skip), ("formats", recipe.formats)):
        for glob in globs:
            if not fnmatch.filter(names, glob):
                raise ValueError(f"{setting} pattern {glob!r} matches no layer of {type(model).__name__}")
    if recipe.text_rows == "dense" and architecture.text_rows is None:
        _refuse_unknown_text(model, candidates)
    modules: dict[str, Any] = dict(model.named_modules())
    _refuse_unknown_roles(model, architecture, recipe)
    attentions = architecture.attentions_of(model) if recipe.rotate_values else []
    reasons = {one.name: _unrotated_reason(model, one, recipe.m) for one in attentions}
    readers = {name for one in attentions if reasons[one.name] is None for name in one.readers}
    layers = tuple(
        _plan_layer(modules[candidate.name], candidate, recipe, candidate.name in readers)
        for candidate in candidates
    )
    if architecture.text_rows is not None:
        layers = tuple(replace(layer, splits_text=layer.candidate.stream == "joint") for layer in layers)
    dropping = {layer.name for layer in layers if layer.dense_reason is None and not layer.drops_nothing}
    for one in attentions:
        if reasons[one.name] is None and not dropping & set(one.readers):
            reasons[one.name] = "no layer that reads it drops activations or weights"
    mlps = architecture.mlps_of(model) if recipe.permute_hidden else []
    modulation = tuple(layer for layer in modulation if _skipping(recipe, layer.name) is None)
    plan = Plan(recipe, architecture, layers, modulation, tuple(attentions), tuple(mlps))
    reasons.update({one.name: _unpermuted_reason(model, one, plan) for one in mlps})
    return plan.leave_basis({name: reason for name, reason in reasons.items() if reason is not None})


def _modulation(model: nn.Module, architecture: Architecture, recipe: Recipe) -> tuple[LayerPlan, ...]:
    """The layers that `recipe.modulation` is about; ValueError where it is not known which these are."""
    if recipe.modulation == "dense":
        return ()
    found = architecture.modulation_of(model)
    if not found:
        raise ValueError(
            f"which layers of {type(model).__name__} make modulation of the timestep is not known: use "
            "modulation='dense'"
        )
    plans = []
    for candidate in found:
        linear: Any = model.get_submodule(candidate.name)
        sizes = linear.in_features, linear.out_features
        plans.append(LayerPlan(candidate, *sizes, Pattern(1, 1), "none", 0, False, None, quantized=True))
    return tuple(plans)


def _skipping(recipe: Recipe, name: str) -> str | None:
    """The pattern of `recipe.skip` that leaves the layer `name` dense."""
    return next((glob for glob in recipe.skip if fnmatch.fnmatchcase(name, glob)), None)


def _refuse_unknown_text(model: nn.Module, candidates: list[Candidate]) -> None:
    """ValueError where text may be among the tokens of layers, and which rows these are is not known."""
    joint = [candidate.name for candidate in candidates if candidate.stream == "joint"]
    if not joint and any(candidate.stream == "text" for candidate in candidates):
        return
    where = f"{len(joint)} layers, as {joint[0]}," if joint else "layers"
    raise ValueError(
        f"where the text rows of {type(model).__name__} are is not known, and {where} may read them together "
        "with others: use text_rows='sparse'"
    )


def _refuse_unknown_roles(model: nn.Module, architecture: Architecture, recipe: Recipe) -> None:
    """ValueError where the recipe turns what layers make and read, and which these are is not known."""
    for setting, known, what in (
        ("rotate_values", architecture.attentions, "values of its attentions"),
        ("permute_hidden", architecture.mlps, "hidden features of its MLPs"),
    ):
        if getattr(recipe, setting) is True and not known:
            raise ValueError(
                f"which layers of {type(model).__name__} make and read the {what} is not known: use "
                f"{setting}=False"
            )


def _unrotated_reason(model: nn.Module, attention: Attention, m: int) -> str | None:
    if attention.head_dim % m:
        return f"heads of {attention.head_dim} channels do not split into groups of {m}"
    return fixed_reason(model, attention)


def _unpermuted_reason(model: nn.Module, mlp: Mlp, plan: Plan) -> str | None:
    down, shards = plan.layer(mlp.name), plan.recipe.tp_degree
    if down is None or down.dense_reason is not None or down.keeps_all:
        return _READS_ALL
    if hidden_groups(mlp, down.pattern, shards) is None:
        inside = f"inside {shards} shards of them" if shards > 1 else "among themselves"
        return f"its {mlp.width} hidden features do not split into groups of {down.pattern.m} {inside}"
    return fixed_reason(model, mlp)


def _refuse_replaced(model: nn.Module, architecture: Architecture, recipe: Recipe) -> None:
    """TypeError where something else is in the place of a linear layer that the architecture has."""
    for name, module in model.named_modules():
        if not _like_linear(module) or not any(
            fnmatch.fnmatchcase(name, rule.pattern) for rule in architecture.rules
        ):
            continue
        if not any(fnmatch.fnmatchcase(name, glob) for glob in recipe.skip):
            raise TypeError(f"{name} {foreign_reason(module)}")


def _like_linear(module: nn.Module) -> bool:
    """Whether it is made for the same as `nn.Linear`, which it is not."""
    return not isinstance(module, nn.Linear) and hasattr(module, "in_features")


def _plan_layer(linear: nn.Linear, candidate: Candidate, recipe: Recipe, rotated: bool) -> LayerPlan:
    fixed = recipe.fixed_format(candidate.name)
    keep_all = fixed is None and candidate.stream in FEW_TOKENS and recipe.text_stream == "dense"
    # The kernels do not compress wider inputs in fp8: sparsity would be slower than none.
    too_wide = linear.in_features > MAX_COLUMNS_FP8
    eight_bits: FormatName = "fp8-dense" if keep_all or too_wide else "fp8-sparse"
    if not keep_all and (recipe.drop == "weights" or (too_wide and recipe.drop == "auto")):
        eight_bits = "fp8-weight-sparse"
    layer = LayerPlan(
        candidate,
        linear.in_features,
        linear.out_features,
        _pattern_for(candidate, recipe, rotated),
        recipe.layer_norm,
        recipe.rank_for(linear.in_features),
        recipe.text_rows == "dense" and candidate.stream == "joint",
        None,
    ).in_format(fixed or ("bf16-sparse" if recipe.precision == "bf16" else eight_bits), "dense by 'formats'")
    pattern = Pattern() if layer.weight_sparse else layer.pattern
    reason = layer.dense_reason or pattern.misfit(linear.in_features)
    if reason is None and keep_all and recipe.precision == "bf16":
        reason = f"{candidate.stream} stream"
    if reason is None:
        glob = _skipping(recipe, candidate.name)
        reason = f"skipped by {glob!r}" if glob else None
    return layer if reason is None else layer.dense(reason)


def _pattern_for(candidate: Candidate, recipe: Recipe, rotated: bool) -> Pattern:
    strided = recipe.grouping == "strided" or (recipe.grouping == "auto" and candidate.role in STRIDED_ROLES)
    if rotated or not strided:  # what competes well is adjacent in rotated values
        return Pattern(recipe.n, recipe.m, score=recipe.score)
    parts, degree = candidate.parts, recipe.tp_degree
    if isinstance(parts, int):
        return Pattern(recipe.n, recipe.m, "strided", parts * degree, recipe.score)
    shards = tuple(width // degree for width in parts for _ in range(degree))
    return Pattern(recipe.n, recipe.m, "strided", shards, recipe.score)
