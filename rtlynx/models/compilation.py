"""torch.compile, set up for sparse models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rtlynx.models.guard_filter import needed
from rtlynx.models.plan import ARCHITECTURES, architecture_of
from rtlynx.models.sparsify import sparse_layers, transformers_of
from rtlynx.nn.tensor_parallel import TensorParallelLinear

# Compilations of one code object for each block that may share it, before Dynamo gives up: two layouts of
# inputs, dense and sparse steps, one size and any.
_COMPILATIONS_PER_BLOCK = 8


def compile(
    model_or_pipeline: Any,
    *,
    cuda_graphs: bool | None = None,
    dynamic: bool | None = None,
    backend: str | Callable[..., Any] = "inductor",
) -> Any:
    """Compile a sparse or quantised model, in place, as serves such models best.

    Blocks are compiled one by one, at their first call, or a model that does not declare its repeated blocks
    as a whole. Dynamo then checks fewer guards before each block (`rtlynx.models.guard_filter`). Its limit of
    compilations (`torch._dynamo.config.recompile_limit`) is raised to what blocks of many kinds need.

    Parameters
    ----------
    model_or_pipeline : nn.Module or diffusers pipeline
        For a pipeline, all of its transformers.
    cuda_graphs : bool, optional
        Whether each block becomes a CUDA graph, so that a step does not wait for Python. By default wherever
        they serve: repeated blocks, all on one CUDA device, whose weights stay in place.
    dynamic : bool, optional
        As of torch.compile: by default code for any size of picture and prompt is made at the second size.
    backend : str or callable
        As of torch.compile.

    Returns
    -------
    nn.Module or diffusers pipeline
        The same object.

    Raises
    ------
    ValueError
        If a transformer is dense, or compiled in another way, or `cuda_graphs` are asked for where they do
        not serve. Nothing is compiled then.
    TypeError
        If it is neither a module nor a pipeline with a transformer.
    """
    found = {name: (model, _blocks(model)) for name, model in transformers_of(model_or_pipeline).items()}
    for name, (model, blocks) in found.items():
        _refuse_dense(model)
        _refuse_compiled(getattr(model_or_pipeline, name, model_or_pipeline), blocks or [model])
        reason = _without_graphs_reason(model, blocks, backend)
        if cuda_graphs and reason is not None:
            raise ValueError(f"CUDA graphs do not serve {type(model).__name__} here: {reason}")
    for model, blocks in found.values():
        of_inductor: dict[str, Any] = {}
        if cuda_graphs is not False and _without_graphs_reason(model, blocks, backend) is None:
            of_inductor = torch._inductor.list_mode_options("reduce-overhead")
        _allow_compilations(_COMPILATIONS_PER_BLOCK * max(1, len(blocks)))
        # Blocks known by name are one graph each, but where a cache of diffusers decides which of them run.
        whole = bool(blocks) and architecture_of(model).class_name in ARCHITECTURES and not _cached(model)
        for part in blocks or [model]:
            # A dict for each: torch.compile takes the filter out of it.
            options = {"guard_filter_fn": needed, **of_inductor}
            part.compile(fullgraph=whole, dynamic=dynamic, backend=backend, options=options)
    return model_or_pipeline


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a diffusers model declares as repeated."""
    declared = getattr(model, "_repeated_blocks", None) or ()
    return [module for module in model.modules() if type(module).__name__ in declared]


def _allow_compilations(count: int) -> None:
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, count)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * count)


def _refuse_dense(model: nn.Module) -> None:
    if not sparse_layers(model):
        raise ValueError(
            f"{type(model).__name__} is dense: make it sparse or quantised first (rtlynx.sparsify, calibrate "
            "or load), then compile it"
        )


def _refuse_compiled(model: nn.Module, parts: Sequence[nn.Module]) -> None:
    """ValueError where anything of `model` but `parts` is compiled, or a wrapper compiles it."""
    for name, module in model.named_modules():
        wrapped = "_orig_mod" in module._modules
        if wrapped or (module._compiled_call_impl is not None and not any(module is one for one in parts)):
            where = f"{name}, a {type(module).__name__}," if name else type(model).__name__
            raise ValueError(
                f"{where} is compiled already: leave out torch.compile, compile() and "
                "compile_repeated_blocks(), in whose place rtlynx.compile is"
            )


def _without_graphs_reason(
    model: nn.Module, blocks: Sequence[nn.Module], backend: str | Callable[..., Any]
) -> str | None:
    """Why CUDA graphs of `blocks` do not serve; None where they do."""
    if backend != "inductor":
        return f"they are of the backend 'inductor', not {backend!r}"
    if not blocks:
        return "it declares no repeated blocks, and the output of a whole graph lasts until the next call"
    if _cached(model):
        return "a cache skips some of its blocks, and keeps what others gave (enable_cache)"
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if any(_moves_weights(module) for module in model.modules()):
        return "its weights move between calls (offloading or layerwise casting)"
    if len(places) != 1 or next(iter(places)).type != "cuda":
        return f"they need all weights on one CUDA device, found {', '.join(sorted(map(str, places)))}"
    spread = any(isinstance(module, TensorParallelLinear) for module in model.modules())
    if spread or getattr(model, "_parallel_config", None) is not None:
        return "it runs on several cards, which has not been tried with them"
    return None


def _cached(model: nn.Module) -> bool:
    """Whether diffusers caches what blocks give between steps."""
    return bool(getattr(model, "is_cache_enabled", False))


def _moves_weights(module: nn.Module) -> bool:
    if getattr(module, "_hf_hook", None) is not None:
        return True
    registry: Any = getattr(module, "_diffusers_hook", None)
    return registry is not None and any(
        registry.get_hook(name) is not None for name in ("group_offloading", "layerwise_casting")
    )
