"""What the self-contained HTML pages share."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

NBSP = "\N{NO-BREAK SPACE}"


def page_template(file: Path, **filters: Callable[..., Any]) -> jinja2.Template:
    """The template in `file`, with the filter `number` and others; an undefined name is an error."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=number, **filters)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment.from_string(file.read_text(encoding="utf-8"))


def number(value: float | None, digits: int) -> str:
    """A number for people: a real minus sign, a dash for null."""
    return "\N{EN DASH}" if value is None else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def data_uri(kind: str, data: bytes) -> str:
    """A picture file of this kind ("png", "webp") as the address of an image."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
