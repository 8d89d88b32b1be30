"""What a pipeline is given for one picture: a prompt, or several of its arguments by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Prompt = str | Mapping[str, Any]


def arguments_of(prompt: Prompt) -> Mapping[str, Any]:
    """The pipeline's arguments that `prompt` gives, by name."""
    return {"prompt": prompt} if isinstance(prompt, str) else prompt


def check_prompts(prompts: Iterable[Prompt]) -> None:
    """ValueError where one of `prompts` is none; FileNotFoundError where a picture is not there."""
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, Mapping) or not prompt or not all(isinstance(key, str) for key in prompt):
            raise ValueError(
                "prompts are a list of strings, or of dicts of the pipeline's arguments by name; "
                f"prompt {number} is {prompt!r:.80}"
            )
        for key, value in prompt.items():
            for path in _paths(value):
                if not path.is_file():
                    raise FileNotFoundError(f"prompt {number}: there is no picture {path} ({key})")


def describe(prompt: Prompt) -> str:
    """One line that tells a reader which prompt it is."""
    if isinstance(prompt, str):
        return f"{prompt!r:.80}"
    text = next((value for value in prompt.values() if isinstance(value, str)), None)
    return f"of {', '.join(prompt)}" if text is None else f"{text!r:.80}"


def together(prompts: Sequence[Prompt]) -> list[tuple[list[int], bool]]:
    """Numbers of `prompts` that one pipeline call may draw, and whether as lists of texts.

    Those of text alone, under the same names. A list of pictures means one for each prompt to some pipelines
    and several for one prompt to others, so what has other inputs is drawn alone.
    """
    found: list[tuple[list[int], bool]] = []
    of: dict[tuple[str, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        given = arguments_of(prompt)
        if not all(isinstance(value, str) for value in given.values()):
            found.append(([number], False))
            continue
        names = tuple(sorted(given))
        if names not in of:
            of[names] = []
            found.append((of[names], True))
        of[names].append(number)
    return found


def joined(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Arguments of one pipeline call for `prompts`, each a list with one text for each."""
    names = arguments_of(prompts[0])
    return {name: [arguments_of(prompt)[name] for prompt in prompts] for name in names}


def opened(value: Any) -> Any:
    """`value` with each `Path` in it replaced by the picture that the file holds, as diffusers loads it."""
    if isinstance(value, Path):
        from diffusers.utils import load_image

        return load_image(str(value))
    if isinstance(value, list | tuple):
        return type(value)(opened(one) for one in value)
    return value


def _paths(value: Any) -> list[Path]:
    if isinstance(value, list | tuple):
        return [path for one in value for path in _paths(one)]
    return [value] if isinstance(value, Path) else []
