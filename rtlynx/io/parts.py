"""Checkpoints of a pipeline with several transformers: a folder for each, in one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rtlynx.models.sparsify import transformers_of
from rtlynx.storage.checkpoint_folder import INDEX, check_replaceable
from rtlynx.storage.files import CheckpointError


def parts_of(model_or_pipeline: Any, folder: Path) -> dict[Path, nn.Module]:
    """Folder of a checkpoint -> model: `folder` itself, or one in it for each of several transformers."""
    models = transformers_of(model_or_pipeline)
    return {folder if len(models) == 1 else folder / name: model for name, model in models.items()}


def check_target(folder: Path, *, several: bool | None = None) -> None:
    """Find out, before any work, whether one checkpoint, or several, can be saved to `folder`.

    Where it is not known how many, what is there decides. Raises what `check_replaceable` does.
    """
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    parts = [name for name in names if "transformer" in name and (folder / name).is_dir()]
    if several is None:
        several = bool(parts)
    others = [name for name in names if name not in parts]
    if several and others:
        raise FileExistsError(
            f"{folder} exists and holds other files ({others[0]}) than one folder for each transformer: "
            "choose another folder"
        )
    for name in parts if several else ():
        check_replaceable(folder / name)
    if not (several and parts):
        check_replaceable(folder)


def refuse_other_parts(folder: Path, parts: Mapping[Path, nn.Module]) -> None:
    """CheckpointError where `folder` is of one transformer and there are several, or the other way round."""
    names = ", ".join(part.name for part in parts)
    if len(parts) > 1 and (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} is the checkpoint of one transformer, and this pipeline has several ({names}): load "
            "it into the one that it was made of"
        )
    inside = sorted(found.parent.name for found in folder.glob(f"*transformer*/{INDEX}"))
    if len(parts) == 1 and inside and not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds checkpoints of several transformers ({', '.join(inside)}), and this is one: "
            f"load {folder / inside[0]}"
        )
