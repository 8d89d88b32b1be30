"""What a user types or writes into files, read: KEY=VALUE settings, recipes, prompts."""

from __future__ import annotations

import codecs
import json
import math
import re
import stat
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from rtlynx.calibration import CalibrationOptions, Distillation
    from rtlynx.models.prompts import Prompt
    from rtlynx.recipe import Recipe


class UsageError(ValueError):
    """Something typed that no command takes: exit code 2."""


_WORDS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
# Byte order marks; that of UTF-32 begins like that of UTF-16.
_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MOST_BYTES = 64 << 20
# Recipes that have a name: methods of `Recipe`.
RECIPES = ("recommended", "paper", "immediate", "dense_fp8")
# Names of arguments whose strings are paths of pictures, in files of prompts.
_PICTURES = re.compile(r"(^|_)(images?|masks?|videos?|frames)(_|$)")
_VIDEO_FILES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


def pairs(
    items: Iterable[str] | None, option: str, types_of: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """KEY=VALUE pairs, each key once.

    Parameters
    ----------
    items : what was typed
    option : its name, for errors
    types_of : types of the keys that have one; values of others are JSON where they parse as such, else text
    """
    found: dict[str, Any] = {}
    for item in items or ():
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"{option} takes KEY=VALUE, got {item!r}")
        if key in found:
            raise UsageError(f"{option} gives {key!r} twice: leave one out")
        try:
            found[key] = _value(text, (types_of or {}).get(key, Any))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{option} {key}: {error}") from None
    return found


def _value(text: str, wanted: Any) -> Any:
    """`text` as JSON, else as text, in the type `wanted` where it says what the text cannot be."""
    choices = _choices(wanted)
    word = text.strip().lower()
    if bool in choices and word in _WORDS:
        return _WORDS[word]
    if choices == {bool}:
        raise ValueError(f"expected yes or no (true or false, on or off), got {text!r}")
    if type(None) in choices and word == "none":
        return None
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_once)
    except json.JSONDecodeError:
        value = text
    if choices and choices <= {int, float} and not _fits(value, choices):
        raise ValueError(f"expected a {'whole ' if float not in choices else ''}number, got {text!r}")
    return value


def _choices(wanted: Any) -> set[Any]:
    """The types that make up a union, or the one; empty for "anything"."""
    if wanted is Any:
        return set()
    return set(get_args(wanted)) if get_origin(wanted) in (Union, types.UnionType) else {wanted}


def _fits(value: Any, choices: set[Any]) -> bool:
    return isinstance(value, int | float if float in choices else int) and not isinstance(value, bool)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number to work with")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise ValueError(f"a key is given twice among {', '.join(key for key, _ in items)}")
    return found


def recipe_of(
    named: str | None, settings: list[str] | None = None, default: Callable[..., Recipe] | None = None
) -> Recipe:
    """A recipe by its name (`RECIPES`) or from a JSON file, with single settings changed.

    Where nothing is `named` it is `default`, or `Recipe` itself.
    """
    from rtlynx.recipe import Recipe

    changes = pairs(settings, "--set", get_type_hints(Recipe))
    if named is None or named in RECIPES:
        return Recipe.from_dict(changes, default if named is None else getattr(Recipe, named))
    file = Path(named)
    if file.name == named and not file.suffix and not file.exists():
        raise UsageError(f"no recipe or file is called {named!r}: give {', '.join(RECIPES)}, or a JSON file")
    text = read_text(file)
    try:
        base = Recipe.from_json(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None
    return Recipe.from_dict({**base.to_dict(), **changes})


def calibration_options(
    options: list[str] | None, work: Path | None, pipeline: dict[str, Any]
) -> CalibrationOptions:
    """CalibrationOptions from KEY=VALUE pairs; unknown keys are refused like those of a recipe."""
    from rtlynx.calibration import CalibrationOptions
    from rtlynx.recipe import refuse_unknown

    hints = get_type_hints(CalibrationOptions)
    known = set(hints) - {"folder", "pipeline_kwargs"}
    given = pairs(options, "--option", {key: hints[key] for key in known})
    refuse_unknown("calibration option", given, known)
    if work is not None and work.exists() and not work.is_dir():
        raise ValueError(f"--work {work} is not a folder")
    return CalibrationOptions(folder=work, pipeline_kwargs=pipeline, **given)


def distillation(settings: list[str] | None) -> Distillation | None:
    """Distillation from KEY=VALUE pairs, None where there are none; unknown keys are refused."""
    from rtlynx.calibration import Distillation
    from rtlynx.recipe import refuse_unknown

    if not settings:
        return None
    hints = get_type_hints(Distillation)
    given = pairs(settings, "--distill", hints)
    refuse_unknown("distillation", given, set(hints))
    return Distillation(**given)


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not blank. Lines end with "\\n" or "\\r\\n", with nothing else."""
    if _is_json_lines(file):
        raise ValueError(
            f"{file} holds arguments of a pipeline, which `rtlynx calibrate --prompts` alone takes: give a "
            "text file with one prompt a line"
        )
    return list(_lines(file).values())


def read_prompts_with_inputs(file: Path) -> list[Prompt]:
    """`read_prompts`, or of JSON lines (.jsonl) the pipeline's arguments for each prompt.

    Strings under names of pictures and videos (image, mask_image, pose_video ...) are paths, relative to the
    file; each becomes a `Path`, which calibration opens as a picture.
    """
    if not _is_json_lines(file):
        return list(read_prompts(file))
    found: list[Prompt] = []
    for number, line in _lines(file).items():
        try:
            value = json.loads(line, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_once)
            if not isinstance(value, dict) or not value:
                raise ValueError('expected an object such as {"prompt": "make it snow", "image": "cat.png"}')
            found.append({name: _with_pictures(name, one, file.parent) for name, one in value.items()})
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
    return found


def _is_json_lines(file: Path) -> bool:
    return file.suffix.lower() == ".jsonl"


def _lines(file: Path) -> dict[int, str]:
    """Number of a line, from 1 -> what it holds; blank ones left out."""
    lines = enumerate(read_text(file).split("\n"), 1)
    found = {number: line.strip(" \t\r") for number, line in lines if line.strip()}
    if not found:
        raise ValueError(f"{file} holds no prompts: write one a line")
    return found


def _with_pictures(name: str, value: Any, folder: Path) -> Any:
    """`value` of the argument `name`, with a `Path` for each string, where it is one of pictures."""
    if not _PICTURES.search(name):
        return value
    if isinstance(value, list):
        return [_with_pictures(name, one, folder) for one in value]
    if not isinstance(value, str):
        return value
    path = folder / value
    if path.suffix.lower() in _VIDEO_FILES:
        raise ValueError(f"{value} ({name}) is a video file: give a list of pictures, one for each frame")
    if not path.is_file():
        raise ValueError(f"there is no picture {path} ({name})")
    return path


def read_text(file: Path) -> str:
    """A regular file in UTF-8, or in the encoding that its byte order mark says.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is no regular file, very large, or not text; with file and line.
    """
    data = _read_regular(file)
    mark, encoding = next(
        ((mark, name) for mark, name in _ENCODINGS if data.startswith(mark)), (b"", "utf-8")
    )
    data = data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = _line(data[: error.start].decode(encoding, "ignore"))
        raise ValueError(f"{file}, line {line}: not {encoding.upper()} text; save it as UTF-8") from None
    if "\0" in text:
        line = _line(text.partition("\0")[0])
        raise ValueError(f"{file}, line {line}: a NUL character; save the file as UTF-8 text")
    return text


def _line(before: str) -> int:
    return before.count("\n") + 1


def _read_regular(file: Path) -> bytes:
    """Asks first what `file` is: to open a pipe can wait for ever."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file} is {'a folder' if stat.S_ISDIR(found.st_mode) else 'not a regular file'}")
    if found.st_size > _MOST_BYTES:
        raise ValueError(f"{file} has {found.st_size / 1e6:.0f} MB: is it the right file?")
    return file.read_bytes()
