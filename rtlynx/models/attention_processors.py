"""What diffusers' attention processors compute, with queries and keys handed on before their norms.

Each function here makes a processor's `__call__`. The processor's own serves what is not written out here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from rtlynx.models import flux2, qwen_image, z_image
from rtlynx.models.fusion import Heads, attend, heads

Call = Callable[..., Any]


def _flux_streams(attn: Any, hidden_states: Any, encoder_hidden_states: Any, rotary: Any) -> list[Heads]:
    """Text, where there is a stream of its own, and image; `rotary` is cosine and sine of all tokens."""
    layers, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
    if attn.added_kv_proj_dim is None:
        return [heads(attn, hidden_states, layers, norms, tuple(rotary or ()))]
    tokens = encoder_hidden_states.shape[1]
    of_text, of_image = (tuple(one[part] for one in rotary or ()) for part in _split_at(tokens))
    text_layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text_norms = (attn.norm_added_q, attn.norm_added_k)
    return [
        heads(attn, encoder_hidden_states, text_layers, text_norms, of_text),
        heads(attn, hidden_states, layers, norms, of_image),
    ]


def _split_at(tokens: int) -> tuple[slice, slice]:
    return slice(None, tokens), slice(tokens, None)


def _through(layers: Sequence[Call], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def flux(original: Call, through_out: bool = False) -> Call:
    """`through_out`: attention over one stream goes through the attention's own output layer, too."""

    def __call__(
        self: Any,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if attn.fused_projections:
            return original(
                self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        streams = _flux_streams(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        y = attend(attn, streams, attention_mask)
        if encoder_hidden_states is None:
            return _through(attn.to_out, y) if through_out else y
        of_text, of_image = _split_at(encoder_hidden_states.shape[1])
        return _through(attn.to_out, y[:, of_image]), attn.to_add_out(y[:, of_text])

    return __call__


def flux2_parallel(_original: Call) -> Call:
    def __call__(
        self: Any,
        attn: Any,
        hidden_states: Any,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        return flux2.attention_of(attn, hidden_states, attention_mask, image_rotary_emb)

    return __call__


def qwen(original: Call) -> Call:
    def __call__(
        self: Any,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if encoder_hidden_states is None or attention_mask is not None:  # which it refuses
            return original(
                *(self, attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask),
                *(attention_mask, image_rotary_emb),
            )
        return qwen_image.attention_of(
            attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, image_rotary_emb
        )

    return __call__


def z_single_stream(_original: Call) -> Call:
    def __call__(
        self: Any,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        return z_image.attention_of(attn, hidden_states, attention_mask, freqs_cis)

    return __call__


# Name of a processor's class -> what makes its `__call__`. Wan's norms span all heads: its own is as good.
FUSED: dict[str, Callable[[Call], Call]] = {
    "Flux2AttnProcessor": partial(flux, through_out=True),
    "Flux2ParallelSelfAttnProcessor": flux2_parallel,
    "FluxAttnProcessor": flux,
    "QwenDoubleStreamAttnProcessor2_0": qwen,
    "ZSingleStreamAttnProcessor": z_single_stream,
}
