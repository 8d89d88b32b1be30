"""Every kernel that the package can launch compiles for Hopper, without spills or serialised products."""

import pytest

from rtlynx.cuda import jit

INSTANTIATIONS = jit.instantiations()


def test_every_source_is_instantiated():
    assert {one.source for one in INSTANTIATIONS} == {file.name for file in jit.SOURCES.glob("*.cu")}


@pytest.mark.parametrize(
    "one",
    INSTANTIATIONS,
    ids=lambda one: "-".join([one.entry, *(f"{name}{value}" for name, value in one.defines)]),
)
def test_it_compiles_clean(one):
    report = jit.report(one.source, one.defines)
    assert report.faults == (), report.log
    assert f"Compiling entry function '{one.entry}' for '{jit.ARCH}'" in report.log
