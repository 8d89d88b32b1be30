"""Forwards of blocks whose linear layers read prologues: installed, and in parts."""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from rtlynx.math.attention import Stream, rotated
from rtlynx.models.architecture import Architecture
from rtlynx.models.attention_backend import Fp8Attention, dispatch, in_this_call
from rtlynx.models.recompile_limit import with_own_code
from rtlynx.nn.lora import untouched
from rtlynx.nn.prepared import PreparedInput
from rtlynx.nn.prologue import PrologueCall, activated, adaln, adaln_by_token, is_of, read
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.ops.attention import joint_heads
from rtlynx.ops.dispatch import attention_inputs_support, qk_norm_rotary_supports


def fuse_blocks(model: nn.Module, architecture: Architecture) -> None:
    """Give blocks of `model` that hold sparse layers the forwards of `architecture.fused`.

    On the blocks themselves, whose classes stay: caching, compilation and offloading go by those. A block
    whose forward something else has replaced keeps it.
    """
    for block in model.modules():
        forward = architecture.fused.get(type(block).__name__)
        if forward is None or "forward" in block.__dict__:
            continue
        if any(isinstance(module, SparseLinear) for module in block.modules()):
            block.__dict__["forward"] = FusedForward.of(block, forward, _formats_in(block))


def unfuse_blocks(model: nn.Module) -> None:
    """Undo `fuse_blocks`."""
    for block in model.modules():
        if isinstance(block.__dict__.get("forward"), FusedForward):
            del block.__dict__["forward"]


def _formats_in(block: nn.Module) -> str:
    """A short name for what compiled code of a block depends on: its layers' formats."""
    layers = ((name, layer) for name, layer in block.named_modules() if isinstance(layer, SparseLinear))
    formats = [
        (
            *(name, layer.pattern, layer.norm, layer.format.name, layer.rank, layer.bias is None),
            *(layer.intercept, layer.text_rows_dense, layer.dense_steps, layer.weight_dense_scale is None),
        )
        for name, layer in layers
    ]
    return hashlib.sha256(repr(formats).encode()).hexdigest()[:16]


class FusedForward(partial):
    """The forward of one block, in place of its class's.

    It knows its block weakly, so that a model is freed with the last reference to it. (A partial, since
    torch.compile follows those and no other callable object; it does not follow `type(block).forward`.)
    """

    @classmethod
    def of(cls, block: nn.Module, forward: Callable[..., Any], formats: str) -> FusedForward:
        """`forward`, one of `Architecture.fused`, for `block`, whose layers are of these formats."""
        return cls(with_own_code(_run, formats), weakref.ref(block), type(block).forward, forward, formats)

    @property
    def __signature__(self) -> inspect.Signature:
        """Of the block class's own forward: caches tell kinds of blocks apart by it."""
        whole = inspect.signature(self.args[1])
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        itself, _, forward, formats = self.args
        block = itself()
        return FusedForward.of(memo.get(id(block), block), forward, formats)

    def __reduce__(self) -> Any:
        itself, _, forward, formats = self.args
        return FusedForward.of, (itself(), forward, formats)


def _run(
    itself: Callable[[], Any], original: Callable[..., Any], forward: Callable[..., Any], formats: str, /,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    return forward(itself(), original, *args, **kwargs)


# Attention processors that hand their input to the layers that make q, k and v alone, beside asking for its
# shape.
_HANDING_ON = {
    "Flux2AttnProcessor",
    "Flux2KVAttnProcessor",
    "Flux2KVParallelSelfAttnProcessor",
    "Flux2ParallelSelfAttnProcessor",
    "FluxAttnProcessor",
    "FluxIPAdapterAttnProcessor",
    "HunyuanVideo15AttnProcessor2_0",
    "JointAttnProcessor2_0",
    "LTX2AudioVideoAttnProcessor",
    "LTX2PerturbedAttnProcessor",
    "LTXVideoAttnProcessor",
    "QwenDoubleStreamAttnProcessor2_0",
    "WanAttnProcessor",
    "ZSingleStreamAttnProcessor",
}
# Those that hand it on likewise, and mix further values, of an adapter, into what the output layers read.
_MIXING_MORE = {"SD3IPAdapterJointAttnProcessor2_0"}


def read_by_attention(attn: Any, prologue: PrologueCall, *layers: nn.Module) -> Tensor | PreparedInput:
    """`rtlynx.nn.prologue.read` for layers that `attn` calls with its input; other processors get tensors."""
    if untouched(attn) and (processor_known(attn) or type(attn.processor).__name__ in _MIXING_MORE):
        return read(prologue, *layers)
    return prologue.dense()


def processor_known(attn: Any) -> bool:
    """Whether the attention processor of `attn` is one of diffusers' own for these models."""
    return type(attn.processor).__name__ in _HANDING_ON


def hands_on(attn: Any) -> bool:
    """Whether q, k and v, each made by a layer of `attn`, go nowhere but into the mixing of tokens."""
    return processor_known(attn) and untouched(attn)


def follows(attn: Any, processor: str) -> bool:
    """Whether calling `attn` does what diffusers' attention processor of that name does, and nothing else."""
    return type(attn.processor).__name__ == processor and untouched(attn)


class Heads(NamedTuple):
    """Queries, keys and values (B, T, H, D) of a stream as layers give them, and what comes before mixing.

    norms : of queries and of keys
    rotary : as `rtlynx.math.attention.Stream` has it
    """

    query: Tensor
    key: Tensor
    value: Tensor
    norms: Sequence[nn.Module | None]
    rotary: tuple[Tensor, ...] = ()

    def normalized(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention reads them."""
        made = (
            one if norm is None else norm(one)
            for norm, one in zip(self.norms, (self.query, self.key), strict=True)
        )
        query, key = (rotated(one, self.rotary).type_as(one) if self.rotary else one for one in made)
        return query, key, self.value


def real_pairs(factors: Tensor | None) -> tuple[Tensor, ...]:
    """Complex factors (..., T, D / 2) as `Heads.rotary`: compilers generate no code for complex numbers."""
    return () if factors is None else (torch.view_as_real(factors),)


def heads(
    attn: Any,
    x: Tensor | PreparedInput,
    layers: Sequence[nn.Module],
    norms: Sequence[nn.Module | None],
    rotary: tuple[Tensor, ...] = (),
) -> Heads:
    """Queries, keys and values of x (B, T, K), which `layers` make in that order."""
    width = attn.inner_dim // attn.heads
    query, key, value = (layer(x).unflatten(-1, (-1, width)) for layer in layers)
    return Heads(query, key, value, norms, rotary)


def attend(attn: Any, streams: Sequence[Heads], mask: Tensor | None) -> Tensor:
    """Attention over the tokens of all streams, by the backend and over the processes that `attn` is set to.

    (B, T, H D). One kernel norms and rotates what it can read, and in eight bits rounds it.
    """
    settings = attn.processor
    backend = in_this_call(settings._attention_backend)
    given, eps = _before_norms(streams)
    in_fp8 = isinstance(backend, Fp8Attention) and mask is None and settings._parallel_config is None
    if in_fp8 and given and attention_inputs_support(given):
        return backend.of_streams(given, eps).flatten(2, 3)
    if given and qk_norm_rotary_supports(given):
        query, key, value = joint_heads(given, eps)
    else:
        made = [stream.normalized() for stream in streams]
        query, key, value = (
            (torch.cat(one, dim=1) for one in zip(*made, strict=True)) if made[1:] else made[0]
        )
    y = dispatch(
        *(query, key, value),
        attn_mask=mask,
        backend=backend,
        parallel_config=settings._parallel_config,
    )
    return y.flatten(2, 3).to(query.dtype)


def _before_norms(streams: Sequence[Heads]) -> tuple[list[Stream], float]:
    """Streams for a kernel that norms by itself, and the norms' eps; none where norms are not as it has them.

    That is plain RMS norms of a head, with a weight and no bias, that have the eps in common.
    """
    norms: list[Any] = [norm for stream in streams for norm in stream.norms]
    for norm in norms:
        if norm is None or not is_of(norm, "RMSNorm") or norm.eps != norms[0].eps:
            return [], 0.0
        if norm.weight is None or getattr(norm, "bias", None) is not None:
            return [], 0.0
        if norm.weight.shape != streams[0].query.shape[-1:]:
            return [], 0.0
    weights = [norm.weight for norm in norms]
    return [
        Stream(one.query, one.key, one.value, weights[2 * i], weights[2 * i + 1], one.rotary)
        for i, one in enumerate(streams)
    ], norms[0].eps


def feed_forward(ff: Any, prologue: PrologueCall) -> Tensor:
    """diffusers' FeedForward of what `prologue` yields; with another activation than tanh GELU its own."""
    if not untouched(ff) or getattr(ff.net[0], "approximate", None) != "tanh":
        return ff(prologue.dense())
    up, dropout, down = ff.net
    hidden = up.proj(read(prologue, up.proj))
    return down(read(activated(lambda h: dropout(up.gelu(h)), hidden), down))


class GatedMlp(NamedTuple):
    """How one stream of a double block goes on after attention.

    norm, ff : the LayerNorm before the MLP, and the MLP
    gate : of the attention's output, (B, D)
    modulation : shift, scale and gate of the MLP, each (B, D)
    feed_forward : calls the MLP with what a prologue yields
    choice : which row of these, then (R, D), each token takes, (B, T) int32; None where it takes its batch's
    """

    norm: nn.LayerNorm
    ff: nn.Module
    gate: Tensor
    modulation: Sequence[Tensor]
    feed_forward: Callable[[Any, PrologueCall], Tensor] = feed_forward
    choice: Tensor | None = None

    def __call__(self, x: Tensor, attention: Tensor) -> Tensor:
        """The stream x (B, T, D) after attention's output (B, T, D) and the MLP."""
        shift, scale, gate = self.modulation
        x = x + self._of_tokens(self.gate) * attention
        out = self.feed_forward(self.ff, modulated(self.norm, x, shift, scale, self.choice))
        return x + self._of_tokens(gate) * out

    def _of_tokens(self, gate: Tensor) -> Tensor:
        return gate.unsqueeze(1) if self.choice is None else embedding(self.choice, gate)


def rows_of_modulation(index: Tensor, batch: int) -> Tensor:
    """Row of (2 B, D) that each token takes, (B, T) int32: of the second half where `index` (B, T) is 1."""
    index = index.to(torch.int32)
    if batch == 1:
        return index
    return index * batch + torch.arange(batch, dtype=torch.int32, device=index.device)[:, None]


def modulated(
    norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor, choice: Tensor | None
) -> PrologueCall:
    """norm(x) * (1 + scale) + shift, by batch or, where there is a `choice`, by token (see `GatedMlp`)."""
    if choice is None:
        return adaln(norm, x, shift, scale)
    return adaln_by_token(norm, x, shift, scale, choice)


def finite_half(x: Tensor) -> Tensor:
    """As diffusers keeps float16 finite."""
    return x.clip(-65504, 65504) if x.dtype is torch.float16 else x
