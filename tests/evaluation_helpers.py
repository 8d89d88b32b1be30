"""Small evaluations of the model in the box, and stand-ins for networks whose weights are not here."""

from dataclasses import replace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import tiny_flux
from rtlynx_zoo.pipeline import EmojiPipeline
from rtlynx_zoo.prompts import ASSETS

from rtlynx import Recipe
from rtlynx.evaluate.evaluation import EvaluationSettings, evaluate_model
from rtlynx.evaluate.picture_metrics import METRICS

PROMPTS = ("red heart", "hot dog", "rocket")
BY_NAME = {metric.name: metric for metric in METRICS}


def tiny_pipeline(*_arguments, **_how):
    """The pipeline of the model in the box around a smaller transformer, always the same."""
    transformer = tiny_flux(
        in_channels=48, joint_attention_dim=384, pooled_projection_dim=384, attention_head_dim=32
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(ASSETS / "scheduler", local_files_only=True)
    return EmojiPipeline(transformer, scheduler)


def settings(**changes):
    chosen = {"model": "zoo:flux-emoji", "prompts": PROMPTS, "pipeline_kwargs": {"num_inference_steps": 1}}
    if "checkpoint" not in changes:
        chosen["recipe"] = Recipe.immediate()
    return EvaluationSettings(**{**chosen, **changes})


def evaluate(out, *, images=2, metrics=METRICS[:2], **changes):
    return evaluate_model(settings(**changes), out, images=images, metrics=metrics, progress=False)


def mean_distance(a, b):
    """In LPIPS' place: mean absolute difference."""
    return (a - b).abs().mean()


def colour_and_length(pictures, prompts):
    """In CLIP's place: embeddings of a picture and of a prompt."""
    lengths = torch.tensor([[float(len(prompt)), 1.0, 0.0] for prompt in prompts])
    return pictures.mean((2, 3)), lengths


class Brightness:
    """In ImageReward's place: reads the file that it is given, and has a side effect of the prompt."""

    def score(self, prompt, path):
        from PIL import Image

        with Image.open(path) as image:
            pixels = image.convert("L").tobytes()
        return sum(pixels) / len(pixels) - len(prompt)


STAND_INS = {"lpips": mean_distance, "clip_score": colour_and_length, "image_reward": Brightness()}


def with_stand_ins():
    """All metrics; those that need networks look with stand-ins."""
    return tuple(
        replace(metric, load=lambda _device, _download, name=metric.name: STAND_INS[name])
        if metric.needs
        else metric
        for metric in METRICS
    )
