"""`SparseLinear`: an `nn.Linear` whose input is N:M-sparse."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rtlynx.context import SharedInput, SparseContext
from rtlynx.kernels import ops, reference
from rtlynx.kernels.blocks import compute_order
from rtlynx.kernels.choice import kernels_serve
from rtlynx.kernels.reference import Norm
from rtlynx.pattern import Pattern

Spans = tuple[tuple[int, int], ...]  # half-open ranges of tokens


class _OrderedWeight:
    """A copy of a layer's weight in the kernels' column order, made anew when the weight may have changed."""

    def __init__(self) -> None:
        self._entry: tuple[weakref.ref[Tensor], int, int, Pattern, Tensor] | None = None

    def get(self, weight: Tensor, pattern: Pattern) -> Tensor:
        """`weight` in compute order: itself for adjacent groups, which need no other."""
        if pattern.grouping == "adjacent":
            return weight
        if torch.compiler.is_compiling() or weight.is_inference():
            # No version, or no guard that sees it: in order for this call alone.
            return compute_order(weight.detach(), pattern)
        entry = self._entry
        state = (weight._version, weight.data_ptr(), pattern)
        if entry is not None and entry[0]() is weight and entry[1:4] == state:
            return entry[4]
        ordered = compute_order(weight.detach(), pattern)
        if weight.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return ordered  # filled by replays of that graph alone
            torch.cuda.current_stream(weight.device).synchronize()  # other streams may be the next to ask
        self._entry = (weakref.ref(weight), *state, ordered)
        return ordered

    def drop(self) -> None:
        self._entry = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _OrderedWeight:
        return _OrderedWeight()

    def __getstate__(self) -> dict[str, Any]:
        return {"_entry": None}


class _WatchedWeight:
    """`SparseLinear.weight` to everyone but the layer itself: drops the copy in compute order.

    Who asks for the weight may change it behind its version's back; peft merges into `weight.data`.
    """

    def __get__(self, layer: SparseLinear | None, owner: type) -> Any:
        if layer is None:
            return self
        if "_ordered" in layer.__dict__:
            layer._ordered.drop()
        return nn.Module.__getattr__(layer, "weight")


class SparseLinear(nn.Linear):
    """Y = s ⊙ (S(X) W'^T) + (X A) B^T + b, S keeping n of every m entries of each token.

    A subclass of `nn.Linear` that keeps `weight` and `bias`, so peft, offloading and tensor-parallel styles
    see an ordinary linear layer. All parameters are in natural column order whatever the grouping.

    In bfloat16 on a Hopper card, without gradients, the layer runs on sparse tensor cores
    (`rtlynx.kernels.choice`). With strided groups it then keeps a copy of the weight in the order of the
    groups, 2 N K bytes beside the parameter. The copy is private, in no `state_dict`, and made anew when the
    weight is replaced, moved, changed in place or taken from the layer by name (peft merges into
    `layer.weight.data`). Not seen is a change through `.data` of a reference taken before: read
    `layer.weight` after it.

    Attributes
    ----------
    weight : Parameter (N, K)
        W, or the refitted W' where `refitted`.
    lowrank_down : Parameter (r, K) or None
        A^T of the low-rank branch, which reads the dense input.
    lowrank_up : Parameter (N, r) or None
        B.
    weight_dense : buffer (N, K) or None
        The original W beside a refitted one, kept only where some rows or steps run dense.
    pattern : Pattern
    norm : "none" | "scale" | "paper"
        Whether the norm scale s is applied ("paper": with the paper's printed epsilon).
    dense_reason : str or None
        Why the layer runs densely all the same (its K does not split into groups), or None.
    """

    pattern: Pattern
    norm: Norm
    refitted: bool
    dense_reason: str | None
    lowrank_down: nn.Parameter | None
    lowrank_up: nn.Parameter | None
    weight_dense: Tensor | None
    text_rows_dense: bool
    context: SparseContext
    shared_input: SharedInput
    _ordered: _OrderedWeight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: Pattern | None = None,
        norm: Norm = "scale",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._become_sparse(pattern or Pattern(), norm)

    def _become_sparse(self, pattern: Pattern, norm: Norm) -> None:
        if norm not in ("none", "scale", "paper"):
            raise ValueError(f"norm is 'none', 'scale' or 'paper', got {norm!r}")
        self.pattern = pattern
        self.norm = norm
        self.refitted = False
        self.dense_reason = pattern.misfit(self.in_features)
        self.text_rows_dense = False
        self.context = SparseContext()
        self.shared_input = SharedInput(single=True)
        self._ordered = _OrderedWeight()
        self.register_parameter("lowrank_down", None)
        self.register_parameter("lowrank_up", None)
        self.register_buffer("weight_dense", None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, pattern: Pattern | None = None, norm: Norm = "scale"
    ) -> SparseLinear:
        """A sparse layer over the parameters of `linear` (shared, not copied), with its hooks and mode.

        A K that does not split into groups gives a layer that stays dense and says why in `dense_reason`.

        Raises
        ------
        TypeError
            If `linear` is not a plain `nn.Linear`: a subclass with its own forward, or a layer whose forward
            an offload hook has replaced, would silently lose that behaviour.
        """
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            raise TypeError(f"SparseLinear replaces a plain nn.Linear, got {type(linear).__name__}")
        if "forward" in linear.__dict__:
            raise TypeError(
                "the layer's forward has been replaced (an offload hook?): sparsify the model first, "
                "then enable offloading"
            )
        layer = cls.__new__(cls)
        # Shares parameters and custom attributes; copies the registries, so that neither layer sees what is
        # registered on the other later.
        layer.__dict__.update(
            {
                key: copy.copy(value) if isinstance(value, dict) else value
                for key, value in vars(linear).items()
            }
        )
        layer._become_sparse(pattern or Pattern(), norm)
        return layer

    def to_linear(self) -> nn.Linear:
        """A plain `nn.Linear` over the original weight (shared, not copied).

        Raises
        ------
        RuntimeError
            If the weight was refitted and the original was not kept.
        """
        weight = self.original_weight()
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        for key, value in vars(self).items():
            if key not in SparseLinear.__annotations__:
                plain.__dict__[key] = copy.copy(value) if isinstance(value, dict) else value
        for name in ("lowrank_down", "lowrank_up"):
            plain._parameters.pop(name, None)
        plain._buffers.pop("weight_dense", None)
        if weight is not self.weight:
            plain.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        return plain

    if not TYPE_CHECKING:  # to a type checker it is the attribute of nn.Linear
        weight = _WatchedWeight()

    def _own_weight(self) -> Tensor:
        weight = self._parameters.get("weight")
        return self.weight if weight is None else weight  # (not a parameter where it is parametrised)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        self._ordered.drop()  # or it would stay on a device that the layer leaves
        return super()._apply(fn, recurse)

    @property
    def rank(self) -> int:
        """Rank of the low-rank branch, 0 without one."""
        return 0 if self.lowrank_down is None else self.lowrank_down.shape[0]

    def set_lowrank(self, down: Tensor, up: Tensor) -> None:
        """Set the low-rank branch: `down` A^T (r, K), `up` B (N, r), cast like the weight."""
        rank = down.shape[0]
        if rank < 1 or down.shape != (rank, self.in_features) or up.shape != (self.out_features, rank):
            raise ValueError(
                f"low-rank factors of a {self.in_features} -> {self.out_features} layer are "
                f"(r, {self.in_features}) and ({self.out_features}, r), "
                f"got {tuple(down.shape)} and {tuple(up.shape)}"
            )
        train = self.weight.requires_grad
        self.lowrank_down = nn.Parameter(down.detach().to(self.weight).contiguous(), requires_grad=train)
        self.lowrank_up = nn.Parameter(up.detach().to(self.weight).contiguous(), requires_grad=train)

    def set_refit(self, weight: Tensor, *, keep_dense: bool = False) -> None:
        """Replace W by the refitted W' (N, K); `keep_dense` keeps W beside it for dense rows and steps."""
        if weight.shape != self.weight.shape:
            raise ValueError(
                f"a refitted weight here is {tuple(self.weight.shape)}, got {tuple(weight.shape)}"
            )
        if keep_dense and self.weight_dense is None:
            self.weight_dense = self.weight.detach()
        new = weight.detach().to(self.weight).contiguous()  # safetensors saves nothing else
        self.weight = nn.Parameter(new, requires_grad=self.weight.requires_grad)
        self.refitted = True

    def forward(self, input: Tensor) -> Tensor:
        """X (..., K) -> Y (..., N)."""
        x = input
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
            # Select on what the product will see.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.dense_reason is not None or self.context.dense_step:
            return self._dense(x)
        text_rows = self.context.text_rows if self.text_rows_dense else None
        if text_rows is None:
            return self._sparse(input, x, None)[0]
        rows = x.shape[-2]
        start, stop, _ = slice(*text_rows).indices(rows)
        if start >= stop:
            return self._sparse(input, x, None)[0]
        spans = [(first, last) for first, last in ((0, start), (stop, rows)) if first < last]
        pieces = self._sparse(input, x, tuple(spans)) if spans else []
        pieces.insert(1 if start > 0 else 0, self._dense(x[..., start:stop, :]))
        return torch.cat(pieces, dim=-2)

    def _sparse(self, input: Tensor, x: Tensor, spans: Spans | None) -> list[Tensor]:
        """The output for each span of tokens of `x`, or for all of them; `input` is x before a cast."""
        parameters = self._parameters
        down, up, bias = parameters["lowrank_down"], parameters["lowrank_up"], parameters["bias"]
        weight = self._own_weight()
        if kernels_serve(x, self.pattern, self.norm, weight, bias, down, up):
            return self._by_kernels(input, x, spans, weight)
        compressed = self.shared_input.compress(
            input,
            (self.pattern, self.norm, x.dtype),
            lambda: reference.compress(x, self.pattern, self.norm),
        )
        outputs = []
        for span in spans or (None,):
            piece, kept = x, compressed
            if span is not None:
                piece, kept = x[..., slice(*span), :], compressed.rows(slice(*span))
            lowrank = None if down is None else linear(piece, down)
            outputs.append(reference.sparse_linear(kept, weight, bias, lowrank, up))
        return outputs

    def _by_kernels(self, input: Tensor, x: Tensor, spans: Spans | None, weight: Tensor) -> list[Tensor]:
        parameters = self._parameters
        down, up, bias = parameters["lowrank_down"], parameters["lowrank_up"], parameters["bias"]
        pattern, norm = self.pattern, self.norm == "scale"
        grouping, parts = pattern.grouping, ops.pattern_parts(pattern, self.in_features)
        if x.stride(-1) != 1:
            x = x.contiguous()
        # Blocks cannot be sliced by rows: spans are compressed one by one.
        pieces = [x] if spans is None else [x[..., slice(*span), :] for span in spans]
        weight = self._ordered.get(weight, pattern)
        if self.shared_input.single:
            return [ops.linear(piece, weight, bias, down, up, grouping, parts, norm) for piece in pieces]
        # T comes out of the same pass, so a layer with another A compresses again.
        compressed = self.shared_input.compress(
            input,
            ("kernels", pattern, norm, spans),
            lambda: [ops.compress(piece, down, grouping, parts, norm) for piece in pieces],
            down,
        )
        return [
            ops.gemm(
                blocks,
                scale if norm else None,
                None if down is None else lowrank,
                weight,
                up,
                bias,
                piece.numel() // self.in_features,
                [],
            ).view(*piece.shape[:-1], self.out_features)
            for piece, (blocks, scale, lowrank) in zip(pieces, compressed, strict=True)
        ]

    def _dense(self, x: Tensor) -> Tensor:
        return linear(x, self._original_weight(), self.bias)

    def original_weight(self) -> Tensor:
        """The weight of the dense layer.

        Raises
        ------
        RuntimeError
            If the weight was refitted and the original was not kept.
        """
        self._ordered.drop()  # for the reason given at `weight`
        return self._original_weight()

    def _original_weight(self) -> Tensor:
        if not self.refitted:
            return self._own_weight()
        if self.weight_dense is None:
            raise RuntimeError(
                "this layer was refitted without keeping its original weight, which dense rows and steps "
                "need: calibrate with text_rows='dense' or dense_steps > 0 to keep both"
            )
        return self.weight_dense

    def extra_repr(self) -> str:
        pattern = f"{self.pattern.n}:{self.pattern.m} {self.pattern.grouping}"
        state = f"dense: {self.dense_reason}" if self.dense_reason else f"{pattern}, norm={self.norm}"
        rank = f", rank={self.rank}" if self.rank else ""
        return f"{super().extra_repr()}, {state}{rank}{', refitted' if self.refitted else ''}"
