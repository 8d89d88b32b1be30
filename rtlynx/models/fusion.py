"""Forwards of blocks whose linear layers read the ends of elementwise chains: installed, and in parts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rtlynx.compressed import PreparedInput
from rtlynx.linear import SparseLinear
from rtlynx.models.architecture import Architecture
from rtlynx.reading import Chain, activated, adaln, read, untouched


def fuse_blocks(model: nn.Module, architecture: Architecture) -> None:
    """Give blocks of `model` that hold sparse layers the forwards of `architecture.fused`.

    On the blocks themselves, whose classes stay: caching, compilation and offloading go by those. A block
    whose forward something else has replaced keeps it.

    Blocks whose layers are of the same forms share a forward. What torch.compile makes of a block hangs on
    the forward's code, is looked through at each call, and may not be more than a few of one code
    (`torch._dynamo.config.recompile_limit`): a budget makes more forms of blocks than that.
    """
    for block in model.modules():
        forward = architecture.fused.get(type(block).__name__)
        if forward is None or "forward" in block.__dict__:
            continue
        if any(isinstance(module, SparseLinear) for module in block.modules()):
            # (A bound method cannot be pickled, and Dynamo does not follow `type(block).forward`.)
            own = _with_own_code(forward, _forms_in(block))
            block.__dict__["forward"] = partial(own, block, type(block).forward)


def unfuse_blocks(model: nn.Module, architecture: Architecture) -> None:
    """Undo `fuse_blocks`."""
    for block in model.modules():
        forward = architecture.fused.get(type(block).__name__)
        installed = getattr(block.__dict__.get("forward"), "func", None)
        if forward is not None and installed in _copies.get(forward, {}).values():
            del block.__dict__["forward"]


def _forms_in(block: nn.Module) -> str:
    """A short name for what compiled code of a block depends on: its layers' forms."""
    layers = ((name, layer) for name, layer in block.named_modules() if isinstance(layer, SparseLinear))
    forms = [
        (name, layer.pattern, layer.norm, layer.precision, layer.rank, layer.text_rows_dense)
        for name, layer in layers
    ]
    return hashlib.sha256(repr(forms).encode()).hexdigest()[:16]


_Forward = Callable[..., Any]
_copies: dict[_Forward, dict[str, _Forward]] = {}  # of a forward, by forms


def _with_own_code(forward: _Forward, forms: str) -> _Forward:
    """A copy of `forward` for blocks of these forms, with a code object of its own; the same at each call."""
    copies = _copies.setdefault(forward, {})
    if forms not in copies:
        assert isinstance(forward, FunctionType)
        code, name = forward.__code__.replace(), forward.__name__
        copy = FunctionType(code, forward.__globals__, name, forward.__defaults__)
        copy.__kwdefaults__, copy.__doc__ = forward.__kwdefaults__, forward.__doc__
        # Where pickles find it; dots would be taken for attributes.
        copy.__module__ = __name__
        copy.__qualname__ = f"{forward.__module__.replace('.', '/')}:{name}:{forms}"
        copies[forms] = copy
    return copies[forms]


def __getattr__(name: str) -> _Forward:
    """Copies of forwards by name, for pickles of models that were made sparse in another process."""
    module, _, of = name.partition(":")
    function, _, forms = of.partition(":")
    if not forms:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _with_own_code(getattr(import_module(module.replace("/", ".")), function), forms)


# Attention processors that hand their input to q, k and v alone, beside asking for its shape.
_HANDING_ON = {
    "FluxAttnProcessor",
    "FluxIPAdapterAttnProcessor",
    "QwenDoubleStreamAttnProcessor2_0",
    "ZSingleStreamAttnProcessor",
}


def read_by_attention(attn: Any, chain: Chain, *layers: nn.Module) -> Tensor | PreparedInput:
    """`rtlynx.reading.read` for layers that `attn` calls with its input; others' processors get tensors."""
    if type(attn.processor).__name__ in _HANDING_ON and untouched(attn):
        return read(chain, *layers)
    return chain.dense()


def follows(attn: Any, processor: str) -> bool:
    """Whether calling `attn` does what diffusers' attention processor of that name does, and nothing else."""
    return type(attn.processor).__name__ == processor and untouched(attn)


def rotate(x: Tensor, factors: Tensor) -> Tensor:
    """Pairs of neighbours in x (B, T, H, D) as complex numbers, times factors (T, D / 2) or (B, T, D / 2).

    In float32, as diffusers does it in complex numbers, for which torch.compile generates no code.
    """
    cos, sin = torch.view_as_real(factors).unsqueeze(-3).unbind(-1)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.stack(turned, dim=-1).flatten(-2).type_as(x)


def heads(
    attn: Any,
    x: Tensor | PreparedInput,
    layers: Sequence[nn.Module],
    norms: Sequence[nn.Module | None],
    factors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, T, H, D) of x (B, T, K), queries and keys normalised and rotated.

    `layers` and `norms` make them in that order; `factors` as `rotate` takes them.
    """
    width = attn.inner_dim // attn.heads
    query, key, value = (layer(x).unflatten(-1, (-1, width)) for layer in layers)
    query, key = (one if norm is None else norm(one) for norm, one in zip(norms, (query, key), strict=True))
    if factors is not None:
        query, key = rotate(query, factors), rotate(key, factors)
    return query, key, value


def attend(attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, T, H, D), by the backend and over the processes that `attn` is set to: (B, T, H D)."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    settings = attn.processor
    y = dispatch_attention_fn(
        *(query, key, value),
        attn_mask=mask,
        backend=settings._attention_backend,
        parallel_config=settings._parallel_config,
    )
    return y.flatten(2, 3).to(query.dtype)


def feed_forward(ff: Any, chain: Chain) -> Tensor:
    """diffusers' FeedForward with tanh GELU, of what `chain` yields."""
    if not untouched(ff):
        return ff(chain.dense())
    up, dropout, down = ff.net
    hidden = up.proj(read(chain, up.proj))
    return down(read(activated(lambda h: dropout(up.gelu(h)), hidden), down))


class GatedMlp(NamedTuple):
    """How one stream of a double block goes on after attention.

    norm, ff : the LayerNorm before the MLP, and the MLP
    gate : of the attention's output, (B, D)
    modulation : shift, scale and gate of the MLP, each (B, D)
    """

    norm: nn.LayerNorm
    ff: nn.Module
    gate: Tensor
    modulation: Sequence[Tensor]

    def __call__(self, x: Tensor, attention: Tensor) -> Tensor:
        """The stream x (B, T, D) after attention's output (B, T, D) and the MLP."""
        x = x + self.gate.unsqueeze(1) * attention
        shift, scale, gate = self.modulation
        return x + gate.unsqueeze(1) * feed_forward(self.ff, adaln(self.norm, x, shift, scale))


def finite_half(x: Tensor) -> Tensor:
    """As diffusers keeps float16 finite."""
    return x.clip(-65504, 65504) if x.dtype is torch.float16 else x
