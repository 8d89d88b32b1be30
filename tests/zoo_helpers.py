"""Tiny models of the zoo's architectures, and stand-ins that know the answer."""

import diffusers
import numpy as np
import torch
from rtlynx_zoo.pipeline import EmojiPipeline, FashionPipeline

_TINY_FLUX = dict(num_layers=1, num_single_layers=1, attention_head_dim=32, axes_dims_rope=(8, 12, 12))
TINY = {
    "flux": _TINY_FLUX,
    "flux-fashion": _TINY_FLUX,
    "qwen-image": dict(num_layers=1, attention_head_dim=32, axes_dims_rope=(8, 12, 12)),
    "z-image": dict(n_layers=1, dim=96, n_heads=3, n_kv_heads=3, axes_dims=[8, 12, 12]),
}


def randomize(model, seed=0):
    """Every parameter drawn, so that no part of the model is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.05 * drawn if parameter.ndim > 1 else 1 + 0.1 * drawn)
    return model.eval()


def emoji_pipeline(model):
    return _quiet(EmojiPipeline(model, diffusers.FlowMatchEulerDiscreteScheduler()))


def fashion_pipeline(model):
    return _quiet(FashionPipeline(model, diffusers.FlowMatchEulerDiscreteScheduler()))


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def write_archive(file, pictures=8):
    """Random pictures in the format of training.data."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 17, pictures)
    np.savez(
        file,
        pictures=rng.integers(0, 256, (pictures, 64, 64, 3), dtype=np.uint8),
        names=np.array([f"emoji {i}" for i in range(pictures)]),
        tokens=rng.standard_normal((lengths.sum(), 384)).astype(np.float16),
        lengths=lengths,
    )
    return file


def write_fashion_archive(file, pictures=8):
    """Random pictures in the format of training.fashion_data."""
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix in ("", "test_"):
        arrays[f"{prefix}pictures"] = rng.integers(0, 256, (pictures, 32, 32, 1), dtype=np.uint8)
        arrays[f"{prefix}labels"] = rng.integers(0, 10, pictures)
    np.savez(file, **arrays)
    return file


# What each architecture predicts, told by diffusers' pipelines rather than by our own code: FLUX and
# Qwen-Image see the noise level and predict noise - picture; Z-Image sees 1 - noise level and predicts the
# opposite.


class FluxOracle(diffusers.FluxTransformer2DModel):
    """Knows the picture: `tokens` (B, 256, 48)."""

    def forward(self, hidden_states, timestep, return_dict, **_):
        assert not return_dict
        return ((hidden_states - self.tokens) / timestep[:, None, None],)


class QwenImageOracle(diffusers.QwenImageTransformer2DModel):
    """Knows the picture: `tokens` (B, 256, 48)."""

    def forward(self, hidden_states, timestep, img_shapes, return_dict, **_):
        assert not return_dict
        assert img_shapes == [[(1, 16, 16)]] * len(hidden_states)
        return ((hidden_states - self.tokens) / timestep[:, None, None],)


class ZImageOracle(diffusers.ZImageTransformer2DModel):
    """Knows the picture: `latents` (B, 12, 1, 32, 32)."""

    def forward(self, x, t, cap_feats, return_dict):
        assert not return_dict
        assert [caption.shape for caption in cap_feats] == [(16, 384)] * len(x)
        return ([(known - z) / (1 - time) for z, time, known in zip(x, t, self.latents, strict=True)],)
