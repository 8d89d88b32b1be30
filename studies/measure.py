"""One row of the study: build a variant, draw, measure."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from make_variant import Built, Calibration, build
from model_errors import model_errors
from modelled_time import all_dense, step_ms
from picture_figures import Judges, picture_figures
from PIL import Image
from row_store import over_seeds
from study_model import StudyModel, noise_seed
from torch import Tensor
from variants import Variant

from rtlynx.calibration.calls import Call
from rtlynx.evaluate.grid import to_image
from rtlynx.evaluate.layers import (
    Distribution,
    activation_distributions,
    gaussian_energy_kept,
    weight_distributions,
)
from rtlynx.evaluate.sampling import sample_and_record, sample_pictures
from rtlynx.models.plan import make_plan
from rtlynx.models.sparsify import target_model
from rtlynx.recipe import Recipe
from rtlynx.storage.files import atomic_file

COMPARED = 16  # prompts on whose dense calls, at every step, errors inside the model are measured
ATLAS_PICTURES, ATLAS_COLUMNS = 64, 8
DISTRIBUTION_CALLS = 8


@dataclass
class Study:
    """What all variants of one model share.

    known_dense : (steps, study seed) -> dense pictures, drawn once and kept.
    """

    model: StudyModel
    judges: Judges
    calibration: Calibration
    batch_size: int = 500
    compared: int = COMPARED
    progress: bool = False
    known_dense: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _calls: dict[int, list[Call]] = field(default_factory=dict)

    def draw(self, pipeline: Any, count: int, steps: int, first_seed: int) -> Tensor:
        """`count` pictures (n, 3, H, W) on the CPU."""
        return sample_pictures(
            pipeline,
            self.model.prompts(count),
            seed=self.model.first_noise + first_seed,
            batch_size=self.batch_size,
            pipeline_kwargs={**self.model.settings, "num_inference_steps": steps},
        )

    def dense(self, count: int, steps: int, seed: int) -> Tensor:
        """The dense model's pictures of a study seed."""
        known = self.known_dense.get((steps, seed))
        if known is None or len(known) < count:
            known = self.draw(self.model.pipeline, count, steps, noise_seed(seed))
            self.known_dense[steps, seed] = known
        return known[:count]

    def calls(self, steps: int) -> list[Call]:
        """Calls of the dense model at every one of `steps` steps, for one batch of prompts."""
        if steps not in self._calls:
            _, self._calls[steps] = sample_and_record(
                self.model.pipeline,
                self.model.prompts(self.compared),
                steps=steps,
                recorded=steps,
                seed=self.model.first_noise,
                batch_size=self.compared,
                pipeline_kwargs=self.model.settings,
            )
        return self._calls[steps]

    def row(
        self, variant: Variant, pictures: int, seeds: Sequence[int], atlas: Path | None = None
    ) -> dict[str, Any]:
        """Build, draw and measure one variant.

        Parameters
        ----------
        pictures, seeds : how many pictures of each of which seeds.
        atlas : PNG to write the first pictures of the first seed to; a second one, of the name with "-worst"
            at its end, gets those furthest from dense, under the dense ones.
        """
        # Shared by all variants, so not part of the time that this one takes.
        self.calls(variant.steps)
        references = [self.dense(pictures, variant.reference_steps, seed) for seed in seeds]
        start = time.perf_counter()
        built = build(variant, self.model, self.calibration, progress=self.progress)
        prompts = self.model.prompts(pictures)
        found, drawing = [], 0.0
        for seed, reference in zip(seeds, references, strict=True):
            began = time.perf_counter()
            mine = self.draw(
                built.pipeline, pictures, variant.steps, noise_seed(seed, other=variant.other_noise)
            )
            drawing += time.perf_counter() - began
            found.append(picture_figures(mine, reference, prompts, self.judges))
            if atlas is not None and seed == seeds[0]:
                write_atlas(atlas, mine)
                rows = found[0]["worst_rows"]
                if rows:  # what breaks: dense above, the variant below
                    write_atlas(
                        atlas.with_stem(f"{atlas.stem}-worst"), torch.cat([reference[rows], mine[rows]])
                    )
        computed = None if built.cache is None else built.cache.computed
        modelled = built.modelled_ms(self.model.architecture, variant.steps)
        names = ("psnr", "ssim", "perceptual", "frechet", "precision", "recall", "retrieval")
        return {
            "name": variant.name,
            "group": variant.group,
            "sweep": variant.sweep,
            "pictures": pictures,
            "seeds": list(seeds),
            "n": pictures * len(seeds),
            "distinct_prompts": len(set(prompts)),
            "steps": variant.steps,
            "reference_steps": variant.reference_steps,
            "figures": {name: over_seeds([one[name] for one in found]) for name in names},
            "groups": _mean_groups([one["groups"] for one in found]),
            "worst": found[0]["worst"],
            "errors": self._errors(built, variant),
            "modelled_ms": modelled,
            "modelled_speedup": _over(self._dense_ms(built), modelled),
            "unmodelled": built.unmodelled,
            "calls_computed": computed,
            "forms": dict(Counter(layer.form for layer in built.plan.values())),
            "forms_by_role": self._forms_by_role(built),
            "recipe": built.recipe,
            "distillation": built.distillation,
            "calibration_prompts": None if built.calibration_seconds is None else self._prompts(variant),
            "calibration_seconds": _rounded(built.calibration_seconds),
            "drawing_seconds": _rounded(drawing),
            "seconds": _rounded(time.perf_counter() - start),
        }

    def _prompts(self, variant: Variant) -> int:
        most = self.calibration.prompts
        return variant.prompts if most is None else min(most, variant.prompts)

    def _errors(self, built: Built, variant: Variant) -> dict[str, Any]:
        model = target_model(built.pipeline)
        return model_errors(target_model(self.model.pipeline), model, built.layers, self.calls(variant.steps))

    def _forms_by_role(self, built: Built) -> dict[str, dict[str, int]]:
        """What layers of the image are, counted: role -> form -> layers."""
        found: dict[str, Counter[str]] = {}
        for layer in make_plan(target_model(self.model.pipeline), Recipe(rank=None)).sparse:
            if layer.name in built.plan:
                found.setdefault(layer.candidate.role, Counter())[built.plan[layer.name].form] += 1
        return {role: dict(forms) for role, forms in found.items()}

    def _dense_ms(self, built: Built) -> float | None:
        return step_ms(self.model.architecture, all_dense(built.plan))

    def distributions(self, steps: int) -> dict[str, Any]:
        """By role, of weights and activations: energy that 2:4 keeps, histograms (the paper's Figure 2)."""
        model = target_model(self.model.pipeline)
        layers = make_plan(model, Recipe.immediate(grouping="adjacent")).sparse
        calls = self.calls(steps)
        spread = calls[:: max(1, len(calls) // DISTRIBUTION_CALLS)]
        weights, activations = (
            weight_distributions(model, layers),
            activation_distributions(model, layers, spread),
        )
        by_role: dict[str, Any] = {}
        for role in dict.fromkeys(layer.candidate.role for layer in layers):
            names = [layer.name for layer in layers if layer.candidate.role == role]
            by_role[role] = {
                kind: _plain(Distribution.merged(some[name] for name in names))
                for kind, some in (("weights", weights), ("activations", activations))
            }
        return {"normal": gaussian_energy_kept(), "roles": by_role}


def write_atlas(path: Path, pictures: Tensor) -> None:
    """The first pictures in rows of `ATLAS_COLUMNS`, as a PNG."""
    some = pictures[:ATLAS_PICTURES]
    size = some.shape[-1]
    rows = -(-len(some) // ATLAS_COLUMNS)
    atlas = Image.new("RGB", (ATLAS_COLUMNS * size, rows * size), "white")
    for i, picture in enumerate(some):
        atlas.paste(to_image(picture), (i % ATLAS_COLUMNS * size, i // ATLAS_COLUMNS * size))
    with atomic_file(path) as temporary:
        atlas.save(temporary, "PNG", optimize=True)


def read_atlas(path: Path) -> Tensor:
    """Inverse of `write_atlas`, to eight bits: (n, 3, S, S) in [0, 1]; n is a multiple of a row."""
    with Image.open(path) as image:
        raw = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        width, height = image.size
    size = width // ATLAS_COLUMNS
    tiles = raw.view(height // size, size, width // size, size, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, size, size).float() / 255


def _mean_groups(by_seed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of each group's figures; None where one is missing."""
    groups = {}
    for name in dict.fromkeys(name for one in by_seed for name in one):
        some = [one[name] for one in by_seed if name in one]
        groups[name] = {key: over_seeds([one[key] for one in some])["mean"] for key in some[0]}
    return groups


def _plain(one: Distribution) -> dict[str, Any]:
    return {"share": one.share, "counts": [int(count) for count in one.counts]}


def _over(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or not part else whole / part


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
