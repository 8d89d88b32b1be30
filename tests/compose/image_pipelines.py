"""Other pipelines of diffusers that draw pictures: name -> `Case`."""

import zlib

import diffusers
import torch
from flux_pipelines import FLUX2_VAE
from pipeline_cases import (
    FLOW,
    SHIFTED,
    SIZE,
    STRENGTH,
    Case,
    image,
    kl,
    masked,
    numbers,
    ones,
    two_texts,
    with_inputs,
)

# --------------------------------------------------------------------------------------------- Qwen-Image

QWEN = (
    "QwenImageTransformer2DModel",
    {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    },
)
QWEN_VAE = (
    "AutoencoderKLQwenImage",
    {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    },
)


def qwen_case(inputs=dict, settings=None, **more):
    texts = two_texts((1, 8, 16), ones, mask_name="prompt_embeds_mask")
    parts = {"scheduler": FLOW, "vae": QWEN_VAE, "transformer": QWEN}
    settings = {**SIZE, "true_cfg_scale": 2.0, **(settings or {})}
    return Case(parts, with_inputs(texts, inputs), settings, calls=2, **more)


SMALL = {"functions": {"calculate_dimensions": lambda _area, _ratio: (32, 32, None)}}
SMALL_PLUS = {"functions": {"calculate_dimensions": lambda _area, _ratio: (32, 32)}}


QWENS = {
    "QwenImagePipeline": qwen_case(),
    "QwenImageImg2ImgPipeline": qwen_case(image, STRENGTH),
    "QwenImageInpaintPipeline": qwen_case(masked, STRENGTH),
    "QwenImageEditPipeline": qwen_case(image, **SMALL),
    "QwenImageEditInpaintPipeline": qwen_case(masked, STRENGTH, **SMALL),
    "QwenImageEditPlusPipeline": qwen_case(image, **SMALL_PLUS),
}

# ------------------------------------------------------------------------------------------------ Z-Image

Z_IMAGE = (
    "ZImageTransformer2DModel",
    {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 16,
        "dim": 48,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 8, 8],
        "axes_lens": [256, 32, 32],
    },
)


def z_case(inputs=dict, settings=None):
    def texts():
        return {"prompt_embeds": [numbers(8, 16)], "negative_prompt_embeds": [numbers(8, 16)]}

    parts = {"scheduler": FLOW, "vae": kl(16), "transformer": Z_IMAGE}
    return Case(parts, with_inputs(texts, inputs), {**SIZE, **(settings or {})})


Z_IMAGES = {
    "ZImagePipeline": z_case(),
    "ZImageImg2ImgPipeline": z_case(image, STRENGTH),
    "ZImageInpaintPipeline": z_case(masked, STRENGTH),
}

# ----------------------------------------------------------------------------------------------------- SD3

SD3 = (
    "SD3Transformer2DModel",
    {
        "sample_size": 32,
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 64,
        "out_channels": 4,
    },
)


def sd3_case(inputs=dict, settings=None, channels=4):
    transformer = SD3[0], {**SD3[1], "in_channels": channels, "out_channels": channels}
    parts = {"scheduler": FLOW, "vae": kl(channels), "transformer": transformer}
    texts = with_inputs(two_texts((1, 8, 32)), two_texts((1, 64), name="pooled_prompt_embeds"))
    return Case(parts, with_inputs(texts, inputs), {"height": 16, "width": 16, **(settings or {})})


SD3S = {
    "StableDiffusion3Pipeline": sd3_case(),
    "StableDiffusion3Img2ImgPipeline": sd3_case(image, STRENGTH),
    "StableDiffusion3InpaintPipeline": sd3_case(masked, STRENGTH, 16),
    "StableDiffusion3PAGPipeline": sd3_case(),
}

# -------------------------------------------------------------------------------------------------- others

SANA = {
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 32,
    "caption_channels": 16,
    "sample_size": 32,
}
DC = (
    "AutoencoderDC",
    {
        "latent_channels": 4,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": [1, 1],
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "attention_head_dim": 2,
    },
)
PIXART = (
    "PixArtTransformer2DModel",
    {
        "sample_size": 8,
        "num_layers": 1,
        "patch_size": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_channels": 32,
        "in_channels": 4,
        "cross_attention_dim": 32,
        "out_channels": 8,
    },
)
HUNYUAN_VAE = (
    "AutoencoderKLHunyuanImage",
    {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "spatial_compression_ratio": 8,
        "sample_size": 32,
    },
)
IDEOGRAM = (
    "Ideogram4Transformer2DModel",
    {
        "in_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "adaln_dim": 8,
        "llm_features_dim": 32,
        "mrope_section": (4, 2, 2),
    },
)


def ideogram_text(prompt, grid_h, grid_w, max_sequence_length, device):
    """In place of its text encoder: embeddings by the letters of prompts, and where text and picture lie."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    text = torch.zeros(len(prompts), max_sequence_length + grid_h * grid_w, 32)
    for row, one in zip(text, prompts, strict=True):
        generator = torch.Generator().manual_seed(zlib.crc32(one.encode()))
        row[:max_sequence_length] = torch.randn(max_sequence_length, 32, generator=generator)
    lengths = [max_sequence_length] * len(prompts)
    ids = diffusers.Ideogram4Pipeline._prepare_ids(lengths, grid_h, grid_w, max_sequence_length, device)
    return text.to(device), *ids


OTHERS = {
    "Ideogram4Pipeline": Case(
        {
            "scheduler": FLOW,
            "vae": FLUX2_VAE,
            "transformer": IDEOGRAM,
            "unconditional_transformer": IDEOGRAM,
        },
        # (With more than a text, prompts are drawn one by one.)
        lambda: {"prompt": f"{int(torch.randint(100, (1,)))} cats", "guidance_scale": 2.0},
        {"height": 16, "width": 16, "max_sequence_length": 8, "guidance_schedule": None},
        attributes={"encode_prompt": ideogram_text},
    ),
    "SanaPipeline": Case(
        {"scheduler": FLOW, "vae": DC, "transformer": ("SanaTransformer2DModel", SANA)},
        two_texts((1, 8, 16), ones),
        {**SIZE, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "SanaSprintPipeline": Case(
        {
            "scheduler": ("SCMScheduler", {}),
            "vae": DC,
            "transformer": (
                "SanaTransformer2DModel",
                {**SANA, "qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
            ),
        },
        lambda: {"prompt_embeds": numbers(1, 8, 16), "prompt_attention_mask": ones(1, 8)},
        {**SIZE, "use_resolution_binning": False},
    ),
    "PixArtSigmaPipeline": Case(
        {"scheduler": ("DDIMScheduler", {}), "vae": kl(4), "transformer": PIXART},
        two_texts((1, 8, 32), ones),
        {**SIZE, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "PixArtAlphaPipeline": Case(
        {"scheduler": ("DDIMScheduler", {}), "vae": kl(4), "transformer": PIXART},
        two_texts((1, 8, 32), ones),
        {**SIZE, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "AuraFlowPipeline": Case(
        {
            "scheduler": FLOW,
            "vae": kl(4),
            "transformer": (
                "AuraFlowTransformer2DModel",
                {
                    "sample_size": 32,
                    "patch_size": 2,
                    "in_channels": 4,
                    "num_mmdit_layers": 1,
                    "num_single_dit_layers": 1,
                    "attention_head_dim": 8,
                    "num_attention_heads": 4,
                    "caption_projection_dim": 32,
                    "joint_attention_dim": 32,
                    "out_channels": 4,
                    "pos_embed_max_size": 256,
                },
            ),
        },
        two_texts((1, 8, 32), ones),
        SIZE,
    ),
    "Lumina2Pipeline": Case(
        {
            "scheduler": FLOW,
            "vae": kl(4),
            "transformer": (
                "Lumina2Transformer2DModel",
                {
                    "sample_size": 4,
                    "patch_size": 2,
                    "in_channels": 4,
                    "hidden_size": 32,
                    "num_layers": 2,
                    "num_attention_heads": 2,
                    "num_kv_heads": 1,
                    "multiple_of": 16,
                    "axes_dim_rope": (8, 4, 4),
                    "axes_lens": (300, 64, 64),
                    "cap_feat_dim": 16,
                },
            ),
        },
        two_texts((1, 8, 16), ones),
        SIZE,
        calls=2,
    ),
    "HiDreamImagePipeline": Case(
        {
            "scheduler": FLOW,
            "vae": kl(4),
            "transformer": (
                "HiDreamImageTransformer2DModel",
                {
                    "patch_size": 2,
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "attention_head_dim": 8,
                    "num_attention_heads": 4,
                    "caption_channels": [32, 16],
                    "text_emb_dim": 64,
                    "num_routed_experts": 4,
                    "num_activated_experts": 2,
                    "axes_dims_rope": (4, 2, 2),
                    "max_resolution": (32, 32),
                    "llama_layers": (0, 1),
                },
            ),
        },
        with_inputs(
            two_texts((1, 8, 32), name="prompt_embeds_t5"),
            two_texts((2, 1, 8, 16), name="prompt_embeds_llama3"),
            two_texts((1, 64), name="pooled_prompt_embeds"),
        ),
        SIZE,
        attributes={"default_sample_size": 16},
    ),
    "CogView4Pipeline": Case(
        {
            "scheduler": SHIFTED,
            "vae": kl(4),
            "transformer": (
                "CogView4Transformer2DModel",
                {
                    "patch_size": 2,
                    "in_channels": 4,
                    "num_layers": 1,
                    "attention_head_dim": 8,
                    "num_attention_heads": 4,
                    "out_channels": 4,
                    "text_embed_dim": 32,
                    "time_embed_dim": 8,
                    "condition_dim": 4,
                },
            ),
        },
        two_texts((1, 8, 32)),
        SIZE,
        calls=2,
    ),
    "CogView3PlusPipeline": Case(
        {
            "scheduler": ("CogVideoXDDIMScheduler", {}),
            "vae": kl(4),
            "transformer": (
                "CogView3PlusTransformer2DModel",
                {
                    "patch_size": 2,
                    "in_channels": 4,
                    "num_layers": 1,
                    "attention_head_dim": 8,
                    "num_attention_heads": 4,
                    "out_channels": 4,
                    "text_embed_dim": 32,
                    "time_embed_dim": 8,
                    "condition_dim": 2,
                    "pos_embed_max_size": 32,
                    "sample_size": 8,
                },
            ),
        },
        two_texts((1, 8, 32)),
        SIZE,
    ),
    "BriaPipeline": Case(
        {
            "scheduler": FLOW,
            "vae": kl(4),
            "transformer": (
                "BriaTransformer2DModel",
                {
                    "patch_size": 1,
                    "in_channels": 16,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": 32,
                    "pooled_projection_dim": None,
                    "axes_dims_rope": [4, 4, 8],
                },
            ),
        },
        two_texts((1, 8, 32)),
        SIZE,
    ),
    "OvisImagePipeline": Case(
        {
            "scheduler": FLOW,
            "vae": kl(1),
            "transformer": (
                "OvisImageTransformer2DModel",
                {
                    "patch_size": 1,
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": 32,
                    "axes_dims_rope": (4, 4, 8),
                },
            ),
        },
        two_texts((1, 8, 32)),
        {**SIZE, "negative_prompt": None},
        calls=2,
    ),
    "DiTPipeline": Case(
        {
            "scheduler": ("DDIMScheduler", {}),
            "vae": kl(4),
            "transformer": (
                "DiTTransformer2DModel",
                {
                    "sample_size": 8,
                    "num_layers": 1,
                    "patch_size": 2,
                    "attention_head_dim": 8,
                    "num_attention_heads": 4,
                    "in_channels": 4,
                    "out_channels": 8,
                    "num_embeds_ada_norm": 1000,
                },
            ),
        },
        lambda: {"class_labels": torch.randint(1000, (1,)).tolist()},
        {"output_type": "np"},
    ),
    "HunyuanImagePipeline": Case(
        {
            "scheduler": FLOW,
            "vae": HUNYUAN_VAE,
            "transformer": (
                "HunyuanImageTransformer2DModel",
                {
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_attention_heads": 4,
                    "attention_head_dim": 8,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "num_refiner_layers": 1,
                    "patch_size": (1, 1),
                    "guidance_embeds": False,
                    "text_embed_dim": 32,
                    "text_embed_2_dim": 32,
                    "rope_axes_dim": (4, 4),
                },
            ),
        },
        with_inputs(
            two_texts((1, 8, 32), ones, mask_name="prompt_embeds_mask"),
            two_texts((1, 8, 32), ones, name="prompt_embeds_2", mask_name="prompt_embeds_mask_2"),
        ),
        SIZE,
    ),
}

IMAGE_PIPELINES = {**QWENS, **Z_IMAGES, **SD3S, **OTHERS}
