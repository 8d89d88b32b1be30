"""Rotations of values and permutations of hidden features, from what layers read in the recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rtlynx.calibration.calls import CalibrationError
from rtlynx.calibration.collect import split_kinds
from rtlynx.calibration.processes import all_rows, broadcast, distributed, rank, world
from rtlynx.calibration.recording import Recording
from rtlynx.calibration.replay import device_of
from rtlynx.math.grouping import grouping_permutation
from rtlynx.math.rotation import value_rotation
from rtlynx.models.architecture import Attention, Mlp
from rtlynx.models.plan import LayerPlan, Plan
from rtlynx.models.reparameterize import hidden_groups

_FILE = "bases.safetensors"
# Tokens by which hidden features are permuted, where memory allows.
_TOKENS = 2048


class _Outputs:
    """What one attention gives to one kind of token, head by head: count, means, and scatter about them.

    Sums of raw products would lose the scatter where a mean outweighs it, see `RunningMoments`.
    """

    def __init__(self, attention: Attention, device: torch.device) -> None:
        heads, d = attention.heads, attention.head_dim
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(heads, d, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(heads, d, d, dtype=torch.float64, device=device)

    def add(self, y: Tensor) -> None:
        """Add tokens `y` (..., K), whose first heads · d columns the attention gave."""
        heads, d = self.mean.shape
        by_head = y[..., : heads * d].reshape(-1, heads, d).transpose(0, 1)
        count = by_head.shape[1]
        if not count:
            return
        mean = by_head.mean(1, dtype=torch.float64)
        deviations = (by_head - mean[:, None].float()).float()
        total, off = self.count + count, mean - self.mean
        self.scatter += deviations.mT @ deviations + self.count * count / total * _outer(off)
        self.mean += count / total * off
        self.count = total

    def all_reduce(self) -> None:
        """Merge over the processes of the default group; nothing to do in a single process."""
        if not distributed():
            return
        total, mean = self.count.clone(), self.count * self.mean
        for one in (total, mean):
            dist.all_reduce(one)
        mean = mean / total.clamp(min=1)
        self.scatter += self.count * _outer(self.mean - mean)
        dist.all_reduce(self.scatter)
        self.count, self.mean = total, mean


class _Hidden:
    """Count and a random sample of one kind of token of the hidden features of one MLP."""

    def __init__(self, mlp: Mlp, per_call: int, seed: int, device: torch.device) -> None:
        self.mlp, self.per_call = mlp, per_call
        self.generator = torch.Generator().manual_seed(seed)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sample: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add tokens `x` (..., K), whose last columns are the hidden features."""
        tokens = x[..., self.mlp.first :].reshape(-1, self.mlp.width)
        self.count += len(tokens)
        chosen = torch.randperm(len(tokens), generator=self.generator)[: self.per_call]
        self.sample.append(tokens[chosen.to(tokens.device)].cpu())

    def all_reduce(self) -> None:
        """Sum the count, and gather the sample, over the processes of the default group."""
        if distributed():
            dist.all_reduce(self.count)
            mine = torch.cat(self.sample) if self.sample else torch.zeros(0, self.mlp.width)
            self.sample = [all_rows(mine, self.count.device)]


_Seen = TypeVar("_Seen", _Outputs, _Hidden)


def find_bases(plan: Plan, recording: Recording, advance: Callable[[int], None]) -> dict[str, Tensor]:
    """Attention -> R (H, d, d) float32, MLP -> order (K,) int32 of its hidden features; of those that ran.

    On the CPU, the same in all processes. They are read from the folder of `recording` where an earlier run
    found them. `advance` is told of each batch.

    Raises
    ------
    CalibrationError
        At the first token that is not finite, naming layer and batch.
    """
    folder = recording.folder
    known = folder is not None and folder.has(_FILE)
    if broadcast(known):
        return broadcast(folder.read(_FILE)[0] if folder is not None and known else {})
    model, seed = recording.model, recording.options.seed
    device, per_call = device_of(model), _tokens_per_call(plan, recording)
    kinds = ("image", "text")
    outputs = {one.name: {kind: _Outputs(one, device) for kind in kinds} for one in plan.rotated}
    hidden = {
        one.name: {kind: _Hidden(one, per_call, seed, device) for kind in kinds} for one in plan.permuted
    }
    _replay(plan, recording, {**outputs, **hidden}, advance)
    bases = {}
    for attention in plan.rotated:
        gave = _ran(outputs[attention.name])
        if gave and rank() == 0:
            bases[attention.name] = _rotation(model, attention, gave, plan)
    for mlp in plan.permuted:
        held = _ran(hidden[mlp.name])
        if held and rank() == 0:
            bases[mlp.name] = _order(model, mlp, held, plan, seed)
    bases = broadcast(bases)
    if folder is not None and rank() == 0:
        folder.write(_FILE, bases, "bases")
    return bases


def _ran(seen: dict[str, _Seen]) -> list[_Seen]:
    """The kinds of tokens that there were, summed over processes; all of them must call this."""
    for kind in seen.values():
        kind.all_reduce()
    return [kind for kind in seen.values() if kind.count]


def _tokens_per_call(plan: Plan, recording: Recording) -> int:
    """How many tokens of each kind to keep of each call."""
    if not plan.permuted:
        return 0
    calls = recording.fit_calls
    each = next(recording.model.parameters()).element_size() * sum(mlp.width for mlp in plan.permuted)
    tokens = min(_TOKENS, int(recording.options.memory_gb * 1e9) // each)
    return max(1, -(-tokens // (max(1, calls) * world())))


def _replay(
    plan: Plan,
    recording: Recording,
    seen: Mapping[str, Mapping[str, _Outputs | _Hidden]],
    advance: Callable[[int], None],
) -> None:
    """Replay the calls to fit on, and add what each layer reads to those of `seen` that it is a reader of."""
    model, architecture = recording.model, plan.architecture
    position: dict[str, Any] = {}

    def watch(layer: LayerPlan, kinds: Mapping[str, _Outputs | _Hidden]) -> Any:
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

    layers = {layer.name: layer for layer in plan.layers}
    readers = [(layers[name], seen[one.name]) for one in plan.reparameterized for name in one.readers]
    joint = any(layer.candidate.stream == "joint" for layer, _ in readers)
    handles = [watch(layer, kinds) for layer, kinds in readers]
    try:
        for number in recording.batches["fit"]:
            for call in recording.store.replay([number], device_of(model)):
                rows = architecture.text_rows(call) if joint and architecture.text_rows else None
                position.update(batch=number, rows=rows)
                with torch.no_grad():
                    model(**call)
            advance(1)
    finally:
        for handle in handles:
            handle.remove()


def _shares(seen: list[Any], balance: str) -> Tensor:
    """What each kind of token weighs, in all 1."""
    counts = torch.stack([one.count for one in seen])
    return counts / counts.sum() if balance == "tokens" else torch.full_like(counts, 1 / len(seen))


def _outer(x: Tensor) -> Tensor:
    """Of each row of `x` (H, d) with itself: (H, d, d)."""
    return x[..., :, None] * x[..., None, :]


def _rotation(model: nn.Module, attention: Attention, seen: list[_Outputs], plan: Plan) -> Tensor:
    share = _shares(seen, plan.recipe.balance)
    mean: Tensor = sum(weight * one.mean for weight, one in zip(share, seen, strict=True))
    covariance: Tensor = sum(
        weight * (one.scatter / one.count + _outer(one.mean - mean))
        for weight, one in zip(share, seen, strict=True)
    )
    gram = torch.zeros_like(covariance)
    for name in attention.readers:
        reader: Any = model.get_submodule(name)
        columns = reader.weight.detach()[:, : attention.heads * attention.head_dim].double()
        by_head = columns.unflatten(1, covariance.shape[:2]).transpose(0, 1)  # (heads, N, d)
        gram += by_head.mT @ by_head
    shared = (attention.value_heads, -1)  # heads in a row that read the same values
    covariance, gram = covariance.unflatten(0, shared).mean(1), gram.unflatten(0, shared).sum(1)
    return value_rotation(covariance, gram, plan.recipe.m).float().cpu()


def _order(model: nn.Module, mlp: Mlp, seen: list[_Hidden], plan: Plan, seed: int) -> Tensor:
    """What competes in the down projection drops little of its output, features taken as uncorrelated."""
    layer, down = plan.layer(mlp.name), model.get_submodule(mlp.name)
    assert layer is not None
    groups = hidden_groups(mlp, layer.pattern, plan.recipe.tp_degree)
    assert groups is not None
    weight: Any = down.weight
    columns = weight.detach()[:, mlp.first :].float().norm(dim=0)
    energies = []
    for share, one in zip(_shares(seen, plan.recipe.balance), seen, strict=True):
        tokens = torch.cat(one.sample).to(columns)
        energies.append(tokens.mul_(columns).square_().mul_(share / len(tokens)))
        one.sample.clear()
    every = torch.cat(energies)
    order = torch.arange(mlp.width, device=every.device)
    for places in groups:
        where = places.flatten().to(every.device)
        found = grouping_permutation(every[:, where], layer.pattern.n, layer.pattern.m, seed=seed)
        order[where] = where[found]
    return order.int().cpu()
