"""Kernels compile for Hopper, without spills or serialised products: a few here, all in `.ci/run`."""

import compile_kernels
import pytest

from rtlynx.cuda import jit

INSTANTIATIONS = jit.instantiations()
FEW = compile_kernels.few(INSTANTIATIONS)


def test_every_source_is_instantiated():
    sources = {file.name for file in jit.SOURCES.glob("*.cu")}
    assert {one.source for one in INSTANTIATIONS} == sources
    assert {one.source for one in FEW} == sources


def test_every_prologue_is_among_the_few():
    every, few = (
        {(one.source, name) for one in some for name, _ in one.defines if name.startswith("PROLOGUE_")}
        for some in (INSTANTIATIONS, FEW)
    )
    assert few == every


@pytest.mark.parametrize("one", FEW, ids=compile_kernels.name_of)
def test_it_compiles_clean(one):
    assert compile_kernels.faults_of(one) == []


def test_the_command_compiles_all_and_counts_them(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(compile_kernels, "faults_of", lambda one: asked.append(one) or [])
    assert compile_kernels.main() == 0
    assert set(asked) == set(INSTANTIATIONS)
    assert capsys.readouterr().out.startswith(f"{len(INSTANTIATIONS)} kernels compiled for sm_90a, 0 with")


def test_the_command_fails_for_what_the_assembler_says(monkeypatch, capsys):
    bad = FEW[0]
    monkeypatch.setattr(compile_kernels, "faults_of", lambda one: ["8 bytes spill stores"] * (one == bad))
    assert compile_kernels.main() == 1
    assert f"{compile_kernels.name_of(bad)}: 8 bytes spill stores" in capsys.readouterr().out
