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
from rtlynx.recipe import is_number, is_whole


@dataclass(frozen=True)
class CalibrationOptions:
    """How calibration data is drawn and how much memory it may take.

    Parameters
    ----------
    batch_size : int
        Prompts a pipeline call, where they are text alone and it takes lists of them; else one.
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

    Raises
    ------
    ValueError
        If a value is out of range.
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
                is_whole(getattr(self, name)) and getattr(self, name) >= 1,
                self,
                name,
                "a whole number above 0",
            )
        _require(
            is_whole(self.seed) and 0 <= self.seed < 2**63, self, "seed", "a whole number from 0 to 2^63 - 1"
        )
        _require(is_number(self.heldout) and 0 <= self.heldout < 1, self, "heldout", "a share in [0, 1)")
        _require(isinstance(self.sequential, bool), self, "sequential", "True or False")
        finite = is_number(self.memory_gb) and 0 < self.memory_gb < math.inf
        _require(finite, self, "memory_gb", "a number above 0 and finite")
        kwargs = self.pipeline_kwargs
        named = isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)
        _require(named, self, "pipeline_kwargs", "a dict of the pipeline's arguments by name")
        if self.folder is not None:
            path = isinstance(self.folder, str | os.PathLike) and os.fspath(self.folder) != ""
            _require(path, self, "folder", "a path or None")
            object.__setattr__(self, "folder", Path(self.folder))


@dataclass(frozen=True)
class Distillation:
    """Training after the closed form, so that the sparse model's guided velocity is that of the dense one.

    Trained are the weights and biases of the layers that drop activations or weights, and nothing else. The
    loss is 0.1 (c² + u²) + 0.2 (g c - (g - 1) u)²: c and u are the errors of the conditional and the
    unconditional prediction at one state, g is the guidance scale. Where a step is one call it is the squared
    error alone. The optimiser is Adam; its learning rate falls to 0 along a cosine.

    Parameters
    ----------
    steps : int
        Steps of the optimiser.
    batch_size : int
        States a step, each with both guidance passes.
    micro_batch_size : int, optional
        Of these, how many go through the model at one time; gradients add up. Default all.
    learning_rate : float
        Its largest value.
    guidance : float, optional
        Guidance scale g of u + g (c - u). Default: of `pipeline_kwargs` or the pipeline. With 1 the loss is
        the mean of both squared errors.
    on_policy_share : float in [0, 1]
        Share of states that the sparse model's own sampling goes through; the others are those that
        calibration recorded of the dense model.
    on_policy_prompts : int
        Prompts that the sparse model draws for them, from fresh noise, at each refresh.
    refresh_every : int, optional
        Steps between two refreshes. Default a quarter of `steps`. With a folder, an interrupted training goes
        on from the last one.
    rank : int, optional
        Train a correction of this rank to each weight, merged into it at the end, and not the weight: for
        models whose master weights and optimiser states do not fit.
    gradient_checkpointing : bool
        Compute each block's activations again in the backward pass, and keep only its inputs.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    steps: int = 500
    batch_size: int = 32
    micro_batch_size: int | None = None
    learning_rate: float = 3e-4
    guidance: float | None = None
    on_policy_share: float = 0.5
    on_policy_prompts: int = 128
    refresh_every: int | None = None
    rank: int | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "on_policy_prompts"):
            value = getattr(self, name)
            _require(is_whole(value) and value >= 1, self, name, "a whole number above 0")
        for name in ("micro_batch_size", "refresh_every", "rank"):
            value = getattr(self, name)
            fits = value is None or (is_whole(value) and value >= 1)
            _require(fits, self, name, "a whole number above 0, or None")
        rate, guidance = self.learning_rate, self.guidance
        _require(
            is_number(rate) and 0 < rate < math.inf, self, "learning_rate", "a number above 0 and finite"
        )
        fits = guidance is None or (is_number(guidance) and 0 <= guidance < math.inf)
        _require(fits, self, "guidance", "a number, 0 or more and finite, or None")
        share, again = self.on_policy_share, self.gradient_checkpointing
        _require(is_number(share) and 0 <= share <= 1, self, "on_policy_share", "a share in [0, 1]")
        _require(isinstance(again, bool), self, "gradient_checkpointing", "True or False")

    @property
    def refresh_steps(self) -> int:
        """`refresh_every` with its default resolved."""
        return self.refresh_every or -(-self.steps // 4)


def _require(right: bool, options: object, name: str, expected: str) -> None:
    if not right:
        raise ValueError(f"{name} is {expected}, got {getattr(options, name)!r}")


@dataclass(frozen=True)
class DistillationReport:
    """What distillation did.

    Attributes
    ----------
    steps : int
        Steps of the optimiser.
    layers : int
        Layers trained.
    guidance : float or None
        Guidance scale of the loss; None where each step of the pipeline is one call.
    loss_before, loss_after : float
        On calls of the dense model, of held-out prompts where there are any, at the start and at the end.
    """

    steps: int
    layers: int
    guidance: float | None
    loss_before: float
    loss_after: float


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
        What the budget decided; `candidates` are the dense steps that were compared where the recipe's
        `dense_sigmas` is "auto".
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
    distillation : DistillationReport or None
        What distillation did, where there was one. The errors of the layers that it trained are not known.
    others : dict[str, CalibrationReport]
        Of the further transformers of a pipeline that draws with several, by name (`transformer_2`).
    """

    solutions: dict[str, Solution]
    dense: dict[str, str]
    costs: tuple[InputCost, ...] = ()
    choice: Choice | None = None
    unrotated: Mapping[str, str] = field(default_factory=dict)
    extra_bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    unpermuted: Mapping[str, str] = field(default_factory=dict)
    distillation: DistillationReport | None = None
    others: Mapping[str, CalibrationReport] = field(default_factory=dict)
