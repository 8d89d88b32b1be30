"""LTX-2: blocks in which a video and an audio stream read the prompt, then each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from rtlynx.models.architecture import Architecture, AttentionRule, LayerRule, MlpRule, Stream
from rtlynx.models.fusion import feed_forward, read_by_attention
from rtlynx.models.ltx import BLOCK, modulation_of
from rtlynx.nn.prologue import Modulation, PrologueCall, rms_adaln, rmsnorm

Call = dict[str, Any]  # arguments of a block's call


class Names(NamedTuple):
    """How a block and its call name what belongs to one of the streams.

    prefix : of its modules, tables, tokens and masks
    temb, temb_prompt, rotary : arguments of the call
    """

    prefix: str
    temb: str
    temb_prompt: str
    rotary: str


VIDEO = Names("", "temb", "temb_prompt", "video_rotary_emb")
AUDIO = Names("audio_", "temb_audio", "temb_prompt_audio", "audio_rotary_emb")


def attention(
    attn: Any, prologue: PrologueCall, context: PrologueCall | Tensor | None = None, **others: Any
) -> Tensor:
    """`attn` of what `prologue` yields; its keys and values are of `context`, where there is one.

    A gate for each head (LTX-2.3) is dense: queries then read the dense chain, too.
    """
    gates = () if attn.to_gate_logits is None else (attn.to_gate_logits,)
    if context is None:
        inputs = read_by_attention(attn, prologue, attn.to_q, attn.to_k, attn.to_v, *gates)
        return attn(inputs, **others)
    inputs = read_by_attention(attn, prologue, attn.to_q, *gates)
    if isinstance(context, PrologueCall):
        return attn(inputs, read_by_attention(attn, context, attn.to_k, attn.to_v), **others)
    return attn(inputs, context, **others)


def prompted(block: Any, of: Names, call: Call, parameters: Sequence[Modulation]) -> Tensor:
    """One stream after self-attention and cross-attention to the prompt.

    parameters : shift, scale and gate of self-attention, of the MLP, and, in LTX-2.3, of the cross-attention.
    """

    def part(name: str) -> Any:
        return getattr(block, of.prefix + name)

    x, text = call[f"{of.prefix}hidden_states"], call[f"{of.prefix}encoder_hidden_states"]
    shift, scale, gate, _, _, _, *cross = parameters
    perturbed = ("perturbation_mask", "all_perturbed") if block.perturbed_attn else ()
    out = attention(
        part("attn1"),
        rms_adaln(part("norm1"), x, shift, scale),
        attention_mask=call.get(f"{of.prefix}self_attention_mask"),
        query_rotary_emb=call.get(of.rotary),
        **{name: call.get(name) for name in perturbed},
    )
    x = x + out * gate.whole()
    if block.cross_attn_adaln:
        table, temb = part("prompt_scale_shift_table"), call.get(of.temb_prompt)
        if temb is None:
            text_shift, text_scale = table[None, None].to(x).unbind(dim=2)
        else:
            text_shift, text_scale = (one.whole() for one in modulation_of(table, temb))
        text = text * (1 + text_scale) + text_shift
    norm = part("norm2")
    prologue = rms_adaln(norm, x, cross[0], cross[1]) if cross else rmsnorm(norm, x)
    mask = call.get(f"{of.prefix}encoder_attention_mask")
    out = attention(part("attn2"), prologue, text, attention_mask=mask)
    return x + (out * cross[2].whole() if cross else out)


def exchanged(block: Any, call: Call, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
    """Both streams after each has read the other."""
    table, audio_table = (
        block.video_a2v_cross_attn_scale_shift_table,
        block.audio_a2v_cross_attn_scale_shift_table,
    )
    # Of either: scale and shift for audio to video, then for video to audio.
    modulated = modulation_of(table[:4], call["temb_ca_scale_shift"])
    audio_modulated = modulation_of(audio_table[:4], call["temb_ca_audio_scale_shift"])

    def prologues(first: int) -> tuple[PrologueCall, PrologueCall]:
        scale, shift = modulated[first : first + 2]
        audio_scale, audio_shift = audio_modulated[first : first + 2]
        return (
            rms_adaln(block.audio_to_video_norm, video, shift, scale),
            rms_adaln(block.video_to_audio_norm, audio, audio_shift, audio_scale),
        )

    new_video, new_audio = video, audio
    rotary, audio_rotary = call.get("ca_video_rotary_emb"), call.get("ca_audio_rotary_emb")
    if call.get("use_a2v_cross_attention", True):
        reader, read = prologues(0)
        out = attention(
            block.audio_to_video_attn,
            reader,
            read,
            attention_mask=call.get("a2v_cross_attention_mask"),
            query_rotary_emb=rotary,
            key_rotary_emb=audio_rotary,
        )
        (gate,) = modulation_of(table[4:], call["temb_ca_gate"])
        new_video = video + gate.whole() * out
    if call.get("use_v2a_cross_attention", True):
        read, reader = prologues(2)
        out = attention(
            block.video_to_audio_attn,
            reader,
            read,
            attention_mask=call.get("v2a_cross_attention_mask"),
            query_rotary_emb=audio_rotary,
            key_rotary_emb=rotary,
        )
        (gate,) = modulation_of(audio_table[4:], call["temb_ca_audio_gate"])
        new_audio = audio + gate.whole() * out
    return new_video, new_audio


def block(
    block: Any, original: Callable[..., tuple[Tensor, Tensor]], *args: Any, **call: Any
) -> tuple[Tensor, Tensor]:
    """LTX2VideoTransformerBlock.forward as the model calls it, by name; otherwise it stays diffusers' own."""
    if args:
        return original(block, *args, **call)
    parameters = modulation_of(block.scale_shift_table, call["temb"])
    audio_parameters = modulation_of(block.audio_scale_shift_table, call["temb_audio"])
    video = prompted(block, VIDEO, call, parameters)
    audio = prompted(block, AUDIO, call, audio_parameters)
    video, audio = exchanged(block, call, video, audio)
    shift, scale, gate = parameters[3:6]
    out = feed_forward(block.ff, rms_adaln(block.norm3, video, shift, scale))
    video = video + out * gate.whole()
    shift, scale, gate = audio_parameters[3:6]
    audio_out = feed_forward(block.audio_ff, rms_adaln(block.audio_norm3, audio, shift, scale))
    return video, audio + audio_out * gate.whole()


def _self_attention(attn: str, stream: Stream) -> tuple[LayerRule, ...]:
    return (
        *(LayerRule(f"{BLOCK}.{attn}.to_{x}", "attention-in", stream, attn) for x in "qkv"),
        LayerRule(f"{BLOCK}.{attn}.to_out.0", "attention-out", stream),
    )


def _cross_attention(attn: str, reader: Stream, read: Stream) -> tuple[LayerRule, ...]:
    return (
        LayerRule(f"{BLOCK}.{attn}.to_q", "attention-in", reader),
        *(LayerRule(f"{BLOCK}.{attn}.to_{x}", "attention-in", read, attn) for x in "kv"),
        LayerRule(f"{BLOCK}.{attn}.to_out.0", "attention-out", reader),
    )


def _mlp(ff: str, stream: Stream) -> tuple[LayerRule, ...]:
    return (
        LayerRule(f"{BLOCK}.{ff}.net.0.proj", "mlp-up", stream),
        LayerRule(f"{BLOCK}.{ff}.net.2", "mlp-down", stream),
    )


ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

LTX2 = Architecture(
    class_name="LTX2VideoTransformer3DModel",
    rules=(
        *_self_attention("attn1", "image"),
        *_cross_attention("attn2", "image", "text"),
        *_cross_attention("audio_to_video_attn", "image", "audio"),
        *_mlp("ff", "image"),
        *_self_attention("audio_attn1", "audio"),
        *_cross_attention("audio_attn2", "audio", "text"),
        *_cross_attention("video_to_audio_attn", "audio", "image"),
        *_mlp("audio_ff", "audio"),
    ),
    attentions=tuple(
        AttentionRule(BLOCK, attn, (f"{attn}.to_v",), (f"{attn}.to_out.0",)) for attn in ATTENTIONS
    ),
    mlps=tuple(
        MlpRule(BLOCK, (ff, f"{ff}.net.0"), (f"{ff}.net.0.proj",), f"{ff}.net.2") for ff in ("ff", "audio_ff")
    ),
    fused={"LTX2VideoTransformerBlock": block},
)
