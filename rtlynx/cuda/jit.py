"""CUDA sources of this package to kernels that can be launched: compiled at first use, kept on disk.

A kernel is a source file, macro definitions and the name of an `extern "C" __global__` function with one
structure as its only parameter. NVRTC compiles it for Hopper without a GPU, without nvcc and without CUDA's
headers, so the sources bring what they need.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import os
import pkgutil
import re
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rtlynx.cuda import cache
from rtlynx.cuda.driver import INVALID_CONTEXT, allowed_during_capture, bind_context, call, fail

HOPPER = (9, 0)
ARCH = "sm_90a"
SOURCES = Path(__file__).parent / "sm90"
# Warnings change no code, but the report of `-v` is what the tests read.
PTXAS_FLAGS = ("-v", "--warn-on-spills", "--warn-on-local-memory-usage")
PRECOMPILE_SWITCH = "RTLYNX_PRECOMPILE"

Defines = tuple[tuple[str, int | str], ...]


class CompileError(RuntimeError):
    """A source that does not compile, with the compiler's log, or no compiler."""


@dataclass(frozen=True)
class Instantiation:
    """One kernel that the package can launch. Modules in cuda/sm90 list theirs in `INSTANTIATIONS`."""

    source: str
    entry: str
    defines: Defines = ()


def instantiations() -> list[Instantiation]:
    """Every kernel of the package, in a stable order."""
    package = f"{__package__}.{SOURCES.name}"
    names = sorted(module.name for module in pkgutil.iter_modules([str(SOURCES)]))
    found: dict[Instantiation, None] = {}
    for name in names:
        module = importlib.import_module(f"{package}.{name}")
        found.update(dict.fromkeys(getattr(module, "INSTANTIATIONS", ())))
    return list(found)


@dataclass(frozen=True)
class Report:
    """What the assembler says of a compiled source: the worst of its kernels.

    faults : lines that no kernel of this package may have: spills, and matrix instructions that the assembler
        serialises (C7510 to C7515).
    warnings : all warnings, of the compiler too.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    faults: tuple[str, ...]
    warnings: tuple[str, ...]
    log: str = dataclasses.field(repr=False)

    @classmethod
    def from_log(cls, log: str) -> Report:
        """Read a log of NVRTC with `-v` for ptxas."""

        def numbers(pattern: str) -> list[int]:
            return [int(number) for number in re.findall(pattern, log)]

        lines = [line.strip() for line in log.splitlines()]
        spills = re.compile(r"\b[1-9]\d* bytes spill (stores|loads)")
        return cls(
            registers=max(numbers(r"Used (\d+) registers"), default=0),
            spill_bytes=sum(numbers(r"(\d+) bytes spill (?:stores|loads)")),
            stack_bytes=max(numbers(r"(\d+) bytes stack frame"), default=0),
            faults=tuple(line for line in lines if spills.search(line) or re.search(r"\(C751[0-5]\)", line)),
            warnings=tuple(line for line in lines if re.search(r"\bwarning\b", line)),
            log=log,
        )


def compile(source: str, defines: Defines = (), folder: Path = SOURCES) -> bytes:
    """Compile `folder`/`source` to a cubin for Hopper. Needs no GPU and looks at no cache.

    Raises
    ------
    CompileError
        With the compiler's log.
    """
    return _nvrtc(source, defines, folder)[0]


def report(source: str, defines: Defines = (), folder: Path = SOURCES) -> Report:
    """Compile, and tell what the assembler said."""
    return Report.from_log(_nvrtc(source, defines, folder)[1])


def _nvrtc(source: str, defines: Defines, folder: Path) -> tuple[bytes, str]:
    """Cubin and log."""
    Program, ProgramOptions = _compiler()
    log = _Log()
    options = ProgramOptions(
        name=source,
        arch=ARCH,
        std="c++17",
        include_path=str(folder),
        define_macro=[(name, str(value)) for name, value in defines] or None,
        ptxas_options=list(PTXAS_FLAGS),
        device_as_default_execution_space=True,  # NVRTC 13.0 takes lambdas for host functions
    )
    code = (folder / source).read_text(encoding="utf-8")
    try:
        cubin = bytes(Program(code, "c++", options).compile("cubin", logs=log).code)
    except Exception as error:  # cuda-core's errors share no base, and a missing library comes here too
        given = (
            " ".join(f"{name}={value}" for name, value in defines if isinstance(value, int))
            or "no definitions"
        )
        raise CompileError(f"{source} ({given}) does not compile for {ARCH}:\n{error}") from None
    return cubin, log.text


def _compiler() -> tuple[Any, Any]:
    """`Program` and `ProgramOptions` of cuda-core: a third of a second, for nothing on a cache hit."""
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise CompileError(f"cuda-core is missing ({error}): pip install cuda-core cuda-bindings") from None
    return Program, ProgramOptions


class _Log:
    """What cuda-core writes a compilation's log to."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


@functools.cache
def nvrtc() -> tuple[str, Path]:
    """Version and library file of the NVRTC in use.

    Raises
    ------
    CompileError
        If there is none.
    """
    try:
        from cuda.bindings import nvrtc as bindings
        from cuda.pathfinder import load_nvidia_dynamic_lib

        _, major, minor = bindings.nvrtcVersion()
        return f"{major}.{minor}", Path(load_nvidia_dynamic_lib("nvrtc").abs_path)
    except (ImportError, RuntimeError) as error:
        raise CompileError(
            f"NVRTC, the compiler of the kernels, is missing ({str(error).splitlines()[0]}): "
            "pip install cuda-core cuda-bindings nvidia-cuda-nvrtc"
        ) from None


def cubin(source: str, defines: Defines = (), folder: Path = SOURCES) -> bytes:
    """Like `compile`, through the cache on disk."""
    return cache.cached(_key(source, defines, folder), lambda: compile(source, defines, folder))


def _key(source: str, defines: Defines, folder: Path) -> str:
    """Digest of all that a cubin depends on.

    The card comes in by its architecture and not by its name: code for sm_90a is the same on every card of
    compute capability 9.0, and what a machine without a GPU precompiles is found by all of them. All sources
    count, as any may be included by any.
    """
    version, library = nvrtc()
    build = library.stat().st_size  # the version lacks the patch level
    digest = hashlib.sha256()
    for part in (source, repr(defines), ARCH, *PTXAS_FLAGS, version, build):
        digest.update(f"{part}\0".encode())
    for file in sorted(file for file in folder.rglob("*.cu*") if file.suffix in (".cu", ".cuh")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def precompile(folder: Path = SOURCES) -> int:
    """Compile every kernel that the cache lacks, on all cores; return how many there are. Needs no GPU."""
    units = list(dict.fromkeys((one.source, one.defines) for one in instantiations()))
    _compiler()  # imported by one thread: cuda-core does not bear two
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda unit: cubin(unit[0], unit[1], folder), units):
            pass
    return len(units)


_lock = threading.RLock()
_kernels: dict[tuple[Any, ...], Kernel] = {}
_libraries: dict[tuple[Any, ...], Any] = {}
_pack_config = struct.Struct("7I4xQQI4x").pack  # CUlaunchConfig
# CUlaunchAttribute structures: number 6, programmatic stream serialization, and 4, cluster dimensions.
_ATTRIBUTE = struct.Struct("I4x3I52x")
_PORTABLE_CLUSTER = 8  # more blocks than this must be allowed
_allowed: dict[tuple[int, int], int] = {}  # shared memory, by code and device

Parameters = bytes | ctypes.Structure | ctypes.Array[Any]


class Kernel:
    """A kernel to launch on any Hopper card of this machine; from `load`."""

    def __init__(
        self, name: str, handle: Any, threads: int, shared_bytes: int, pdl: bool, cluster: int
    ) -> None:
        self.name = name
        self._handle = handle
        self._threads = threads
        self._shared_bytes = shared_bytes
        self._cluster = cluster
        attributes = [_ATTRIBUTE.pack(6, 1, 0, 0)] if pdl else []
        if cluster > 1:
            attributes.append(_ATTRIBUTE.pack(4, cluster, 1, 1))
        packed = b"".join(attributes)
        self._packed_attributes = ctypes.create_string_buffer(packed, max(1, len(packed)))
        self._attributes = ctypes.addressof(self._packed_attributes)
        self._attribute_count = len(attributes)
        self._functions: dict[int, int] = {}  # by device
        # Not through cuda-bindings, which takes twice as long and keeps launch attributes in objects.
        self._launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        self._launch.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def launch(self, grid: tuple[int, int, int], stream: int, params: Parameters) -> None:
        """Launch on the current device. Never waits for it.

        Parameters
        ----------
        grid : (x, y, z) blocks, none zero
        stream : a stream of the current device, as in `torch.cuda.current_stream().cuda_stream`
        params : the kernel's parameter structure, laid out as C++ does; copied before this returns

        Raises
        ------
        RuntimeError
            With the driver's name for what failed.
        """
        device = torch._C._cuda_getDevice()  # (current_device asks first whether CUDA is up)
        function = self._functions.get(device) or self._prepare(device, params)
        config = _pack_config(
            *grid, self._threads, 1, 1, self._shared_bytes, stream, self._attributes, self._attribute_count
        )
        # The driver asks for the address of an array with one pointer to the structure.
        if isinstance(params, bytes):
            pointer: Any = ctypes.c_char_p(params)
        else:
            pointer = ctypes.c_void_p(ctypes.addressof(params))
        status = self._launch(config, function, ctypes.addressof(pointer), None)
        if status == INVALID_CONTEXT:  # a thread in which nothing has used CUDA yet
            bind_context(device)
            status = self._launch(config, function, ctypes.addressof(pointer), None)
        if status:
            fail(status, f"launch of {self.name} with grid {grid} on cuda:{device}")

    def most_clusters(self) -> int:
        """How many clusters the current device holds at one time; 0 where one does not fit."""
        from cuda.bindings import driver

        config, cluster = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
        config.gridDimX, config.gridDimY, config.gridDimZ = self._cluster, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = cluster.value.clusterDim
        size.x, size.y, size.z = self._cluster, 1, 1
        config.attrs, config.numAttrs = [cluster], 1
        function = driver.CUfunction(self._prepare(torch.cuda.current_device()))
        (count,) = call(driver.cuOccupancyMaxActiveClusters, function, config)
        return int(count)

    def _prepare(self, device: int, params: Parameters | None = None) -> int:
        """First use on `device`: check, load the code there, allow the shared memory."""
        from cuda.bindings import driver

        with _lock, allowed_during_capture():
            if device in self._functions:
                return self._functions[device]
            _require_hopper(device)
            bind_context(device)
            if params is not None:
                _, size = call(driver.cuKernelGetParamInfo, self._handle, 0)
                given = len(params) if isinstance(params, bytes) else ctypes.sizeof(params)
                if given != size:
                    raise RuntimeError(f"{self.name} takes a structure of {size} bytes and got {given}")
            attribute = driver.CUfunction_attribute
            # Another launch of the same code may have been allowed more.
            allowed = max(self._shared_bytes, _allowed.get((int(self._handle), device), 0))
            _allowed[int(self._handle), device] = allowed
            wanted = [
                (attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, allowed, "bytes of shared memory")
            ]
            if self._cluster > _PORTABLE_CLUSTER:
                non_portable = attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
                wanted.append((non_portable, 1, f"clusters of {self._cluster}"))
            for which, value, what in wanted:
                call(
                    driver.cuKernelSetAttribute,
                    which,
                    value,
                    self._handle,
                    driver.CUdevice(device),
                    doing=f"allowing {self.name} {value} {what}",
                )
            (function,) = call(driver.cuKernelGetFunction, self._handle)
            self._functions[device] = int(function)
            return self._functions[device]


def load(
    source: str,
    entry: str,
    defines: Defines = (),
    *,
    threads: int,
    shared_bytes: int,
    pdl: bool = False,
    cluster: int = 1,
    folder: Path = SOURCES,
) -> Kernel:
    """The kernel `entry` of `folder`/`source`, compiled with `defines` where it is not cached.

    Parameters
    ----------
    threads : threads of a block
    shared_bytes : dynamic shared memory of a block
    pdl : programmatic dependent launch: the kernel may start before the one ahead of it in the stream has
        ended, and waits for its results itself
    cluster : blocks of a cluster, along x; divides the grid

    Raises
    ------
    RuntimeError
        If the current device is not a Hopper card, or the driver refuses.
    CompileError
        If it does not compile.
    """
    key = (source, entry, defines, threads, shared_bytes, pdl, cluster, folder)
    kernel = _kernels.get(key)
    if kernel is not None:
        return kernel
    with _lock:
        if key not in _kernels:
            _require_hopper(torch.cuda.current_device() if torch.cuda.is_available() else None)
            if not _kernels and os.environ.get(PRECOMPILE_SWITCH, "0") not in ("", "0"):
                precompile()
            handle = _handle(source, entry, defines, folder)
            _kernels[key] = Kernel(entry, handle, threads, shared_bytes, pdl, cluster)
        return _kernels[key]


def loaded() -> int:
    """How many kernels this process has loaded."""
    return len(_kernels)


def _handle(source: str, entry: str, defines: Defines, folder: Path) -> Any:
    """A CUkernel, which belongs to no device."""
    from cuda.bindings import driver

    key = (source, defines, folder)
    with allowed_during_capture():
        if key not in _libraries:
            code = cubin(source, defines, folder)
            (_libraries[key],) = call(driver.cuLibraryLoadData, code, [], [], 0, [], [], 0)
        doing = f"looking for {entry} in {source}"
        (handle,) = call(driver.cuLibraryGetKernel, _libraries[key], entry.encode(), doing=doing)
    return handle


def unsupported_reason(device: int | None) -> str:
    """Why kernels cannot run on CUDA device `device` (None: there is none), or an empty string."""
    if device is None:
        return "the kernels need a Hopper card, and torch sees no CUDA device"
    found = torch.cuda.get_device_capability(device)
    if found != HOPPER:
        name = torch.cuda.get_device_name(device)
        return (
            f"the kernels need a Hopper card (compute capability 9.0), and cuda:{device}, {name}, "
            f"has {found[0]}.{found[1]}"
        )
    try:
        nvrtc()
        importlib.metadata.version("cuda-core")
    except CompileError as error:
        return str(error)
    except importlib.metadata.PackageNotFoundError:
        return "cuda-core is missing: pip install cuda-core cuda-bindings"
    return ""


def _require_hopper(device: int | None) -> None:
    if reason := unsupported_reason(device):
        raise RuntimeError(reason)
