"""How makers publish the weights of models in single files: other names, and layers joined to one."""

from types import CodeType, FunctionType

import diffusers
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from helpers import MODELS, TEXT_TOKENS
from video_pipelines import VIDEO_PIPELINES

COMFY = "model.diffusion_model."  # before each name in files that hold further models
QKV = (("to_q.", "to_k.", "to_v."), ("add_q_proj.", "add_k_proj.", "add_v_proj."))


def published(state, blocks, joined=(), swapped=(), prefix=""):
    """Names and tensors of a file, of a state dict in the names of diffusers.

    blocks : how names begin -> (how they begin in the file, {part of the rest: what stands there}).
    joined : parts of names whose tensors are one there, under the first; some of them may be missing.
    swapped : how names of modulations begin that diffusers has with scale before shift.
    """
    state = dict(state)
    for first, *others in joined:
        for name in [one for one in state if first in one]:
            further = [state.pop(name.replace(first, other), None) for other in others]
            state[name] = torch.cat([state[name], *(one for one in further if one is not None)])
    found = {}
    for name, tensor in state.items():
        if name.startswith(swapped):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        begin = next(one for one in blocks if name.startswith(one))
        block, parts = blocks[begin]
        name = name.removeprefix(begin)
        for part, other in parts.items():
            name = name.replace(part, other)
        found[f"{prefix}{block}{name}"] = tensor
    return found


def z_image(state):
    """As Tongyi-MAI publishes it, with the prefix of ComfyUI."""
    parts = {
        "all_final_layer.2-1.": "final_layer.",
        "all_x_embedder.2-1.": "x_embedder.",
        ".attention.to_out.0.": ".attention.out.",
        ".attention.norm_k.": ".attention.k_norm.",
        ".attention.norm_q.": ".attention.q_norm.",
        ".attention.to_q.": ".attention.qkv.",
    }
    return published(state, {"": ("", parts)}, QKV, prefix=COMFY)


# ------------------------------------------------------------------- Black Forest Labs, and who follows them

IN_DOUBLE = {
    "attn.to_q": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}
IN_SINGLE = {"attn.norm_q.weight": "norm.query_norm.scale", "attn.norm_k.weight": "norm.key_norm.scale"}
OUTSIDE = {
    "x_embedder.": "img_in.",
    "context_embedder.": "txt_in.",
    "timestep_embedder.linear_1": "time_in.in_layer",
    "timestep_embedder.linear_2": "time_in.out_layer",
    "guidance_embedder.linear_1": "guidance_in.in_layer",
    "guidance_embedder.linear_2": "guidance_in.out_layer",
    "text_embedder.linear_1": "vector_in.in_layer",
    "text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}


def black_forest(state, double, single, outside, joined=QKV):
    blocks = {
        "transformer_blocks.": ("double_blocks.", {**IN_DOUBLE, **double}),
        "single_transformer_blocks.": ("single_blocks.", {**IN_SINGLE, **single}),
        "": ("", {**outside, **OUTSIDE}),
    }
    return published(state, blocks, joined, ("norm_out.linear",))


def flux2(state):
    double = {
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
    }
    single = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
    outside = {"time_guidance_embed.": "", **{f"{name}.linear.": f"{name}.lin." for name in MODULATIONS}}
    return black_forest(state, double, single, outside)


MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")


def flux(state):
    """Chroma, too, which has a network in place of modulations."""
    double = {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    }
    single = {".norm.linear": ".modulation.lin", "attn.to_q": "linear1", "proj_out": "linear2"}
    outside = {"time_text_embed.": ""}
    if any("distilled_guidance_layer" in name for name in state):
        count = sum(".norms." in name for name in state)
        scales = {f"norms.{i}.weight": f"norms.{i}.scale" for i in range(count)}
        outside |= {".linear_1": ".in_layer", ".linear_2": ".out_layer", **scales}
    joined = (("attn.to_q.", "attn.to_k.", "attn.to_v.", "proj_mlp."), QKV[1])
    return black_forest(state, double, single, outside, joined)


# ------------------------------------------------------------------------------------------------ others


def sd3(state):
    """As Stability AI publishes it."""
    parts = {
        ".attn.to_q.": ".x_block.attn.qkv.",
        ".attn.norm_q.": ".x_block.attn.ln_q.",
        ".attn.norm_k.": ".x_block.attn.ln_k.",
        ".attn.to_out.0.": ".x_block.attn.proj.",
        ".attn.add_q_proj.": ".context_block.attn.qkv.",
        ".attn.norm_added_q.": ".context_block.attn.ln_q.",
        ".attn.norm_added_k.": ".context_block.attn.ln_k.",
        ".attn.to_add_out.": ".context_block.attn.proj.",
        ".attn2.to_q.": ".x_block.attn2.qkv.",
        ".attn2.norm_q.": ".x_block.attn2.ln_q.",
        ".attn2.norm_k.": ".x_block.attn2.ln_k.",
        ".attn2.to_out.0.": ".x_block.attn2.proj.",
        ".norm1.linear.": ".x_block.adaLN_modulation.1.",
        ".norm1_context.linear.": ".context_block.adaLN_modulation.1.",
        ".ff.net.0.proj.": ".x_block.mlp.fc1.",
        ".ff.net.2.": ".x_block.mlp.fc2.",
        ".ff_context.net.0.proj.": ".context_block.mlp.fc1.",
        ".ff_context.net.2.": ".context_block.mlp.fc2.",
    }
    outside = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj.": "x_embedder.proj.",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out.": "final_layer.linear.",
        "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    }
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    swapped = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
    blocks = {"transformer_blocks.": ("joint_blocks.", parts), "": ("", outside)}
    return published(state, blocks, QKV, swapped, COMFY)


def wan(state):
    """As Wan-AI publishes it."""
    parts = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "proj_out": "head.head",
    }
    in_block = {
        "attn1.": "self_attn.",
        "attn2.": "cross_attn.",
        ".to_out.0.": ".o.",
        ".to_q.": ".q.",
        ".to_k.": ".k.",
        ".to_v.": ".v.",
        "scale_shift_table": "modulation",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        ".norm2.": ".norm3.",
    }
    blocks = {"blocks.": ("blocks.", in_block), "scale_shift_table": ("head.modulation", {}), "": ("", parts)}
    return published(state, blocks)


LTX = {"proj_in": "patchify_proj", "norm_q": "q_norm", "norm_k": "k_norm"}


def ltx(state):
    """As Lightricks publishes it."""
    return published(state, {"": ("", {**LTX, "time_embed.": "adaln_single."})}, prefix=COMFY)


def ltx2(state):
    """As Lightricks publishes it: video and audio."""
    parts = {
        "time_embed.": "adaln_single.",
        "audio_proj_in": "audio_patchify_proj",
        "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
        "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
        "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
        "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
        "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
        "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    }
    return published(state, {"": ("", {**parts, **LTX})}, prefix=COMFY)


def hunyuan_video(state):
    """As Tencent publishes it."""
    names = {".net.0.proj": ".fc1", ".net.2": ".fc2"}
    double = {
        "attn.to_q": "img_attn_qkv",
        "attn.add_q_proj": "txt_attn_qkv",
        "attn.norm_q": "img_attn_q_norm",
        "attn.norm_k": "img_attn_k_norm",
        "attn.norm_added_q": "txt_attn_q_norm",
        "attn.norm_added_k": "txt_attn_k_norm",
        "attn.to_out.0": "img_attn_proj",
        "attn.to_add_out": "txt_attn_proj",
        "norm1.linear": "img_mod.linear",
        "norm1_context.linear": "txt_mod.linear",
        "ff_context.": "txt_mlp.",
        "ff.": "img_mlp.",
        **names,
    }
    single = {
        ".norm.linear": ".modulation.linear",
        "attn.to_q": "linear1",
        "proj_out": "linear2",
        "attn.norm_q": "q_norm",
        "attn.norm_k": "k_norm",
    }
    text = {
        "proj_in": "input_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder": "c_embedder",
        "token_refiner.refiner_blocks": "individual_token_refiner.blocks",
        "attn.to_q": "self_attn_qkv",
        "attn.to_out.0": "self_attn_proj",
        "norm_out.linear": "adaLN_modulation.1",
        ".ff.": ".mlp.",
        **names,
    }
    outside = {
        "x_embedder.": "img_in.",
        "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    blocks = {
        "transformer_blocks.": ("double_blocks.", double),
        "single_transformer_blocks.": ("single_blocks.", single),
        "context_embedder.": ("txt_in.", text),
        "": ("", outside),
    }
    joined = (("attn.to_q.", "attn.to_k.", "attn.to_v.", "proj_mlp."), QKV[1])
    return published(state, blocks, joined, ("norm_out.linear",))


# ------------------------------------------------------------------------------------------------ models


def tiny_hunyuan_video(seed=0):
    name, config = VIDEO_PIPELINES["HunyuanVideoPipeline"].models["transformer"]
    torch.manual_seed(seed)
    return getattr(diffusers, name)(**config).eval()


def hunyuan_video_call(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 4, 2, 4, 8, generator=gen),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 16, generator=gen),
        "encoder_attention_mask": torch.ones(1, TEXT_TOKENS),
        "pooled_projections": torch.randn(1, 8, generator=gen),
        "guidance": torch.tensor([6000.0]),
    }


MODELS = {**MODELS, "hunyuan-video": (tiny_hunyuan_video, hunyuan_video_call)}
# (Files of Qwen-Image have the names of diffusers. Those of HunyuanVideo 1.5 diffusers 0.42 does not read.)
FORMATS = {
    "z-image": z_image,
    "flux": flux,
    "flux2": flux2,
    "chroma": flux,
    "qwen": dict,
    "sd3": sd3,
    "wan": wan,
    "ltx": ltx,
    "ltx2": ltx2,
    "hunyuan-video": hunyuan_video,
}


def read_narrow(monkeypatch, model):
    """Have diffusers read files of `model`: of FLUX.1, Chroma and HunyuanVideo it assumes the full width."""

    def narrow(code):
        consts = [narrow(one) if isinstance(one, CodeType) else one for one in code.co_consts]
        return code.replace(co_consts=tuple(width if one == 3072 else one for one in consts))

    entry = SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]
    width = model.config.get("num_attention_heads", 0) * model.config.get("attention_head_dim", 0)
    convert = entry["checkpoint_mapping_fn"]
    narrowed = FunctionType(narrow(convert.__code__), convert.__globals__, closure=convert.__closure__)
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", narrowed)
