"""How much of the energy of layer inputs 2:4 keeps, while a pipeline draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from rtlynx.evaluate.layers import distributions
from rtlynx.evaluate.sampling import sample_pictures
from rtlynx.math.selection import Pattern
from rtlynx.models.plan import make_plan
from rtlynx.models.sparsify import sparse_layers, state_of, target_model
from rtlynx.recipe import Recipe


def activation_energy_kept(
    pipeline: Any, prompts: Sequence[str], *, pipeline_kwargs: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Share of the energy of each candidate layer's input that 2:4 (adjacent) keeps, while drawing prompts.

    Parameters
    ----------
    pipeline : diffusers pipeline
        Dense. Candidates whose inputs do not split into groups of 4, or that did not run, are left out.

    Raises
    ------
    TypeError, ValueError
        If it is a bare model, which cannot draw prompts, or sparse already, or its transformer did not run.
    """
    if isinstance(pipeline, nn.Module):
        raise TypeError("a bare transformer cannot draw prompts: give a pipeline folder")
    model = target_model(pipeline)
    if state_of(model) is not None or sparse_layers(model):
        raise ValueError(f"{type(model).__name__} is sparse: activations are measured in the dense model")
    layers = make_plan(model, Recipe(grouping="adjacent")).layers
    with distributions(model, layers, Pattern(), histogram=False) as found:
        sample_pictures(pipeline, prompts, pipeline_kwargs=pipeline_kwargs)
    shares = {name: one.share for name, one in found.items() if one.total}
    if found and not shares:
        raise ValueError(f"no layer of {type(model).__name__} ran while the pipeline drew the prompts")
    return shares
