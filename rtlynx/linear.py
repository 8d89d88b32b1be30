"""`SparseLinear`: an `nn.Linear` whose input is N:M-sparse."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rtlynx.context import SharedInput, SparseContext
from rtlynx.kernels import ops
from rtlynx.kernels.ops import Compressed, Norm
from rtlynx.pattern import Pattern


class SparseLinear(nn.Linear):
    """Y = s ⊙ (S(X) W'^T) + (X A) B^T + b, S keeping n of every m entries of each token.

    A subclass of `nn.Linear` that keeps `weight` and `bias`, so peft, offloading and tensor-parallel styles
    see an ordinary linear layer. All parameters are in natural column order whatever the grouping.

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
        self.shared_input = SharedInput()
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
        compressed = self.shared_input.compress(
            input, (self.pattern, self.norm, x.dtype), lambda: ops.compress(x, self.pattern, self.norm)
        )
        text_rows = self.context.text_rows if self.text_rows_dense else None
        if text_rows is None:
            return self._sparse(x, compressed)
        start, stop, _ = slice(*text_rows).indices(x.shape[-2])
        before, after = slice(0, start), slice(stop, x.shape[-2])
        pieces = [
            self._sparse(x[..., before, :], compressed.rows(before)),
            self._dense(x[..., start:stop, :]),
            self._sparse(x[..., after, :], compressed.rows(after)),
        ]
        return torch.cat(pieces, dim=-2)

    def _sparse(self, x: Tensor, compressed: Compressed) -> Tensor:
        lowrank = None if self.lowrank_down is None else linear(x, self.lowrank_down)
        return ops.sparse_linear(compressed, self.weight, self.bias, lowrank, self.lowrank_up)

    def _dense(self, x: Tensor) -> Tensor:
        return linear(x, self.original_weight(), self.bias)

    def original_weight(self) -> Tensor:
        if not self.refitted:
            return self.weight
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
