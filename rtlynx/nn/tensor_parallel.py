"""Sparse layers in a model that diffusers' `enable_parallelism` has spread over several processes.

Context parallel (Ulysses, ring) cuts tokens, and these layers work token by token: only the place of the
text rows changes (`local_text_rows`). Tensor parallel cuts weights: the model is sharded first, then made
sparse, each layer whole for a moment (its digest, its calibrated weight, its quantisation), after which every
process keeps its shard. PyTorch's hooks of the dense layer stay: they turn its input into a `DTensor` and
gather or sum its output. Layers that read a prologue share its compressed form, as in one process, but for
row-parallel ones with norm compensation.

- Column-parallel (to_q, to_k, to_v, MLP up): all K inputs, N/t outputs. A of the low-rank branch is whole, B
  cut like the weight. Everything else is as in one process.
- Row-parallel (to_out, MLP down, proj_out): K/t inputs, and outputs are sums over processes. A of the branch
  is cut like the weight, B whole; the bias is added by process 0 alone. The norm scale is that of
  the whole token: processes exchange three numbers a token. The scale of a token in fp8 is that of the shard
  alone: each process applies its own to its own sum, which is as right, rounds no coarser, costs nothing, and
  is what the kernels compute anyway.

What is cut and how, and the hooks, are diffusers' and PyTorch's. Ours are the factors' shards, the scale of
whole tokens, and `Shard.cut` and `Shard.whole`: diffusers cuts by a private function, and gathers nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rtlynx.math.selection import Pattern, select
from rtlynx.nn.input_cache import SharedInput
from rtlynx.nn.original import original_bias_of
from rtlynx.nn.prepared import PreparedInput
from rtlynx.nn.sparse_linear import SparseLinear

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# The axis along which a layer's tensors are cut; those that are not named are whole on every process.
_CUT: dict[int, dict[str, int]] = {
    0: dict.fromkeys(
        ("weight", "weight_scale", "weight_dense", "weight_dense_scale", "bias", "bias_dense", "lowrank_b"), 0
    ),
    1: {"weight": 1, "weight_dense": 1, "lowrank_a": 1},
}


@dataclass(frozen=True)
class Shard:
    """How the weight (N, K) of one layer is cut over the processes of a tensor-parallel group.

    dim : 0 where outputs are cut (column-parallel), 1 where inputs are (row-parallel).
    blocks : widths along `dim`, each of which is cut by itself (FLUX proj_out: attention | MLP).
    plain : whether the layer is called with plain tensors, whole or this process's part, as by diffusers.
    """

    dim: Literal[0, 1]
    blocks: tuple[int, ...]
    mesh: DeviceMesh
    plain: bool = False

    @property
    def degree(self) -> int:
        return int(self.mesh.size())

    @property
    def rank(self) -> int:
        return int(self.mesh.get_local_rank())

    def row_ranges(self, rank: int) -> list[tuple[int, int]]:
        """Half-open ranges along `dim` that process `rank` holds, in order."""
        starts = accumulate(self.blocks, initial=0)
        pieces = [width // self.degree for width in self.blocks]
        return [
            (start + rank * piece, start + (rank + 1) * piece)
            for start, piece in zip(starts, pieces, strict=False)
        ]

    def cut(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part of a whole tensor along `dim`; a copy."""
        parts = [tensor.narrow(dim, start, stop - start) for start, stop in self.row_ranges(self.rank)]
        return torch.cat(parts, dim).clone(memory_format=torch.contiguous_format)

    def whole(self, tensor: Tensor) -> Tensor:
        """The whole of a DTensor in natural order, on every process (which all must call this)."""
        sharded = cast(Any, tensor.detach())
        (placement,) = sharded.placements
        if not placement.is_shard():
            return cast(Tensor, sharded.to_local())
        pieces = [width // self.degree for width in self.blocks]
        parts = sharded.full_tensor().split(pieces * self.degree, placement.dim)
        ordered = [part for block in range(len(pieces)) for part in parts[block :: len(pieces)]]
        return torch.cat(ordered, placement.dim)

    def whole_linear(self, dense: nn.Linear) -> nn.Linear:
        """`dense`, which PyTorch has cut, with whole parameters of its own; all processes call this."""
        whole = copy.copy(dense)
        whole._parameters = {
            name: None
            if parameter is None
            else nn.Parameter(self.whole(parameter), requires_grad=parameter.requires_grad)
            for name, parameter in dense._parameters.items()
        }
        return whole

    def pattern(self, pattern: Pattern, k: int) -> Pattern:
        """The pattern of a shard of a layer whose whole input of `k` entries has `pattern`.

        Raises
        ------
        ValueError
            If groups reach over several shards.
        """
        if self.dim == 0:
            return pattern
        if pattern.grouping == "adjacent":
            if any((width // self.degree) % pattern.m for width in self.blocks):
                raise ValueError(
                    f"{self.degree} tensor-parallel shards of its {k} inputs do not hold whole groups of "
                    f"{pattern.m}"
                )
            return pattern
        bounds = list(accumulate(pattern.widths(k), initial=0))
        for rank in range(self.degree):
            if not {bound for span in self.row_ranges(rank) for bound in span} <= set(bounds):
                raise ValueError(
                    f"its strided groups reach over {self.degree} tensor-parallel shards: make the model "
                    f"sparse (calibrate it) with a recipe of tp_degree={self.degree}, or grouping='adjacent'"
                )
        mine = [
            stop - start
            for start, stop in pairwise(bounds)
            if any(first <= start and stop <= last for first, last in self.row_ranges(self.rank))
        ]
        return Pattern(pattern.n, pattern.m, "strided", tuple(mine) if len(mine) > 1 else 1, pattern.score)


def shards_of(model: nn.Module, names: Iterable[str]) -> dict[str, Shard]:
    """How PyTorch has cut the linears `names` of a dense `model`: of those that it has cut, none by default.

    Raises
    ------
    ValueError
        If one is cut in a way that is not known here.
    """
    sharded = {
        name: weight
        for name in names
        if _is_sharded(weight := model.get_submodule(name)._parameters.get("weight"))
    }
    if not sharded:
        return {}
    blocks: dict[str, Any] = {}
    config = getattr(getattr(model, "_parallel_config", None), "tensor_parallel_config", None)
    if config is not None:
        from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs

        blocks = resolve_tp_shard_specs(model, cast(Any, model)._tp_plan, config._mesh.size())
    return {name: _shard(name, weight, blocks.get(f"{name}.weight")) for name, weight in sharded.items()}


def _is_sharded(tensor: Tensor | None) -> bool:
    return hasattr(tensor, "placements")  # a DTensor, without importing what defines it


def _shard(name: str, weight: Any, spec: Any) -> Shard:
    dim = weight.placements[0].dim if weight.placements[0].is_shard() else None
    widths = tuple(spec.block_sizes) if spec is not None else (weight.shape[dim or 0],)
    degree = weight.device_mesh.size()
    if len(weight.placements) != 1 or dim not in (0, 1) or any(width % degree for width in widths):
        raise ValueError(
            f"{name}: a weight placed as {weight.placements} over {degree} processes is not one that tensor "
            "parallelism of columns or rows alone leaves behind"
        )
    return Shard(dim, widths, weight.device_mesh, plain=spec is not None)


class TensorParallelLinear(SparseLinear):
    """One process's shard of a `SparseLinear`; takes and gives the `DTensor`s of PyTorch's hooks around it.

    Parameters and buffers are plain tensors, this process's part of the whole layer's, and `in_features`,
    `out_features` and `pattern` are those of the part. `from_linear` makes a whole layer of a whole linear
    (`Shard.whole_linear`), to be given weights and factors as any other; `take_shard` then cuts it.

    In a row-parallel layer with norm compensation, inputs get no gradient.
    """

    shard: Shard
    replicated_bias: Tensor | None

    def take_shard(self, shard: Shard, dense: nn.Linear) -> None:
        """Keep this process's part alone of what is whole now; `dense` is the layer that PyTorch has cut.

        Where the weight is the original one, it is that of `dense` from now on, not a copy.
        """
        pattern = shard.pattern(self.pattern, self.in_features)  # (raises before anything is changed)
        if self.format.weight_sparse and shard.dim == 1 and any(w // shard.degree % 4 for w in shard.blocks):
            raise ValueError(
                f"{shard.degree} processes would cut the groups of four neighbouring weights of inputs "
                f"{shard.blocks}: use a number of processes that leaves multiples of four to each"
            )
        self.unpack()
        for name, dim in _CUT[shard.dim].items():
            tensor = self._parameters.get(name)
            if tensor is not None:
                if name == "weight" and not self.weight_changed:
                    part = cast(Any, dense._parameters[name]).detach().to_local()
                else:
                    part = shard.cut(tensor.detach(), dim)
                self._parameters[name] = nn.Parameter(part, requires_grad=tensor.requires_grad)
            elif self._buffers.get(name) is not None:
                self._buffers[name] = shard.cut(cast(Tensor, self._buffers[name]), dim)
        self.shard, self.pattern = shard, pattern
        self.register_buffer("replicated_bias", None, persistent=False)
        if shard.dim == 0:
            self.out_features //= shard.degree
            return
        self.in_features //= shard.degree
        if self.bias is not None:
            original = original_bias_of(self)
            self.replicated_bias = None if original is None else original.detach()  # for `to_linear`
            if shard.rank:  # outputs are summed
                self.register_parameter("bias", None)
                self.bias_dense = None
        if self._compensated:
            self.shared_input = SharedInput()  # not the one pass that knows this process's shard alone

    @property
    def _compensated(self) -> bool:
        """Whether a token's norm scale depends on what other processes hold of it."""
        return self.shard.dim == 1 and self.norm != "none" and self.pattern.n != self.pattern.m

    def to_linear(self) -> nn.Linear:
        """The layer as PyTorch has cut it, over `DTensor`s; see `SparseLinear.to_linear`."""
        from torch.distributed.tensor import DTensor, Replicate
        from torch.distributed.tensor import Shard as Placement

        plain = super().to_linear()
        plain._buffers.pop("replicated_bias")
        plain.__dict__.pop("shard")
        mesh, cut = self.shard.mesh, Placement(self.shard.dim)
        parameters: dict[str, tuple[Tensor, Any]] = {"weight": (plain.weight, cut)}
        if self.shard.dim == 0 and plain.bias is not None:
            parameters["bias"] = (plain.bias, cut)
        elif self.replicated_bias is not None:
            parameters["bias"] = (self.replicated_bias, Replicate())
        for name, (local, placement) in parameters.items():
            whole = DTensor.from_local(local.detach(), mesh, (placement,), run_check=False)
            plain.register_parameter(name, nn.Parameter(whole, requires_grad=plain.weight.requires_grad))
        plain.out_features, plain.in_features = plain.weight.shape
        return plain

    def forward(self, input: Any) -> Tensor:
        """X -> Y, `DTensor`s: (..., K) whole -> (..., N) cut, or (..., K) cut -> (..., N) to be summed."""
        return self._distributed(super().forward(_local(input)))

    def _distributed(self, y: Tensor) -> Tensor:
        """This process's y (..., N) as the part that it is."""
        from torch.distributed.tensor import DTensor, Partial
        from torch.distributed.tensor import Shard as Placement

        placement = Placement(y.ndim - 1) if self.shard.dim == 0 else Partial()
        return DTensor.from_local(y, self.shard.mesh, (placement,), run_check=False)

    @property
    def reads_prepared(self) -> bool:
        """Whether it can be called with a `PreparedInput`: nothing but PyTorch's two hooks is around it."""
        hooks = len(self._forward_pre_hooks), len(self._forward_hooks)
        plain = self.shard.plain and hooks == (1, 1) and "forward" not in self.__dict__
        return plain and not self._compensated  # (which asks other processes for their part of the input)

    def __call__(self, input: Any) -> Any:
        """As of any module; a `PreparedInput` passes by the hook that makes a tensor a `DTensor`."""
        if not isinstance(input, PreparedInput):
            return super().__call__(input)
        (gather_or_sum,) = self._forward_hooks.values()
        return gather_or_sum(self, (input,), self._distributed(input.output_of(self)))

    @property
    def whole_scale(self) -> Callable[..., Tensor] | None:
        return self._whole_scale if self._compensated else None

    def _whole_scale(self, x: Tensor, *, mask: Tensor | None = None, local: Tensor | None = None) -> Tensor:
        """s (..., 1) float32 of whole tokens, of which `x` is this process's part (see `pattern.norm_scale`).

        What is kept of `x` is told by `mask`, or by `local`, the scale that `x` has by itself.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "a row-parallel layer with norm compensation passes no gradient to its input: call the model "
                "under torch.no_grad()"
            )
        x32 = x.detach().float()
        largest = x32.abs().amax(-1, keepdim=True)
        unit = torch.ones_like(largest)
        if self.norm != "paper":
            unit = torch.where((largest > 0) & torch.isfinite(largest), largest, unit)
        squares = (x32 / unit).square()
        total = squares.sum(-1, keepdim=True)
        if mask is not None:
            kept = select(squares, mask).sum(-1, keepdim=True)
        else:
            assert local is not None
            kept = total / local.square()
        mine = torch.cat((largest, total, kept), dim=-1)
        theirs = mine.new_empty(self.shard.degree, *mine.shape)
        dist.all_gather_into_tensor(theirs.flatten(0, 1), mine, group=self.shard.mesh.get_group())
        return _scale_of_shards(*theirs.unbind(-1), paper=self.norm == "paper").unsqueeze(-1)

    def extra_repr(self) -> str:
        cut = "outputs" if self.shard.dim == 0 else "inputs"
        return f"{super().extra_repr()}, {cut} of process {self.shard.rank} of {self.shard.degree}"


def _scale_of_shards(largest: Tensor, total: Tensor, kept: Tensor, *, paper: bool) -> Tensor:
    """s (...) from what each process (axis 0) knows: sums of squares in units of its own largest entry."""
    if paper:
        return (total.sum(0) / (kept.sum(0) + 1e-8)).sqrt()
    whole = largest.amax(0)
    usable = (whole > 0) & torch.isfinite(whole)
    ratio = (largest / torch.where(usable, whole, 1.0)).square()
    return torch.where(usable, (total * ratio).sum(0) / (kept * ratio).sum(0), 1.0).sqrt()


def _local(input: Any) -> Tensor:
    """This process's part of a DTensor, which PyTorch's hook made as a view of the layer's real input.

    Under `no_grad` that input itself where it can be told, so that q, k and v know that they read one tensor.
    """
    local: Tensor = input.to_local()
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or local.is_inference():
        return local
    base = local._base
    if base is not None and (base.shape, base.stride()) == (local.shape, local.stride()):
        return base
    return local


def local_text_rows(model: nn.Module, rows: tuple[int, int | None] | None) -> tuple[int, int | None] | None:
    """Where the text rows `rows` of a call lie on this process's tokens, under diffusers' context parallel.

    Raises
    ------
    ValueError
        If that is not known: the text is not first, or the model's plan does not cut it.
    """
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if config is None or rows is None:
        return rows
    registry = getattr(model, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("cp_input---")
    start, stop = rows
    if hook is None or "encoder_hidden_states" not in hook.metadata or start != 0 or stop is None:
        raise ValueError(
            f"where the text rows of {type(model).__name__} lie on the shards of this context-parallel plan "
            "is not known: use a recipe of text_rows='sparse'"
        )
    mesh = config._flattened_mesh
    degree, rank = mesh.size(), mesh.get_local_rank()
    return 0, stop // degree + (rank < stop % degree)  # as torch.tensor_split


def refuse_parallel(model: nn.Module, why: str, *, context: bool) -> None:
    """ValueError if `model` is sharded by tensor parallelism or, with `context`, is context-parallel."""
    config = getattr(model, "_parallel_config", None)
    sharded = any(_is_sharded(parameter) for parameter in model.parameters())
    if sharded or (context and config is not None):
        raise ValueError(f"{type(model).__name__} is spread over several processes: {why}")
