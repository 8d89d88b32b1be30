"""What a calibration is told and what it tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtlynx.calibration.budget import Choice, LayerCost
from rtlynx.calibration.solve import Solution


@dataclass(frozen=True)
class CalibrationOptions:
    """How calibration data is drawn and how much memory it may take.

    Parameters
    ----------
    batch_size : int
        Prompts a pipeline call.
    steps_per_prompt : int
        Sampling steps recorded of each prompt (both guidance passes), evenly spread over the schedule.
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
        Recorded calls and solutions go here, and an interrupted calibration goes on from here.
    pipeline_kwargs : mapping
        Passed to the pipeline (guidance_scale, height, ...).
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
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a whole number above 0, got {getattr(self, name)}")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout is a share in [0, 1), got {self.heldout}")
        if self.memory_gb <= 0:
            raise ValueError(f"memory_gb is above 0, got {self.memory_gb}")
        if self.folder is not None:
            object.__setattr__(self, "folder", Path(self.folder))


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found.

    solutions : per layer: ridge, error before and after (relative, squared, on held-out prompts).
    dense : candidates that stayed dense, with the reason.
    costs : per layer and form, where the recipe has a budget: error at the output and modelled saving.
    choice : what the budget decided, or None.
    extra_bytes : memory added to the model (factors, scales, and original weights that are kept), less what
        eight-bit weights save.
    """

    solutions: dict[str, Solution]
    dense: dict[str, str]
    costs: tuple[LayerCost, ...] = ()
    choice: Choice | None = None
    extra_bytes: int = 0
