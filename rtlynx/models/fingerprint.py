"""Tell whether two models hold the same weights, mostly without reading all of them."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from rtlynx.math.fp8 import E4M3
from rtlynx.nn.packed_weight import held_state_dict
from rtlynx.nn.sparse_linear import SparseLinear

_SAMPLES = 64
# Tensors of up to this many entries are read whole, of others at least half as many are.
_WHOLE = 1 << 17
_REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16, E4M3, torch.float8_e5m2)
# Bytes from which on threads take less time than starting them.
_THREADED = 1 << 24
# What a cast to these dtypes may change, relative to the norm. Eight bits leave nothing to compare.
_LOSS = {"float16": 2.0**-7, "float8_e4m3fn": math.inf, "float8_e5m2": math.inf}
# What it may change at least: float16 has no numbers below 2^-24.
_LEAST_LOSS = 2.0**-15

_NUMBER = r"-?(\d\.\d{6}e[+-]\d{2,3}|nan|inf)"
# What `record` writes.
RECORD = rf"[0-9a-f]{{16}} [a-z0-9_]{{1,24}} [0-9x]{{0,200}} {_NUMBER} {_NUMBER}"


def weight_fingerprint(weight: Tensor) -> str:
    """Digest of a weight's shape and of 64 entries spread over it, as bfloat16 (so a cast model matches)."""
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long().to(flat.device)
    sample = flat[index].to(torch.bfloat16).float().cpu().numpy()
    return hashlib.sha256(repr(tuple(weight.shape)).encode() + sample.tobytes()).hexdigest()[:16]


def model_fingerprint(model: nn.Module) -> str:
    """Digest of the model's class and of all its tensors; of a sparse model, of what it still holds."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, one in records(base_tensors(model, with_ip_adapters=True)).items():
        digest.update(f"{name}={one};".encode())
    return digest.hexdigest()


def base_tensors(model: nn.Module, *, with_ip_adapters: bool = False) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the dense model that `model` is, or was and still holds.

    Not among them: refitted and quantised weights whose original was not kept; biases likewise; what lies on
    "meta"; tensor-parallel shards, of which no process knows the whole; and what IP-Adapters brought along,
    unless these are asked for.
    """
    tensors = held_state_dict(model)  # (of packed weights, which are changed ones, none stays)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if "IPAdapter" in type(module).__name__ and not with_ip_adapters:  # diffusers' names of all of them
            tensors = {key: one for key, one in tensors.items() if not key.startswith(prefix)}
        if not isinstance(module, SparseLinear):
            continue
        for kind in ("lowrank_a", "lowrank_b", "weight_scale"):
            tensors.pop(f"{prefix}{kind}", None)
        original = tensors.pop(f"{prefix}weight_dense", None)
        rounded = tensors.pop(f"{prefix}weight_dense_scale", None) is not None
        if original is not None and not rounded:
            tensors[f"{prefix}weight"] = original
        elif module.weight_changed:
            tensors.pop(f"{prefix}weight", None)
        bias = tensors.pop(f"{prefix}bias_dense", None)
        if module.intercept:
            tensors.pop(f"{prefix}bias", None)
        if bias is not None and module.intercept == "refitted":
            tensors[f"{prefix}bias"] = bias
    return {name: tensor for name, tensor in tensors.items() if is_plain(tensor)}


def is_plain(tensor: object) -> bool:
    """Whether the numbers of `tensor` can be read here: it is no `DTensor` or the like, and not on "meta"."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
    )


def records(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> `record`, of all `tensors`."""
    return dict(zip(tensors, _each(record, tensors.values()), strict=True))


def record(tensor: Tensor) -> str:
    """What tells a tensor from a changed one: digest, dtype, shape, and norm and projection of a sample.

    The sample is all of a small tensor. Of a large one it is 2^16 entries or more, some in every row and in
    every column: a LoRA of relative size 2e-5 in bfloat16 changes hundreds of them, a negated row at least
    one. The digest is of the sample rounded to bfloat16, so casts between float32 and bfloat16 do not change
    it. Norm and projection are for casts that do (`same`).
    """
    tensor = tensor.detach()
    sample = tensor.reshape(-1)[:: _stride(tensor)].contiguous().cpu()
    norm = projection = 0.0
    if tensor.dtype in _REAL:
        values = sample.float().numpy().astype(np.float64)
        # Not by BLAS, whose threads would spin for each small tensor.
        norm = math.sqrt(float(np.square(values).sum()))
        projection = float((values * _signs(len(values))).sum())
        sample = sample.to(torch.bfloat16)
    shape = "x".join(map(str, tensor.shape))
    kind = "" if tensor.dtype in _REAL else str(tensor.dtype)
    digest = hashlib.sha256(f"{shape} {kind} ".encode())
    digest.update(_bytes(sample))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{digest.hexdigest()[:16]} {dtype} {shape} {norm:.6e} {projection:.6e}"


@functools.lru_cache(maxsize=64)
def _signs(count: int) -> np.ndarray:
    """+1 or -1 for each of `count` entries, without a pattern."""
    index = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (index >> np.uint64(40) & np.uint64(1)).astype(np.float64) * 2 - 1


def same(one: str, other: str) -> bool:
    """Whether two records can be of one tensor.

    Where one of them was cast to float16, which loses bits, norm and projection must agree to 2^-7: that
    tells another model or a trained one, not a faint adapter. In eight bits the shapes must agree.
    """
    digest, dtype, shape, *numbers = one.split(" ")
    digest_, dtype_, shape_, *numbers_ = other.split(" ")
    if digest == digest_:
        return True
    loss = max(_LOSS.get(dtype, 0.0), _LOSS.get(dtype_, 0.0))
    if dtype == dtype_ or shape != shape_ or not loss:
        return False
    if math.isinf(loss):
        return True
    slack = loss * float(numbers[0]) + _LEAST_LOSS
    return all(abs(float(a) - float(b)) <= slack for a, b in zip(numbers, numbers_, strict=True))


def full_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> digest of every bit of a tensor, its dtype and its shape."""
    return dict(zip(tensors, _each(_full_digest, tensors.values()), strict=True))


def _full_digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(_bytes(tensor.detach().cpu()))
    return digest.hexdigest()[:32]


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in order; a view where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _stride(tensor: Tensor) -> int:
    """Distance of sampled entries: no longer than a row, and without a common factor with one."""
    if tensor.numel() <= _WHOLE:
        return 1
    row = tensor.numel() // tensor.shape[0]
    stride = min(row, 2 * tensor.numel() // _WHOLE)
    while math.gcd(stride, row) > 1:
        stride -= 1
    return stride


def _each(function: Callable[[Tensor], str], tensors: Iterable[Tensor]) -> list[str]:
    """`function` of each tensor; in threads if that pays, on the CPU alone (streams belong to threads)."""
    tensors = list(tensors)
    if any(tensor.device.type != "cpu" for tensor in tensors) or sum(t.nbytes for t in tensors) < _THREADED:
        return [function(tensor) for tensor in tensors]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, tensors))
