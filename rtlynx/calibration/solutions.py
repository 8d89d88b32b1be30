"""Solved layers, in the host's memory and, where there is a folder, on disk for a later run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rtlynx.calibration.calls import CalibrationError
from rtlynx.calibration.collect import InputGroup
from rtlynx.calibration.folder import WorkFolder
from rtlynx.math.formats import FormatName
from rtlynx.models.plan import LayerPlan
from rtlynx.nn.solution import Solution


class SolutionStore:
    """Solutions by name and format of a layer; one file for each group of layers that see the same.

    bases : digest of the bases that the model was turned to before; files of others are not read.
    """

    def __init__(self, folder: WorkFolder | None) -> None:
        self.folder = folder
        self.bases = ""
        self._solutions: dict[tuple[str, FormatName], Solution] = {}

    def of(self, layers: Iterable[LayerPlan]) -> dict[str, Solution]:
        """Name -> solution of `layers` in the formats that they are planned in."""
        return {layer.name: self._solutions[layer.name, layer.format.name] for layer in layers}

    def has(self, group: InputGroup) -> bool:
        """Whether an earlier run solved `group`; its solutions are then read."""
        if self.folder is None or not self.folder.has(_file(group)):
            return False
        tensors, about = self.folder.read(_file(group))
        if about["bases"] != self.bases:
            return False
        numbers = about["layers"]
        for layer in group.layers:
            ridge, before, error, refitted = numbers[layer.name]
            own = f"{layer.name}."
            found: dict[str, Any] = {
                key.removeprefix(own): tensor for key, tensor in tensors.items() if key.startswith(own)
            }
            self._solutions[layer.name, layer.format.name] = Solution(
                **found,
                refitted=bool(refitted),
                weight_sparse=layer.weight_sparse,
                ridge=ridge,
                error_before=before,
                error=error,
            )
        return True

    def put(
        self, group: InputGroup, solutions: dict[str, Solution], dtype: torch.dtype, *, write: bool
    ) -> None:
        """Keep the solutions of `group`; `write` also puts them into the folder.

        On the CPU and, but for models whose `dtype` is float64, in no more than four bytes a number: those of
        a large model would not fit beside it on a card.
        """
        tensors: dict[str, Tensor] = {}
        numbers = {}
        formats = {layer.name: layer.format.name for layer in group.layers}
        for name, solution in solutions.items():
            held: dict[str, Any] = {}
            for kind, tensor in solution.tensors.items():
                if not bool(tensor.float().isfinite().all()):
                    raise CalibrationError(f"the solved {kind} of {name} is not finite: take a larger ridge")
                if tensor.dtype is torch.float64:
                    tensor = tensor.to(torch.promote_types(dtype, torch.float32))
                held[kind] = tensors[f"{name}.{kind}"] = tensor.cpu().contiguous()
            self._solutions[name, formats[name]] = replace(solution, **held)
            numbers[name] = [solution.ridge, solution.error_before, solution.error, solution.refitted]
        if self.folder is not None and write:
            self.folder.write(_file(group), tensors, {"bases": self.bases, "layers": numbers})


def _file(group: InputGroup) -> str:
    return f"solution-{re.sub(r'[^A-Za-z0-9_.-]', '_', group.key)}.safetensors"
