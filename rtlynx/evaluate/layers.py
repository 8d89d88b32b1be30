"""What happens inside the layers: output errors, the energy that 2:4 keeps, distributions of entries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.calibration.calls import Call, CallStore
from rtlynx.math.selection import Pattern, pattern_mask, select
from rtlynx.models.plan import LayerPlan, architecture_of
from rtlynx.nn.call import calling

# Histograms are of entries divided by the root mean square of their tensor; the outer bins take the rest.
HISTOGRAM_RANGE = 5.0
HISTOGRAM_BINS = 80
# Entries of one tensor that go into its histogram, evenly spread over it.
HISTOGRAM_ENTRIES = 1 << 16


def layer_errors(
    dense: nn.Module,
    variants: Mapping[str, Mapping[str, nn.Module]],
    calls: Iterable[Call],
) -> dict[str, dict[str, float]]:
    """Relative squared output error ‖Y − Ŷ‖² / ‖Y‖² of single layers, over all tokens of `calls`.

    Y and Ŷ, both with bias, come from the same input: the one that the layer has in the dense model.

    Parameters
    ----------
    dense : nn.Module
        The dense model.
    variants : mapping
        Variant -> name of a linear of `dense` -> the layer that takes its place there.
    calls : iterable of dict
        Keyword arguments of calls of `dense`, which is run once for all variants.

    Returns
    -------
    dict
        Variant -> layer name -> error. 0 / 0 is 0; a layer that no call reaches is left out.
    """
    stand_ins: dict[str, dict[str, nn.Module]] = {}
    for variant, layers in variants.items():
        for name, layer in layers.items():
            stand_ins.setdefault(name, {})[variant] = layer
    wrong: dict[tuple[str, str], float] = {}
    total: dict[str, float] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        total[name] = total.get(name, 0.0) + _energy(y)
        for variant, layer in stand_ins[name].items():
            key = variant, name
            wrong[key] = wrong.get(key, 0.0) + _energy(layer(x).float() - y.float())

    with watch_linears(dense, list(stand_ins), see):
        _replay(dense, calls)
    return {
        variant: {name: _ratio(wrong[variant, name], total[name]) for name in layers if name in total}
        for variant, layers in variants.items()
    }


def mean_error(errors: Mapping[str, float]) -> float:
    """Mean over layers; 0 where no layer is sparse."""
    return sum(errors.values()) / len(errors) if errors else 0.0


def energy_kept(x: Tensor, pattern: Pattern | None = None) -> float:
    """Share of the squared magnitude of `x` (..., K) that `pattern` (default 2:4, adjacent) keeps.

    1 for a tensor of zeros: nothing is lost.
    """
    kept, total = _kept_and_total(x, pattern or Pattern())
    return kept / total if total else 1.0


def gaussian_energy_kept() -> float:
    """The share that 2:4 keeps of independent normal entries: what structure-free numbers would give."""
    z = torch.linspace(0, 12, 200_001, dtype=torch.float64)
    larger = torch.special.erfc(z / math.sqrt(2))  # chance that another entry has the larger magnitude
    survives = (1 - larger) ** 3 + 3 * larger * (1 - larger) ** 2  # at most one of the three others has
    density = 2 * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(z.square() * density * survives, z))


@dataclass
class Distribution:
    """Energy kept by 2:4 and a histogram, accumulated over tensors of one kind.

    counts : (HISTOGRAM_BINS,) of entries / RMS between -HISTOGRAM_RANGE and HISTOGRAM_RANGE.
    """

    kept: float = 0.0
    total: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(HISTOGRAM_BINS, dtype=torch.float64))

    @property
    def share(self) -> float:
        """Share of the energy that 2:4 keeps."""
        return self.kept / self.total if self.total else 1.0

    @classmethod
    def merged(cls, parts: Iterable[Distribution]) -> Distribution:
        """The distribution of all tensors that went into `parts`; an object given twice counts once."""
        distinct = list({id(part): part for part in parts}.values())
        counts = torch.stack([part.counts for part in distinct]).sum(0)
        return cls(sum(part.kept for part in distinct), sum(part.total for part in distinct), counts)

    def add(self, x: Tensor, pattern: Pattern, *, histogram: bool = True) -> None:
        """Take in one tensor (..., K)."""
        kept, total = _kept_and_total(x, pattern)
        self.kept += kept
        self.total += total
        if not histogram or not total:
            return
        flat = x.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // HISTOGRAM_ENTRIES)].float().cpu()
        unit = (sample / math.sqrt(total / flat.numel())).clamp(-HISTOGRAM_RANGE, HISTOGRAM_RANGE)
        counts = torch.histc(unit, HISTOGRAM_BINS, min=-HISTOGRAM_RANGE, max=HISTOGRAM_RANGE)
        self.counts += counts.double()


def weight_distributions(
    model: nn.Module, layers: Sequence[LayerPlan], pattern: Pattern | None = None
) -> dict[str, Distribution]:
    """Layer name -> distribution of its weight, grouped along the inputs as weight sparsity would."""
    found = {}
    for layer in layers:
        found[layer.name] = Distribution()
        found[layer.name].add(_linear(model, layer.name).weight, pattern or Pattern())
    return found


def activation_distributions(
    model: nn.Module,
    layers: Sequence[LayerPlan],
    calls: Iterable[Call],
    pattern: Pattern | None = None,
) -> dict[str, Distribution]:
    """Layer name -> distribution of its inputs in `calls`. Layers that read one tensor share one object."""
    with distributions(model, layers, pattern or Pattern(), histogram=True) as found:
        _replay(model, calls)
    return found


@contextmanager
def distributions(
    model: nn.Module, layers: Sequence[LayerPlan], pattern: Pattern, *, histogram: bool
) -> Iterator[dict[str, Distribution]]:
    """Distributions of layer inputs that fill while the model runs, one for each distinct input."""
    by_input: dict[str, Distribution] = {}
    first: dict[str, str] = {}
    found: dict[str, Distribution] = {}
    for layer in layers:
        if pattern.misfit(layer.in_features) is None:
            found[layer.name] = by_input.setdefault(layer.candidate.reads, Distribution())
            first.setdefault(layer.candidate.reads, layer.name)

    def see(name: str, x: Tensor, _y: Tensor) -> None:
        found[name].add(x, pattern, histogram=histogram)

    with watch_linears(model, list(first.values()), see):
        yield found


@contextmanager
def watch_linears(model: nn.Module, names: Sequence[str], see: Any) -> Iterator[None]:
    """Call `see(name, input, output)`, without gradients, whenever one of the linears `names` has run."""

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            with torch.no_grad():
                see(name, args[0], output)

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replay(model: nn.Module, calls: Iterable[Call]) -> None:
    """Run calls of a dense model. Sparse layers called meanwhile run them as steps that are not dense."""
    store, device, text_rows = CallStore(), next(model.parameters()).device, architecture_of(model).text_rows
    with torch.no_grad():
        for call in calls:
            store.put(0, [call])
            for moved in store.replay([0], device):
                with calling(text_rows=None if text_rows is None else text_rows(moved)):
                    model(**moved)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _energy(x: Tensor) -> float:
    return float(x.float().square().sum(dtype=torch.float64))


def _kept_and_total(x: Tensor, pattern: Pattern) -> tuple[float, float]:
    x = x.detach()
    return _energy(select(x, pattern_mask(x, pattern))), _energy(x)


def _ratio(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if part == 0 else math.inf
    return part / whole
