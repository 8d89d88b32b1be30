"""Compile every kernel of the package for Hopper, without a GPU: `python tests/compile_kernels.py`.

Fails for spills and for matrix instructions that the assembler serialises. The test suite compiles a few of
them only (`tests/test_kernels_compile.py`): all take minutes.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from rtlynx.cuda import jit

VARIED = ("FP8", "MODE", "PROLOGUE", "TRANSPOSED")  # what `few` wants every value of


def name_of(one: jit.Instantiation) -> str:
    given = (f"{name}{value}" for name, value in one.defines if name != "PARAMETER_FIELDS")
    return "-".join([one.source, *given])


def faults_of(one: jit.Instantiation) -> list[str]:
    """What is wrong with a kernel, compiled now and from no cache."""
    try:
        report = jit.report(one.source, one.defines)
    except jit.CompileError as error:
        return [str(error)]
    if f"Compiling entry function '{one.entry}' for '{jit.ARCH}'" not in report.log:
        return [f"no kernel {one.entry} for {jit.ARCH} in what was compiled"]
    return list(report.faults)


def few(instantiations: list[jit.Instantiation]) -> list[jit.Instantiation]:
    """Few: each source with each data type, prologue and mode that it is compiled with, and with a branch."""

    def marks(one: jit.Instantiation) -> set[object]:
        found: set[object] = {(one.source, *pair) for pair in one.defines if pair[0].startswith(VARIED)}
        rank = dict(one.defines).get("RANK", 0)
        return found | {one.source, (one.source, rank != 0)}

    left = set().union(*map(marks, instantiations))
    kept = []
    while left:
        # The first of several; of gemm the narrower one, which compiles in a third of the time.
        best = max(
            instantiations,
            key=lambda one: (len(marks(one) & left), -int(dict(one.defines).get("BLOCK_N", 0))),
        )
        kept.append(best)
        left -= marks(best)
    return kept


def main() -> int:
    every = jit.instantiations()
    jit.nvrtc()
    import cuda.core  # noqa: F401  imported by one thread: it does not bear two

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(faults_of, every))
    bad = 0
    for one, faults in zip(every, found, strict=True):
        bad += bool(faults)
        for fault in faults:
            print(f"{name_of(one)}: {fault}")
    print(f"{len(every)} kernels compiled for {jit.ARCH}, {bad} with spills, serialised products or errors")
    return 1 if bad or not every else 0


if __name__ == "__main__":
    sys.exit(main())
