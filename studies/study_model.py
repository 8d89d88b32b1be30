"""A model under study: how it is loaded, what it is asked to draw, and with which noise."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from rtlynx_zoo.pipeline import FashionPipeline
from rtlynx_zoo.prompts import (
    FASHION_CLASSES,
    all_prompts,
    calibration_prompts,
    demo_prompts,
    evaluation_prompts,
    fashion_prompts,
)
from z_image_batch import batch_equal_pictures

from rtlynx.models.pipelines import load_model
from rtlynx.models.sparsify import target_model

GUIDANCE = 3.0
# Of classes: more guidance draws each class's typical piece again and again.
CLASS_GUIDANCE = 1.5
CALIBRATION_PROMPTS = 1024
# First seed of the noise of each of the study's seeds; further apart than there are pictures.
SEED_STRIDE = 1_000_000
# Dense against dense with other noise: the noise floor.
OTHER_NOISE = 500_000
# Where prompts are classes, calibration and pictures differ in their noise: prompt i is calibrated on from
# noise i, and picture 0 drawn from this.
CLASS_NOISE = 100_000


@dataclass(frozen=True)
class StudyModel:
    """A dense pipeline and its prompts.

    evaluation : prompts that are drawn and measured, in order; none is in `calibration`, unless the noise of
        pictures begins behind that of calibration.
    settings : passed to the pipeline with every call.
    first_noise : added to the noise seeds of all pictures that are measured.
    """

    name: str
    pipeline: Any
    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": GUIDANCE})
    first_noise: int = 0

    def __post_init__(self) -> None:
        both = set(self.calibration) & set(self.evaluation)
        if both and self.first_noise < len(self.calibration):
            raise ValueError(f"{len(both)} prompts are both calibrated and measured on: {min(both)!r} ...")

    @property
    def draws_classes(self) -> bool:
        """Whether prompts are classes of clothing."""
        return isinstance(self.pipeline, FashionPipeline)

    @property
    def architecture(self) -> str:
        """Class name of the transformer."""
        return type(target_model(self.pipeline)).__name__

    def prompts(self, count: int) -> list[str]:
        """`count` prompts to draw; past the last one they come again, with other noise."""
        return list(itertools.islice(itertools.cycle(self.evaluation), count))

    def copy_of_pipeline(self) -> Any:
        """The pipeline around a copy of its transformer, to be changed."""
        model = copy.deepcopy(target_model(self.pipeline))
        return type(self.pipeline)(**{**self.pipeline.components, "transformer": model})


def load_study_model(source: str, *, device: str, dtype: torch.dtype) -> StudyModel:
    """A model of the zoo (`zoo:NAME`) with the box's emoji captions, or with the classes of flux-fashion.

    Evaluation prompts: the demo's 64, the 512 held out, then the 281 captions of no list: 857 in all, none of
    which is calibrated on. The model has been trained on every caption.
    """
    return study_of(source, load_model(source, device=device, dtype=dtype))


def study_of(name: str, pipeline: Any) -> StudyModel:
    """`pipeline` with its prompts; as of `load_study_model`."""
    if not callable(pipeline) or not hasattr(pipeline, "components"):
        raise ValueError(f"{name} is no pipeline: a bare transformer cannot draw prompts")
    model = target_model(pipeline)
    if isinstance(model, ZImageTransformer2DModel):
        batch_equal_pictures(model)
    if isinstance(pipeline, FashionPipeline):
        settings = {"guidance_scale": CLASS_GUIDANCE}
        calibrated = tuple(fashion_prompts(CALIBRATION_PROMPTS))
        return StudyModel(name, pipeline, calibrated, FASHION_CLASSES, settings, CLASS_NOISE)
    calibration = tuple(calibration_prompts())
    return StudyModel(name, pipeline, calibration, _disjoint(calibration))


def _disjoint(calibration: Sequence[str]) -> tuple[str, ...]:
    taken = set(calibration)
    ordered = [*demo_prompts(), *evaluation_prompts(), *all_prompts()]
    return tuple(dict.fromkeys(prompt for prompt in ordered if prompt not in taken))


def noise_seed(seed: int, *, other: bool = False) -> int:
    """Picture i of study seed `seed` starts from noise of this plus i."""
    return seed * SEED_STRIDE + (OTHER_NOISE if other else 0)
