"""Errors inside a model, on calls recorded from the dense one: of layers and of its output, by step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx import schedule
from rtlynx.calibration.calls import Call, CallStore
from rtlynx.evaluate.layers import layer_errors, mean_error
from rtlynx.models.plan import architecture_of
from rtlynx.models.sparsify import comparable


def model_errors(
    dense: nn.Module, model: nn.Module, layers: Mapping[str, nn.Module], calls: Sequence[Call]
) -> dict[str, Any]:
    """Relative squared errors of `model` against `dense`, both given what dense sampling gave dense.

    Parameters
    ----------
    layers : name -> layer of the layers of `model` that differ from `dense`.
    calls : of the dense model, in sampling order, of all steps of one batch.

    Returns
    -------
    dict
        noise : noise level of each step in (0, 1], in sampling order.
        layer_error, layers : mean over layers, and each layer's, mean over steps.
        layer_error_by_step : mean over layers.
        output_error, output_error_by_step : of the model's output.
        output_error_weighted : of the output, steps weighted by their noise level: an early error is
        carried through all that is left of the way.
    """
    architecture = architecture_of(dense)
    levels = [_level(call[architecture.timestep_argument], architecture.descending) for call in calls]
    by_level: dict[float, list[Call]] = defaultdict(list)
    for level, call in zip(levels, calls, strict=True):
        by_level[level].append(call)
    twin = comparable(dense, model)
    by_step = [layer_errors(twin, {"variant": layers}, some)["variant"] for some in by_level.values()]
    names = by_step[0] if by_step else {}
    outputs = _output_errors(dense, model, levels, calls)
    weight = sum(outputs)  # of the keys: noise levels
    return {
        "noise": list(by_level),
        "layer_error": sum(map(mean_error, by_step)) / len(by_step),
        "layers": {name: sum(step[name] for step in by_step) / len(by_step) for name in names},
        "layer_error_by_step": [mean_error(step) for step in by_step],
        "output_error": sum(outputs.values()) / len(outputs),
        "output_error_by_step": list(outputs.values()),
        "output_error_weighted": sum(level * error for level, error in outputs.items()) / weight,
    }


def _output_errors(
    dense: nn.Module, model: nn.Module, levels: Sequence[float], calls: Sequence[Call]
) -> dict[float, float]:
    """Noise level -> ||y - y'||² / ||y||². Calls run in order, so that caches count."""
    wrong: dict[float, float] = defaultdict(float)
    total: dict[float, float] = defaultdict(float)
    parameter = next(model.parameters())
    argument = architecture_of(dense).timestep_argument
    with schedule([float(call[argument].flatten()[0]) for call in calls], levels):
        for level, call in zip(levels, calls, strict=True):
            expected = _output(dense, call, next(dense.parameters()).dtype)
            wrong[level] += _energy(_output(model, call, parameter.dtype) - expected)
            total[level] += _energy(expected)
    return {level: wrong[level] / total[level] if total[level] else 0.0 for level in total}


@torch.no_grad()
def _output(model: nn.Module, call: Call, dtype: torch.dtype) -> Tensor:
    device = next(model.parameters()).device
    store = CallStore()
    store.put(0, [call])
    (moved,) = store.replay([0], device)
    found = model(**{**_cast(moved, dtype), "return_dict": False})[0]
    return found.float() if isinstance(found, Tensor) else torch.cat([one.float().flatten() for one in found])


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Embeddings and latents in the model's dtype; positions and lengths as they are."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {
            key: item if key in ("img_ids", "txt_ids") else _cast(item, dtype) for key, item in value.items()
        }
    return [_cast(item, dtype) for item in value] if isinstance(value, list) else value


def _level(timestep: Any, descending: bool) -> float:
    """Share of noise: 1 at the start of sampling."""
    value = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
    return value if descending else 1 - value


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
