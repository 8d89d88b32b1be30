"""More pipelines of diffusers that take pictures, or draw with sound: name -> `Case`."""

import torch
from image_pipelines import QWEN, QWEN_VAE, Z_IMAGE
from pipeline_cases import FLOW, SIZE, Case, frames, kl, numbers, ones, picture, two_texts, with_inputs
from video_pipelines import FLOW_VISION, SEES, UNIPC, VIDEO, WAN_VAE, wan

# ------------------------------------------------------------------------------------- HunyuanVideo 1.5

HUNYUAN = (
    "HunyuanVideo15Transformer3DModel",
    {
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 16,
        "text_embed_2_dim": 32,
        "image_embed_dim": 32,
        "rope_axes_dim": (4, 6, 6),
        "target_size": 16,
        "task_type": "i2v",
    },
)
HUNYUAN_VAE = (
    "AutoencoderKLHunyuanVideo15",
    {
        "latent_channels": 4,
        "block_out_channels": (16, 16),
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 2,
        "downsample_match_channel": False,
        "upsample_match_channel": False,
    },
)


def hunyuan_case(inputs, settings, **models):
    parts = {
        "scheduler": FLOW,
        "vae": HUNYUAN_VAE,
        "transformer": HUNYUAN,
        "guider": ("ClassifierFreeGuidance", {"guidance_scale": 2.0}),
        **models,
    }
    texts = with_inputs(
        two_texts((1, 8, 16), ones, mask_name="prompt_embeds_mask"),
        two_texts((1, 8, 32), ones, name="prompt_embeds_2", mask_name="prompt_embeds_mask_2"),
    )
    return Case(
        parts, with_inputs(texts, inputs), settings, attributes={"vision_num_semantic_tokens": 5}, calls=2
    )


# ------------------------------------------------------------------------------------------------ LTX-2

LTX2 = (
    "LTX2VideoTransformer3DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 1,
        "qk_norm": "rms_norm_across_heads",
        "caption_channels": 16,
        "rope_double_precision": False,
        "rope_type": "split",
    },
)
LTX2_CONNECTORS = (
    "pipelines.ltx2.connectors.LTX2TextConnectors",
    {
        "caption_channels": 16,
        "text_proj_in_factor": 2,
        "video_connector_num_attention_heads": 2,
        "video_connector_attention_head_dim": 8,
        "video_connector_num_layers": 1,
        "video_connector_num_learnable_registers": None,
        "audio_connector_num_attention_heads": 2,
        "audio_connector_attention_head_dim": 8,
        "audio_connector_num_layers": 1,
        "audio_connector_num_learnable_registers": None,
        "connector_rope_base_seq_len": 32,
        "rope_double_precision": False,
        "causal_temporal_positioning": False,
        "rope_type": "split",
    },
)
LTX2_VAE = (
    "AutoencoderKLLTX2Video",
    {
        "latent_channels": 4,
        "block_out_channels": (8,),
        "decoder_block_out_channels": (8,),
        "layers_per_block": (1,),
        "decoder_layers_per_block": (1, 1),
        "spatio_temporal_scaling": (True,),
        "decoder_spatio_temporal_scaling": (True,),
        "decoder_inject_noise": (False, False),
        "downsample_type": ("spatial",),
        "upsample_residual": (False,),
        "upsample_factor": (1,),
        "timestep_conditioning": False,
        "patch_size": 1,
        "patch_size_t": 1,
    },
)
LTX2_AUDIO = (
    "AutoencoderKLLTX2Audio",
    {
        "base_channels": 4,
        "ch_mult": (1,),
        "num_res_blocks": 1,
        "attn_resolutions": None,
        "in_channels": 2,
        "resolution": 32,
        "latent_channels": 2,
        "mid_block_add_attention": False,
        "mel_bins": 8,
    },
)
LTX2_SETTINGS = {
    **SIZE,
    "num_frames": 5,
    "guidance_scale": 2.0,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_guidance_scale": 2.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "spatio_temporal_guidance_blocks": None,
    "use_cross_timestep": False,
}


def ltx2_case(inputs=dict, settings=None):
    parts = {
        "scheduler": FLOW,
        "vae": LTX2_VAE,
        "audio_vae": LTX2_AUDIO,
        "connectors": LTX2_CONNECTORS,
        "transformer": LTX2,
    }
    return Case(
        parts, with_inputs(two_texts((1, 8, 16, 2), ones), inputs), {**LTX2_SETTINGS, **(settings or {})}
    )


# Eight channels: pictures of four, RGBA, are otherwise taken for latents.
LAYERED_VAE = {
    **QWEN_VAE[1],
    "input_channels": 4,
    "z_dim": 8,
    "latents_mean": [0.0] * 8,
    "latents_std": [1.0] * 8,
}
LAYERED = {
    **QWEN[1],
    "in_channels": 32,
    "out_channels": 8,
    "use_layer3d_rope": True,
    "use_additional_t_cond": True,
}
EDIT_PIPELINES = {
    "HunyuanVideo15Pipeline": hunyuan_case(dict, VIDEO),
    "HunyuanVideo15ImageToVideoPipeline": hunyuan_case(
        lambda: {"image": picture(16)}, {"num_frames": 9}, **FLOW_VISION
    ),
    "LTX2Pipeline": ltx2_case(),
    "LTX2ImageToVideoPipeline": ltx2_case(lambda: {"image": torch.rand(1, 3, 32, 32)}, {"image_crf": 0}),
    "WanAnimatePipeline": Case(
        {
            "scheduler": UNIPC,
            "vae": WAN_VAE,
            "transformer": wan(
                "WanAnimateTransformer3DModel",
                in_channels=36,
                latent_channels=16,
                image_dim=32,
                motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
                motion_encoder_size=16,
                motion_style_dim=8,
                motion_dim=4,
                motion_encoder_dim=16,
                face_encoder_hidden_dim=16,
                face_encoder_num_heads=2,
                inject_face_latents_blocks=1,
            ),
            **SEES,
        },
        with_inputs(
            two_texts((1, 8, 32)),
            lambda: {"image": picture(16), "pose_video": frames(5, 16), "face_video": frames(5, 16)},
        ),
        {"height": 16, "width": 16, "segment_frame_length": 5},
    ),
    "ZImageOmniPipeline": Case(
        {
            "scheduler": FLOW,
            "vae": kl(16),
            "transformer": (Z_IMAGE[0], {**Z_IMAGE[1], "siglip_feat_dim": 32}),
        },
        lambda: {"prompt_embeds": [[numbers(8, 16)]], "negative_prompt_embeds": [[numbers(8, 16)]]},
        SIZE,
    ),
    "QwenImageLayeredPipeline": Case(
        {
            "scheduler": FLOW,
            "vae": (QWEN_VAE[0], LAYERED_VAE),
            "text_encoder": SEES["image_encoder"],  # in whose dtype pictures are
            "transformer": (QWEN[0], LAYERED),
        },
        with_inputs(
            two_texts((1, 8, 16), ones, mask_name="prompt_embeds_mask"),
            lambda: {"image": picture(mode="RGBA")},
        ),
        {"true_cfg_scale": 2.0, "layers": 2},
        output_type="pt",  # diffusers 0.42 fails for latents, at the end
        attributes={"get_image_caption": lambda *_args, **_kwargs: "a cat"},
        functions={"calculate_dimensions": lambda _area, _ratio: (32, 32)},
        calls=2,
    ),
}
