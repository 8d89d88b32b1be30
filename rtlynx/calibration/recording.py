"""From prompts (or given calls) to recorded calls of the denoiser, split into fitting and held-out ones."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.calibration.calls import Call, CallStore, chosen_steps, record_calls
from rtlynx.calibration.options import CalibrationOptions
from rtlynx.calibration.processes import rank, world
from rtlynx.files import CheckpointError, read_json, write_json
from rtlynx.fingerprint import model_fingerprint
from rtlynx.models.plan import Plan
from rtlynx.pipelines import quiet, sampling_steps
from rtlynx.progress import ProgressBar

MANIFEST = "calibration.json"


class Recording:
    """The calls that this process holds.

    batches : split ("fit" or "heldout") -> numbers of its batches in `store`.
    """

    def __init__(self, model: nn.Module, plan: Plan, options: CalibrationOptions) -> None:
        self.model, self.plan, self.options = model, plan, options
        self.store = CallStore(options.folder)
        self.batches: dict[str, list[int]] = {"fit": [], "heldout": []}

    @property
    def numbers(self) -> list[int]:
        """All batches of this process."""
        return self.batches["fit"] + self.batches["heldout"]

    def use_calls(self, calls: list[Call]) -> None:
        """Take calls as they are, each a batch of its own."""
        if not calls:
            raise ValueError("no calls to calibrate on")
        self._claim_folder(_digest(calls))
        splits = _split(len(calls), self.options.heldout)
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
        self._claim_folder(hashlib.sha256("\n".join(prompts).encode()).hexdigest())
        steps = sampling_steps(pipeline, self.options.pipeline_kwargs)
        splits = _split(len(prompts), self.options.heldout)
        with ProgressBar("recording calls", len(prompts), show=show) as advance:
            number = 0
            for split, indices in splits.items():
                for start in range(0, len(indices), self.options.batch_size):
                    batch = {i: prompts[i] for i in indices[start : start + self.options.batch_size]}
                    if number % world() == rank():
                        self.batches[split].append(number)
                        if not self.store.has(number):
                            self.store.put(number, self._sample_batch(pipeline, batch, number, steps))
                    number += 1
                    advance(len(batch))

    def _sample_batch(self, pipeline: Any, batch: dict[int, str], number: int, steps: int) -> list[Call]:
        generators = [torch.Generator().manual_seed(self.options.seed + i) for i in batch]
        settings = {"output_type": "latent", **self.options.pipeline_kwargs, "num_inference_steps": steps}
        with quiet(pipeline):
            return record_calls(
                self.model,
                self.plan.architecture,
                lambda: pipeline(list(batch.values()), generator=generators, **settings),
                chosen_steps(number, steps, self.options.steps_per_prompt),
            )

    def _claim_folder(self, data: str) -> None:
        """Refuse a folder that holds another calibration; mark a fresh one as this one's."""
        folder = self.options.folder
        if folder is None:
            return
        settings = {
            "data": data,
            "recipe": {**self.plan.recipe.to_dict(), "budget": None},
            "batch_size": self.options.batch_size,
            "steps_per_prompt": self.options.steps_per_prompt,
            "heldout": self.options.heldout,
            "seed": self.options.seed,
            "sequential": self.options.sequential,
            "pipeline_kwargs": json.dumps(dict(self.options.pipeline_kwargs), sort_keys=True, default=str),
            "model": model_fingerprint(self.model),
        }
        path = folder / MANIFEST
        if path.is_file():
            old = read_json(path)
            different = sorted(key for key in settings if old.get(key) != settings[key])
            if different:
                raise CheckpointError(
                    f"{folder} holds a calibration with other {', '.join(different)}: choose another folder, "
                    "or delete it"
                )
        elif rank() == 0:
            write_json(path, settings)


def _split(count: int, heldout: float) -> dict[str, list[int]]:
    """Indices for fitting and held out; the latter evenly spread, at least one of two or more."""
    wanted = round(count * heldout)
    if heldout and count > 1:
        wanted = max(1, wanted)
    held = {int((i + 1) * count / wanted) - 1 for i in range(wanted)}
    return {"fit": [i for i in range(count) if i not in held], "heldout": sorted(held)}


def _digest(value: Any) -> str:
    """Digest of nested calls: tensors by their bytes, the rest by its text."""
    digest = hashlib.sha256()

    def feed(item: Any) -> None:
        if isinstance(item, Tensor):
            whole = item.detach().cpu().contiguous().flatten()
            digest.update(repr((item.dtype, tuple(item.shape))).encode())
            digest.update(whole.view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item):
                feed(key)
                feed(item[key])
        elif isinstance(item, list | tuple):
            for one in item:
                feed(one)
        else:
            digest.update(repr(item).encode())

    feed(value)
    return digest.hexdigest()
