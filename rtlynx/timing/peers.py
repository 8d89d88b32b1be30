"""What there is besides us: cuBLAS through `F.linear`, cuSPARSELt and dense fp8 products through PyTorch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rtlynx.math.fp8 import E4M3, E4M3_MAX, quantize_tokens
from rtlynx.math.selection import nm_mask, select
from rtlynx.timing.operands import Operands
from rtlynx.timing.sustained import (
    REPLAY_MS,
    Call,
    ProfilerTimer,
    Timer,
    TimerFactory,
    close,
    measure,
)

TORCHAO = {
    "bf16": "no 2:4 product for bf16 activations in torchao 0.18, only for float8",
    "fp8": "its float8 2:4 product is a CUDA extension of torchao 0.18, which was not installed",
}
SEARCH_SECONDS, SEARCH_REPLAY_MS = 0.06, 8.0
PROBE_REPLAY_MS = 0.1
MOST_ALGORITHMS = 40


class Algorithm(NamedTuple):
    """A way in which cuSPARSELt multiplies."""

    alg_id: int
    split_k: int = 1
    split_k_mode: int = -1


def masked(x: Tensor) -> Tensor:
    """X with 2 of every 4 entries: cuSPARSELt's compression does not select, it wants them zero already."""
    return select(x, nm_mask(x))


def selected(of: Operands) -> Tensor:
    """What cuSPARSELt compresses of a layer's input, quantised where the layer is."""
    return masked(of.x) if of.quantized is None else quantize_tokens(of.x, nm_mask(of.x)).values


def multiply(compressed: Tensor, weight: Tensor, algorithm: Algorithm) -> Tensor:
    """X W^T for compressed X (M, K) and W (N, K), as PyTorch orients 2:4 activations; (M, N) bf16."""
    options: dict = {}
    if algorithm.split_k > 1:
        options = {"split_k": algorithm.split_k, "split_k_mode": algorithm.split_k_mode}
    if weight.dtype is E4M3:
        options["out_dtype"] = torch.bfloat16
    return torch._cslt_sparse_mm(compressed, weight.t(), alg_id=algorithm.alg_id, **options)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic quantisation as users compile it: (M, K) bf16 -> e4m3 values and scales (M, 1)."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / E4M3_MAX
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def dense_fp8_calls(sets: Sequence[Operands]) -> dict[str, Callable[[], list[Call]]]:
    """A dense fp8 linear in its two parts: PyTorch's row-wise scaled product, and compiled quantisation."""
    quantize = torch.compile(quantize_rows, dynamic=False)

    def products() -> list[Call]:
        inputs = [quantize_rows(of.x) for of in sets]
        return [
            partial(
                torch._scaled_mm,
                values,
                of.held.t(),
                scale_a=scale,
                scale_b=of.weight_scale.unsqueeze(0),
                bias=of.bias,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            for of, (values, scale) in zip(sets, inputs, strict=True)
            if of.weight_scale is not None
        ]

    return {
        "cublas_fp8": products,
        "cublas_fp8_quant": lambda: [partial(quantize, of.x) for of in sets],
    }


class CuSparseLt:
    """cuSPARSELt's products and how to time them: as a graph, or by the profiler where none can be captured.

    Attributes
    ----------
    method : "cuda graph" | "profiler"
    reason : str or None
        Why not a graph.
    chosen : Algorithm or None
        The last one that `best` found.
    """

    def __init__(
        self, new_graphs: Callable[[], TimerFactory], generator: torch.Generator, dtype: str = "bf16"
    ) -> None:
        self.method, self.reason = "cuda graph", None
        self.chosen: Algorithm | None = None
        x, weight = (
            torch.randn(256, 256, device=generator.device, generator=generator, dtype=torch.bfloat16)
            for _ in range(2)
        )
        x = masked(x)
        if dtype == "fp8":
            x, weight = x.to(E4M3), weight.to(E4M3)
        compressed = torch._cslt_compress(x)  # where this fails there is nothing to time
        try:
            # A pool of memory each: PyTorch trips over one whose graphs are all gone.
            new_graphs().timer([lambda: torch._cslt_compress(x)], PROBE_REPLAY_MS)
            new_graphs().timer([lambda: multiply(compressed, weight, Algorithm(0))], PROBE_REPLAY_MS)
        except Exception as error:
            self.method, self.reason = "profiler", str(error).strip().splitlines()[0]

    def timer(self, graphs: TimerFactory, calls: Sequence[Call], replay_ms: float = REPLAY_MS) -> Timer:
        if self.method == "cuda graph":
            return graphs.timer(calls, replay_ms)
        return ProfilerTimer(calls)

    def best(self, graphs: TimerFactory, pairs: Sequence[tuple[Tensor, Tensor]], wanted: Tensor) -> Algorithm:
        """The fastest algorithm for these (compressed, weight), of those that give `wanted` on the first."""
        self.chosen = None
        timers: dict[Algorithm, Timer] = {}
        for algorithm in candidates(*pairs[0]):
            try:
                if not close(multiply(*pairs[0], algorithm), wanted):
                    continue
                calls = product_calls(pairs, algorithm)
                timers[algorithm] = self.timer(graphs, calls, SEARCH_REPLAY_MS)
            except RuntimeError:
                continue  # cuSPARSELt refuses algorithms that do not suit a shape
        if not timers:
            raise RuntimeError("no algorithm of cuSPARSELt takes this shape and gives the right product")
        names = {str(algorithm): algorithm for algorithm in timers}
        by_name = {name: timers[algorithm] for name, algorithm in names.items()}
        rounds = 2 if self.method == "cuda graph" else 1  # reading a profile takes far longer than its window
        taken = measure(by_name, SEARCH_SECONDS, rounds, lambda: (None, None), {}, discard=0.0)
        self.chosen = names[min(taken, key=lambda name: taken[name].us)]
        return self.chosen


def product_calls(pairs: Sequence[tuple[Tensor, Tensor]], algorithm: Algorithm) -> list[Call]:
    return [partial(multiply, compressed, weight, algorithm) for compressed, weight in pairs]


def candidates(compressed: Tensor, weight: Tensor) -> list[Algorithm]:
    """All algorithms, and the library's own search's choice, which may split K."""
    found, count = [], MOST_ALGORITHMS
    try:
        search = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]
        alg_id, split_k, mode, count = search(compressed, weight.t(), None, None, None, False)
        found = [Algorithm(alg_id, split_k, mode) if split_k > 1 else Algorithm(alg_id)]
    except (AttributeError, TypeError, RuntimeError):
        pass  # older or newer PyTorch: the algorithms one by one, then
    each = [Algorithm(alg_id) for alg_id in range(min(count, MOST_ALGORITHMS))]
    return list(dict.fromkeys(each + found))
