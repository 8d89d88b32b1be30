"""`rtlynx.calibrate`: record the denoiser's calls, gather moments block by block, solve, choose, apply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.calibration.apply import apply_solutions, solved_layer, temporarily_sparse
from rtlynx.calibration.budget import Choice, InputCost, choose, inputs_of
from rtlynx.calibration.calls import CalibrationError, Call, moved, pictures_in
from rtlynx.calibration.collect import Collector, InputGroup, input_groups, inputs_of_groups, passes
from rtlynx.calibration.dense_step_search import DenseStepSearch, IncomparableSteps
from rtlynx.calibration.distill import distill_layers, refuse_distillation, refuse_without_memory
from rtlynx.calibration.folder import digest
from rtlynx.calibration.layer_errors import LayerErrors
from rtlynx.calibration.moments import Moments
from rtlynx.calibration.options import CalibrationOptions, CalibrationReport, Distillation
from rtlynx.calibration.output_error import Guidance, OutputError, judged_calls, null_comes_first
from rtlynx.calibration.prices import ModelPrices
from rtlynx.calibration.processes import broadcast, rank, world
from rtlynx.calibration.progress import ProgressBar
from rtlynx.calibration.recording import Recording
from rtlynx.calibration.refusals import (
    refuse_all_dense,
    refuse_for_several,
    refuse_sequential,
    refuse_unfit,
    resolve_dense_sigmas,
    without_auto_sigmas,
)
from rtlynx.calibration.reparameterize import find_bases
from rtlynx.calibration.replay import SkippedBlocks, block_order, device_of, tokens_per_layer
from rtlynx.calibration.solutions import SolutionStore
from rtlynx.calibration.solve import solve_layers, solve_pruned, with_errors
from rtlynx.calibration.train import train_lowrank
from rtlynx.math.formats import FormatName
from rtlynx.models.pipelines import guidance_scale, offload_again, offloaded_after_errors
from rtlynx.models.plan import LayerPlan, Plan
from rtlynx.models.prompts import Prompt
from rtlynx.models.reparameterize import Reparameterization, reparameterize
from rtlynx.models.sparsify import densify, extra_bytes, make_plan_for_dense, state_of, transformers_of
from rtlynx.models.tracing import shared_reads
from rtlynx.models.transaction import all_or_none
from rtlynx.nn.solution import Solution
from rtlynx.recipe import Budget, Recipe

TRAINING_TOKENS = 16384


# Hooks record what layers read, which code that was compiled before them would leave out.
@torch.compiler.set_stance("force_eager")
def calibrate(
    model_or_pipeline: Any,
    prompts: Sequence[Prompt] | None = None,
    recipe: Recipe | None = None,
    options: CalibrationOptions | None = None,
    *,
    calls: Iterable[Call] | None = None,
    distill: Distillation | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """Make a model sparse and compensate it on its own activations, in place.

    Parameters
    ----------
    model_or_pipeline : diffusers pipeline or nn.Module
        Dense, or sparse without calibration. A bare module needs `calls`. Of a pipeline with several
        transformers each is calibrated, one after the other, on the steps that it draws.
    prompts : sequence of str or dict
        Hundreds; the pipeline samples them. A dict holds the pipeline's arguments for one picture by name,
        ``{"prompt": "make it snow", "image": picture}``. A `Path` in it stands for the picture in that file.
    recipe : Recipe, optional
        Default `Recipe.recommended()`.
    options : CalibrationOptions, optional
    calls : iterable of dict, optional
        Keyword arguments of calls of the module, in place of prompts; every eighth is held out.
    distill : Distillation, optional
        Train the layers that drop activations or weights afterwards, on the whole model. Needs prompts, and
        one process.
    progress : bool
        Show progress bars.

    Returns
    -------
    CalibrationReport
        Of the first transformer; those of further ones are its `others`.

    Raises
    ------
    ValueError
        For no prompts, prompts beside calls, arguments that the pipeline does not take, a recipe that cannot
        be calibrated so, a model that is calibrated already, or spread over processes.
    CalibrationError
        For a transformer that the pipeline does not call, no layer to solve, non-finite activations, or
        distillation that does not fit.
    CheckpointError
        If `options.folder` holds another calibration, or is damaged.
    TypeError
        For a bare module without `calls`, or what is neither a module nor a pipeline with a transformer.

    Notes
    -----
    After an error the model is as before; what was recorded stays in `options.folder`. Under `torchrun` every
    process replays its own prompts; moments are summed over processes, so all end with the same model.
    """
    recipe, options = recipe or Recipe.recommended(), options or CalibrationOptions()
    if isinstance(prompts, str):
        raise ValueError("prompts are a list of strings, got one string")
    if prompts is not None and calls is not None:
        raise ValueError("give prompts or calls, not both")
    if distill is not None and calls is not None:
        raise ValueError("distillation draws with the sparse model: give a pipeline and prompts, not calls")
    refuse_sequential(recipe, options)
    models = transformers_of(model_or_pipeline)
    if len(models) > 1:
        refuse_for_several(model_or_pipeline, models, calls, distill)
    recipe = resolve_dense_sigmas(recipe, options, len(models), calls)
    pipeline = None if calls is not None else model_or_pipeline
    data = list(prompts or ()) if calls is None else list(calls)
    for model in models.values():
        refuse_unfit(model)
    show = progress and rank() == 0
    with offloaded_after_errors(model_or_pipeline), all_or_none(*models.values()):
        reports = {
            name: _calibrate_model(
                model, pipeline, data, recipe, options, distill, name if len(models) > 1 else None, show=show
            )
            for name, model in models.items()
        }
        offload_again(model_or_pipeline)
    return replace(reports.pop(next(iter(reports))), others=reports)


def _calibrate_model(
    model: nn.Module,
    pipeline: Any,
    data: list[Any],
    recipe: Recipe,
    options: CalibrationOptions,
    distill: Distillation | None,
    part: str | None,
    *,
    show: bool,
) -> CalibrationReport:
    """Calibrate one transformer on `data`: prompts of `pipeline`, or calls where there is none.

    `part` is its name in a pipeline that draws with several.
    """
    if state_of(model) is not None:
        densify(model)
    plan = make_plan_for_dense(model, recipe)
    refuse_all_dense(plan)
    if distill is not None:
        refuse_distillation(model, plan)
        if recipe.budget is None:  # which would leave fewer
            refuse_without_memory(plan, distill, next(model.parameters()).device)
    if part is not None and options.folder is not None:
        options = replace(options, folder=options.folder / part)
    recording = Recording(model, plan, options, part)
    if pipeline is None:
        recording.use_calls(data)
    else:
        recording.sample(pipeline, data, show=show)
    return _Calibration(plan, recording, distill, show=show).finish()


class _Calibration:
    """Everything after recording."""

    def __init__(
        self, plan: Plan, recording: Recording, distillation: Distillation | None, *, show: bool
    ) -> None:
        self.distillation = distillation
        self.plan, self.recipe, self.recording, self.show = plan, plan.recipe, recording, show
        self.model, self.options = recording.model, recording.options
        self.device, self.dtype = device_of(self.model), next(self.model.parameters()).dtype
        self.solutions = SolutionStore(recording.folder)
        self.tokens: dict[str, int] = {}
        self.originals: dict[str, nn.Module] = {}  # in sequential mode, of layers that run sparse
        self.order: list[str] = []  # blocks, as they run
        self.unseen: dict[str, str] = {}  # layers that no token reached (experts that are rarely chosen)

    def finish(self) -> CalibrationReport:
        """Solve every layer, let the budget choose, and make the model sparse."""
        search = self._dense_step_search()
        self.plan = self._with_shared_inputs()
        groups = input_groups(self.plan.alternatives())
        self.order = self._block_order(groups)
        silent = {
            layer.name: "did not run in calibration"
            for layer in self.plan.sparse
            if layer.candidate.block not in self.order
        }
        plan = self.plan.leave_dense(silent)
        refuse_all_dense(plan)
        plan, done = self._reparameterize(plan)
        self._solve([group for group in groups if group.block in self.order])
        for name, dense in self.originals.items():
            self.model.set_submodule(name, dense)
        plan = plan.leave_dense(self.unseen)
        refuse_all_dense(plan)
        costs: tuple[InputCost, ...] = ()
        choice = None
        if self.recipe.budget is not None:
            plan, costs, choice = self._choose(plan, search)
            if not plan.sparse:
                raise CalibrationError(self._none_left(costs))
        solutions = self.solutions.of(plan.sparse)
        distilled = None
        if self.distillation is not None:
            solutions, distilled = distill_layers(
                plan, self.recording, solutions, self.distillation, show=self.show
            )
        apply_solutions(self.model, plan, solutions, done=done)
        return CalibrationReport(
            solutions,
            {layer.name: layer.dense_reason for layer in plan.layers if layer.dense_reason is not None},
            costs,
            choice,
            plan.unrotated,
            extra_bytes(self.model),
            self.tokens,
            plan.unpermuted,
            distilled,
        )

    def _dense_step_search(self) -> DenseStepSearch | None:
        """What chooses dense steps, where the recipe leaves that open and the pipeline tells enough."""
        if not self.recipe.chooses_dense_steps:
            return None
        try:
            return DenseStepSearch(self.recording, show=self.show)
        except IncomparableSteps as error:
            self.recipe = without_auto_sigmas(self.recipe, str(error))
            self.plan = self.recording.plan = make_plan_for_dense(self.model, self.recipe)
            return None

    def _reparameterize(self, plan: Plan) -> tuple[Plan, Reparameterization | None]:
        """Rotate and permute in the dense model, so that all that follows sees the channels sorted."""
        if not plan.reparameterized:
            return plan, None
        replays = len(self.recording.batches["fit"])
        with ProgressBar("finding rotations and permutations", replays, show=self.show) as advance:
            bases = find_bases(plan, self.recording, advance)
        silent = (one.name for one in plan.reparameterized if one.name not in bases)
        plan = plan.leave_basis(dict.fromkeys(silent, "did not run in calibration"))
        self.solutions.bases = digest(bases)
        changed = plan.reparameterized
        return plan, reparameterize(self.model, changed, bases) if changed else None

    def _with_shared_inputs(self) -> Plan:
        """The plan, which also says what read one tensor in the first call where names do not tell."""
        if self.plan.knows_shared_inputs:
            return self.plan
        probe = self._first_call()
        candidates = [layer.candidate for layer in self.plan.sparse]
        return self.plan.reading(broadcast(shared_reads(self.model, candidates, probe) if probe else {}))

    def _first_call(self) -> dict[str, Any] | None:
        return next(self.recording.store.replay(self.recording.numbers, self.device), None)

    def _block_order(self, groups: list[InputGroup]) -> list[str]:
        blocks = list(dict.fromkeys(group.block for group in groups))
        probe = self._first_call()
        return broadcast(block_order(self.model, blocks, probe) if probe is not None else [])

    def _solve(self, groups: list[InputGroup]) -> None:
        """Gather moments for as many blocks at a time as memory allows, and solve them."""
        memory = 1 if self.options.sequential else int(self.options.memory_gb * 1e9)
        collector = Collector(
            self.model,
            self.plan.architecture,
            self.recording.store,
            self._training_tokens_per_call(),
            None if self.options.sequential else SkippedBlocks(self.model, self.order),
        )
        replays = len(list(passes(groups, self.order, memory))) * len(self.recording.numbers)
        with ProgressBar("gathering moments", replays, show=self.show) as advance:
            for batch in passes(groups, self.order, memory):
                missing = [group for group in batch if not self.solutions.has(group)]
                if missing:
                    collector.collect(missing, self.recording.batches, missing[-1].block, advance)
                else:
                    advance(len(self.recording.numbers))
                for gathered in inputs_of_groups(missing):
                    gathered.all_reduce(self.device)
                    formats = [group for group in missing if group.gathered is gathered]
                    for group in formats:
                        self._solve_and_keep(group, last=group is formats[-1])
                    gathered.clear()
                if self.options.sequential:
                    self._make_sparse(batch)

    def _solve_and_keep(self, group: InputGroup, *, last: bool) -> None:
        unseen = self._unseen_reason(group)
        if unseen is not None:
            self.unseen.update({layer.name: unseen for layer in group.layers})
            return
        try:
            solved = self._solve_group(group, last=last)
        except (CalibrationError, torch.linalg.LinAlgError) as error:
            names = ", ".join(layer.name for layer in group.layers)
            raise CalibrationError(f"{error}: leave {names} dense (skip)") from None
        self.solutions.put(group, solved, self.dtype, write=rank() == 0)

    def _training_tokens_per_call(self) -> int:
        if self.recipe.lowrank_solver != "trained":
            return 0
        return -(-TRAINING_TOKENS // (max(1, self.recording.fit_calls) * world()))

    def _unseen_reason(self, group: InputGroup) -> str | None:
        """Why the layers of one input cannot be solved; None where they can."""
        if not group.count("fit"):
            return "no token reached it in calibration"
        if not group.count("heldout") and self.recipe.ridge == "auto" and self._is_solved(group.layers[0]):
            return "no token of a held-out prompt reached it in calibration"
        return None

    def _is_solved(self, layer: LayerPlan) -> bool:
        """Whether a weight or factors of a layer are solved for in closed form."""
        refit = layer.refits(self.recipe)
        return self.recipe.lowrank_solver == "closed-form" and bool(layer.rank or refit)

    def _solve_group(self, group: InputGroup, *, last: bool) -> dict[str, Solution]:
        """Solve the layers of one input in one format: together, with one A, or each on its own.

        The moments of the input are gone then in its `last` format, which takes most memory. (At 15,360
        inputs and two kinds of tokens they are 19 GB.)
        """
        fit = group.combined("fit", self.recipe.balance)
        assert fit is not None
        heldout = group.combined("heldout", self.recipe.balance)
        if last:
            group.gathered.moments.clear()
        layers = group.layers
        if self.recipe.lowrank_sharing == "shared":
            solved = self._solve_together(group, layers, fit, heldout)
        else:
            solved = [one for layer in layers for one in self._solve_together(group, [layer], fit, heldout)]
        return dict(zip((layer.name for layer in layers), solved, strict=True))

    def _solve_together(
        self, group: InputGroup, layers: Sequence[LayerPlan], fit: Moments, heldout: Moments | None
    ) -> list[Solution]:
        """Solve some layers of one input, with one A."""
        recipe, layer = self.recipe, layers[0]
        weights, biases = zip(*map(self._weight_and_bias, layers), strict=True)
        refit = layer.refits(recipe)
        own = biases if refit and recipe.intercept else None
        if layer.weight_sparse:
            return solve_pruned(fit, weights, ridge=recipe.ridge, heldout=heldout, biases=own)
        if recipe.lowrank_solver == "closed-form":
            return solve_layers(
                fit,
                weights,
                rank=layer.rank,
                refit=refit,
                ridge=recipe.ridge,
                heldout=heldout,
                quantised=layer.quantized,
                biases=own,
            )
        lowrank_a, lowrank_b = train_lowrank(
            torch.cat(group.gathered.tokens),
            torch.cat(weights),
            layer.pattern,
            layer.norm,
            rank=layer.rank,
            steps=recipe.train_steps,
            seed=self.options.seed,
        )
        errors = LayerErrors(heldout or fit, torch.cat(weights))
        solution = Solution(lowrank_a=lowrank_a, lowrank_b=lowrank_b)
        return with_errors(errors, solution, None, [len(weight) for weight in weights])

    def _weight_and_bias(self, layer: LayerPlan) -> tuple[Tensor, Tensor]:
        """(N, K) and (N,) of the dense layer, zeros where it has no bias."""
        linear: Any = self.model.get_submodule(layer.name)
        weight = linear.weight.detach()
        return weight, weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()

    def _make_sparse(self, groups: list[InputGroup]) -> None:
        """Sequential mode: the blocks solved so far run sparse from now on."""
        for group in groups:
            for layer in group.layers:
                if layer.name in self.unseen:
                    continue
                solution = self.solutions.of([layer])[layer.name]
                self.originals[layer.name] = self.model.get_submodule(layer.name)
                sparse = solved_layer(self.model, layer, solution)
                self.model.set_submodule(layer.name, sparse)

    def _none_left(self, costs: Sequence[InputCost]) -> str:
        if any(cost.saving > 0 for cost in costs):
            return f"{self.recipe.budget} leaves no layer sparse: allow more"
        return (
            f"no layer takes less time in another format, at {max(self.tokens.values())} tokens in a call: "
            "calibrate on larger pictures, or without a budget"
        )

    def _guidance(self) -> Guidance | None:
        """How the pipeline guides; None where it does not, or that is not known."""
        if self.recording.pipeline is None:
            return None
        try:
            scale = guidance_scale(self.recording.pipeline, self.options.pipeline_kwargs)
        except ValueError:
            return None
        store, batches = self.recording.store, self.recording.batches
        asked = broadcast([number for split in batches.values() for number in split if store.count(number)])
        return Guidance(scale, null_comes_first(store, asked, self.plan.architecture))

    def _choose(
        self, plan: Plan, search: DenseStepSearch | None
    ) -> tuple[Plan, tuple[InputCost, ...], Choice]:
        """Measure the readers of each input alone, in each format, on a few steps; the budget decides."""
        budget = self.recipe.budget
        assert budget is not None
        store = self.recording.store
        heldout, fit = (
            [number for number in self.recording.batches[split] if store.count(number)]
            for split in ("heldout", "fit")
        )
        numbers = broadcast(heldout or fit)
        if not all(store.has(number) for number in numbers):
            raise CalibrationError("a budget under torchrun needs a folder that all processes share")
        calls = judged_calls(store, numbers, self.plan.architecture)
        layers = {(layer.name, layer.format.name): layer for layer in plan.alternatives()}
        fixed = {
            layer.name: layer.format.name for layer in plan.sparse if self.recipe.fixed_format(layer.name)
        }
        tokens = tokens_per_layer(
            self.model, [layer.name for layer in plan.layers], moved(calls[0], self.device)
        )
        pictures = pictures_in(calls[0])  # in serving there is one
        self.tokens = {name: count // pictures for name, count in tokens.items()}
        error = OutputError(self.model, calls, self.plan.architecture, self._guidance(), self.order)

        def measure(formats: Mapping[str, FormatName]) -> float:
            chosen = [layers[item] for item in formats.items()]
            with temporarily_sparse(self.model, chosen, self.solutions.of(chosen)):
                return error()

        place = {block: i for i, block in enumerate(self.order)}
        options = sorted(_options(plan).items(), key=lambda one: place.get(one[1][0].candidate.block, -1))
        prices = ModelPrices(plan, self.tokens)
        readers, costs = inputs_of(plan.layers), []
        with ProgressBar("measuring inputs", len(options), show=self.show) as advance:
            for (name, format), chosen in options:
                names = tuple(layer.name for layer in chosen)
                others = [layer for layer in readers[name] if layer.name not in names]
                dense = [layer.dense("") for layer in chosen]
                saving = prices.us([*others, *dense]) - prices.us([*others, *chosen])
                with error.behind(chosen[0].candidate.block):
                    found = measure(dict.fromkeys(names, format))
                costs.append(InputCost(name, names, format, found, saving))
                advance(1)
        costs = broadcast(costs)  # cards round differently

        def decide(limit: Budget) -> Choice:
            return broadcast(choose(costs, limit, measure, fixed))

        if search is None:
            choice = decide(budget)
            return plan.in_formats(choice.formats).leave_dense(choice.dense), tuple(costs), choice
        plan, choice = search.choose(plan, costs, prices, decide, self.solutions)
        self.recording.settle_dense_steps(plan)
        return plan, tuple(costs), choice


def _options(plan: Plan) -> dict[tuple[str, FormatName], list[LayerPlan]]:
    """(Key of an input, format) -> its readers in that format, where the budget may choose it."""
    free = [layer for layer in plan.alternatives() if not plan.recipe.fixed_format(layer.name)]
    found: dict[tuple[str, FormatName], list[LayerPlan]] = {}
    for layer in free:
        found.setdefault((layer.candidate.reads, layer.format.name), []).append(layer)
    return found
