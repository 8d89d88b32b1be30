"""First-block caching (diffusers' `FirstBlockCacheConfig`) under a pipeline that knows nothing of it.

diffusers keeps a cache for each guidance pass and asks the pipeline to name the pass. The zoo's pipelines do
not, so passes are told apart as the library tells sampling steps apart: by the timestep argument. Whether a
call is cached is decided for the whole batch at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rtlynx.models.architecture import Architecture
from rtlynx.models.plan import architecture_of

STACKS = ("transformer_blocks", "single_transformer_blocks")


class FirstBlockCache:
    """Caching on `model`, switched on for good; counts the calls that ran all blocks.

    A call at the timestep of the one before is another guidance pass of the same step; a timestep against the
    schedule's direction starts a new picture and empties the caches.
    """

    def __init__(self, model: Any, threshold: float) -> None:
        from diffusers import FirstBlockCacheConfig

        self.calls = self.full = 0
        self._model = model
        self._architecture: Architecture = architecture_of(model)
        self._last: float | None = None
        self._pass = 0
        self._model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        self._watch_last_block()
        self._forward = model.forward
        self._model.forward = self._named_call

    @property
    def computed(self) -> float:
        """Share of calls that ran all blocks."""
        return self.full / self.calls if self.calls else 1.0

    def _named_call(self, *args: Any, **kwargs: Any) -> Any:
        call = self._architecture.call_arguments(self._model, args, kwargs)
        timestep = call[self._architecture.timestep_argument]
        value = float(timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep)
        if self._last is not None and value == self._last:
            self._pass += 1
        else:
            self._pass = 0
            if self._last is not None and (value > self._last) == self._architecture.descending:
                self._model._reset_stateful_cache()
        self._last = value
        self.calls += 1
        with self._model.cache_context(f"pass {self._pass}"):
            return self._forward(*args, **kwargs)

    def _watch_last_block(self) -> None:
        blocks = [block for name in STACKS for block in getattr(self._model, name, ())]
        # Its modulation, once a call, and only in a call that is not cached.
        first = next(module for module in blocks[-1].modules() if isinstance(module, nn.Linear))

        def ran(_module: nn.Module, _args: Any, _output: Any) -> None:
            self.full += 1

        first.register_forward_hook(ran)
