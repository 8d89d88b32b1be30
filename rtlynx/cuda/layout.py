"""Structures that kernels take as their parameter, packed as C++ lays them out and checked field by field.

The host describes a structure once, as a `Layout`. It packs values by it, and hands the compiler the place
and size of every field, which the device code compares with its own: a field too many, too few, renamed or
moved does not compile.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import NamedTuple

# C++ type -> format of `struct`, bytes, alignment.
_TYPES = {
    "pointer": ("Q", 8, 8),
    "uint64": ("Q", 8, 8),
    "int64": ("q", 8, 8),
    "int": ("i", 4, 4),
    "float": ("f", 4, 4),
    "TensorMap": ("128s", 128, 64),
}


class Field(NamedTuple):
    """One field, or `count` of them in an array; `type` is a C++ type or another layout."""

    name: str
    type: str | Layout
    count: int = 1  # type: ignore[assignment]  # (a tuple has a method of the name)


class _Leaf(NamedTuple):
    """A field of a plain type: its path from the outermost structure, and what `struct` calls it."""

    path: str
    offset: int
    size: int
    code: str


class Layout:
    """A structure by its fields in order.

    Parameters
    ----------
    *fields : Field or tuple
        Name, type ("pointer", "int", "int64", "uint64", "float", "TensorMap" or a `Layout`) and, for an
        array, the count.
    """

    def __init__(self, *fields: Field | tuple[str, str | Layout] | tuple[str, str | Layout, int]) -> None:
        self.fields = tuple(Field(*field) for field in fields)
        self._leaves: list[_Leaf] = []
        offset, self.alignment = 0, 1
        for name, kind, count in self.fields:
            size, alignment = _measure(kind)
            offset = -(-offset // alignment) * alignment
            self.alignment = max(self.alignment, alignment)
            self._leaves += _leaves(name, kind, count, offset)
            offset += size * count
        self.size = -(-offset // self.alignment) * self.alignment
        (whole,) = self.pieces()
        self.pack, self.unpack = whole.pack, whole.unpack

    def pieces(self, *names: str) -> list[struct.Struct]:
        """Packers of the parts that begin with the structure and with each of the fields `names`.

        Their bytes, one after the other, are the structure.
        """
        starts = [leaf.offset for name in names for leaf in self._leaves if leaf.path == name]
        if len(starts) != len(names):
            raise ValueError(
                f"the structure has the fields {[leaf.path for leaf in self._leaves]}, not {names}"
            )
        bounds = [0, *starts, self.size]
        return [
            _packer([leaf for leaf in self._leaves if begin <= leaf.offset < end], begin, end)
            for begin, end in itertools.pairwise(bounds)
        ]

    @property
    def defines(self) -> tuple[tuple[str, int | str], ...]:
        """Macros by which device code checks its `Parameters` (layout.cuh)."""
        checks = " ".join(f"FIELD({leaf.path}, {leaf.offset}, {leaf.size})" for leaf in self._leaves)
        return (("PARAMETER_BYTES", self.size), ("PARAMETER_FIELDS", checks))


def _measure(kind: str | Layout) -> tuple[int, int]:
    """Size and alignment."""
    if isinstance(kind, Layout):
        return kind.size, kind.alignment
    _, size, alignment = _TYPES[kind]
    return size, alignment


def _leaves(name: str, kind: str | Layout, count: int, offset: int) -> Iterator[_Leaf]:
    if isinstance(kind, str):
        code, size, _ = _TYPES[kind]
        yield _Leaf(name, offset, size * count, code * count)
        return
    for index in range(count):
        prefix = name if count == 1 else f"{name}[{index}]"
        for leaf in kind._leaves:
            yield leaf._replace(path=f"{prefix}.{leaf.path}", offset=offset + index * kind.size + leaf.offset)


def _packer(leaves: list[_Leaf], begin: int, end: int) -> struct.Struct:
    """Of the bytes from `begin` to `end`."""
    code, at = "<", begin
    for leaf in leaves:
        code += f"{leaf.offset - at}x{leaf.code}"
        at = leaf.offset + leaf.size
    return struct.Struct(f"{code}{end - at}x")
