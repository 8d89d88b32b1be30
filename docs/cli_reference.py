"""The reference of the command line, made from the commands themselves."""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from rtlynx.cli import commands  # noqa: F401  importing them registers them
from rtlynx.cli.app import app


def reference() -> str:
    """Every command in Markdown: what it does, its arguments and options, an example."""
    known: Any = typer.main.get_command(app)
    kinds = {
        command.name or getattr(command.callback, "__name__", ""): get_type_hints(command.callback)
        for command in app.registered_commands
    }
    return "\n\n".join(_section(name, one, kinds[name]) for name, one in known.commands.items())


def _section(name: str, command: Any, kinds: dict[str, Any]) -> str:
    parts = [f"## rtlynx {name}", _paragraphs(command.help or "")]
    rows = [_row(one, kinds[one.name]) for one in command.params if one.name in kinds]
    if rows:
        parts.append("\n".join(["| argument | default | what it does |", "|---|---|---|", *rows]))
    if command.epilog:
        parts.append(f"```bash\n{command.epilog.removeprefix('Example: ')}\n```")
    return "\n\n".join(parts)


def _row(parameter: Any, kind: Any) -> str:
    told = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    known = not (told is None or told is False or told == [] or callable(told))
    default = "required" if parameter.required else f"`{told}`" if known else ""
    return f"| {_shown(parameter, kind)} | {default} | {parameter.help} |"


def _shown(parameter: Any, kind: Any) -> str:
    option = max(parameter.opts, key=len)
    if not option.startswith("-"):
        return f"`{option.upper()}`"
    if kind is bool:
        return f"`{option}`"
    return f"`{option} {parameter.metavar or _value(kind)}`"


def _value(kind: Any) -> str:
    """What stands for an option's value."""
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    parts = [one for one in get_args(kind) if one is not type(None)]
    if parts:
        return _value(parts[0])
    return {Path: "PATH", int: "NUMBER", float: "NUMBER"}.get(kind, "TEXT")


def _paragraphs(text: str) -> str:
    """As one line a paragraph: docstrings are wrapped."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
