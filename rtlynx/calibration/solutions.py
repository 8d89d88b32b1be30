"""Solved layers, in memory and, where there is a folder, on disk for a later run."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

from rtlynx.calibration.calls import CalibrationError
from rtlynx.calibration.collect import InputGroup
from rtlynx.calibration.folder import WorkFolder
from rtlynx.calibration.solve import Solution
from rtlynx.models.plan import LayerPlan
from rtlynx.recipe import Form

_TENSORS = ("weight", "lowrank_a", "lowrank_b", "scale")


class SolutionStore:
    """Solutions by name and form of a layer; one file for each group of layers that see the same."""

    def __init__(self, folder: WorkFolder | None) -> None:
        self.folder = folder
        self._solutions: dict[tuple[str, Form], Solution] = {}

    def of(self, layers: Iterable[LayerPlan]) -> dict[str, Solution]:
        """Name -> solution of `layers` in the forms that they are planned in."""
        return {layer.name: self._solutions[layer.name, layer.form] for layer in layers}

    def has(self, group: InputGroup) -> bool:
        """Whether an earlier run solved `group`; its solutions are then read."""
        if self.folder is None or not self.folder.has(_file(group)):
            return False
        tensors, numbers = self.folder.read(_file(group))
        for layer in group.layers:
            ridge, before, error, refitted = numbers[layer.name]
            weight, lowrank_a, lowrank_b, scale = (tensors.get(f"{layer.name}.{kind}") for kind in _TENSORS)
            self._solutions[layer.name, layer.form] = Solution(
                weight, lowrank_a, lowrank_b, ridge, before, error, scale, bool(refitted)
            )
        return True

    def put(self, group: InputGroup, solutions: dict[str, Solution], *, write: bool) -> None:
        """Keep the solutions of `group`; `write` also puts them into the folder."""
        tensors: dict[str, Tensor] = {}
        numbers = {}
        for name, solution in solutions.items():
            for kind in _TENSORS:
                tensor = getattr(solution, kind)
                if tensor is None:
                    continue
                if not bool(tensor.float().isfinite().all()):
                    raise CalibrationError(f"the solved {kind} of {name} is not finite: take a larger ridge")
                tensors[f"{name}.{kind}"] = tensor
            numbers[name] = [solution.ridge, solution.error_before, solution.error, solution.refitted]
        for layer in group.layers:
            self._solutions[layer.name, layer.form] = solutions[layer.name]
        if self.folder is not None and write:
            self.folder.write(_file(group), tensors, numbers)


def _file(group: InputGroup) -> str:
    return f"solution-{re.sub(r'[^A-Za-z0-9_.-]', '_', group.key)}.safetensors"
