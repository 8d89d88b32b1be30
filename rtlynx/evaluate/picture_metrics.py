"""Metrics of single pictures, and the networks that some of them look with.

Nothing is downloaded unless that is asked for: without their weights metrics are absent, with the reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rtlynx.evaluate.grid import to_image
from rtlynx.evaluate.metrics import psnr, ssim
from rtlynx.storage.files import first_line

CLIP_MODEL = "openai/clip-vit-large-patch14"
IMAGE_REWARD = "ImageReward-v1.0"
IMAGE_REWARD_FOLDER = Path("~/.cache/ImageReward")
_FETCH = "--download fetches it"


class Unavailable(Exception):
    """A metric cannot be had here; the message says why."""


def _no_network(device: str, download: bool) -> None:
    return None


@dataclass(frozen=True)
class Metric:
    """A figure of a picture.

    Parameters
    ----------
    name : key in results.json
    title : heading in tables, with the unit
    better : "higher" | "lower"
    digits : decimals to print
    against_dense : bool
        Whether it compares with the dense model's picture; the dense model itself then has no figure.
    compute : (network, pictures, reference, prompts) -> list of n floats
        pictures, reference : Tensor (n, 3, H, W), float32, in [0, 1].
    needs : what it looks with, "" for nothing
    load : (device, download) -> network
        Raises `Unavailable`. `download` says whether the network may be used.
    """

    name: str
    title: str
    better: Literal["higher", "lower"]
    digits: int
    against_dense: bool
    compute: Callable[[Any, Tensor, Tensor, Sequence[str]], list[float]]
    needs: str = ""
    load: Callable[[str, bool], Any] = _no_network


def load_networks(
    metrics: Iterable[Metric], device: str, *, download: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """Networks by the name of their metric, and the reasons of metrics that cannot be had."""
    networks, reasons = {}, {}
    for metric in metrics:
        try:
            networks[metric.name] = metric.load(device, download)
        except Unavailable as error:
            reasons[metric.name] = str(error)
        except Exception as error:  # of all kinds: the loaders are other people's
            why = f"{type(error).__name__}: {first_line(error)}"
            reasons[metric.name] = f"{metric.needs} could not be loaded ({why})"
    return networks, reasons


# ----------------------------------------------------------------------------------------- without a network


def _psnr(_: Any, pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> list[float]:
    each = [psnr(a, b) for a, b in zip(pictures.split(1), reference.split(1), strict=True)]
    return [math.inf if one is None else one for one in each]


def _ssim(_: Any, pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> list[float]:
    return [ssim(a, b) for a, b in zip(pictures.split(1), reference.split(1), strict=True)]


# ----------------------------------------------------------------------------------------------------- LPIPS


def _load_lpips(device: str, download: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """torchmetrics' LPIPS on AlexNet, whose weights torchvision brings."""
    _require("torchvision", "pip install 'rtlynx[eval]'")
    from torchvision.models import AlexNet_Weights

    weights = Path(torch.hub.get_dir()) / "checkpoints" / AlexNet_Weights.DEFAULT.url.rpartition("/")[2]
    if not download and not weights.is_file():
        raise Unavailable(f"AlexNet's weights (233 MB) are not in {weights.parent}: {_FETCH}")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)


@torch.no_grad()
def _lpips(
    network: Callable[[Tensor, Tensor], Tensor], pictures: Tensor, reference: Tensor, prompts: Sequence[str]
) -> list[float]:
    pairs = zip(pictures.split(1), reference.split(1), strict=True)
    return [float(network(a, b)) for a, b in pairs]


# ------------------------------------------------------------------------------------------------ CLIP score


class Clip:
    """Pictures and prompts -> their embeddings.

    Not torchmetrics' `clip_score`, which takes no features of transformers 5.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        images = [to_image(picture.cpu()) for picture in pictures]
        longest = self.model.config.text_config.max_position_embeddings
        how = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": longest}
        inputs = self.processor(text=list(prompts), images=images, **how)
        found = self.model(**inputs.to(self.model.device))
        return found.image_embeds, found.text_embeds


def _load_clip(device: str, download: bool) -> Clip:
    _require("transformers", "pip install 'rtlynx[eval]'")
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(CLIP_MODEL, local_files_only=not download)
        processor = CLIPProcessor.from_pretrained(CLIP_MODEL, local_files_only=not download)
    except OSError as error:
        if download:
            raise
        where = "the local Hugging Face cache"
        raise Unavailable(f"{CLIP_MODEL} (1.7 GB) is not in {where}: {_FETCH}") from error
    return Clip(model.eval().to(device), processor)


@torch.no_grad()
def _clip_score(
    network: Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]],
    pictures: Tensor,
    reference: Tensor,
    prompts: Sequence[str],
) -> list[float]:
    image, text = network(pictures, prompts)
    cosines = torch.nn.functional.cosine_similarity(image.float(), text.float())
    return (100 * cosines).clamp_min(0).tolist()


# ----------------------------------------------------------------------------------------------- ImageReward


def _load_reward(device: str, download: bool) -> Any:
    _require("ImageReward", "pip install image-reward")
    folder = IMAGE_REWARD_FOLDER.expanduser()
    missing = [name for name in ("ImageReward.pt", "med_config.json") if not (folder / name).is_file()]
    if missing and not download:
        raise Unavailable(f"{missing[0]} (1.8 GB in all) is not in {folder}: {_FETCH}")
    with contextlib.redirect_stdout(sys.stderr):  # it prints, and standard output may be JSON
        import ImageReward

        return ImageReward.load(IMAGE_REWARD, device=device, download_root=str(folder))


@torch.no_grad()
def _image_reward(network: Any, pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> list[float]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "picture.png")  # all versions take a path, some nothing else
        for picture, prompt in zip(pictures, prompts, strict=True):
            to_image(picture.cpu()).save(path)
            found.append(float(network.score(prompt, path)))
    return found


def _require(package: str, how: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed ({how})")


METRICS = (
    Metric("psnr", "PSNR, dB", "higher", 2, True, _psnr),
    Metric("ssim", "SSIM", "higher", 3, True, _ssim),
    Metric("lpips", "LPIPS", "lower", 3, True, _lpips, "AlexNet of torchvision", _load_lpips),
    Metric("clip_score", "CLIP score", "higher", 2, False, _clip_score, CLIP_MODEL, _load_clip),
    Metric("image_reward", "ImageReward", "higher", 3, False, _image_reward, IMAGE_REWARD, _load_reward),
)
