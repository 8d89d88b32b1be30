"""One look for all progress bars."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Context manager whose value advances a bar on standard error: `with ProgressBar(...) as advance`.

    Where that is neither a terminal nor a notebook, nothing is written.
    """

    def __init__(self, description: str, total: int, *, show: bool = True) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (show and (console.is_terminal or console.is_jupyter)),
        )
        self._task = self._progress.add_task(description, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return lambda count: self._progress.update(self._task, advance=count)

    def __exit__(self, *_exc: object) -> None:
        self._progress.stop()
