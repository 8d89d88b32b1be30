"""The `rtlynx` command: what goes wrong becomes one line and an exit code.

Only the standard library is imported here, so that this much works whatever else is broken. The commands are
in `rtlynx.cli.commands`.
"""

from __future__ import annotations

import os
import re
import sys
import traceback

from rtlynx._version import __version__

TRACEBACK_SWITCH = "RTLYNX_TRACEBACK"
DONE, BAD_INPUT, INTERRUPTED = 0, 1, 130
# Raised for what a user can change; others are faults of this program or of a library.
_EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 bad input or a failure, 2 wrong usage, 130 interrupted."""
    try:
        code = _run(sys.argv[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
        _complain("interrupted")
    except BrokenPipeError:  # whoever reads the output has enough of it, as `head` does
        code = BAD_INPUT
    except Exception as error:
        if os.environ.get(TRACEBACK_SWITCH):
            raise
        code = BAD_INPUT
        _complain(f"error: {_explain(error)}")
    _give_up_unwritable_output()
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:  # needs nothing that can be broken
        print(__version__)
        return DONE
    try:
        from rtlynx.cli import commands  # typer and rich
    except Exception:
        if arguments[:1] == ["doctor"]:
            from rtlynx.cli import doctor

            return doctor.print_plainly(as_json="--json" in arguments)
        raise
    code, complaint = commands.run(arguments)
    if complaint:
        _complain(f"error: {complaint}")
    return code


def _explain(error: Exception) -> str:
    """One line for a user."""
    kind, message = type(error).__name__, str(error).strip()
    if isinstance(error, OSError) and error.filename and error.strerror:
        message = f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in message:
        return f"out of memory. {message}".strip()
    if _while_importing(error):
        return (
            f"a library cannot be imported ({kind}: {message or 'no reason given'}): "
            f"`rtlynx doctor` tells which are broken, {TRACEBACK_SWITCH}=1 shows where"
        )
    if isinstance(error, _EXPECTED) and message:
        return message
    return f"unexpected {kind}{f': {message}' if message else ''} ({TRACEBACK_SWITCH}=1 shows where)"


def _while_importing(error: Exception) -> bool:
    """Whether a module could not be found, compiled or run. An ImportError in our own words is no such."""
    if isinstance(error, SyntaxError) or (isinstance(error, ImportError) and error.name):
        return True
    return any(frame.f_code.co_name == "<module>" for frame, _ in traceback.walk_tb(error.__traceback__))


def _complain(text: str) -> None:
    """One line on standard error, red on a terminal."""
    if sys.stderr is None:
        return
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\s]+", " ", text).strip()
    red = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[1;31m{line}\033[0m" if red else line, file=sys.stderr)


def _give_up_unwritable_output() -> None:
    """Point a closed pipe or full disk to nowhere: Python would complain of it once more when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError):  # no file behind it, or it is closed
                continue
