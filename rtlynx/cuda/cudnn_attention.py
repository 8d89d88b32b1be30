"""Host side of cuDNN's fp8 attention for Hopper: plans of its graphs, made once a shape, and launch.

The library is NVIDIA's: cuDNN comes with PyTorch, its Python package (nvidia-cudnn-frontend, module `cudnn`)
with the extra `attention`. Its scales are numbers in device memory. Here they are constants, the same for all
calls: what inputs are scaled by is folded into the softmax's scale and into the units of values and output.
"""

from __future__ import annotations

import functools
import importlib.util
import struct
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rtlynx.cuda.driver import allowed_during_capture, bind_context, call
from rtlynx.math.attention import P_SCALE
from rtlynx.math.fp8 import E4M3

INSTALL = "pip install 'rtlynx[attention]'"
MAX_HEAD_DIM, HEAD_DIM_MULTIPLE = 256, 16
_ALIGNMENT = 16  # bytes, of addresses and strides
_Q, _K, _V, _O, _FIRST_SCALE = 1, 2, 3, 4, 5  # names of tensors in a graph
# Arguments of `sdpa_fp8`, and which constant each is.
_SCALES = {
    "descale_q": "one",
    "descale_k": "one",
    "descale_v": "one",
    "descale_s": "inverse of P's scale",
    "scale_s": "P's scale",
    "scale_o": "one",
}
_CONSTANTS = {"one": 1.0, "P's scale": P_SCALE, "inverse of P's scale": 1 / P_SCALE}
_Strides = tuple[int, ...]
_handles = threading.local()


class _Plan(NamedTuple):
    graph: Any
    workspace: int  # bytes


def missing_reason() -> str | None:
    """Why cuDNN's attention cannot be called, or None where its package is there."""
    if importlib.util.find_spec("cudnn") is None:
        return f"fp8 attention on a card is cuDNN's, whose Python package is not installed: {INSTALL}"
    return None


def head_dim_reason(head_dim: int) -> str | None:
    """Why the kernel does not take heads of `head_dim`, or None where it does."""
    if 0 < head_dim <= MAX_HEAD_DIM and head_dim % HEAD_DIM_MULTIPLE == 0:
        return None
    return (
        f"cuDNN's fp8 attention takes head dimensions up to {MAX_HEAD_DIM} that are multiples of "
        f"{HEAD_DIM_MULTIPLE}, got {head_dim}"
    )


def launch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`rtlynx.math.attention.attention_fp8` on the current device and stream.

    Raises
    ------
    ImportError
        If the package `cudnn` is not installed.
    ValueError
        If the kernel does not take the head dimension.
    RuntimeError
        If this cuDNN has no kernel for the shapes.
    """
    reason = head_dim_reason(q.shape[-1])
    if reason is not None:
        raise ValueError(reason)
    if q.shape[1] == 1:  # which the kernel refuses
        return launch(q.expand(-1, 2, -1, -1), k, v, scale)[:, :1].contiguous()
    q, k, v = (_laid_out(one) for one in (q, k, v))
    out = torch.empty(q.shape, dtype=E4M3, device=q.device)
    if not out.numel():
        return out
    device, s_kv = q.get_device(), k.shape[1]
    plan = _plan(device, q.shape, s_kv, _strides(q), _strides(k), _strides(v), scale)
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=q.device)
    addresses = {_Q: q.data_ptr(), _K: k.data_ptr(), _V: v.data_ptr(), _O: out.data_ptr()}
    addresses.update(_scale_addresses(device))
    plan.graph.execute(addresses, workspace.data_ptr(), handle=_handle(device))
    return out


def _laid_out(x: Tensor) -> Tensor:
    """`x`, or a copy where its rows do not lie as the kernel reads them."""
    strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    apart = all(size == 1 or (stride and stride % _ALIGNMENT == 0) for size, stride in strides)
    if x.stride(-1) == 1 and apart and x.data_ptr() % _ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _strides(x: Tensor) -> _Strides:
    """Strides of (B, S, H, D), those of a dense tensor along axes of one entry, where any will do."""
    strides, dense = list(x.stride()), 1
    for axis in (3, 2, 1, 0):
        if x.shape[axis] == 1:
            strides[axis] = dense
        dense = max(dense, strides[axis] * x.shape[axis])
    return tuple(strides)


def _cudnn() -> Any:
    reason = missing_reason()
    if reason is not None:
        raise ImportError(reason, name="cudnn")
    import cudnn

    return cudnn


def _handle(device: int) -> int:
    """This thread's handle on `device`, set to the current stream."""
    of_device: dict[int, tuple[int, int | None]] = _handles.__dict__.setdefault("of_device", {})
    handle, stream = of_device.get(device) or (None, None)
    current = torch.cuda.current_stream(device).cuda_stream
    if handle is None or stream != current:
        with allowed_during_capture():
            handle = _cudnn().create_handle() if handle is None else handle
            _cudnn().set_stream(handle=handle, stream=current)
        of_device[device] = handle, current
    return handle


@functools.cache
def _scale_addresses(device: int) -> dict[int, int]:
    """Tensor of a graph -> address of the constant that it is.

    In memory of the driver's: PyTorch's could be a CUDA graph's own, where the first call is made for one.
    """
    from cuda.bindings import driver

    bind_context(device)
    packed = struct.pack(f"{len(_CONSTANTS)}f", *_CONSTANTS.values())
    with allowed_during_capture():
        (memory,) = call(driver.cuMemAlloc, len(packed))
        call(driver.cuMemcpyHtoD, memory, packed, len(packed))
    places = {name: int(memory) + 4 * i for i, name in enumerate(_CONSTANTS)}
    return {_FIRST_SCALE + i: places[constant] for i, constant in enumerate(_SCALES.values())}


@functools.lru_cache(maxsize=256)
def _plan(
    device: int, shape: tuple[int, ...], s_kv: int, q: _Strides, k: _Strides, v: _Strides, scale: float
) -> _Plan:
    """The graph for queries of `shape` (B, S_q, H, D), strides in the same order."""
    cudnn = _cudnn()
    number, eight_bits = cudnn.data_type.FLOAT, cudnn.data_type.FP8_E4M3
    batch, s_q, heads, width = shape
    graph = cudnn.pygraph(
        io_data_type=eight_bits,
        intermediate_data_type=number,
        compute_data_type=number,
        handle=_handle(device),
    )

    def tensor(uid: int, tokens: int, strides: _Strides) -> Any:
        of_axes = [strides[axis] for axis in (0, 2, 1, 3)]
        return graph.tensor(dim=[batch, heads, tokens, width], stride=of_axes, data_type=eight_bits, uid=uid)

    scales = {
        name: graph.tensor(dim=[1] * 4, stride=[1] * 4, data_type=number, uid=_FIRST_SCALE + i)
        for i, name in enumerate(_SCALES)
    }
    out, _, amax_s, amax_o = graph.sdpa_fp8(
        q=tensor(_Q, s_q, q),
        k=tensor(_K, s_kv, k),
        v=tensor(_V, s_kv, v),
        **scales,
        attn_scale=scale,
        generate_stats=False,
    )
    dense = [s_q * heads * width, width, heads * width, 1]
    out.set_output(True).set_dim([batch, heads, s_q, width]).set_stride(dense).set_data_type(eight_bits)
    out.set_uid(_O)
    for unused in (amax_s, amax_o):  # the largest weight and output: nobody asks
        unused.set_output(False).set_dim([1] * 4).set_stride([1] * 4).set_data_type(number)
    try:
        with allowed_during_capture():
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A])
            graph.check_support()
            graph.build_plans()
    except cudnn.cudnnGraphNotSupportedError as error:
        raise RuntimeError(
            f"cuDNN {cudnn.backend_version()} has no fp8 attention for q of shape {tuple(shape)} and "
            f"{s_kv} keys: {error}. Use another version, or rtlynx.fp8_attention(model, enabled=False)"
        ) from error
    return _Plan(graph, graph.get_workspace_size())
