"""The rotation of a model's values, from what its attentions give in the recorded calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rtlynx.calibration.calls import CalibrationError
from rtlynx.calibration.collect import split_kinds
from rtlynx.calibration.processes import agree, distributed, rank
from rtlynx.calibration.recording import Recording
from rtlynx.math.rotation import value_rotation
from rtlynx.models.architecture import Attention
from rtlynx.models.plan import LayerPlan, Plan

_FILE = "rotations.safetensors"


class _Outputs:
    """Count, sum and second moments, head by head, of what one attention gives to one kind of token."""

    def __init__(self, attention: Attention, device: torch.device) -> None:
        heads, d = attention.heads, attention.head_dim
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(heads, d, dtype=torch.float64, device=device)
        self.squares = torch.zeros(heads, d, d, dtype=torch.float64, device=device)

    def add(self, y: Tensor) -> None:
        """Add tokens `y` (..., K), whose first heads · d columns the attention gave."""
        heads, d = self.sum.shape
        by_head = y[..., : heads * d].reshape(-1, heads, d).transpose(0, 1).float()
        self.count += by_head.shape[1]
        self.sum += by_head.sum(1)
        self.squares += by_head.mT @ by_head

    def all_reduce(self) -> None:
        """Sum over the processes of the default group; nothing to do in a single process."""
        if distributed():
            for total in (self.count, self.sum, self.squares):
                dist.all_reduce(total)


def find_rotations(plan: Plan, recording: Recording, advance: Callable[[int], None]) -> dict[str, Tensor]:
    """Attention -> R (H, d, d) float32 on the CPU, the same in all processes; of those that ran.

    They are read from the folder of `recording` where an earlier run found them. `advance` is told of each
    batch.

    Raises
    ------
    CalibrationError
        At the first token that is not finite, naming layer and batch.
    """
    folder = recording.folder
    known = folder is not None and folder.has(_FILE)
    if agree(known):
        return agree(folder.read(_FILE)[0] if folder is not None and known else {})
    device = next(recording.model.parameters()).device
    outputs = {
        attention.name: {kind: _Outputs(attention, device) for kind in ("image", "text")}
        for attention in plan.rotated
    }
    _replay(plan, recording, outputs, advance)
    rotations = {}
    for attention in plan.rotated:
        kinds = outputs[attention.name].values()
        for kind in kinds:  # every process takes part, also one that saw no such token
            kind.all_reduce()
        seen = [kind for kind in kinds if kind.count]
        if seen:
            covariance = _covariance(seen, plan.recipe.balance)
            rotations[attention.name] = _rotation(recording.model, attention, covariance, plan.recipe.m)
    rotations = agree(rotations)
    if folder is not None and rank() == 0:
        folder.write(_FILE, rotations, "rotations")
    return rotations


def _replay(
    plan: Plan, recording: Recording, outputs: dict[str, dict[str, _Outputs]], advance: Callable[[int], None]
) -> None:
    """Replay the calls to fit on, and add what each attention gives to its `outputs`."""
    model, architecture = recording.model, plan.architecture
    layers = {layer.name: layer for layer in plan.layers}
    position: dict[str, Any] = {}

    def watch(layer: LayerPlan, kinds: dict[str, _Outputs]) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            if not bool(torch.isfinite(x).all()):
                raise CalibrationError(
                    f"calibration data holds NaN or Inf: input of {layer.name}, batch {position['batch']}"
                )
            for kind, tokens in split_kinds(x, position["rows"], layer).items():
                own = "text" if layer.candidate.stream == "text" else "image"
                kinds[own if kind == "all" else kind].add(tokens)

        return model.get_submodule(layer.name).register_forward_pre_hook(hook, with_kwargs=True)

    readers = [(layers[name], outputs[one.name]) for one in plan.rotated for name in one.readers]
    joint = any(layer.candidate.stream == "joint" for layer, _ in readers)
    handles = [watch(layer, kinds) for layer, kinds in readers]
    try:
        for number in recording.batches["fit"]:
            for call in recording.store.replay([number], next(model.parameters()).device):
                rows = architecture.text_rows(call) if joint and architecture.text_rows else None
                position.update(batch=number, rows=rows)
                with torch.no_grad():
                    model(**call)
            advance(1)
    finally:
        for handle in handles:
            handle.remove()


def _covariance(seen: list[_Outputs], balance: str) -> Tensor:
    """The centred covariance (H, d, d) of what one attention gives, kinds of tokens weighted by `balance`."""
    counts = torch.stack([one.count for one in seen])
    share = counts / counts.sum() if balance == "tokens" else torch.full_like(counts, 1 / len(seen))
    mean = sum(weight / one.count * one.sum for weight, one in zip(share, seen, strict=True))
    squares = sum(weight / one.count * one.squares for weight, one in zip(share, seen, strict=True))
    return squares - mean[..., :, None] * mean[..., None, :]


def _rotation(model: nn.Module, attention: Attention, covariance: Tensor, m: int) -> Tensor:
    gram = torch.zeros_like(covariance)
    for name in attention.readers:
        reader: Any = model.get_submodule(name)
        columns = reader.weight.detach()[:, : attention.heads * attention.head_dim].double()
        by_head = columns.unflatten(1, covariance.shape[:2]).transpose(0, 1)  # (heads, N, d)
        gram += by_head.mT @ by_head
    shared = (attention.value_heads, -1)  # heads in a row that read the same values
    covariance, gram = covariance.unflatten(0, shared).mean(1), gram.unflatten(0, shared).sum(1)
    return value_rotation(covariance, gram, m).float().cpu()
