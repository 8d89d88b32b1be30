"""The API page: signatures and docstrings of the public names, as Markdown."""

import inspect
import json
import re
from typing import Any

import rtlynx

# What the page says in which order; every public name is in one of these groups.
GROUPS = {
    "Models": ("sparsify", "calibrate", "save", "load", "densify", "schedule", "RTLynxConfig"),
    "Choices": ("Recipe", "Budget", "CalibrationOptions", "CalibrationReport"),
    "The layer": ("SparseLinear", "Pattern"),
    "Selection": ("nm_mask", "norm_scale", "pack", "unpack"),
    "Errors": ("CalibrationError", "CheckpointError"),
}
_SECTION = re.compile(r"^(\w[\w ]*)\n-+\n", re.MULTILINE)


def page() -> str:
    parts = []
    for title, names in GROUPS.items():
        parts.append(f"## {title}")
        for name in names:
            parts += _entry(name, getattr(rtlynx, name))
    return "\n\n".join(parts)


def _entry(name: str, thing: Any) -> list[str]:
    parts = [f"### `{name}`", f"```python\n{_signature(f'rtlynx.{name}', thing)}\n```", docstring(thing)]
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        methods = [
            f"- `{method}`: {_summary(member)}"
            for method, member in vars(thing).items()
            if not method.startswith("_") and _is_method(member) and inspect.getdoc(member)
        ]
        parts += ["**Methods and properties**", "\n".join(methods)] if methods else []
    return parts


def docstring(thing: Any) -> str:
    """A docstring in Markdown: its sections as bold words, what stands in their lists as lists."""
    pieces = _SECTION.split(inspect.getdoc(thing) or "")
    parts = [pieces[0].strip()]
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        listed = title in ("Parameters", "Attributes", "Raises", "Returns")
        parts.append(f"**{title}**\n\n{_items(body) if listed else body.strip()}")
    return "\n\n".join(parts)


def _items(body: str) -> str:
    """Lines at the margin begin an item, indented ones go on with it."""
    items: list[list[str]] = []
    for line in body.strip().splitlines():
        if line.startswith(" ") and items:
            items[-1].append(line.strip())
        elif line.strip():
            name, colon, rest = line.partition(" : ")
            items.append([f"`{name}`: {rest}" if colon else line])
    return "\n".join(f"- {item[0]}{_continued(item[1:])}" for item in items)


def _continued(lines: list[str]) -> str:
    return f"  \n  {' '.join(lines)}" if lines else ""


def _is_method(member: Any) -> bool:
    return isinstance(member, classmethod | staticmethod | property) or inspect.isfunction(member)


def _summary(member: Any) -> str:
    return (inspect.getdoc(member) or "").split("\n\n")[0].replace("\n", " ")


def _signature(name: str, thing: Any) -> str:
    """Parameters with their defaults, a line each where they are many; no types, which the text has."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return f"class {name}({thing.__bases__[0].__name__})"
    given = []
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in given:
            given.append("*")
        given.append(parameter.name + _default(parameter.default))
    line = f"{name}({', '.join(given)})"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {one},\n" for one in given) + ")"


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return ""
    if type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return "={}"
    return f"={json.dumps(value) if isinstance(value, str) else repr(value)}"
