"""What diffusers calls an attention backend, in eight bits, and a dispatch that knows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from rtlynx.math.attention import Stream
from rtlynx.nn.call import Whose, current_call
from rtlynx.ops.attention import attention, joint_attention

_UNDO = "rtlynx.fp8_attention(model, enabled=False) takes fp8 attention out"


@dataclass(frozen=True)
class Fp8Attention:
    """What a processor's attention backend is, where that is ours.

    q_exponent, k_exponent : queries and keys times 2^exponent fit e4m3.
    before : the backend that it stands for, diffusers' own.
    dense_steps : whose state of a call says that it is left to `before`; None where none is.
    follows : whether those are the calls that the model's recipe runs dense, which come and go with it.
    """

    q_exponent: int
    k_exponent: int
    before: Any
    dense_steps: Whose | None = None
    follows: bool = False

    def fitting_both(self, other: Fp8Attention) -> Fp8Attention:
        """Of a processor that two attentions share."""
        return replace(
            self,
            q_exponent=min(self.q_exponent, other.q_exponent),
            k_exponent=min(self.k_exponent, other.k_exponent),
        )

    def following(self, whose: Whose | None) -> Fp8Attention:
        """Of a model whose dense steps the state of `whose` calls tells; None where it has none."""
        return replace(self, dense_steps=whose) if self.follows else self

    def of_streams(self, streams: Sequence[Stream], norm_eps: float) -> Tensor:
        """Attention (B, S, H, D) over the tokens of all `streams`, which come without norms and rotation."""
        return joint_attention(
            streams,
            scale=streams[0].query.shape[-1] ** -0.5,
            eps=norm_eps,
            q_exponent=self.q_exponent,
            k_exponent=self.k_exponent,
        )

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        parallel_config: Any = None,
    ) -> Tensor:
        """Attention of (B, S, H, D), as `dispatch_attention_fn` gives it.

        Raises
        ------
        ValueError
            If there is a mask, dropout, or tokens are spread over processes.
        """
        if attn_mask is not None:
            raise ValueError(
                "fp8 attention takes no mask, and this call has one: draw prompts of one length together, or "
                f"one at a time without a mask, as pipelines do; {_UNDO}"
            )
        if is_causal or dropout_p:
            raise ValueError(f"fp8 attention is neither causal nor has it dropout; {_UNDO}")
        if parallel_config is not None:
            raise ValueError(f"fp8 attention takes no context parallelism; {_UNDO}")
        return attention(
            query,
            key,
            value,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            q_exponent=self.q_exponent,
            k_exponent=self.k_exponent,
        )


def attentions(model: nn.Module) -> list[tuple[str, Any]]:
    """Name and module of all attentions that diffusers dispatches."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(getattr(module, "processor", None), "_attention_backend")
    ]


def follow(model: nn.Module, whose: Whose | None) -> None:
    """Have attention of `model` in eight bits go by the dense steps of its recipe, if it is to follow them.

    The state of `whose` calls tells them; None where there are none.
    """
    for _, attn in attentions(model):
        backend = attn.processor._attention_backend
        if isinstance(backend, Fp8Attention):
            attn.processor._attention_backend = backend.following(whose)


@contextmanager
def dense_steps_told_by(model: nn.Module, whose: Whose) -> Iterator[None]:
    """Meanwhile, have attention of `model` in eight bits `follow` the state of `whose` calls."""
    before = {attn.processor: attn.processor._attention_backend for _, attn in attentions(model)}
    follow(model, whose)
    try:
        yield
    finally:
        for processor, backend in before.items():
            processor._attention_backend = backend


def in_this_call(backend: Any) -> Any:
    """What serves the call under way: in steps that are left to it the backend that ours stands for."""
    if isinstance(backend, Fp8Attention) and backend.dense_steps is not None:
        return backend.before if current_call(backend.dense_steps, lent=True).dense else backend
    return backend


def dispatch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, backend: Any = None,
    **others: Any,
) -> Tensor:  # fmt: skip
    """diffusers' `dispatch_attention_fn`, which knows our backend beside its own."""
    backend = in_this_call(backend)
    if isinstance(backend, Fp8Attention):
        return backend(query, key, value, attn_mask, **others)
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn(query, key, value, attn_mask, backend=backend, **others)
