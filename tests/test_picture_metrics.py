"""Metrics of single pictures with stand-in networks; CLIP's real classes on a tiny random model."""

import json
import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch
from evaluation_helpers import BY_NAME, Brightness, colour_and_length, mean_distance
from torch import nn

from rtlynx.evaluate import picture_metrics, psnr, ssim
from rtlynx.evaluate.picture_metrics import METRICS, Clip, Unavailable, load_networks


@pytest.fixture
def pictures():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reference(pictures):
    return (pictures + 0.1 * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)).clamp(0, 1)


def test_figures_are_of_each_picture_alone(pictures, reference):
    for name, mean in (("psnr", psnr), ("ssim", ssim)):
        each = BY_NAME[name].compute(None, pictures, reference, ["a", "b"])
        assert each == [mean(pictures[i : i + 1], reference[i : i + 1]) for i in range(2)]
    assert BY_NAME["psnr"].compute(None, pictures, pictures, ["a", "b"]) == [float("inf")] * 2


def test_lpips_asks_its_network_of_each_pair(pictures, reference):
    found = BY_NAME["lpips"].compute(mean_distance, pictures, reference, ["a", "b"])
    assert found == pytest.approx(
        [float((a - b).abs().mean()) for a, b in zip(pictures, reference, strict=True)]
    )


def test_clip_score_is_a_hundred_cosines_and_never_negative(pictures):
    found = BY_NAME["clip_score"].compute(colour_and_length, pictures, pictures, ["a", "longer"])
    image, text = colour_and_length(pictures, ["a", "longer"])
    cosines = (image * text).sum(1) / image.norm(dim=1) / text.norm(dim=1)
    assert found == pytest.approx((100 * cosines).tolist(), rel=1e-5)

    def opposite(some, prompts):
        return some.mean((2, 3)), -some.mean((2, 3))

    assert BY_NAME["clip_score"].compute(opposite, pictures, pictures, ["a", "b"]) == [0.0, 0.0]


def test_image_reward_sees_the_picture_and_its_prompt(pictures):
    white, black = torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    both = torch.cat((white, black))
    assert BY_NAME["image_reward"].compute(Brightness(), both, both, ["a", "abc"]) == [254.0, -3.0]


def test_every_network_has_a_reason_where_it_cannot_be_had():
    def absent(_device, _download):
        raise Unavailable("not here")

    def broken(_device, _download):
        raise RuntimeError("operator nms does not exist\nand more")

    chosen = (METRICS[0], replace(METRICS[2], load=absent), replace(METRICS[3], load=broken))
    networks, reasons = load_networks(chosen, "cpu")
    assert list(networks) == ["psnr"]
    assert reasons["lpips"] == "not here"
    assert reasons["clip_score"] == (
        "openai/clip-vit-large-patch14 could not be loaded (RuntimeError: operator nms does not exist)"
    )


def test_packages_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(picture_metrics.importlib.util, "find_spec", lambda _name: None)
    networks, reasons = load_networks(METRICS, "cpu")
    assert list(networks) == ["psnr", "ssim"]
    assert {name: reason.partition(" ")[0] for name, reason in reasons.items()} == {
        "lpips": "torchvision",
        "clip_score": "transformers",
        "image_reward": "ImageReward",
    }
    assert all("pip install" in reason for reason in reasons.values())


def test_clip_without_weights_is_not_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(picture_metrics, "CLIP_MODEL", str(tmp_path / "none"))
    _, reasons = load_networks([BY_NAME["clip_score"]], "cpu")
    assert "not in the local Hugging Face cache: --download fetches it" in reasons["clip_score"]


# --------------------------------------------------------------------------------- torchmetrics' LPIPS itself


def alexnet(weights=None):
    """AlexNet's convolutions with random weights, as torchvision arranges them."""
    torch.manual_seed(0)
    pool = {"kernel_size": 3, "stride": 2}
    features = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(**pool),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(**pool),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(**pool),
    )  # fmt: skip
    return types.SimpleNamespace(features=features)


@pytest.fixture
def torchvision(monkeypatch, tmp_path):
    """A stand-in package; what it would download goes into the folder that this returns."""
    url = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    package, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    package.__spec__, package.models = ModuleSpec("torchvision", None), models
    models.alexnet = alexnet
    models.AlexNet_Weights = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(url=url))
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    for module in ("torchmetrics.image.lpip", "torchmetrics.functional.image.lpips"):
        monkeypatch.setattr(f"{module}._TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_lpips_by_torchmetrics_on_random_features(torchvision):
    metric = BY_NAME["lpips"]
    _, reasons = load_networks([metric], "cpu")
    assert "AlexNet's weights (233 MB) are not in" in reasons["lpips"]
    (torchvision / "alexnet-owt-7be5be79.pth").touch()
    networks, reasons = load_networks([metric], "cpu")
    assert reasons == {}
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    same, near = (
        metric.compute(networks["lpips"], pictures, pictures, ["a", "b"]),
        (pictures + 0.02).clamp(0, 1),
    )
    assert same == pytest.approx([0.0, 0.0], abs=1e-6)
    near = metric.compute(networks["lpips"], near, pictures, ["a", "b"])
    far = metric.compute(networks["lpips"], 1 - pictures, pictures, ["a", "b"])
    assert all(0 < a < b for a, b in zip(near, far, strict=True))


# --------------------------------------------------------------------------------------------- CLIP's classes


def bytes_to_letters():
    """CLIP's alphabet: a printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]


@pytest.fixture
def tiny_clip(tmp_path):
    """A folder with a random CLIP of 16 channels, whose tokens are letters."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = bytes_to_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 512, "eos_token_id": 513}
    config = CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": 514},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    square = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(tmp_path)
    return tmp_path


def test_clip_is_loaded_from_files_and_judges_by_picture_and_prompt(tiny_clip, monkeypatch):
    monkeypatch.setattr(picture_metrics, "CLIP_MODEL", str(tiny_clip))
    metric = BY_NAME["clip_score"]
    networks, reasons = load_networks([metric], "cpu")
    assert reasons == {}
    network = networks["clip_score"]
    assert isinstance(network, Clip)
    pictures = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    image, text = network(pictures, ["red heart", "letters " * 40])  # longer than CLIP reads
    torch.testing.assert_close(image.norm(dim=1), torch.ones(2))
    assert not torch.allclose(image[0], image[1])
    assert not torch.allclose(text[0], text[1])
    each = metric.compute(network, pictures, pictures, ["red heart", "fox"])
    alone = metric.compute(network, pictures[1:], pictures[1:], ["fox"])
    assert alone == pytest.approx(each[1:], abs=1e-3)
