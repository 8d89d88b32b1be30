"""Transformers at full size with random weights, and the inputs of one denoising step."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    LTX2VideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor

from rtlynx.timing import hunyuan_video15, qwen_edit
from rtlynx.timing.sampling import (
    CHROMA_SAMPLING,
    FLUX2_DEV_SAMPLING,
    FLUX2_KLEIN_SAMPLING,
    FLUX_SAMPLING,
    HUNYUAN_SAMPLING,
    LTX2_SAMPLING,
    QWEN_IMAGE_SAMPLING,
    SD3_SAMPLING,
    WAN_SAMPLING,
    Z_IMAGE_SAMPLING,
    Sampling,
    Size,
)

Call = dict[str, Any]  # arguments of one forward
TIMESTEP = 0.5  # of every call, whatever noise level it is timed at: time does not depend on it
# Of a square picture in a prompt of Qwen-Image-Edit: 384 by 384 pixels, which Qwen2.5-VL rounds to 14 by 14
# tokens of 28 by 28 pixels.
SHOWN_TOKENS = 14 * 14


class FullModel(NamedTuple):
    """One transformer.

    build : the module, its class's defaults but for what is given here
    calls : arguments of the forwards of one step: two where guidance takes two
    size : of a common picture or video and prompt
    sampling : which steps a picture usually takes
    """

    name: str
    build: Callable[[], Any]
    calls: Callable[[Size, Callable[..., Tensor]], list[Call]]
    size: Size
    sampling: Sampling


def _flux(size: Size, normal: Callable[..., Tensor]) -> list[Call]:
    side, batch = size.side // 16, size.batch
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None, :]
    tokens = normal(batch, size.image_tokens, 64)
    return [
        {
            "hidden_states": tokens,
            "encoder_hidden_states": normal(batch, size.text_tokens, 4096),
            "pooled_projections": normal(batch, 768),
            "timestep": tokens.new_full((batch,), TIMESTEP),
            "guidance": tokens.new_full((batch,), 3.5, dtype=torch.float32),
            "img_ids": ids.view(-1, 3).to(tokens.device),
            "txt_ids": tokens.new_zeros(size.text_tokens, 3, dtype=torch.float32),
        }
    ]


class _Constant(torch.nn.Module):
    """Gives the same row whatever it is called with, which tells how many."""

    def __init__(self, row: Tensor) -> None:
        super().__init__()
        self.register_buffer("row", row)

    def forward(self, x: Tensor) -> Tensor:
        row: Any = self.row
        return row.expand(len(x), -1)


def _chroma1() -> Any:
    model: Any = ChromaTransformer2DModel()
    # It embeds guidance 0 on the host in each call, and a CUDA graph holds no copy from there.
    embed = model.time_text_embed
    embed.guidance_proj = _Constant(embed.guidance_proj(torch.zeros(1)))
    return model


def _chroma(size: Size, normal: Callable[..., Tensor]) -> list[Call]:
    """With guidance: a prompt, and a negative one, both padded; padding is masked, and here there is none."""
    (call,) = _flux(size, normal)
    kept = {name: call[name] for name in ("hidden_states", "timestep", "img_ids", "txt_ids")}
    tokens = size.text_tokens + size.image_tokens
    mask = torch.ones(size.batch, tokens, dtype=torch.bool, device=call["hidden_states"].device)
    return [
        {
            **kept,
            "encoder_hidden_states": normal(size.batch, size.text_tokens, 4096),
            "attention_mask": mask,
        }
        for _ in range(2)
    ]


def _flux2_klein_4b() -> Flux2Transformer2DModel:
    """The class's defaults are those of dev; these sizes are of the published FLUX.2-klein-4B."""
    return Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )


def _flux2_klein(size: Size, normal: Callable[..., Tensor]) -> list[Call]:
    return [_flux2(size, normal, text_width=7680)]


def _flux2_dev(size: Size, normal: Callable[..., Tensor]) -> list[Call]:
    call = _flux2(size, normal, text_width=15_360)
    tokens = call["hidden_states"]
    return [{**call, "guidance": tokens.new_full((size.batch,), 4.0, dtype=torch.float32)}]


def _flux2(size: Size, normal: Callable[..., Tensor], *, text_width: int) -> Call:
    side, batch = size.side // 16, size.batch
    tokens = normal(batch, size.image_tokens, 128)

    def ids(*sizes: int) -> Tensor:
        positions = torch.cartesian_prod(*map(torch.arange, sizes))
        return positions.expand(batch, -1, -1).to(tokens.device)

    return {
        "hidden_states": tokens,
        "encoder_hidden_states": normal(batch, size.text_tokens, text_width),
        "timestep": tokens.new_full((batch,), TIMESTEP),
        "img_ids": ids(1, side, side, 1),
        "txt_ids": ids(1, 1, 1, size.text_tokens),
    }


def _qwen_image(size: Size, normal: Callable[..., Tensor]) -> list[Call]:
    """With guidance: a prompt, and a negative one."""
    side, batch = size.side // 16, size.batch
    tokens = normal(batch, size.image_tokens, 64)
    return [
        {
            "hidden_states": tokens,
            "encoder_hidden_states": normal(batch, length, 3584),
            "timestep": tokens.new_full((batch,), TIMESTEP),
            "img_shapes": [[(1, side, side)]] * batch,
        }
        for length in (size.text_tokens, max(1, size.text_tokens // 4))
    ]


def _qwen_edit_2511() -> Any:
    model: Any = QwenImageTransformer2DModel(zero_cond_t=True)
    model.forward = MethodType(qwen_edit.forward, model)
    return model


def _qwen_edit(size: Size, normal: Callable[..., Tensor]) -> list[Call]:
    """Tokens of the edited picture, as large as the drawn one, behind those of the drawn one.

    Both prompts show it to the encoder of text besides.
    """
    side, batch = size.side // 16, size.batch
    calls = _qwen_image(size, normal)
    tokens = normal(batch, 2 * size.image_tokens, 64)
    for call in calls:
        words = call["encoder_hidden_states"]
        shown = normal(batch, SHOWN_TOKENS + words.shape[1], 3584)
        shapes = [[(1, side, side)] * 2] * batch
        call |= {"hidden_states": tokens, "encoder_hidden_states": shown, "img_shapes": shapes}
    return calls


def _sd35_large() -> Any:
    """The class's defaults are those of SD3 medium; these sizes are of the published SD3.5 large."""
    model: Any = SD3Transformer2DModel(
        num_layers=38,
        num_attention_heads=38,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )
    model._repeated_blocks = ["JointTransformerBlock"]  # diffusers declares none
    return model


def _sd3(size: Size, normal: Callable[..., Tensor]) -> list[Call]:
    """With guidance: a prompt and a negative one in one batch; 77 tokens of CLIP and 256 of T5 for each."""
    batch, side = 2 * size.batch, size.side // 8
    latents = normal(batch, 16, side, side)
    return [
        {
            "hidden_states": latents,
            "encoder_hidden_states": normal(batch, size.text_tokens, 4096),
            "pooled_projections": normal(batch, 2048),
            "timestep": latents.new_full((batch,), TIMESTEP),
        }
    ]


def _z_image(size: Size, normal: Callable[..., Tensor]) -> list[Call]:
    side = size.side // 8
    latents = [normal(16, 1, side, side) for _ in range(size.batch)]
    return [
        {
            "x": latents,
            "t": latents[0].new_full((size.batch,), TIMESTEP),
            "cap_feats": [normal(size.text_tokens, 2560) for _ in range(size.batch)],
        }
    ]


def _wan(size: Size, normal: Callable[..., Tensor]) -> list[Call]:
    """With guidance: a prompt, and a negative one, both padded."""
    latents = normal(size.batch, 16, *size.latents)
    return [
        {
            "hidden_states": latents,
            "encoder_hidden_states": normal(size.batch, size.text_tokens, 4096),
            "timestep": latents.new_full((size.batch,), TIMESTEP),
        }
        for _ in range(2)
    ]


def _hunyuan_video15() -> Any:
    """The class's defaults are those of the published 480p weights, but for the task."""
    model: Any = HunyuanVideo15Transformer3DModel(task_type="t2v")
    model.forward = MethodType(hunyuan_video15.forward, model)
    return model


def _hunyuan(size: Size, normal: Callable[..., Tensor]) -> list[Call]:
    """With guidance: a prompt, and a negative one, both padded. No glyphs, no picture to begin with."""
    batch = size.batch
    # What is drawn, the first frame's latents and where they are given: of text alone zeros.
    drawn, given = normal(batch, 32, *size.grid), normal(batch, 33, *size.grid) * 0
    latents = torch.cat([drawn, given], dim=1)
    pad = hunyuan_video15

    def padded(valid: int, length: int) -> Tensor:
        return (torch.arange(length, device=latents.device) < valid).expand(batch, -1).long()

    return [
        {
            "hidden_states": latents,
            "timestep": latents.new_full((batch,), TIMESTEP),
            "encoder_hidden_states": normal(batch, pad.WORD_TOKENS, 3584),
            "encoder_attention_mask": padded(words, pad.WORD_TOKENS),
            "encoder_hidden_states_2": normal(batch, pad.GLYPH_TOKENS, 1472) * 0,
            "encoder_attention_mask_2": padded(0, pad.GLYPH_TOKENS),
            "image_embeds": normal(batch, pad.IMAGE_TOKENS, 1152) * 0,
        }
        for words in (size.text_tokens, max(1, size.text_tokens // 4))
    ]


def _ltx2(size: Size, normal: Callable[..., Tensor]) -> list[Call]:
    """With guidance, for which the pipeline puts a negative prompt and the prompt in one forward.

    Audio is 25 tokens for a second of 24 frames. Positions are made beforehand, as by the pipeline. Its mask
    of prompts hides nothing: what they have beyond their words are registers.
    """
    from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed

    batch, (frames, height, width) = 2 * size.batch, size.grid
    audio_tokens = max(1, round(size.frames / 24 * 25))
    tokens = normal(batch, size.image_tokens, 128)
    video = LTX2AudioVideoRotaryPosEmbed(4096)
    audio = LTX2AudioVideoRotaryPosEmbed(2048, scale_factors=(4,), modality="audio")
    return [
        {
            "hidden_states": tokens,
            "audio_hidden_states": normal(batch, audio_tokens, 128),
            "encoder_hidden_states": normal(batch, size.text_tokens, 3840),
            "audio_encoder_hidden_states": normal(batch, size.text_tokens, 3840),
            "timestep": tokens.new_full((batch,), TIMESTEP),
            "video_coords": video.prepare_video_coords(batch, frames, height, width, tokens.device),
            "audio_coords": audio.prepare_audio_coords(batch, audio_tokens, tokens.device),
        }
    ]


MODELS = {
    model.name: model
    for model in (
        FullModel(
            "flux1-dev", lambda: FluxTransformer2DModel(guidance_embeds=True), _flux, Size(), FLUX_SAMPLING
        ),
        FullModel(
            *("qwen-image", lambda: QwenImageTransformer2DModel(), _qwen_image),
            *(Size(text_tokens=128), QWEN_IMAGE_SAMPLING),
        ),
        FullModel("qwen-edit", _qwen_edit_2511, _qwen_edit, Size(text_tokens=128), QWEN_IMAGE_SAMPLING),
        FullModel(
            "z-image", lambda: ZImageTransformer2DModel(), _z_image, Size(text_tokens=32), Z_IMAGE_SAMPLING
        ),
        # One of the two transformers, of which each step takes one. The class's defaults are its 14 billion
        # parameters; size and frames are the defaults of WanPipeline: 32,760 tokens.
        FullModel(
            "wan2.2-14b",
            lambda: WanTransformer3DModel(),
            _wan,
            Size(side=480, width=832, frames=81),
            WAN_SAMPLING,
        ),
        # The class's defaults are its 19 billion parameters, but for the form of rotary embeddings; size and
        # frames are the defaults of LTX2Pipeline: 6,144 tokens of video, 126 of audio.
        FullModel(
            "ltx-2",
            lambda: LTX2VideoTransformer3DModel(rope_type="split"),
            _ltx2,
            Size(side=512, text_tokens=1024, width=768, frames=121, token=(8, 32, 32)),
            LTX2_SAMPLING,
        ),
        # The weights for 480p draw a video of 848 by 480 pixels by default: 49,290 tokens.
        FullModel(
            "hunyuan-video-1.5",
            _hunyuan_video15,
            _hunyuan,
            Size(side=480, width=848, frames=121, text_tokens=128),
            HUNYUAN_SAMPLING,
        ),
        FullModel("flux2-klein", _flux2_klein_4b, _flux2_klein, Size(), FLUX2_KLEIN_SAMPLING),
        # The class's defaults are its 32 billion parameters.
        FullModel("flux2-dev", lambda: Flux2Transformer2DModel(), _flux2_dev, Size(), FLUX2_DEV_SAMPLING),
        FullModel("sd3.5-large", _sd35_large, _sd3, Size(text_tokens=77 + 256), SD3_SAMPLING),
        FullModel("chroma", _chroma1, _chroma, Size(), CHROMA_SAMPLING),
    )
}


def full_model(name: str) -> str:
    """`name`, if it is one of MODELS; ValueError otherwise."""
    if name not in MODELS:
        raise ValueError(f"no full-size model is called {name!r}; there are {', '.join(MODELS)}")
    return name


def build(model: FullModel) -> Any:
    """On the card in bfloat16; the default device is left as it was, which compilation needs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return model.build().eval().requires_grad_(False).to(torch.bfloat16)
    finally:
        torch.set_default_dtype(before)


def normals(seed: int) -> Callable[..., Tensor]:
    """Fresh random bfloat16 on the card."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return lambda *shape: torch.randn(*shape, device="cuda", generator=generator, dtype=torch.bfloat16)
