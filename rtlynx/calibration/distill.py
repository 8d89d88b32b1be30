"""Train sparse layers on the whole model: its guided velocity is to be that of the dense one.

The dense model is the teacher, in the same modules: each trained layer keeps its dense weight and runs with
either. Half of the states come from the sparse model's own sampling, since that is where it will be asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from rtlynx.calibration.calls import CalibrationError
from rtlynx.calibration.folder import digest
from rtlynx.calibration.options import Distillation, DistillationReport
from rtlynx.calibration.output_error import guided_square
from rtlynx.calibration.pairs import State, check_apart, null_first, outputs, states_of, turned
from rtlynx.calibration.processes import world
from rtlynx.calibration.progress import ProgressBar
from rtlynx.calibration.recording import Recording
from rtlynx.calibration.trainable import BYTES_TRAINED, Mode, TrainableLinear, trained_bytes
from rtlynx.models.hooks import entering_calls
from rtlynx.models.pipelines import guidance_scale
from rtlynx.models.plan import LayerPlan, Plan
from rtlynx.nn.call import CallState
from rtlynx.nn.solution import Solution

BETAS = (0.9, 0.99)
WARM_UP = 0.05  # share of the steps in which the learning rate rises
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LARGEST_GRADIENT = 1.0  # norm, of the loss over the mean square of the dense velocity
_FILE = "distillation.safetensors"
_RANK = 32  # of the correction that is advised where whole weights do not fit


def refuse_distillation(model: nn.Module, plan: Plan) -> None:
    """CalibrationError where no layer drops anything, the model is offloaded, or there are processes."""
    if getattr(model, "_hf_hook", None) is not None:
        raise CalibrationError(
            "distillation needs the whole model on one device, and it is offloaded: load it without "
            "enable_model_cpu_offload"
        )
    if world() > 1:
        raise CalibrationError(
            "distillation trains in one process, and there are several: run without torchrun"
        )
    if all(layer.drops_nothing for layer in plan.sparse):
        raise CalibrationError(
            "no layer drops activations or weights, so there is nothing to distil: leave it out"
        )


def refuse_without_memory(plan: Plan, settings: Distillation, device: torch.device) -> None:
    """CalibrationError where master weights and optimiser states take more than is free on a card."""
    needed, free = trained_bytes(plan.sparse, settings), free_bytes(device)
    if needed <= free:
        return
    rank = _RANK if settings.rank is None else max(1, settings.rank // 2)
    smaller = replace(settings, rank=rank, gradient_checkpointing=True)
    raise CalibrationError(
        f"distillation of these layers takes {needed / 1e9:.3g} GB beside the model and its activations "
        f"({BYTES_TRAINED} bytes a trained number), and {free / 1e9:.3g} GB are free on {device}: train a "
        f"correction of low rank (Distillation(rank={rank}, gradient_checkpointing=True) takes "
        f"{trained_bytes(plan.sparse, smaller) / 1e9:.3g} GB), or use a larger card"
    )


def free_bytes(device: torch.device) -> float:
    """Memory that is free on a card, with what PyTorch holds unused; infinity on other devices."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def distill_layers(
    plan: Plan,
    recording: Recording,
    solutions: Mapping[str, Solution],
    distillation: Distillation,
    *,
    show: bool,
) -> tuple[dict[str, Solution], DistillationReport]:
    """Train the solved layers of `plan` that drop activations or weights.

    Parameters
    ----------
    plan : Plan
        The final one. The model of `recording` is dense, and dense again afterwards.
    recording : Recording
        Of a pipeline.
    solutions : name -> solution, of every sparse layer.
    distillation : Distillation
    show : bool
        Show a progress bar.

    Raises
    ------
    CalibrationError
        If no layer drops activations, the training does not fit into memory, or a gradient is not finite.
    """
    device = next(recording.model.parameters()).device
    refuse_distillation(recording.model, plan)
    refuse_without_memory(plan, distillation, device)
    training = _Training(plan, recording, solutions, distillation, device)
    with training.in_place():
        return training.run(show=show)


class _Training:
    def __init__(
        self,
        plan: Plan,
        recording: Recording,
        solutions: Mapping[str, Solution],
        settings: Distillation,
        device: torch.device,
    ) -> None:
        self.plan, self.recording, self.settings, self.device = plan, recording, settings, device
        self.model, self.options, self.mode = recording.model, recording.options, Mode()
        self.architecture = plan.architecture
        dense = plan.recipe.dense_ranges  # which a calibration may have chosen
        self.identity = digest([repr(plan.layers), dense, sorted(solutions), asdict(settings)])
        generator = torch.Generator().manual_seed(self.options.seed)
        self.layers = {
            layer.name: TrainableLinear(
                self._dense(layer),
                *(layer, plan.recipe, solutions[layer.name], self.mode),
                rank=settings.rank,
                generator=generator,
            )
            for layer in plan.sparse
        }
        self.trained = [
            parameter
            for layer in self.layers.values()
            for parameter in (layer.master, layer.up, layer.down, layer.master_bias)
            if parameter is not None
        ]
        self.optimiser = torch.optim.Adam(
            self.trained, settings.learning_rate, BETAS, fused=device.type == "cuda"
        )
        self.guidance: float | None = None
        self.null_first = False
        self.unit = 1.0

    def _dense(self, layer: LayerPlan) -> nn.Linear:
        dense = self.model.get_submodule(layer.name)
        assert isinstance(dense, nn.Linear)
        return dense

    # ------------------------------------------------------------------------------- the model meanwhile

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with trainable layers, of which nothing else takes a gradient."""
        dense = {name: self.model.get_submodule(name) for name in self.layers}
        wanted = {one: one.requires_grad for one in self.model.parameters()}
        blocks = {layer.candidate.block for layer in self.plan.sparse}
        wrapped = {
            block: vars(block).get("forward")
            for block in map(self.model.get_submodule, blocks if self.settings.gradient_checkpointing else ())
        }
        hooks = []
        try:
            for one in wanted:
                one.requires_grad_(False)
            for name, layer in self.layers.items():
                self.model.set_submodule(name, layer)
            for block in wrapped:
                block.forward = partial(self._checkpointed, block.forward)
            if self.plan.recipe.depends_on_call:
                hooks.append(self.model.register_forward_pre_hook(self._enter, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for block, own in wrapped.items():
                del block.forward
                if own is not None:
                    block.forward = own
            for name, linear in dense.items():
                self.model.set_submodule(name, linear)
            for one, grad in wanted.items():
                one.requires_grad_(grad)

    def _checkpointed(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """`forward`, computed again in the backward pass, as in this call."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        call = self.mode.call

        def in_call(*args: Any, **kwargs: Any) -> Any:
            self.mode.call = call
            return forward(*args, **kwargs)

        return checkpoint(in_call, *args, use_reentrant=False, **kwargs)

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In training no call is of a dense step; where its text is, the call says."""
        of = self.architecture
        rows = None
        if self.plan.recipe.text_rows == "dense" and of.text_rows is not None:
            rows = of.text_rows(of.call_arguments(model, args, kwargs))
        self.mode.call = CallState(text_rows=rows)

    @contextmanager
    def _teacher(self) -> Iterator[None]:
        self.mode.dense = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.mode.dense = False

    # --------------------------------------------------------------------------------------------- states

    def _recorded(self, split: str) -> list[State]:
        """Of the dense model's sampling."""
        found = []
        for number in self.recording.batches[split]:
            found += states_of(self.recording.sparse_calls(number), self.architecture)
        return found

    @torch.no_grad()
    def _sampled(self, refresh: int) -> list[State]:
        """Of the sparse model's own sampling, from noise that nothing else starts from."""
        prompts, options = list(self.recording.prompts_of["fit"].values()), self.options
        order = torch.randperm(len(prompts), generator=self._generator(refresh, "prompts")).tolist()
        some = [prompts[i] for i in order[: self.settings.on_policy_prompts]]
        first = options.seed + len(self.recording.prompts) + refresh * self.settings.on_policy_prompts
        found: list[State] = []
        with entering_calls(self.model, self.plan), self._pipeline_tells_steps():
            for start in range(0, len(some), options.batch_size):
                batch = some[start : start + options.batch_size]
                seeds = [first + start + i for i in range(len(batch))]
                calls = self.recording.draw_some(batch, seeds, refresh + start // options.batch_size)
                found += states_of(calls, self.architecture)
        return turned(found) if self.null_first else found

    @contextmanager
    def _pipeline_tells_steps(self) -> Iterator[None]:
        """Meanwhile, the step of each call counts, which in training it does not."""

        def forget(_model: nn.Module, _args: Any) -> None:
            self.mode.call = None

        handle = self.model.register_forward_pre_hook(forget)
        try:
            yield
        finally:
            handle.remove()

    def _generator(self, number: int, what: str) -> torch.Generator:
        """A start of its own for each step, so that a resumed training draws the same."""
        seed = int(digest([self.options.seed, number, what])[:15], 16)
        return torch.Generator().manual_seed(seed)

    # ------------------------------------------------------------------------------------------- training

    def run(self, *, show: bool) -> tuple[dict[str, Solution], DistillationReport]:
        settings, every = self.settings, self.settings.refresh_steps
        recorded, heldout = self._recorded("fit"), self._recorded("heldout")
        if not recorded:
            raise CalibrationError(
                "every recorded step runs dense by the choice of calibration, so there is none to train on: "
                "give more prompts, or CalibrationOptions(steps_per_prompt=...) above "
                f"{self.options.steps_per_prompt}"
            )
        self.null_first = null_first([*recorded, *heldout], self.architecture)
        if self.null_first:
            recorded, heldout = turned(recorded), turned(heldout)
        judged = heldout or recorded
        judged = judged[:: max(1, len(judged) // settings.batch_size)][: settings.batch_size]
        with self._teacher():
            check_apart(self.model, recorded, self.device)
            self.unit = self._mean_square(judged)
        if any(state.null is not None for state in (*recorded, *heldout)):
            self.guidance = self._guidance()
        start, before = self._resume()
        if before is None:
            before = self._mean_loss(judged)
        own: list[State] = []
        what = f"distilling ({trained_bytes(self.plan.sparse, settings) / 1e9:.2g} GB)"
        with ProgressBar(what, settings.steps, show=show) as advance:
            advance(start)
            for step in range(start, settings.steps):
                if step % every == 0:
                    if step > start:
                        self._save(step, before)
                    own = self._sampled(step // every) if settings.on_policy_share else []
                self._step(step, recorded, own)
                advance(1)
        if start < settings.steps:
            self._save(settings.steps, before)
        after = self._mean_loss(judged)
        found = {name: layer.distilled() for name, layer in self.layers.items()}
        trained = sum(not layer.drops_nothing for layer in self.plan.sparse)
        return found, DistillationReport(settings.steps, trained, self.guidance, before, after)

    def _guidance(self) -> float:
        if self.settings.guidance is not None:
            return float(self.settings.guidance)
        try:
            return guidance_scale(self.recording.pipeline, self.options.pipeline_kwargs)
        except ValueError as error:
            raise CalibrationError(f"{error}: give Distillation(guidance=...)") from None

    def _step(self, step: int, recorded: list[State], own: list[State]) -> None:
        """One step of the optimiser, on states of both kinds."""
        settings, generator = self.settings, self._generator(step, "states")
        mine = round(settings.on_policy_share * settings.batch_size) if own else 0
        states = _drawn(own, mine, generator) + _drawn(recorded, settings.batch_size - mine, generator)
        for group in self.optimiser.param_groups:
            group["lr"] = settings.learning_rate * _rate(step, settings.steps)
        self.optimiser.zero_grad(set_to_none=True)
        # cuDNN attention gave gradients that were not finite (torch 2.11, H200).
        with torch.enable_grad(), sdpa_kernel(_ATTENTION):
            for some in self._portions(states):
                loss = self._loss(some) * (len(some) / len(states) / self.unit)
                loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, LARGEST_GRADIENT)
        if not math.isfinite(float(norm)):
            raise CalibrationError(
                f"the gradient of step {step} of distillation is not finite: take a lower learning_rate than "
                f"{settings.learning_rate:g}"
            )
        self.optimiser.step()

    def _portions(self, states: Sequence[State]) -> Iterator[Sequence[State]]:
        size = self.settings.micro_batch_size or len(states)
        for start in range(0, len(states), size):
            yield states[start : start + size]

    def _loss(self, states: Sequence[State]) -> Tensor:
        """Mean over `states`; every entry of a velocity counts the same."""
        rows = [row for state in states for row in state.rows]
        with self._teacher():
            wanted = outputs(self.model, rows, self.device)
        found = outputs(self.model, rows, self.device)
        errors = iter(
            [(y.float() - target.float()).flatten() for y, target in zip(found, wanted, strict=True)]
        )
        pairs, alone = [], []
        for state in states:
            if state.null is None:
                alone.append(next(errors))
            else:
                pairs.append((next(errors), next(errors)))
        total = found[0].new_zeros((), dtype=torch.float32)
        if alone:
            total = total + torch.cat(alone).square().mean() * (len(alone) / len(states))
        if pairs:
            assert self.guidance is not None
            conditional, null = (torch.cat(some) for some in zip(*pairs, strict=True))
            total = total + guided_square(conditional, null, self.guidance) * (len(pairs) / len(states))
        return total

    @torch.no_grad()
    def _mean_loss(self, states: Sequence[State]) -> float:
        return sum(float(self._loss(some)) * len(some) for some in self._portions(states)) / len(states)

    def _mean_square(self, states: Sequence[State]) -> float:
        """Of the dense velocity: in units of it one bound of the gradient fits all models."""
        found = []
        for some in self._portions(states):
            rows = [row for state in some for row in state.rows]
            found += [float(y.float().square().mean()) for y in outputs(self.model, rows, self.device)]
        return sum(found) / len(found) or 1.0

    # --------------------------------------------------------------------------------------------- resume

    def _save(self, step: int, before: float) -> None:
        """Write masters and optimiser states; they are in the place of earlier ones, whole or not at all."""
        folder = self.recording.folder
        if folder is None:
            return
        tensors = {f"{i}.master": one.detach() for i, one in enumerate(self.trained)}
        for i, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"{i}.adam.{key}": one for key, one in moments.items()}
        folder.write(_FILE, tensors, {"identity": self.identity, "step": step, "loss_before": before})

    def _resume(self) -> tuple[int, float | None]:
        """Step to go on from, and the loss at the start; (0, None) where nothing of this plan was kept."""
        folder = self.recording.folder
        if folder is None or not folder.has(_FILE):
            return 0, None
        tensors, about = folder.read(_FILE)
        if about["identity"] != self.identity:  # of another budget
            return 0, None
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            i, kind, *key = name.split(".")
            if kind == "adam":
                state.setdefault(int(i), {})[key[0]] = tensor
        with torch.no_grad():
            for number, parameter in enumerate(self.trained):
                parameter.copy_(tensors[f"{number}.master"])
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        return about["step"], about["loss_before"]


def _drawn(states: Sequence[State], count: int, generator: torch.Generator) -> list[State]:
    """`count` of `states` at random."""
    if not count:
        return []
    return [states[i] for i in torch.randint(len(states), (count,), generator=generator).tolist()]


def _rate(step: int, steps: int) -> float:
    """The learning rate's share of its largest value: it rises shortly, then falls to 0 along a cosine."""
    rise = max(1, round(WARM_UP * steps))
    return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps))
