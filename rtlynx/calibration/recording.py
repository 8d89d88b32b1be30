"""From prompts (or given calls) to recorded calls of the denoiser, split into fitting and held-out ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from rtlynx.calibration.calls import (
    CalibrationError,
    Call,
    CallStore,
    calls_by_step,
    chosen_steps,
    pictures_in,
    recorded_step,
)
from rtlynx.calibration.folder import WorkFolder, digest
from rtlynx.calibration.options import CalibrationOptions
from rtlynx.calibration.processes import rank, world
from rtlynx.calibration.progress import ProgressBar
from rtlynx.models.fingerprint import model_fingerprint
from rtlynx.models.pipelines import check_call, draw, draw_alone, offload_again
from rtlynx.models.plan import Plan
from rtlynx.models.prompts import Prompt, describe, together

# Errors that another way of giving the prompt would not mend.
_NOT_OF_THE_PROMPT = (CalibrationError, torch.OutOfMemoryError, MemoryError)
_REASON = 300  # characters of an error that are shown: some hold whole tensors

_T = TypeVar("_T")
_Use = Callable[[Callable[[], Any]], _T]  # makes something of one pipeline call


class Recording:
    """The calls that this process holds.

    batches : split ("fit" or "heldout") -> numbers of its batches in `store`.
    pipeline, prompts : what was sampled, of any split; None and empty where calls were given.
    prompts_of : split -> its prompts by their numbers.
    part : name of the model in a pipeline with several, which may draw some pictures without it.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, options: CalibrationOptions, part: str | None = None
    ) -> None:
        self.model, self.plan, self.options, self.part = model, plan, options, part
        self.pipeline: Any = None
        self.prompts: list[Prompt] = []
        self.prompts_of: dict[str, dict[int, Prompt]] = {"fit": {}, "heldout": {}}
        self.in_lists: bool | None = None  # whether the pipeline takes lists of prompts, once that is known
        self._refusal: Exception | None = None
        self._pictures: set[int] = set()  # how many its last call drew
        # Whether it has to decode what it draws, once that is known (or asked for).
        self._decodes: bool | None = False if "output_type" in options.pipeline_kwargs else None
        self._settled = False  # whether dense steps were chosen after recording
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

    def sample(self, pipeline: Any, prompts: list[Prompt], *, show: bool) -> None:
        """Sample prompts and record; batches already on disk are not sampled again."""
        if isinstance(pipeline, nn.Module):
            raise TypeError("a bare module has no prompts: give calibrate() a pipeline, or calls=...")
        if not prompts:
            raise ValueError("no prompts to calibrate on")
        check_call(pipeline, self.options.pipeline_kwargs, prompts)
        identities = [self._identity(prompt) for prompt in prompts]
        splits = _split_prompts(identities, self.options.heldout)
        self._refuse_without_heldout(splits)
        self._claim_folder(identities, pipeline)
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
                            seeds = [self.options.seed + i for i in batch]
                            self.store.put(number, self.draw_some(list(batch.values()), seeds, number))
                    number += 1
                    advance(len(batch))
        if self.part is not None and world() == 1 and not self.fit_calls:
            raise CalibrationError(
                f"{type(pipeline).__name__} made 0 calls of its {self.part}: with these settings it draws "
                "with other transformers alone. Calibrate with more steps, or without this one"
            )

    def draw_some(self, prompts: Sequence[Prompt], seeds: Sequence[int], number: int) -> list[Call]:
        """Draw batch `number` of prompts with the model as it is now; its calls at some sparse steps."""
        found: list[Call] = []
        for shift, steps in enumerate(self._each(prompts, seeds, self._steps_of)):
            chosen = chosen_steps(number + shift, len(steps), self.options.steps_per_prompt)
            found += [call for step in sorted(chosen) for call in steps[step]]
        return found

    def draw(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Any]:
        """What each pipeline call for some of `prompts` gives with the model as it is now."""
        return list(self._each(prompts, seeds, lambda sample: sample()))

    def _steps_of(self, sample: Callable[[], Any]) -> list[list[Call]]:
        """The calls that one pipeline call makes, by sampling step."""
        architecture, recipe = self.plan.architecture, self.plan.recipe
        idle = self.part is not None
        steps = calls_by_step(self.model, architecture, sample, recipe, self.pipeline, may_be_idle=idle)
        self._pictures = {pictures_in(call) for step in steps for call in step}
        return steps

    def _each(self, prompts: Sequence[Prompt], seeds: Sequence[int], use: _Use[_T]) -> Iterator[_T]:
        """What `use` makes of each pipeline call that draws some of `prompts`."""
        for numbers, texts in together(prompts):
            found = None
            if texts and self.in_lists is not False:
                found = self._in_list([prompts[i] for i in numbers], [seeds[i] for i in numbers], use)
            if found is not None:
                yield found[0]
                continue
            for number in numbers:
                yield self._alone(prompts[number], seeds[number], use)

    def _in_list(self, prompts: Sequence[Prompt], seeds: Sequence[int], use: _Use[_T]) -> tuple[_T] | None:
        """One pipeline call for all `prompts`; None where it does not take lists of them."""
        self._pictures = set()
        try:
            found = self._without_decoding(partial(draw, self.pipeline, prompts, seeds), use)
        except _NOT_OF_THE_PROMPT:
            raise
        except Exception as error:
            if self.in_lists:
                raise self._failed(prompts[0], error) from error
            self.in_lists, self._refusal = False, error
            return None
        if len(prompts) > 1 and not self.in_lists:
            # Some take a list of prompts for the parts of one picture or video.
            self.in_lists = all(count % len(prompts) == 0 for count in self._pictures)
        return None if self.in_lists is False else (found,)

    def _alone(self, prompt: Prompt, seed: int, use: _Use[_T]) -> _T:
        try:
            found = self._without_decoding(partial(draw_alone, self.pipeline, prompt, seed), use)
        except _NOT_OF_THE_PROMPT:
            raise
        except Exception as error:
            first = self._refusal or error  # of lists: it says more where both fail
            raise self._failed(prompt, first) from first
        self._refusal = None
        return found

    def _without_decoding(self, draw_with: Callable[[Mapping[str, Any]], Any], use: _Use[_T]) -> _T:
        """One pipeline call, which gives latents where the pipeline can do without decoding them."""

        def call(*, decodes: bool) -> _T:
            offload_again(self.pipeline)  # its other models have to fit, too
            latent = {} if decodes else {"output_type": "latent"}
            return use(lambda: draw_with({**latent, **self.options.pipeline_kwargs}))

        if self._decodes is not None:
            return call(decodes=self._decodes)
        try:
            found = call(decodes=False)
            self._decodes = False
        except _NOT_OF_THE_PROMPT:
            raise
        except Exception as error:
            try:
                found = call(decodes=True)
            except Exception:
                raise error from None
            self._decodes = True
        return found

    def settle_dense_steps(self, plan: Plan) -> None:
        """Calibration has chosen which steps run dense, as `plan` says."""
        self.plan, self._settled = plan, True

    def sparse_calls(self, number: int) -> list[Call]:
        """The calls of batch `number`, of steps that run sparse, or that no schedule tells."""
        calls = self.store.get(number)
        return [one for one in calls if not self._runs_dense(one)] if self._settled else calls

    def _runs_dense(self, call: Call) -> bool:
        step = recorded_step(call)
        return step is not None and self.plan.recipe.is_dense_step(step.index, step.count, step.sigma)

    def _failed(self, prompt: Prompt, error: Exception) -> CalibrationError:
        text = " ".join(str(error).split()) or "no reason given"
        reason = f"{type(error).__name__}: {text:.{_REASON}}"
        return CalibrationError(
            f"{type(self.pipeline).__name__} does not draw the prompt {describe(prompt)} ({reason}): if it "
            "needs other arguments, give them in pipeline_kwargs, or with each prompt"
        )

    def _identity(self, prompt: Prompt) -> Any:
        """The same for copies of one prompt, and in a later run."""
        if isinstance(prompt, str):
            return prompt
        try:
            return digest(prompt)
        except TypeError:  # of an object that is only equal to itself
            if self.options.folder is not None:
                raise
            return id(prompt)

    def _refuse_without_heldout(self, splits: Mapping[str, list[int]]) -> None:
        """Before any work: a ridge that is chosen on held-out prompts needs some."""
        recipe = self.plan.recipe
        solved = recipe.lowrank_solver == "closed-form" and any(
            layer.rank or layer.refits(recipe) for layer in self.plan.alternatives()
        )
        if solved and recipe.ridge == "auto" and not splits["heldout"]:
            raise ValueError(
                "ridge='auto' is chosen on held-out prompts, and there are none: give more prompts (that "
                "differ), `heldout` above 0, or a ridge"
            )

    def _claim_folder(self, data: Any, pipeline: Any = None) -> None:
        """Keep what is recorded in the folder of the options, if it holds no other calibration."""
        options, recipe = self.options, self.plan.recipe
        if options.folder is None:
            return
        settings = {
            "data": digest(data),
            # Where calibration is to choose dense steps, it records all of them, as where there are none.
            "recipe": {**recipe.to_dict(), "budget": None, "dense_sigmas": recipe.dense_ranges},
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


def _split_prompts(prompts: list[Any], heldout: float) -> dict[str, list[int]]:
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
