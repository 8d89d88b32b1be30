"""From prompts (or given calls) to recorded calls of the denoiser, split into fitting and held-out ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from rtlynx.calibration.calls import CalibrationError, Call, CallStore, calls_by_step, chosen_steps
from rtlynx.calibration.folder import WorkFolder, digest
from rtlynx.calibration.options import CalibrationOptions
from rtlynx.calibration.processes import rank, world
from rtlynx.calibration.progress import ProgressBar
from rtlynx.math.formats import FP8_DENSE
from rtlynx.models.fingerprint import model_fingerprint
from rtlynx.models.pipelines import check_call, draw
from rtlynx.models.plan import Plan


class Recording:
    """The calls that this process holds.

    batches : split ("fit" or "heldout") -> numbers of its batches in `store`.
    pipeline, prompts : what was sampled, of any split; None and empty where calls were given.
    prompts_of : split -> its prompts by their numbers.
    """

    def __init__(self, model: nn.Module, plan: Plan, options: CalibrationOptions) -> None:
        self.model, self.plan, self.options = model, plan, options
        self.pipeline: Any = None
        self.prompts: list[str] = []
        self.prompts_of: dict[str, dict[int, str]] = {"fit": {}, "heldout": {}}
        self._runs_dense: Callable[[Call], bool] | None = None
        self.folder: WorkFolder | None = None
        self.store = CallStore()
        self.batches: dict[str, list[int]] = {"fit": [], "heldout": []}

    @property
    def numbers(self) -> list[int]:
        """All batches of this process."""
        return self.batches["fit"] + self.batches["heldout"]

    @property
    def fit_calls(self) -> int:
        """How many calls of this process there are to fit on."""
        return sum(self.store.count(number) for number in self.batches["fit"])

    def use_calls(self, calls: list[Call]) -> None:
        """Take calls as they are, each a batch of its own."""
        if not calls:
            raise CalibrationError("no calls to calibrate on")
        for number, call in enumerate(calls):
            _check_arguments(self.model, number, call)
        splits = _split(len(calls), self.options.heldout)
        self._refuse_without_heldout(splits)
        self._claim_folder(calls)
        for split, numbers in splits.items():
            for number in numbers:
                if number % world() == rank():
                    self.store.put(number, [calls[number]])
                    self.batches[split].append(number)

    def sample(self, pipeline: Any, prompts: list[str], *, show: bool) -> None:
        """Sample prompts and record; batches already on disk are not sampled again."""
        if isinstance(pipeline, nn.Module):
            raise TypeError("a bare module has no prompts: give calibrate() a pipeline, or calls=...")
        if not prompts:
            raise ValueError("no prompts to calibrate on")
        if any(not isinstance(prompt, str) for prompt in prompts):
            raise ValueError("prompts are a list of strings")
        check_call(pipeline, self.options.pipeline_kwargs)
        splits = _split_prompts(prompts, self.options.heldout)
        self._refuse_without_heldout(splits)
        self._claim_folder(prompts, pipeline)
        self.pipeline, self.prompts = pipeline, prompts
        self.prompts_of = {split: {i: prompts[i] for i in indices} for split, indices in splits.items()}
        with ProgressBar("recording calls", len(prompts), show=show) as advance:
            number = 0
            for split, indices in splits.items():
                for start in range(0, len(indices), self.options.batch_size):
                    batch = {i: prompts[i] for i in indices[start : start + self.options.batch_size]}
                    if number % world() == rank():
                        self.batches[split].append(number)
                        if not self.store.has(number):
                            self.store.put(number, self._sample_batch(batch, number))
                    number += 1
                    advance(len(batch))

    def draw_steps(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Call]]:
        """Draw prompts with the model as it is now; its calls at each sampling step that runs sparse."""
        plan = self.plan
        return calls_by_step(self.model, plan.architecture, lambda: self.draw(prompts, seeds), plan.recipe)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Any:
        """What the pipeline gives for prompts, with the model as it is now: latents where it can."""
        settings = {"output_type": "latent", **self.options.pipeline_kwargs}
        return draw(self.pipeline, prompts, seeds, settings)

    def settle_dense_steps(self, plan: Plan, runs_dense: Callable[[Call], bool]) -> None:
        """Calibration has chosen which steps run dense: `plan` says which, and `runs_dense` which calls."""
        self.plan, self._runs_dense = plan, runs_dense

    def sparse_calls(self, number: int) -> list[Call]:
        """The calls of batch `number`, of steps that run sparse."""
        calls = self.store.get(number)
        return calls if self._runs_dense is None else [one for one in calls if not self._runs_dense(one)]

    def _sample_batch(self, batch: dict[int, str], number: int) -> list[Call]:
        """Calls at some of the steps."""
        steps = self.draw_steps(list(batch.values()), [self.options.seed + i for i in batch])
        chosen = chosen_steps(number, len(steps), self.options.steps_per_prompt)
        return [call for step in sorted(chosen) for call in steps[step]]

    def _refuse_without_heldout(self, splits: Mapping[str, list[int]]) -> None:
        """Before any work: a ridge that is chosen on held-out prompts needs some."""
        recipe = self.plan.recipe
        solved = recipe.lowrank_solver == "closed-form" and any(
            layer.rank or (recipe.refit and layer.format is not FP8_DENSE)
            for layer in self.plan.alternatives()
        )
        if solved and recipe.ridge == "auto" and not splits["heldout"]:
            raise ValueError(
                "ridge='auto' is chosen on held-out prompts, and there are none: give more prompts (that "
                "differ), `heldout` above 0, or a ridge"
            )

    def _claim_folder(self, data: Any, pipeline: Any = None) -> None:
        """Keep what is recorded in the folder of the options, if it holds no other calibration."""
        options = self.options
        if options.folder is None:
            return
        settings = {
            "data": digest(data),
            "recipe": {**self.plan.recipe.to_dict(), "budget": None},
            "batch_size": options.batch_size,
            "steps_per_prompt": options.steps_per_prompt,
            "heldout": options.heldout,
            "seed": options.seed,
            "sequential": options.sequential,
            "pipeline_kwargs": digest(options.pipeline_kwargs),
            "pipeline": type(pipeline).__name__,
            "scheduler": digest(_description(getattr(pipeline, "scheduler", None))),
            "model": digest([_description(self.model), model_fingerprint(self.model)]),
        }
        self.folder = WorkFolder(options.folder, settings)
        self.store = CallStore(self.folder)


def _check_arguments(model: nn.Module, number: int, call: Any) -> None:
    """ValueError unless `call` holds arguments of the model by name."""
    if not isinstance(call, dict):
        found = type(call).__name__
        raise ValueError(f"calls are dicts of the model's arguments by name; call {number} is a {found}")
    try:
        inspect.signature(type(model).forward).bind(model, **call)
    except TypeError as error:
        raise ValueError(f"call {number} does not fit {type(model).__name__}: {error}") from None


def _description(component: Any) -> dict[str, Any]:
    """Class and configuration of a scheduler or model, less where it was loaded from."""
    config = getattr(component, "config", None)
    known = config if isinstance(config, Mapping) else {}
    return {
        "class": type(component).__name__,
        "config": {key: value for key, value in known.items() if not key.startswith("_")},
    }


def _split_prompts(prompts: list[str], heldout: float) -> dict[str, list[int]]:
    """`_split` of the distinct prompts: all copies of one are held out, or none is."""
    distinct = list(dict.fromkeys(prompts))
    held = {distinct[i] for i in _split(len(distinct), heldout)["heldout"]}
    splits: dict[str, list[int]] = {"fit": [], "heldout": []}
    for i, prompt in enumerate(prompts):
        splits["heldout" if prompt in held else "fit"].append(i)
    return splits


def _split(count: int, heldout: float) -> dict[str, list[int]]:
    """Indices for fitting and held out; the latter evenly spread, at least one of two or more."""
    wanted = round(count * heldout)
    if heldout and count > 1:
        wanted = max(1, wanted)
    held = {int((i + 1) * count / wanted) - 1 for i in range(wanted)}
    return {"fit": [i for i in range(count) if i not in held], "heldout": sorted(held)}
