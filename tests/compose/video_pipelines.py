"""The pipelines of diffusers that draw videos: name -> `Case`."""

import torch
import transformers
from pipeline_cases import FLOW, SIZE, Case, frames, image, numbers, ones, picture, two_texts, with_inputs

SQUARE = {"height": 16, "width": 16}
VIDEO = {**SQUARE, "num_frames": 9}

# ---------------------------------------------------------------------------------------------------- Wan

WAN_VAE = (
    "AutoencoderKLWan",
    {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    },
)


def wan(name="WanTransformer3DModel", **changes):
    return name, {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 1,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
        **changes,
    }


UNIPC = ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True})


def wan_case(transformer, inputs=dict, settings=VIDEO, scheduler=UNIPC, models=None, **more):
    parts = {"scheduler": scheduler, "vae": WAN_VAE, "transformer": transformer, **(models or {})}
    more = {"calls": 2, **more}
    return Case(parts, with_inputs(two_texts((1, 8, 32)), inputs), settings, **more)


def small_image():
    return {"image": picture(16)}


def vision():
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    )


def vision_processor():
    return transformers.CLIPImageProcessor(crop_size=32, size=32)


def siglip():
    return transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    )


def siglip_processor():
    return transformers.SiglipImageProcessor(size={"height": 32, "width": 32})


FLOW_VISION = {"image_encoder": (siglip, {}), "feature_extractor": (siglip_processor, {})}
SEES = {"image_encoder": (vision, {}), "image_processor": (vision_processor, {})}


def video():
    return {"video": frames(9, 16)}


anyflow = wan("AnyFlowTransformer3DModel", gate_value=0.25, deltatime_type="r")
anyflow[1].pop("qk_norm")
WANS = {
    "WanPipeline": wan_case(wan()),
    "WanImageToVideoPipeline": wan_case(wan(in_channels=36), small_image),
    "WanVideoToVideoPipeline": wan_case(wan(), video, {**SQUARE, "strength": 1.0}),
    "WanVACEPipeline": wan_case(
        wan("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=96),
    ),
    "LucyEditPipeline": wan_case(wan(in_channels=32), video),
    "SkyReelsV2Pipeline": wan_case(wan("SkyReelsV2Transformer3DModel")),
    "SkyReelsV2ImageToVideoPipeline": wan_case(
        wan("SkyReelsV2Transformer3DModel", in_channels=36, image_dim=32), small_image, models=SEES
    ),
    "SkyReelsV2DiffusionForcingPipeline": wan_case(
        wan("SkyReelsV2Transformer3DModel"), lambda: {"prompt": None}, {**VIDEO, "base_num_frames": 9}
    ),
    "ChronoEditPipeline": wan_case(
        wan("ChronoEditTransformer3DModel", in_channels=36, image_dim=32),
        small_image,
        {**VIDEO, "num_frames": 5},
        FLOW,
        SEES,
    ),
    "AnyFlowPipeline": wan_case(
        anyflow,
        scheduler=("FlowMapEulerDiscreteScheduler", {"shift": 5.0}),
        calls=1,
    ),
}

# --------------------------------------------------------------------------------------------- LTX, others

LTX = (
    "LTXVideoTransformer3DModel",
    {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
        "num_layers": 1,
        "caption_channels": 32,
    },
)
LTX_VAE = (
    "AutoencoderKLLTXVideo",
    {
        "latent_channels": 8,
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
        "decoder_inject_noise": (False,) * 5,
        "upsample_residual": (False,) * 4,
        "upsample_factor": (1,) * 4,
        "patch_size": 1,
    },
)


def ltx_case(inputs=dict, **more):
    parts = {"scheduler": FLOW, "vae": LTX_VAE, "transformer": LTX}
    return Case(
        parts, with_inputs(two_texts((1, 8, 32), ones), inputs), {**VIDEO, "height": 32, "width": 32}, **more
    )


COGVIDEO_VAE = (
    "AutoencoderKLCogVideoX",
    {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "temporal_compression_ratio": 4,
    },
)


def cogvideo_case(inputs=dict, settings=VIDEO, in_channels=4):
    transformer = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": in_channels,
        "out_channels": 4,
        "time_embed_dim": 2,
        "text_embed_dim": 32,
        "num_layers": 1,
        "sample_width": 2,
        "sample_height": 2,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 8,
    }
    parts = {
        "scheduler": ("CogVideoXDDIMScheduler", {}),
        "vae": COGVIDEO_VAE,
        "transformer": ("CogVideoXTransformer3DModel", transformer),
    }
    return Case(parts, with_inputs(two_texts((1, 8, 32)), inputs), settings)


class Guardrail(torch.nn.Module):
    """In place of that of Cosmos, which is in another package."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, _prompt):
        return True

    def check_video_safety(self, video):
        return video


def cosmos_case(transformer, inputs=dict, settings=VIDEO, **more):
    parts = {"scheduler": (FLOW[0], {"use_karras_sigmas": True}), "vae": WAN_VAE, "transformer": transformer}
    parts["safety_checker"] = (Guardrail, {})
    settings = {**settings, **SIZE}
    return Case(parts, with_inputs(two_texts((1, 8, 32)), inputs), settings, **{"calls": 2, **more})


def cosmos(in_channels):
    return "CosmosTransformer3DModel", {
        "in_channels": in_channels,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "mlp_ratio": 2,
        "text_embed_dim": 32,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "patch_size": (1, 2, 2),
        "rope_scale": (2.0, 1.0, 1.0),
        "concat_padding_mask": False,
        "extra_pos_embed_type": None,
    }


OTHERS = {
    "LTXPipeline": ltx_case(),
    "LTXImageToVideoPipeline": ltx_case(image),
    "LTXConditionPipeline": ltx_case(image),
    "CogVideoXPipeline": cogvideo_case(),
    "CogVideoXImageToVideoPipeline": cogvideo_case(lambda: {"image": picture(16)}, in_channels=8),
    "CogVideoXVideoToVideoPipeline": cogvideo_case(video, {**SQUARE, "strength": 1.0}),
    "MochiPipeline": Case(
        {
            "scheduler": FLOW,
            "vae": (
                "AutoencoderKLMochi",
                {
                    "latent_channels": 12,
                    "encoder_block_out_channels": (32, 32, 32, 32),
                    "decoder_block_out_channels": (32, 32, 32, 32),
                    "layers_per_block": (1, 1, 1, 1, 1),
                },
            ),
            "transformer": (
                "MochiTransformer3DModel",
                {
                    "patch_size": 2,
                    "num_attention_heads": 4,
                    "attention_head_dim": 8,
                    "num_layers": 1,
                    "pooled_projection_dim": 16,
                    "in_channels": 12,
                    "qk_norm": "rms_norm",
                    "text_embed_dim": 32,
                    "time_embed_dim": 4,
                    "activation_fn": "swiglu",
                    "max_sequence_length": 8,
                },
            ),
        },
        two_texts((1, 8, 32), lambda *shape: ones(*shape).bool()),
        {**VIDEO, "num_frames": 7},
    ),
    "HunyuanVideoPipeline": Case(
        {
            "scheduler": FLOW,
            "vae": (
                "AutoencoderKLHunyuanVideo",
                {
                    "latent_channels": 4,
                    "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
                    "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
                    "block_out_channels": (8, 8, 8, 8),
                    "layers_per_block": 1,
                    "norm_num_groups": 4,
                },
            ),
            "transformer": (
                "HunyuanVideoTransformer3DModel",
                {
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "num_refiner_layers": 1,
                    "patch_size": 1,
                    "patch_size_t": 1,
                    "guidance_embeds": True,
                    "text_embed_dim": 16,
                    "pooled_projection_dim": 8,
                    "rope_axes_dim": (4, 6, 6),
                },
            ),
        },
        lambda: {
            "prompt_embeds": numbers(1, 8, 16),
            "prompt_attention_mask": ones(1, 8),
            "pooled_prompt_embeds": numbers(1, 8),
        },
        VIDEO,
    ),
    "Cosmos2TextToImagePipeline": cosmos_case(cosmos(16), settings={}),
    "Cosmos2VideoToWorldPipeline": cosmos_case(cosmos(17), image),
    "AllegroPipeline": Case(
        {
            "scheduler": ("DDIMScheduler", {}),
            "transformer": (
                "AllegroTransformer3DModel",
                {
                    "num_attention_heads": 2,
                    "attention_head_dim": 24,
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_layers": 1,
                    "cross_attention_dim": 48,
                    "sample_width": 8,
                    "sample_height": 8,
                    "sample_frames": 8,
                    "caption_channels": 24,
                },
            ),
        },
        two_texts((1, 8, 24), ones),
        {**VIDEO, "num_frames": 8, "negative_prompt": None},
    ),
    "LattePipeline": Case(
        {
            "scheduler": ("DDIMScheduler", {}),
            "transformer": (
                "LatteTransformer3DModel",
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
                    "attention_bias": True,
                    "activation_fn": "gelu-approximate",
                    "num_embeds_ada_norm": 1000,
                    "norm_type": "ada_norm_single",
                    "norm_elementwise_affine": False,
                    "norm_eps": 1e-6,
                },
            ),
        },
        two_texts((1, 8, 32)),
        {"height": 64, "width": 64, "video_length": 16, "negative_prompt": None, "mask_feature": False},
    ),
    "SanaVideoPipeline": Case(
        {
            "scheduler": ("DPMSolverMultistepScheduler", {}),
            "vae": WAN_VAE,
            "transformer": (
                "SanaVideoTransformer3DModel",
                {
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_attention_heads": 2,
                    "attention_head_dim": 12,
                    "num_layers": 1,
                    "num_cross_attention_heads": 2,
                    "cross_attention_head_dim": 12,
                    "cross_attention_dim": 24,
                    "caption_channels": 8,
                    "sample_size": 8,
                    "patch_size": (1, 2, 2),
                    "qk_norm": "rms_norm_across_heads",
                    "rope_max_seq_len": 32,
                },
            ),
        },
        two_texts((1, 8, 8), ones),
        {
            "height": 32,
            "width": 32,
            "frames": 9,
            "use_resolution_binning": False,
            "negative_prompt": None,
        },
    ),
    "Kandinsky5T2VPipeline": Case(
        {
            "scheduler": FLOW,
            "transformer": (
                "Kandinsky5Transformer3DModel",
                {
                    "in_visual_dim": 16,
                    "in_text_dim": 16,
                    "in_text_dim2": 16,
                    "time_dim": 16,
                    "out_visual_dim": 16,
                    "patch_size": (1, 2, 2),
                    "model_dim": 32,
                    "ff_dim": 32,
                    "num_text_blocks": 1,
                    "num_visual_blocks": 1,
                    "axes_dims": (4, 6, 6),
                    "attention_type": "regular",
                },
            ),
        },
        with_inputs(
            two_texts((1, 8, 16), name="prompt_embeds_qwen"),
            two_texts((1, 16), name="prompt_embeds_clip"),
            lambda: dict.fromkeys(
                ("prompt_cu_seqlens", "negative_prompt_cu_seqlens"), torch.tensor([0, 8], dtype=torch.int)
            ),
        ),
        {"height": 32, "width": 32, "num_frames": 5},
        calls=2,
    ),
}

VIDEO_PIPELINES = {**WANS, **OTHERS}
