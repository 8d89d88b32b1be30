"""What a calibration is told and what it tells."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtlynx.calibration.budget import Choice, InputCost
from rtlynx.nn.solution import Solution


@dataclass(frozen=True)
class CalibrationOptions:
    """How calibration data is drawn and how much memory it may take.

    Parameters
    ----------
    batch_size : int
        Prompts a pipeline call.
    steps_per_prompt : int
        Sampling steps recorded of each prompt (both guidance passes), evenly spread over those that run.
    heldout : float in [0, 1)
        Share of prompts held out to choose the ridge and to report errors; at least one of two or more.
    seed : int
        Prompt i starts from noise of seed + i, whatever the batch or process.
    sequential : bool
        Feed each block the activations of the sparse blocks before it, not the dense model's. Holds each
        refitted weight twice until the end.
    memory_gb : float
        Moments held at one time; always at least one block's.
    folder : Path, optional
        Recorded calls and solutions go here, and an interrupted calibration goes on from here. One folder
        serves one calibration: other settings, data, weights or schedulers are refused.
    pipeline_kwargs : mapping
        Passed to the pipeline (guidance_scale, height, num_inference_steps, sigmas, strength, ...).
    """

    batch_size: int = 8
    steps_per_prompt: int = 4
    heldout: float = 0.125
    seed: int = 0
    sequential: bool = False
    memory_gb: float = 4.0
    folder: Path | None = None
    pipeline_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps_per_prompt"):
            _require(
                _is_whole(getattr(self, name)) and getattr(self, name) >= 1,
                self,
                name,
                "a whole number above 0",
            )
        _require(
            _is_whole(self.seed) and 0 <= self.seed < 2**63, self, "seed", "a whole number from 0 to 2^63 - 1"
        )
        _require(_is_number(self.heldout) and 0 <= self.heldout < 1, self, "heldout", "a share in [0, 1)")
        _require(isinstance(self.sequential, bool), self, "sequential", "True or False")
        finite = _is_number(self.memory_gb) and 0 < self.memory_gb < math.inf
        _require(finite, self, "memory_gb", "a number above 0 and finite")
        kwargs = self.pipeline_kwargs
        named = isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)
        _require(named, self, "pipeline_kwargs", "a dict of the pipeline's arguments by name")
        if self.folder is not None:
            path = isinstance(self.folder, str | os.PathLike) and os.fspath(self.folder) != ""
            _require(path, self, "folder", "a path or None")
            object.__setattr__(self, "folder", Path(self.folder))


def _require(right: bool, options: CalibrationOptions, name: str, expected: str) -> None:
    if not right:
        raise ValueError(f"{name} is {expected}, got {getattr(options, name)!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found.

    Attributes
    ----------
    solutions : dict[str, Solution]
        Per layer: ridge, error before and after (relative, squared, on held-out prompts).
    dense : dict[str, str]
        Candidates that stayed dense, with the reason.
    costs : tuple[InputCost, ...]
        Per input and format, where the recipe has a budget: error at the output that the layers that read it
        add together, and the microseconds that they save in one recorded call.
    choice : Choice or None
        What the budget decided.
    unrotated : dict[str, str]
        Attentions whose values the recipe would rotate and calibration did not, with the reason.
    extra_bytes : int
        Memory added to the model (factors, scales, and original weights that are kept), less what eight-bit
        weights save.
    tokens : dict[str, int]
        Per candidate, where the recipe has a budget: tokens in one recorded call.
    unpermuted : dict[str, str]
        Down projections of MLPs whose hidden features the recipe would permute and calibration did not, with
        the reason.
    """

    solutions: dict[str, Solution]
    dense: dict[str, str]
    costs: tuple[InputCost, ...] = ()
    choice: Choice | None = None
    unrotated: Mapping[str, str] = field(default_factory=dict)
    extra_bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    unpermuted: Mapping[str, str] = field(default_factory=dict)
