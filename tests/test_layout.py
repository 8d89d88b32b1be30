"""Parameter structures: packed as a C compiler lays them out, and compared with the device code by name."""

import ctypes

import pytest

from rtlynx.cuda import jit
from rtlynx.cuda.layout import Layout
from rtlynx.cuda.sm90 import compress, gemm, quantize

TYPES = {"pointer": ctypes.c_uint64, "uint64": ctypes.c_uint64, "int64": ctypes.c_int64}
TYPES |= {"int": ctypes.c_int32, "float": ctypes.c_float}


def as_ctypes(layout):
    """The same structure by ctypes, which knows the rules of C."""

    def kind(one):
        return as_ctypes(one) if isinstance(one, Layout) else TYPES[one]

    fields = [(name, kind(one) * count if count > 1 else kind(one)) for name, one, count in layout.fields]
    return type("Structure", (ctypes.Structure,), {"_fields_": fields})


INNER = Layout(("a", "int"), ("b", "pointer"), ("c", "float"))
OUTER = Layout(("first", "float"), ("inner", INNER, 3), ("last", "int64"), ("tail", "int", 5))


@pytest.mark.parametrize("layout", [INNER, OUTER, Layout(("one", "int"), ("inner", INNER))])
def test_sizes_and_places_are_those_of_c(layout):
    assert layout.size == ctypes.sizeof(as_ctypes(layout))
    values = list(range(1, 1 + sum(1 for _ in layout.pack.__self__.unpack(bytes(layout.size)))))
    structure = as_ctypes(layout).from_buffer_copy(layout.pack(*values))
    found = []

    def read(one):
        for name, _ in one._fields_:
            value = getattr(one, name)
            for item in value if isinstance(value, ctypes.Array) else [value]:
                read(item) if isinstance(item, ctypes.Structure) else found.append(item)

    read(structure)
    assert found == values


def test_pieces_make_up_the_whole():
    first, second, third = OUTER.pieces("inner[1].a", "last")
    whole = OUTER.pack(1.0, *(1, 2, 3.0), *(4, 5, 6.0), *(7, 8, 9.0), 10, *range(5))
    parts = first.pack(1.0, 1, 2, 3.0) + second.pack(4, 5, 6.0, 7, 8, 9.0) + third.pack(10, *range(5))
    assert parts == whole
    with pytest.raises(ValueError, match="the structure has the fields"):
        OUTER.pieces("nothing")


@pytest.mark.parametrize("module", [compress, gemm, quantize])
@pytest.mark.parametrize("change", ["place", "size", "name", "missing"])
def test_a_structure_that_differs_from_the_device_code_does_not_compile(module, change):
    pytest.importorskip("cuda.core")
    one = module.INSTANTIATIONS[0]
    defines = dict(one.defines)
    field = "FIELD(rows, "
    at = defines["PARAMETER_FIELDS"].index(field)
    offset, size = defines["PARAMETER_FIELDS"][at + len(field) :].partition(")")[0].split(", ")
    other = {
        "place": f"{field}{int(offset) + 4}, {size})",
        "size": f"{field}{offset}, {int(size) + 4})",
        "name": f"FIELD(lines, {offset}, {size})",
        "missing": "",
    }[change]
    defines["PARAMETER_FIELDS"] = defines["PARAMETER_FIELDS"].replace(f"{field}{offset}, {size})", other)
    if change == "missing":
        defines["PARAMETER_BYTES"] -= 8
    with pytest.raises(jit.CompileError, match=r"static assertion failed|has no member"):
        jit.compile(one.source, tuple(defines.items()))
