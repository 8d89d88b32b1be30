"""The layers of each architecture by name, written out from the architectures."""

from helpers import (
    chroma_call,
    flux2_call,
    flux_call,
    hunyuan_video15_call,
    ltx2_call,
    ltx_call,
    qwen_call,
    sd3_call,
    tiny_chroma,
    tiny_flux,
    tiny_flux2,
    tiny_hunyuan_video15,
    tiny_ltx,
    tiny_ltx2,
    tiny_qwen,
    tiny_sd3,
    tiny_wan,
    tiny_wan_of_picture,
    tiny_z_image,
    wan_call,
    wan_picture_call,
    z_image_call,
)

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
LAST_DOUBLE = "transformer_blocks.1"


def names(block, *layers):
    return [f"{block}.{layer}" for layer in layers]


ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
SECOND_ATTENTION = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
Z_LAYER = (
    *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
)
FLUX_SINGLE = names(SINGLE, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
FLUX_IMAGE = [*names(DOUBLE, *ATTENTION, "ff.net.0.proj", "ff.net.2"), *FLUX_SINGLE]
FLUX_TEXT = names(DOUBLE, *ADDED, "ff_context.net.0.proj", "ff_context.net.2")
FLUX2_SINGLE = names(SINGLE, "attn.to_qkv_mlp_proj", "attn.to_out")
WAN_SELF, WAN_CROSS = "blocks.0.attn1", "blocks.0.attn2"
WAN_VIDEO = [
    *names(WAN_SELF, "to_q", "to_k", "to_v", "to_out.0"),
    *names(WAN_CROSS, "to_q", "to_out.0"),
    *names("blocks.0.ffn.net", "0.proj", "2"),
]
LTX_VIDEO = [
    *names(f"{DOUBLE}.attn1", "to_q", "to_k", "to_v", "to_out.0"),
    *names(f"{DOUBLE}.attn2", "to_q", "to_out.0"),
    *names(f"{DOUBLE}.ff.net", "0.proj", "2"),
]
LTX2_VIDEO = [
    *LTX_VIDEO,
    *names(f"{DOUBLE}.audio_to_video_attn", "to_q", "to_out.0"),
    *names(f"{DOUBLE}.video_to_audio_attn", "to_k", "to_v"),
]
LTX2_AUDIO = [
    *names(f"{DOUBLE}.audio_attn1", "to_q", "to_k", "to_v", "to_out.0"),
    *names(f"{DOUBLE}.audio_attn2", "to_q", "to_out.0"),
    *names(f"{DOUBLE}.audio_to_video_attn", "to_k", "to_v"),
    *names(f"{DOUBLE}.video_to_audio_attn", "to_q", "to_out.0"),
    *names(f"{DOUBLE}.audio_ff.net", "0.proj", "2"),
]
LTX2_TEXT = [name for attn in ("attn2", "audio_attn2") for name in names(f"{DOUBLE}.{attn}", "to_k", "to_v")]

# name -> model, its call, image and joint layers, text and audio layers: written out from the architectures.
MODELS = {
    "flux": (
        tiny_flux,
        flux_call,
        FLUX_IMAGE,
        FLUX_TEXT,
    ),
    "chroma": (
        tiny_chroma,
        chroma_call,
        FLUX_IMAGE,
        FLUX_TEXT,
    ),
    "flux2": (
        tiny_flux2,
        flux2_call,
        [*names(DOUBLE, *ATTENTION, "ff.linear_in", "ff.linear_out"), *FLUX2_SINGLE],
        names(DOUBLE, *ADDED, "ff_context.linear_in", "ff_context.linear_out"),
    ),
    "qwen": (
        tiny_qwen,
        qwen_call,
        names(DOUBLE, *ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2"),
        names(DOUBLE, *ADDED, "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ),
    "sd3": (
        tiny_sd3,
        sd3_call,
        [
            *names(DOUBLE, *ATTENTION, *SECOND_ATTENTION, "ff.net.0.proj", "ff.net.2"),
            *names(LAST_DOUBLE, *ATTENTION, "ff.net.0.proj", "ff.net.2"),
        ],
        # Nothing reads the text after the last block.
        [
            *names(DOUBLE, *ADDED, "ff_context.net.0.proj", "ff_context.net.2"),
            *names(LAST_DOUBLE, *ADDED[:3]),
        ],
    ),
    "z_image": (
        tiny_z_image,
        z_image_call,
        [*names("noise_refiner.0", *Z_LAYER), *names("layers.0", *Z_LAYER)],
        names("context_refiner.0", *Z_LAYER),
    ),
    "wan": (
        tiny_wan,
        wan_call,
        WAN_VIDEO,
        names(WAN_CROSS, "to_k", "to_v"),
    ),
    "wan_with_picture": (
        tiny_wan_of_picture,
        wan_picture_call,
        WAN_VIDEO,
        names(WAN_CROSS, "to_k", "to_v", "add_k_proj", "add_v_proj"),
    ),
    "ltx": (tiny_ltx, ltx_call, LTX_VIDEO, names(f"{DOUBLE}.attn2", "to_k", "to_v")),
    "ltx2": (tiny_ltx2, ltx2_call, LTX2_VIDEO, [*LTX2_AUDIO, *LTX2_TEXT]),
    "hunyuan_video15": (
        tiny_hunyuan_video15,
        hunyuan_video15_call,
        names(DOUBLE, *ATTENTION, "ff.net.0.proj", "ff.net.2"),
        names(DOUBLE, *ADDED, "ff_context.net.0.proj", "ff_context.net.2"),
    ),
}
