"""Full-size models for timing: their sizes, and the noise levels that their pictures go through."""

import copy
import math

import pytest
import torch
from helpers import SMALL

import rtlynx
from rtlynx.timing import full_models
from rtlynx.timing.full_models import MODELS, Size, full_model
from rtlynx.timing.results import picture_size


def test_a_video_has_latents_for_four_frames_together_and_for_the_first_alone():
    video = MODELS["wan2.2-14b"].size
    assert video.image_tokens == 21 * 30 * 52 == 32_760
    (latents,) = {tuple(call["hidden_states"].shape) for call in MODELS["wan2.2-14b"].calls(video, meta)}
    assert latents == (1, 16, 21, 60, 104)
    assert video.described() == {**Size(side=480).described(), "width": 832, "frames": 81}
    assert picture_size(video.described()) == "832x480, 81 frames"
    assert picture_size(Size().described()) == "1024²"


def meta(*shape):
    return torch.empty(shape, device="meta")


def test_wan_has_fourteen_billion_parameters():
    with torch.device("meta"):
        model = MODELS["wan2.2-14b"].build()
    assert round(sum(one.numel() for one in model.parameters()) / 1e9, 1) == 14.3
    (shape,) = {tuple(block.ffn.net[0].proj.weight.shape) for block in model.blocks}
    assert (len(model.blocks), *shape) == (40, 13_824, 5120)


def test_a_video_of_ltx_2_has_larger_tokens_and_sound():
    full = MODELS["ltx-2"]
    assert full.size.image_tokens == 16 * 16 * 24 == 6144
    (call,) = full.calls(full.size, meta)
    # With guidance: two prompts in one call. Audio: 121 / 24 seconds, 25 tokens a second.
    assert call["hidden_states"].shape == (2, 6144, 128)
    assert call["audio_hidden_states"].shape == (2, 126, 128)
    assert call["encoder_hidden_states"].shape == (2, 1024, 3840)
    with torch.device("meta"):
        model = full.build()
    assert round(sum(one.numel() for one in model.parameters()) / 1e9, 1) == 18.9


def test_sd35_large_has_eight_billion_parameters_and_no_second_attention():
    with torch.device("meta"):
        model = MODELS["sd3.5-large"].build()
    assert round(sum(one.numel() for one in model.parameters()) / 1e9, 2) == 8.06
    assert len(model.transformer_blocks) == 38
    assert not any("attn2" in name for name, _ in model.named_modules())
    assert set(model._repeated_blocks) == {type(block).__name__ for block in model.transformer_blocks}


@torch.no_grad()
def test_chroma_embeds_guidance_as_ever_without_the_host(monkeypatch):
    small = SMALL["chroma"]()
    model = copy.deepcopy(small)
    monkeypatch.setattr(full_models, "ChromaTransformer2DModel", lambda: model)
    MODELS["chroma"].build()
    (call, _) = MODELS["chroma"].calls(Size(side=64, batch=2, text_tokens=5), torch.randn)
    expected = small(**call, return_dict=False)[0]
    assert torch.equal(model(**call, return_dict=False)[0], expected)
    assert model.to("meta").time_text_embed.guidance_proj(torch.zeros(2)).is_meta


def test_flux2_dev_has_thirty_two_billion_parameters_and_takes_guidance():
    full = MODELS["flux2-dev"]
    with torch.device("meta"):
        model = full.build()
    assert round(sum(one.numel() for one in model.parameters()) / 1e9, 1) == 32.2
    (call,) = full.calls(full.size, meta)
    assert call["hidden_states"].shape == (1, 4096, 128)
    assert call["encoder_hidden_states"].shape == (1, 512, 15_360)
    assert call["guidance"].shape == (1,)
    assert model.time_guidance_embed.guidance_embedder is not None
    klein = MODELS["flux2-klein"]
    assert "guidance" not in klein.calls(klein.size, meta)[0]


def test_a_video_of_hunyuan_has_a_padded_text_stream():
    full = MODELS["hunyuan-video-1.5"]
    assert full.size.image_tokens == 31 * 30 * 53 == 49_290
    calls = full.calls(full.size._replace(side=64, width=64), torch.randn)
    assert [int(call["encoder_attention_mask"].sum()) for call in calls] == [128, 32]
    for call in calls:
        assert call["hidden_states"].shape == (1, 65, 31, 4, 4)
        assert not call["hidden_states"][:, 32:].any()
        assert not call["encoder_attention_mask_2"].any()
        assert not call["image_embeds"].any()
    with torch.device("meta"):
        model = full.build()
    assert round(sum(one.numel() for one in model.parameters()) / 1e9, 1) == 8.3
    assert len(model.transformer_blocks) == 54


@torch.no_grad()
def test_hunyuan_draws_as_ever_without_asking_the_card(monkeypatch):
    small = SMALL["hunyuan-video-1.5"]()
    model = copy.deepcopy(small)
    monkeypatch.setattr(full_models, "HunyuanVideo15Transformer3DModel", lambda **_: model)
    MODELS["hunyuan-video-1.5"].build()
    size = Size(side=64, width=96, frames=9, batch=2, text_tokens=5)
    for call in MODELS["hunyuan-video-1.5"].calls(size, torch.randn):
        # Glyphs, too, and texts of several lengths.
        call["encoder_attention_mask"][1, 3:9] = 1
        call["encoder_hidden_states_2"] += 1
        call["encoder_attention_mask_2"] = torch.arange(256).lt(torch.tensor([[0], [7]])).long()
        expected = small(**call, return_dict=False)[0]
        assert torch.equal(model(**call, return_dict=False)[0], expected)
    # Nothing that waits for the card: shapes and branches follow from shapes alone.
    model.to("meta")(**{name: one.to("meta") for name, one in call.items()}, return_dict=False)
    with pytest.raises(ValueError, match="return_dict=False"):
        model(**call)


def test_a_picture_is_edited_beside_its_original():
    full = MODELS["qwen-edit"]
    calls = full.calls(full.size, meta)
    # Both prompts show the original to the encoder, in 196 tokens.
    assert [call["encoder_hidden_states"].shape[1] for call in calls] == [128 + 196, 32 + 196]
    for call in calls:
        assert call["hidden_states"].shape == (1, 2 * 4096, 64)
        assert call["img_shapes"] == [[(1, 64, 64), (1, 64, 64)]]
    with torch.device("meta"):
        model = full.build()
    assert model.config.zero_cond_t
    assert round(sum(one.numel() for one in model.parameters()) / 1e9, 1) == 20.4


@torch.no_grad()
def test_tokens_are_told_apart_as_ever_without_the_host(monkeypatch):
    small = SMALL["qwen-edit"]()
    model = copy.deepcopy(small)
    monkeypatch.setattr(full_models, "QwenImageTransformer2DModel", lambda zero_cond_t: model)
    MODELS["qwen-edit"].build()
    call, _ = MODELS["qwen-edit"].calls(Size(side=64, batch=2, text_tokens=5), torch.randn)
    expected = small(**call, return_dict=False)[0]
    monkeypatch.setattr(torch, "tensor", None)  # which makes the class's forward fail
    assert torch.equal(model(**call, return_dict=False)[0], expected)
    twin = copy.deepcopy(model)
    call["hidden_states"][:, -1] += 1
    assert not torch.equal(twin(**call, return_dict=False)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen-edit", "hunyuan-video-1.5"])
@pytest.mark.parametrize("change", [None, rtlynx.Recipe.dense_fp8()])
def test_blocks_of_models_with_a_forward_of_their_own_compile(monkeypatch, name, change):
    """Inside of that forward, at the first call."""
    torch.manual_seed(0)
    model, full = SMALL[name]().eval(), MODELS[name]
    monkeypatch.setattr(full_models, type(model).__name__, lambda **_: model)
    assert full.build() is model
    model = copy.deepcopy(model if change is None else rtlynx.sparsify(model, change))
    call, _ = full.calls(Size(side=32, text_tokens=5), torch.randn)
    expected = model(**call, return_dict=False)[0]
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.allclose(model(**call, return_dict=False)[0], expected, atol=1e-5)


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(ValueError, match="no full-size model is called 'flux'; there are flux1-dev, "):
        full_model("flux")


def test_sd3_ends_at_the_first_step_of_training_which_is_shifted_twice():
    def shifted(t):
        return 3 * t / (1 + 2 * t)

    end = shifted(1 / 1000)
    wanted = [shifted(1 - (1 - end) * i / 27) for i in range(28)]
    assert MODELS["sd3.5-large"].sampling.sigmas(Size()) == pytest.approx(wanted, abs=1e-6)


# FLUX.2's shift is a line in steps through these two, each a line in tokens.
AT_10_STEPS, AT_200_STEPS = 8.73809524e-05 * 4096 + 1.89833333, 0.00016927 * 4096 + 0.45666666


@pytest.mark.parametrize(
    ("name", "steps", "shift", "terminal"),
    [
        ("chroma", 35, math.exp(1.15), None),
        ("flux1-dev", 28, math.exp(1.15), None),  # 4,096 tokens are the most of its scheduler
        ("flux2-klein", 4, math.exp(AT_10_STEPS + 6 / 190 * (AT_10_STEPS - AT_200_STEPS)), None),
        ("flux2-dev", 50, math.exp(AT_10_STEPS + 40 / 190 * (AT_200_STEPS - AT_10_STEPS)), None),
        # As many as of the drawn picture decide, not those of the edited one.
        ("qwen-edit", 50, math.exp(0.5 + 0.4 * (4096 - 256) / (8192 - 256)), 0.02),
        ("qwen-image", 50, math.exp(0.5 + 0.4 * (4096 - 256) / (8192 - 256)), 0.02),
        ("z-image", 9, 3.0, None),
        ("wan2.2-14b", 50, 3.0, None),
        ("hunyuan-video-1.5", 50, 5.0, None),
        ("ltx-2", 30, math.exp(0.95 + 1.1 * (4096 - 1024) / (4096 - 1024)), 0.1),
    ],
)
def test_a_picture_goes_through_the_noise_levels_of_its_pipeline(name, steps, shift, terminal):
    # UniPC ends at the first of its 1,000 steps of training, the others at the picture.
    end = 1 / 1000 if name == "wan2.2-14b" else 0.0
    times = [1 - (1 - end) * i / steps for i in range(steps)]
    wanted = [shift * t / (1 + (shift - 1) * t) for t in times]  # Esser et al. 2024, equation 23
    if terminal is not None:
        wanted = [1 - (1 - sigma) * (1 - terminal) / (1 - wanted[-1]) for sigma in wanted]
    # UniPC holds them in float32.
    error = 2e-6 if name == "wan2.2-14b" else 1e-6
    assert MODELS[name].sampling.sigmas(Size()) == pytest.approx(wanted, abs=error)
