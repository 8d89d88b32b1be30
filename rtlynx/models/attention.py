"""Attention of diffusers' models in eight bits: which, how it is put in, and how it is taken out again.

diffusers' attention processors hand queries, keys and values to `dispatch_attention_fn` with the backend that
they are set to, one of a closed list. So a processor whose backend is to be ours becomes one of a class that
calls `rtlynx.models.attention_backend.dispatch` in its place, which knows ours and hands all others on.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, Literal

import torch
from torch import nn

from rtlynx.cuda.cudnn_attention import head_dim_reason, missing_reason
from rtlynx.math.attention import exponent_below
from rtlynx.models.attention_backend import Fp8Attention, attentions, dispatch, follow
from rtlynx.models.attention_processors import FUSED
from rtlynx.models.hooks import register_attention_steps
from rtlynx.models.sparsify import observers, state_of, transformers_of
from rtlynx.ops.dispatch import card_unsupported_reason
from rtlynx.recipe import ranges_of

# diffusers' attention processors whose queries and keys all come out of norms of the module.
PROCESSORS = (
    "Flux2AttnProcessor",
    "Flux2ParallelSelfAttnProcessor",
    "FluxAttnProcessor",
    "QwenDoubleStreamAttnProcessor2_0",
    "WanAttnProcessor",
    "ZSingleStreamAttnProcessor",
)
_DISPATCH = "dispatch_attention_fn"
# Attribute of a model whose attention has steps of its own: the handles of the hooks that tell them.
_HOOKS = "_rtlynx_attention"


def fp8_attention(
    model_or_pipeline: Any,
    *,
    bf16_sigmas: Sequence[tuple[float, float]] | Literal["dense"] = "dense",
    skip: Sequence[str] = (),
    enabled: bool = True,
) -> Any:
    """Compute attention in eight bits (e4m3), in place; on a card by cuDNN's kernel.

    For dense models and those that are sparse or in fp8, before or after. The model's weights and what `save`
    writes stay as they are. On a CPU plain PyTorch computes the same numbers, slowly. Called again, it
    chooses anew.

    Parameters
    ----------
    model_or_pipeline : nn.Module or diffusers pipeline
        FLUX.1, FLUX.2, Chroma, Qwen-Image, Wan or Z-Image with diffusers' own attention processors.
    bf16_sigmas : sequence of (low, high), or "dense"
        In steps whose noise level sigma lies in one of these ranges, low < sigma <= high, attention runs by
        the backend that it had before, in the model's dtype. `((0.0, 0.15),)` are the last steps of a
        picture, `()` none; a range from 0 always holds for the last of several. Dense: the steps that the
        model's recipe runs dense, if any, also after `set_dense_steps`. Diffusers pipelines tell which step
        a call is; sampling loops of your own say so with `rtlynx.schedule`.
    skip : sequence of str
        Glob patterns of names of attentions that stay as they are: `("transformer_blocks.0.*",)`.
    enabled : bool
        False: each attention gets the backend back that it had before.

    Returns
    -------
    nn.Module or diffusers pipeline
        The same object.

    Raises
    ------
    ImportError
        If there is a card, and cuDNN's Python package is not installed (`rtlynx[attention]`).
    RuntimeError
        If the model is on a card that is no Hopper.
    ValueError
        If an attention is none of those, in context parallel, or of a head dimension that cuDNN lacks; or if
        `bf16_sigmas` are no such ranges, a pattern of `skip` matches no attention, or attentions of which
        only some are skipped share a processor. Models are then unchanged. Calls with a mask are refused when
        they come.
    TypeError
        If it is neither a module nor a pipeline with a transformer.
    """
    models = transformers_of(model_or_pipeline)
    if not enabled:
        for model in models.values():
            _remove_hooks(model)
            for _, attn in attentions(model):
                _take_out(attn.processor)
        return model_or_pipeline
    ranges = None if bf16_sigmas == "dense" else ranges_of("bf16_sigmas", bf16_sigmas, "dense")
    skipped = _skipped(models, skip)
    if torch.cuda.is_available() and (reason := missing_reason()) is not None:
        raise ImportError(reason, name="cudnn")
    backends: dict[Any, Fp8Attention] = {}
    for model in models.values():
        _refuse_card(model)
        found = attentions(model)
        if not found:
            raise ValueError(f"{type(model).__name__} has no attention that diffusers dispatches")
        for name, attn in found:
            if attn.processor in skipped:
                continue
            backend, other = _backend_for(name, attn), backends.get(attn.processor)
            backends[attn.processor] = backend if other is None else backend.fitting_both(other)
    for processor in skipped:
        _take_out(processor)
    for processor, backend in backends.items():
        steps = replace(backend, follows=ranges is None, dense_steps="attention" if ranges else None)
        _put_in(processor, steps)
    for model in models.values():
        _remove_hooks(model)
        if ranges and any(attn.processor in backends for _, attn in attentions(model)):
            setattr(model, _HOOKS, register_attention_steps(model, ranges))
        _follow_recipe(model)
    return model_or_pipeline


def has_own_steps(model: nn.Module) -> bool:
    """Whether attention of `model` in eight bits has steps of its own, and each call has to tell its step."""
    return hasattr(model, _HOOKS)


def _remove_hooks(model: nn.Module) -> None:
    for handle in getattr(model, _HOOKS, ()):
        handle.remove()
    model.__dict__.pop(_HOOKS, None)


def _skipped(models: Mapping[str, nn.Module], globs: Sequence[str]) -> set[Any]:
    """Processors of the attentions of `models` that a pattern of `globs` leaves out."""
    if isinstance(globs, str) or not all(isinstance(glob, str) for glob in globs):
        raise ValueError(f"skip is a list of glob patterns of attentions' names, got {globs!r}")
    found = [one for model in models.values() for one in attentions(model)]
    for glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name, _ in found):
            some = ", ".join(name for name, _ in found[:3]) or "none"
            raise ValueError(f"skip pattern {glob!r} matches no attention; there are {some}")
    left_out = {name: any(fnmatch.fnmatchcase(name, glob) for glob in globs) for name, _ in found}
    skipped = {attn.processor for name, attn in found if left_out[name]}
    for name, attn in found:
        if attn.processor in skipped and not left_out[name]:
            raise ValueError(
                f"{name} shares its processor with an attention that is skipped: give each its own, or skip "
                "both"
            )
    return skipped


def _follow_recipe(model: nn.Module) -> None:
    """Tell attention in eight bits whether `model` has dense steps, as it is now."""
    state = state_of(model)
    follow(model, "layers" if state is not None and state.plan.recipe.has_dense_steps else None)


observers.append(_follow_recipe)


def _refuse_card(model: nn.Module) -> None:
    for index in {one.get_device() for one in model.parameters() if one.is_cuda}:
        reason = card_unsupported_reason(index)
        if reason is not None:
            raise RuntimeError(f"fp8 attention is for Hopper cards, and this model is on another: {reason}")


def _backend_for(name: str, attn: Any) -> Fp8Attention:
    processor = attn.processor
    kind = type(processor).__name__
    if kind not in PROCESSORS:
        raise ValueError(
            f"fp8 attention knows no bound of the queries and keys of {name}, whose processor is {kind}: it "
            f"takes {', '.join(PROCESSORS)}"
        )
    if processor._parallel_config is not None:
        raise ValueError(f"fp8 attention takes no context parallelism, which {name} is set to")
    head_dim = getattr(attn, "head_dim", None) or attn.inner_dim // attn.heads
    reason = head_dim_reason(head_dim)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    before = processor._attention_backend
    if isinstance(before, Fp8Attention):
        before = before.before
    q, k = (exponent_below(max(_bound_of(name, norm) for norm in _norms(name, attn, x))) for x in "qk")
    return Fp8Attention(q, k, before)


def _norms(name: str, attn: Any, x: str) -> list[Any]:
    """Norms of queries ("q") or keys ("k"), of both streams where there are two."""
    norms = [getattr(attn, f"norm_{x}", None)]
    if getattr(attn, f"add_{x}_proj", None) is not None:
        norms.append(getattr(attn, f"norm_added_{x}", None))
    if None in norms:
        raise ValueError(f"fp8 attention knows no bound of queries and keys without norms, as in {name}")
    return norms


def _bound_of(name: str, norm: Any) -> float:
    """What no entry of `norm`'s output exceeds, also after a rotation of pairs."""
    from diffusers.models.normalization import RMSNorm

    if not isinstance(norm, (nn.RMSNorm, nn.LayerNorm, RMSNorm)):
        raise ValueError(f"fp8 attention knows no bound of what {type(norm).__name__} gives, in {name}")
    weight, bias = norm.weight, getattr(norm, "bias", None)
    if weight is not None and weight.is_meta:
        raise ValueError(f"{name} has no weights yet (meta): load them first")
    shape: Any = getattr(norm, "normalized_shape", None) or norm.dim
    largest = 1.0 if weight is None else float(weight.detach().abs().max())
    # A normalised vector of n entries has the length √n, which a rotation of pairs can gather in one entry.
    shift = 0.0 if bias is None else math.sqrt(2) * float(bias.detach().abs().max())
    return math.sqrt(math.prod(shape)) * largest + shift


@functools.cache
def _dispatching(processor_class: type) -> type:
    """A subclass of the same name whose `__call__` calls our `dispatch` in place of diffusers'.

    Where there is one in `FUSED`, it hands on queries and keys before their norms.
    """
    call: Any = processor_class.__call__
    names = dict(call.__globals__)
    if _DISPATCH not in call.__code__.co_names or _DISPATCH not in names:
        raise RuntimeError(
            f"{processor_class.__name__} of this diffusers does not call {_DISPATCH}: install the version "
            "that rtlynx[diffusers] asks for"
        )
    del names["__name__"]  # Dynamo looks the globals of a module up by it
    names[_DISPATCH] = dispatch
    own = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    own.__kwdefaults__, own.__annotations__ = call.__kwdefaults__, call.__annotations__
    fused = FUSED.get(processor_class.__name__)
    return type(
        processor_class.__name__,
        (processor_class,),
        {"__call__": own if fused is None else fused(own), "__reduce__": _reduce, "__module__": __name__},
    )


def _reduce(processor: Any) -> Any:
    return _again, (type(processor).__base__, processor.__dict__)


def _again(processor_class: type, state: dict[str, Any]) -> Any:
    """A processor as `_put_in` left it, where it is copied or unpickled."""
    processor: Any = object.__new__(_dispatching(processor_class))
    processor.__dict__.update(state)
    return processor


def _is_ours(processor: Any) -> bool:
    return type(processor).__module__ == __name__


def _put_in(processor: Any, backend: Fp8Attention) -> None:
    kind: Any = type(processor)
    if not _is_ours(processor):
        processor.__class__ = _dispatching(kind)
    processor._attention_backend = backend


def _take_out(processor: Any) -> None:
    backend = processor._attention_backend
    if isinstance(backend, Fp8Attention):
        processor._attention_backend = backend.before
    if _is_ours(processor):
        processor.__class__ = type(processor).__base__
