"""Fields of dataclasses by names of an older version, which files and code may still use."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")


def renamed(former: Mapping[str, str]) -> Callable[[type[_T]], type[_T]]:
    """Let a dataclass take and show fields by their former names, with a DeprecationWarning."""

    def decorate(kind: type[_T]) -> type[_T]:
        init: Callable[..., None] = kind.__init__

        @functools.wraps(init)
        def with_former(self: _T, *args: Any, **settings: Any) -> None:
            for old in settings.keys() & former.keys():
                _warn(kind, old, former[old])
            init(self, *args, **by_new_names(settings, former))

        def shown(old: str, new: str) -> property:
            def get(self: _T) -> Any:
                _warn(kind, old, new)
                return getattr(self, new)

            return property(get, doc=f"Former name of `{new}`.")

        def set_state(self: _T, state: Mapping[str, Any]) -> None:
            self.__dict__.update(by_new_names(state, former))  # of a pickle by an older version

        kind.__setstate__ = set_state  # type: ignore[attr-defined]
        kind.__init__ = with_former  # type: ignore[method-assign,assignment]
        for old, new in former.items():
            setattr(kind, old, shown(old, new))
        return kind

    return decorate


def by_new_names(settings: Mapping[str, Any], former: Mapping[str, str]) -> dict[str, Any]:
    """ValueError where a setting is given by both of its names."""
    for old, new in former.items():
        if old in settings and new in settings:
            raise ValueError(f"{old} is the former name of {new}: give one of them")
    return {former.get(key, key): value for key, value in settings.items()}


def _warn(kind: type, old: str, new: str) -> None:
    warnings.warn(f"{kind.__name__}.{old} is called {new} now", DeprecationWarning, stacklevel=3)
