"""What the index of a checkpoint may say. All of it is checked here before anything uses any of it.

The index is `rtlynx.json`, or the `quantization_config` of a model's `config.json`, which other JSON readers
have read: they let NaN pass, and integers of any size. Not by pydantic or msgspec: a dependency of the core
for two tables of checks, and neither bounds how deep and how large what it is given may be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtlynx.math.fp8 import E4M3, is_two_of_four
from rtlynx.math.scores import MAGNITUDE, SCORES
from rtlynx.math.selection import Pattern
from rtlynx.models.fingerprint import RECORD
from rtlynx.recipe import Recipe
from rtlynx.storage.files import CheckpointError, first_line

_DEPTH, _ITEMS, _LONGEST = 16, 1 << 20, 4096
_LARGEST = 2**53
_MOST_HEADS, _MOST_HEAD_DIM = 1 << 14, 1 << 12
# Of layers: far beyond any model, and small enough that no product of two overflows.
_MOST_FEATURES, _MOST_RANK, _MOST_GLOBS, _LONGEST_NAME = 1 << 24, 1 << 20, 1000, 500

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# A check of one value, and what it should be.
_Check = tuple[Callable[[Any], bool], str]


def _whole(least: int, most: int) -> _Check:
    return lambda value: type(value) is int and least <= value <= most, f"a whole number {least} to {most}"


def _one_of(*names: str) -> _Check:
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}"


def _text(pattern: str, what: str) -> _Check:
    return lambda value: isinstance(value, str) and bool(re.fullmatch(pattern, value)), what


_FLAG: _Check = (lambda value: isinstance(value, bool), "true or false")
_MAPPING: _Check = (lambda value: isinstance(value, dict), "an object")
_NAME = _text(rf".{{1,{_LONGEST_NAME}}}", "a name")
_DIGEST = _text("[0-9a-f]{16}", "a digest of 16 digits")

_INDEX: dict[str, _Check] = {
    "rtlynx": _NAME,
    "model": _NAME,
    "recipe": _MAPPING,
    "layers": _MAPPING,
    "dense": _MAPPING,
}
_SIDECAR: dict[str, _Check] = {"tensors_sha256": _text("[0-9a-f]{64}", "a digest of 64 digits")}
_LAYER: dict[str, _Check] = {
    "in_features": _whole(1, _MOST_FEATURES),
    "out_features": _whole(1, _MOST_FEATURES),
    "pattern": _MAPPING,
    "norm": _one_of("none", "scale", "paper"),
    "precision": _one_of("bf16", "fp8"),
    "rank": _whole(0, _MOST_RANK),
    "refitted": _FLAG,
    "intercept": _FLAG,
    "base": _DIGEST,
}
# Only calibrated layers have these, and only in newer files.
_OPTIONAL: dict[str, _Check] = {
    "error": (lambda value: type(value) in (int, float) and value >= 0, "a number, 0 or more"),
    "weight_sparse": _FLAG,
}
_STORED_LAYER: dict[str, _Check] = {"weight": _DIGEST, "weight_dense": _FLAG}
_PATTERN: dict[str, _Check] = {
    "n": _whole(1, _MOST_FEATURES),
    "m": _whole(1, _MOST_FEATURES),
    "grouping": _one_of("adjacent", "strided"),
    "score": (lambda value: isinstance(value, str) and value in SCORES, f"one of {', '.join(SCORES)}"),
    "parts": (lambda value: type(value) is int or isinstance(value, list), "a number or a list of widths"),
}
# Name -> what each value of a mapping is. Old files have none of these.
_TABLES: dict[str, _Check] = {
    "base_tensors": _text(RECORD, "a record of a tensor"),
    "tensors": _text("[0-9a-f]{32}", "a digest of 32 digits"),
    "rotated_tensors": _text(RECORD, "a record of a tensor"),  # as version 4 called the next
    "reparameterized_tensors": _text(RECORD, "a record of a tensor"),
    "reads": _NAME,  # of layers that read one tensor, where a call told it
    "rotations": (lambda value: _is_size(value, _MOST_HEADS, _MOST_HEAD_DIM), "its heads and their width"),
    "permutations": (lambda value: _is_size(value, _MOST_FEATURES), "how many hidden features it has"),
}


def _is_size(value: Any, *limits: int) -> bool:
    if not isinstance(value, list) or len(value) != len(limits):
        return False
    return all(type(one) is int and 1 <= one <= most for one, most in zip(value, limits, strict=True))


def check_values(value: Any, path: Path) -> None:
    """CheckpointError unless `value` is JSON of bounded size, depth and numbers, and prints in one line."""
    left = _ITEMS

    def check(one: Any, depth: int) -> None:
        nonlocal left
        left -= 1
        if depth > _DEPTH or left < 0:
            raise CheckpointError(f"{path} is damaged: it is nested too deeply, or holds too much")
        if isinstance(one, dict | list):
            for key in one if isinstance(one, dict) else ():
                if not isinstance(key, str):
                    raise CheckpointError(f"{path} is damaged: it has a key that is a {type(key).__name__}")
                check(key, depth)
            for item in one.values() if isinstance(one, dict) else one:
                check(item, depth + 1)
        elif isinstance(one, str):
            if len(one) > _LONGEST or not one.isprintable():
                raise CheckpointError(f"{path} is damaged: it holds {one[:40]!r}, which is no name")
        elif isinstance(one, float):
            if not math.isfinite(one):
                raise CheckpointError(f"{path} is damaged: it holds the number {one}")
        elif isinstance(one, int) and not isinstance(one, bool):
            if abs(one) > _LARGEST:
                raise CheckpointError(f"{path} is damaged: it holds a number of {one.bit_length()} bits")
        elif one is not None and not isinstance(one, bool):
            raise CheckpointError(f"{path} is damaged: it holds a {type(one).__name__}")

    check(value, 0)


def check_schema(index: dict[str, Any], path: Path, *, whole_model: bool) -> Recipe:
    """The recipe of `index`; CheckpointError unless all is of the type and within the range that it must be.

    `whole_model` tells the index of a whole model's files, of which each layer says more. The values must
    have passed `check_values`.
    """
    _check_keys(index, _INDEX if whole_model else {**_INDEX, **_SIDECAR}, "", path)
    for table, (good, what) in _TABLES.items():
        entries = index.get(table, {})
        if not isinstance(entries, dict) or not all(map(good, entries.values())):
            raise CheckpointError(f"{path} is damaged: {table} is an object, in it for each name {what}")
    if not isinstance(index.get("config", {}), dict):
        raise CheckpointError(f"{path} is damaged: config is no object")
    if not all(reason is None or isinstance(reason, str) for reason in index["dense"].values()):
        raise CheckpointError(f"{path} is damaged: dense says for each layer why it is")
    for name, entry in index["layers"].items():
        where = f" of {name[:_LONGEST_NAME]}"
        if not isinstance(entry, dict):
            raise CheckpointError(f"{path} is damaged: what it says{where} is no object")
        # Version 1 knew no other precision, versions 1 to 3 no intercepts.
        layer = {"precision": "bf16", "intercept": False, **entry}
        _check_keys(layer, {**_LAYER, **_STORED_LAYER} if whole_model else _LAYER, where, path)
        _check_keys(entry, {key: check for key, check in _OPTIONAL.items() if key in entry}, where, path)
        pattern = {"score": MAGNITUDE.name, **entry["pattern"]}  # versions 1 and 2 knew no other
        _check_keys(pattern, _PATTERN, where, path)
        if layer["precision"] == "fp8" and layer["norm"] == "paper":
            raise CheckpointError(f"{path} is damaged: a layer of precision fp8 with norm 'paper',{where}")
        if layer["intercept"] and not layer["refitted"]:
            raise CheckpointError(f"{path} is damaged: an intercept without a refitted weight,{where}")
        if layer.get("weight_sparse") and not _may_drop_weights(layer):
            raise CheckpointError(
                f"{path} is damaged: a layer that drops weights is refitted, of precision fp8, pattern 1:1, "
                f"rank 0 and a multiple of 4 inputs, and this is not{where}"
            )
        try:
            stored_pattern(entry).widths(entry["in_features"])
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: the pattern{where}: {first_line(error)}") from None
    return _recipe(index["recipe"], path)


def _may_drop_weights(layer: dict[str, Any]) -> bool:
    keeps_all = (
        layer["pattern"]["n"] == layer["pattern"]["m"] and layer["norm"] == "none" and not layer["rank"]
    )
    return keeps_all and layer["refitted"] and layer["precision"] == "fp8" and layer["in_features"] % 4 == 0


def _check_keys(values: dict[str, Any], checks: dict[str, _Check], where: str, path: Path) -> None:
    for key, (good, what) in checks.items():
        if key not in values:
            raise CheckpointError(f"{path} is damaged: it lacks {key}{where}")
        if not good(values[key]):
            raise CheckpointError(
                f"{path} is damaged: unknown {key} {_short(values[key])}{where}, should be {what}"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def reparameterized_tensors(index: dict[str, Any]) -> dict[str, str]:
    """Name -> record of what rotations and permutations changed; version 4 had another name for it."""
    return index.get("reparameterized_tensors", index.get("rotated_tensors", {}))


def stored_formats(entry: dict[str, Any]) -> dict[str, bool]:
    """Whether the weight of one layer of an index is "quantized", and "weight_sparse".

    Version 1 knew no quantised layers, versions 1 to 5 none that drop weights.
    """
    return {
        "quantized": entry.get("precision") == "fp8",
        "weight_sparse": bool(entry.get("weight_sparse", False)),
    }


def stored_pattern(entry: dict[str, Any]) -> Pattern:
    """The pattern of one layer of an index; ValueError where it is none."""
    pattern = entry["pattern"]
    parts, features = pattern["parts"], entry["in_features"]
    widths = parts if isinstance(parts, list) else [parts]
    if not all(type(width) is int and 1 <= width <= features for width in widths):
        raise ValueError(f"parts are whole numbers from 1 to {features}")
    parts = tuple(parts) if isinstance(parts, list) else parts
    return Pattern(
        pattern["n"], pattern["m"], pattern["grouping"], parts, pattern.get("score", MAGNITUDE.name)
    )


def _recipe(settings: dict[str, Any], path: Path) -> Recipe:
    globs = [settings.get("skip"), settings.get("formats"), settings.get("forms")]
    if any(
        isinstance(some, list | dict)
        and (
            len(some) > _MOST_GLOBS
            or any(len(glob) > _LONGEST_NAME for glob in some if isinstance(glob, str))
        )
        for some in globs
    ):
        raise CheckpointError(f"{path} is damaged: its recipe has too many or too long patterns")
    try:
        recipe = Recipe.from_dict(settings)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: its recipe: {first_line(error)}") from None
    if recipe.chooses_dense_steps:
        raise CheckpointError(
            f"{path} is damaged: its recipe leaves the choice of dense_sigmas to calibration"
        )
    return recipe


def wrong_numbers(
    kind: str,
    tensor: Tensor,
    *,
    quantized: bool,
    own: torch.dtype,
    refitted: bool,
    weight_sparse: bool = False,
) -> str | None:
    """Why `tensor` cannot be the `kind` of a layer, `quantized` or not; None where it can.

    Parameters
    ----------
    kind : "weight" | "bias" or one of `rtlynx.nn.state_dict.OWN`
    own : dtype of the model; float64 is right in such a one alone.
    refitted : whether calibration made it; the base model's tensors may hold anything.
    weight_sparse : whether the layer drops weights.
    """
    precision = "fp8" if quantized else "bf16"
    eight_bits = quantized and kind == "weight"
    floats = (*_FLOATS, torch.float64) if own is torch.float64 else _FLOATS
    allowed = (E4M3,) if eight_bits else (torch.float32,) if kind == "weight_scale" else floats
    if tensor.dtype not in allowed:
        return f"is {tensor.dtype} in a layer of precision {precision}"
    if not refitted or kind in ("weight_dense", "bias_dense") or tensor.numel() == 0:
        return None
    if eight_bits:
        bits = tensor.reshape(-1).view(torch.uint8)  # 0x7F and 0xFF are NaN
        nan = int(bits.max()) == 0xFF or int(bits.view(torch.int8).max()) == 0x7F
        if weight_sparse and not is_two_of_four(tensor):
            return "has more than two nonzero entries among four neighbours, in a layer that drops weights"
        return "holds NaN" if nan else None
    least, most = (float(end) for end in tensor.detach().aminmax())
    if not (math.isfinite(least) and math.isfinite(most)):
        return "holds numbers that are not finite"
    if kind == "weight_scale" and least <= 0:
        return f"holds {least}, and scales are above 0"
    return None
