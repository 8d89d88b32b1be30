"""Device code to kernels: what the compiler is asked for and says, and what a launch needs."""

import ctypes
import struct
import threading
from pathlib import Path

import pytest
import torch

from rtlynx.cuda import jit

SOURCE = """
#include "constants.cuh"
struct Parameters { float* out; float value; int padding; };
extern "C" __global__ void fill(const __grid_constant__ Parameters p) {
    extern __shared__ float shared[];
    shared[threadIdx.x] = p.value * FACTOR + OFFSET;
    __syncthreads();
    p.out[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x];
}
"""
FACTOR_TWO = (("FACTOR", 2),)
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* x) {
    float v[128];
    for (int i = 0; i < 128; i++) v[i] = x[i * 1024 + threadIdx.x];
    for (int j = 1; j < 128; j++)
#pragma unroll
        for (int i = 0; i < 128; i++) v[i] = v[i] * v[(i * 7 + 3) & 127] + 1.0f;
    for (int i = 0; i < 128; i++) x[i * 1024 + threadIdx.x] = v[i];
}
"""
# The second product reads an accumulator that ordinary code touched while the first was under way.
SERIALISED = """
#define D "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define PRODUCT asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, " \\
    "1, 1, 1, 0, 0;" : D : "l"(a), "l"(a))
extern "C" __global__ void __launch_bounds__(128) serialised(float* y, unsigned long long a) {
    float d[4] = {0, 0, 0, 0};
    asm volatile("wgmma.fence.sync.aligned;");
    PRODUCT;
    d[0] += 1.0f;
    PRODUCT;
    asm volatile("wgmma.commit_group.sync.aligned;");
    asm volatile("wgmma.wait_group.sync.aligned 0;");
    y[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A folder of device code, and an empty cache."""
    monkeypatch.setenv("RTLYNX_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "fill.cu").write_text(SOURCE)
    (folder / "constants.cuh").write_text("#define OFFSET 1.0f\n")
    return folder


def test_a_cubin_comes_with_the_assemblers_report_and_no_gpu(sources):
    assert jit.compile("fill.cu", FACTOR_TWO, sources).startswith(b"\x7fELF")
    report = jit.report("fill.cu", FACTOR_TWO, sources)
    assert 0 < report.registers < 64
    assert (report.spill_bytes, report.stack_bytes, report.faults, report.warnings) == (0, 0, (), ())


def test_the_report_tells_spills_and_serialised_products(sources):
    (sources / "spill.cu").write_text(SPILLING)
    report = jit.report("spill.cu", (), sources)
    assert report.spill_bytes > 0
    assert report.registers == 32
    assert any("bytes spill stores" in line for line in report.faults)

    (sources / "serialised.cu").write_text(SERIALISED)
    (fault,) = jit.report("serialised.cu", (), sources).faults
    assert "(C7511)" in fault or "(C7510)" in fault


def test_a_log_is_read_by_its_worst_kernel():
    log = """
ptxas info    : (C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'a'
ptxas info    : (C7517) wgmma.wait_group is injected in around line 969 by compiler
gemm.cu(3): warning #177-D: variable "x" was declared but never referenced
ptxas         .     16 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""
    report = jit.Report.from_log(log)
    assert (report.registers, report.spill_bytes, report.stack_bytes) == (168, 4, 16)
    assert [line[16:23] for line in report.faults] == ["(C7513)", "    16 "]
    assert len(report.warnings) == 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("int f() { return nothing; }", "broken.cu(1): error"),
        ('#include "absent.cuh"', "absent.cuh"),
        ('extern "C" __global__ void k() { asm volatile("frobnicate;"); }', "frobnicate"),
    ],
)
def test_what_does_not_compile_is_told_with_the_compilers_words(sources, code, said):
    (sources / "broken.cu").write_text(code)
    with pytest.raises(jit.CompileError, match=r"broken\.cu \(N=8 K=16\) does not compile") as failure:
        jit.compile("broken.cu", (("N", 8), ("K", 16)), sources)
    assert said in str(failure.value)


def test_every_change_of_what_is_compiled_changes_the_key(sources, monkeypatch):
    def key(defines=FACTOR_TWO):
        return jit._key("fill.cu", defines, sources)

    first = key()
    assert key() == first
    assert key((("FACTOR", 3),)) != first
    (sources / "constants.cuh").write_text("#define OFFSET 2.0f\n")
    changed = key()
    assert changed != first
    (sources / "fill.cu").write_text(SOURCE + "\n")
    assert key() != changed
    (sources / "fill.cu").write_text(SOURCE)
    assert key() == changed
    monkeypatch.setattr(jit, "PTXAS_FLAGS", ("-v",))
    assert key() != changed
    monkeypatch.undo()
    version, library = jit.nvrtc()
    monkeypatch.setattr(jit, "nvrtc", lambda: (version + "0", library))
    assert key() != changed
    monkeypatch.setattr(jit, "nvrtc", lambda: (version, sources / "fill.cu"))
    assert key() != changed


def test_without_a_hopper_card_loading_says_what_was_found(monkeypatch, sources):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
        jit.load("fill.cu", "fill", FACTOR_TWO, threads=32, shared_bytes=128, folder=sources)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some B200")
    with pytest.raises(RuntimeError, match=r"Hopper card .* cuda:1, Some B200, has 10\.0"):
        jit.load("fill.cu", "fill", FACTOR_TWO, threads=32, shared_bytes=128, folder=sources)


def test_without_the_compiler_the_obstacle_says_what_to_install(monkeypatch):
    def missing():
        raise jit.CompileError("NVRTC is missing: pip install nvidia-cuda-nvrtc")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: jit.HOPPER)
    assert jit.unsupported_reason(0) == ""
    monkeypatch.setattr(jit, "nvrtc", missing)
    assert "pip install nvidia-cuda-nvrtc" in jit.unsupported_reason(0)


def test_precompiling_fills_the_cache_once(sources, monkeypatch):
    listed = [jit.Instantiation("fill.cu", "fill", (("FACTOR", factor),)) for factor in (1, 2, 2)]
    monkeypatch.setattr(jit, "instantiations", lambda: listed)
    compiled = []
    compile_source = jit.compile
    monkeypatch.setattr(jit, "compile", lambda *unit: compiled.append(unit) or compile_source(*unit))
    assert jit.precompile(sources) == 2
    assert jit.precompile(sources) == 2
    assert len(compiled) == 2


@pytest.mark.parametrize(("switch", "calls"), [("1", 1), ("0", 0), ("", 0), (None, 0)])
def test_the_switch_precompiles_at_the_first_kernel(monkeypatch, switch, calls):
    if switch is None:
        monkeypatch.delenv("RTLYNX_PRECOMPILE", raising=False)
    else:
        monkeypatch.setenv("RTLYNX_PRECOMPILE", switch)
    made = []
    monkeypatch.setattr(jit, "_kernels", {})
    monkeypatch.setattr(jit, "unsupported_reason", lambda device: "")
    monkeypatch.setattr(jit, "precompile", lambda: made.append(1))
    monkeypatch.setattr(jit, "_handle", lambda *unit: None)
    monkeypatch.setattr(ctypes, "CDLL", FakeDriver)
    for entry in ("one", "two", "one"):
        jit.load("fill.cu", entry, threads=32, shared_bytes=0)
    assert len(made) == calls
    assert jit.loaded() == 2


class FakeDriver:
    """Stands for libcuda: notes what a launch hands over, and answers with `statuses`, then with success."""

    def __init__(self, name: str) -> None:
        self.cuLaunchKernelEx = FakeLaunch()


class FakeLaunch:
    argtypes = None

    def __init__(self) -> None:
        self.seen: list[tuple] = []
        self.statuses: list[int] = []

    def __call__(self, config, function, pointers, extra):
        parameters = ctypes.string_at(ctypes.c_void_p.from_address(pointers).value, 16)
        self.seen.append((struct.unpack("7I4xQQI4x", config), function, parameters, extra))
        return self.statuses.pop(0) if self.statuses else 0


@pytest.fixture
def launches(monkeypatch):
    """A kernel that is ready on device 0, on a machine without any, and what its launches did."""
    monkeypatch.setattr(ctypes, "CDLL", FakeDriver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)

    def make(pdl: bool, cluster: int = 1) -> tuple[jit.Kernel, FakeLaunch]:
        kernel = jit.Kernel("fill", None, 128, 1000, pdl, cluster)
        kernel._functions[0] = 77
        return kernel, kernel._launch

    return make


def test_what_a_launch_hands_to_the_driver(launches):
    params = struct.pack("Qfi", 1 << 40, 2.0, 3)
    structure = (ctypes.c_ubyte * 16).from_buffer_copy(params)
    kernel, launch = launches(pdl=False)
    kernel.launch((132, 2, 3), (1 << 63) + 5, params)
    kernel.launch((132, 2, 3), (1 << 63) + 5, structure)
    for (*config, _, attribute_count), *rest in launch.seen:
        assert config == [132, 2, 3, 128, 1, 1, 1000, (1 << 63) + 5]
        assert attribute_count == 0
        assert rest == [77, params, None]
    assert len(launch.seen) == 2


@pytest.mark.parametrize(
    ("pdl", "cluster", "expected"),
    [(True, 1, [(6, 1, 0, 0)]), (False, 4, [(4, 4, 1, 1)]), (True, 8, [(6, 1, 0, 0), (4, 8, 1, 1)])],
)
def test_attributes_of_a_launch(launches, pdl, cluster, expected):
    kernel, launch = launches(pdl, cluster)
    kernel.launch((8, 1, 1), 0, bytes(16))
    ((*_, attributes, count), *_) = launch.seen[0]
    assert count == len(expected)
    assert list(struct.iter_unpack("I4x3I52x", ctypes.string_at(attributes, 72 * count))) == expected


def test_a_thread_without_a_context_gets_one_and_other_failures_are_told(launches, monkeypatch):
    bound = []
    monkeypatch.setattr(jit, "bind_context", bound.append)
    kernel, launch = launches(pdl=False)
    launch.statuses = [201]
    kernel.launch((1, 1, 1), 0, bytes(16))
    assert bound == [0]
    assert len(launch.seen) == 2

    launch.statuses = [700]
    with pytest.raises(
        RuntimeError, match=r"launch of fill .* cuda:0 failed: CUDA_ERROR_ILLEGAL_ADDRESS\. A ker"
    ):
        kernel.launch((1, 1, 1), 0, bytes(16))
    launch.statuses = [201, 201]
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_CONTEXT"):
        kernel.launch((1, 1, 1), 0, bytes(16))


# On a Hopper card. ---------------------------------------------------------------------------------------


@pytest.fixture
def fill(sources):
    if torch.cuda.get_device_capability() != jit.HOPPER:
        pytest.skip("needs a Hopper card")
    return jit.load("fill.cu", "fill", FACTOR_TWO, threads=32, shared_bytes=64 * 1024, folder=sources)


def _launch(kernel, out, value):
    stream = torch.cuda.current_stream().cuda_stream
    kernel.launch((out.numel() // 32, 1, 1), stream, struct.pack("Qfi", out.data_ptr(), value, 0))


@pytest.mark.gpu
def test_a_launch_takes_bytes_or_a_structure(fill, sources):
    out = torch.full((96,), torch.nan, device="cuda")
    _launch(fill, out, 3.0)
    assert out.tolist() == [7.0] * 96

    class Parameters(ctypes.Structure):
        _fields_ = (("out", ctypes.c_void_p), ("value", ctypes.c_float), ("padding", ctypes.c_int))

    fill.launch((3, 1, 1), torch.cuda.current_stream().cuda_stream, Parameters(out.data_ptr(), 4.0, 0))
    assert out.tolist() == [9.0] * 96
    again = jit.load("fill.cu", "fill", FACTOR_TWO, threads=32, shared_bytes=64 * 1024, folder=sources)
    assert again is fill


@pytest.mark.gpu
def test_a_first_launch_may_be_under_capture(fill, sources):
    out = torch.full((96,), torch.nan, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _launch(fill, out, 1.0)  # the first launch of this kernel
        late = jit.load(
            "fill.cu", "fill", (("FACTOR", 5),), threads=32, shared_bytes=128, pdl=True, folder=sources
        )
        _launch(late, out[:32], 1.0)
    for _ in range(10):
        out.fill_(torch.nan)
        graph.replay()
        assert out.tolist() == [6.0] * 32 + [3.0] * 64


@pytest.mark.gpu
def test_threads_that_never_used_cuda_can_launch(fill):
    out = torch.full((96,), torch.nan, device="cuda")
    params = struct.pack("Qfi", out.data_ptr(), 2.0, 0)
    for _ in range(2):
        thread = threading.Thread(target=fill.launch, args=((3, 1, 1), 0, params))
        thread.start()
        thread.join()
        torch.cuda.synchronize()
        assert out.tolist() == [5.0] * 96


@pytest.mark.gpu
def test_every_device_launches(fill):
    for device in range(torch.cuda.device_count()):
        with torch.cuda.device(device):
            out = torch.full((64,), torch.nan, device="cuda")
            _launch(fill, out, 1.0)
            assert out.tolist() == [3.0] * 64


@pytest.mark.gpu
def test_mistakes_are_told_and_leave_the_device_usable(fill, sources):
    out = torch.zeros(96, device="cuda")
    with pytest.raises(RuntimeError, match="takes a structure of 16 bytes and got 8"):
        fill.launch((1, 1, 1), 0, bytes(8))
    _launch(fill, out, 0.0)
    with pytest.raises(RuntimeError, match=r"launch of fill with grid \(0, 1, 1\).*CUDA_ERROR_INVALID_VALUE"):
        fill.launch((0, 1, 1), 0, bytes(16))
    with pytest.raises(RuntimeError, match=r"looking for flil in fill\.cu failed: CUDA_ERROR_NOT_FOUND"):
        jit.load("fill.cu", "flil", FACTOR_TWO, threads=32, shared_bytes=0, folder=sources)
    greedy = jit.load("fill.cu", "fill", FACTOR_TWO, threads=32, shared_bytes=1 << 20, folder=sources)
    with pytest.raises(RuntimeError, match="allowing fill 1048576 bytes of shared memory failed"):
        _launch(greedy, out, 0.0)
    _launch(fill, out, 1.0)
    assert out.tolist() == [3.0] * 96
