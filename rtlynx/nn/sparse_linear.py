"""`SparseLinear`: an `nn.Linear` whose input is N:M-sparse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rtlynx.cuda.sm90.weights import Weights
from rtlynx.math.formats import FP8_WEIGHT_SPARSE, Format, format_of
from rtlynx.math.fp8 import E4M3, Quantized, quantize_weight
from rtlynx.math.reference import Norm
from rtlynx.math.selection import Pattern
from rtlynx.math.tiles import compute_order
from rtlynx.nn.backends import Backend, as_multiplied, choose_backend
from rtlynx.nn.cached_tensor import CachedTensor
from rtlynx.nn.call import CallState, RowRanges, current_call
from rtlynx.nn.input_cache import SharedInput
from rtlynx.nn.original import dense_output, keep_original, original_bias_of, original_of
from rtlynx.nn.packed_weight import PackableLinear
from rtlynx.nn.prepared import PreparedInput
from rtlynx.nn.state_dict import OWN, mark, refusal, rename_former
from rtlynx.ops import fp8_linear as fp8
from rtlynx.ops.dispatch import kernels_support, unsupported_reason


class SparseLinear(PackableLinear):
    """Y = s ⊙ (S(X) W'^T) + (X A) B^T + b, S keeping n of every m entries of each token.

    A subclass of `nn.Linear` that keeps `weight` and `bias`, so peft, offloading and tensor-parallel styles
    see an ordinary linear layer. All parameters are in natural column order whatever the grouping.

    In bfloat16 or fp8 on a Hopper card, without gradients, the layer runs on sparse tensor cores
    (`rtlynx.ops.dispatch`). With strided groups it then keeps a copy of the weight in the order of the
    groups, as large as the parameter. The copy is private, in no `state_dict`, and made anew when the
    weight is replaced, moved or changed in place. A change through `weight.data` has no version and is not
    seen: assign a new `weight` instead. So adapters are not merged into such layers (`mergeable`).

    A quantised layer (`quantize`) multiplies eight-bit values: Y = (s t) ⊙ (Xq Wq^T) ⊙ c + (X A) B^T + b, a
    scale t for each token and c for each output channel (`rtlynx.math.fp8`). Pattern 1:1 makes it dense
    fp8, which runs on PyTorch's own kernel on cards with fp8. In the format "fp8-weight-sparse" its weight is
    2:4-sparse instead, and where our kernel for that serves, the layer holds it packed, in 0.625 bytes an
    entry (`rtlynx.nn.packed_weight`). Quantised layers are for inference, without gradients. Casts
    (`layer.to(dtype)`) leave the weight and its scale alone.

    Attributes
    ----------
    weight : Parameter (N, K)
        W, or the refitted W' where `refitted`; in a quantised layer its float8_e4m3fn values. Each reading
        makes a copy where it is held packed.
    weight_scale : buffer (N,) float32 or None
        c of a quantised layer.
    lowrank_a, lowrank_b : Parameters (r, K) and (N, r), or None
        A^T and B of the low-rank branch, which reads the dense input.
    weight_dense, bias_dense : buffers (N, K) and (N,), or None
        The original W beside a refitted or quantised one, and b (or zeros) beside a refitted one: kept only
        where some rows or steps run dense.
    weight_dense_scale : buffer (N,) float32 or None
        Of a W that is kept in e4m3.
    pattern : Pattern
    format : Format
        What the layer multiplies (`rtlynx.math.formats`): e4m3 where the weight is quantised, else in the
        dtype of its input; all inputs, or those that `pattern` keeps.
    precision : "bf16" | "fp8"
        That of `format`.
    norm : "none" | "scale" | "paper"
        Whether the norm scale s is applied ("paper": with the paper's printed epsilon).
    intercept : "" | "refitted" | "added"
        Whether `bias` was refitted, and to a layer that had none.
    dense_reason : str or None
        Why the layer runs densely all the same (its K does not split into groups), or None.
    backend : Backend or None
        What computes the layer (`rtlynx.nn.backends`); None takes the fastest that serves the call.
    dense_precision : "bf16" | "fp8"
        How W is kept: in the model's dtype, or in e4m3.
    text_rows_dense, dense_steps : bool
        Whether text rows, or all rows in some steps, run dense, as the model's call says (`rtlynx.nn.call`).
        Outside a call of its model such a layer runs dense if it is `lent` to another one, or not at all.
    """

    pattern: Pattern
    norm: Norm
    format: Format
    refitted: bool
    intercept: Literal["", "refitted", "added"]
    dense_reason: str | None
    lowrank_a: nn.Parameter | None
    lowrank_b: nn.Parameter | None
    weight_dense: Tensor | None
    weight_dense_scale: Tensor | None
    bias_dense: Tensor | None
    weight_scale: Tensor | None
    dense_precision: Literal["bf16", "fp8"]
    text_rows_dense: bool
    dense_steps: bool
    lent: bool = False  # (of layers that were pickled before it, too)
    shared_input: SharedInput
    backend: Backend | None
    settings: str
    _packed_weight: CachedTensor
    _folded_lowrank_b: CachedTensor

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
        self.format = format_of(sparse=pattern.n < pattern.m, quantized=False)
        self.refitted = False
        self.intercept = ""
        self.dense_reason = pattern.misfit(self.in_features)
        self.dense_precision = "bf16"
        self.text_rows_dense = self.dense_steps = self.lent = False
        self.shared_input = SharedInput(single=True)
        self.backend = None
        self._packed_weight = CachedTensor()
        self._folded_lowrank_b = CachedTensor()
        self.register_parameter("lowrank_a", None)
        self.register_parameter("lowrank_b", None)
        for name in ("weight_dense", "weight_dense_scale", "bias_dense", "weight_scale"):
            self.register_buffer(name, None)

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
            If the weight was refitted or quantised and the original was not kept.
        """
        if "forward" in self.__dict__:  # of a hook, which would go on calling this layer
            raise RuntimeError(
                "the layer's forward has been replaced (an offload or casting hook?): remove offloading and "
                "layerwise casting first, then make the model dense"
            )
        weight = self.original_weight()
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        for key, value in vars(self).items():
            if key not in SparseLinear.__annotations__:
                plain.__dict__[key] = copy.copy(value) if isinstance(value, dict) else value
        for name in OWN:
            plain._parameters.pop(name, None)
            plain._buffers.pop(name, None)
        plain._parameters["bias"] = original_bias_of(self)
        held = self.held_weight
        if weight is not held:
            plain.weight = nn.Parameter(weight, requires_grad=held.requires_grad)
        return plain

    @property
    def whole_scale(self) -> Callable[..., Tensor] | None:
        """How a shard of a layer finds the norm scale of whole tokens; None where the layer sees those."""
        return None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if hasattr(param, "placements"):  # a DTensor: tensor parallelism would cut the factors wrongly
            raise RuntimeError(
                "this layer is sparse already: enable tensor parallelism first, then make the model sparse"
            )
        super().register_parameter(name, param)

    @property
    def weight_changed(self) -> bool:
        """Whether `weight` is another than that of the dense layer: refitted or quantised."""
        return self.refitted or self.format.quantized

    @property
    def precision(self) -> Literal["bf16", "fp8"]:
        """That of `format`."""
        return self.format.precision

    @property
    def mergeable(self) -> bool:
        """Whether a change of the weight alone (a merged adapter) changes all that the layer computes."""
        copied = self.pattern.grouping != "adjacent"
        return not (self.format.quantized or copied or self.weight_dense is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        self._packed_weight.drop()  # or it would stay on a device that the layer leaves
        self._folded_lowrank_b.drop()
        self.unpack_to_move(fn)
        eight_bits = (self._parameters.get("weight"), self.weight_scale) if self.format.quantized else ()
        if self.weight_dense_scale is not None:
            eight_bits = (*eight_bits, self.weight_dense, self.weight_dense_scale)

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype is tensor.dtype or not any(tensor is one for one in eight_bits):
                return moved
            return tensor.to(moved.device)  # a cast of the model is none of eight-bit values and their scale

        super()._apply(move, recurse)
        self.prepare()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        mark(self, destination, prefix)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        *_, error_messages = lists
        rename_former(state_dict, prefix)
        reason = refusal(self, state_dict, prefix, local_metadata)
        if reason is not None:
            error_messages.append(reason)
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self._packed_weight.drop()  # compiled code would go on with what was made of the old ones
        self._folded_lowrank_b.drop()
        self.shared_input.forget_factors()
        self.prepare()

    def _replicate_for_data_parallel(self) -> SparseLinear:
        raise RuntimeError(
            "DataParallel copies layers to other cards without their parameters: use one process a card"
        )

    @property
    def rank(self) -> int:
        """Rank of the low-rank branch, 0 without one."""
        return 0 if self.lowrank_a is None else self.lowrank_a.shape[0]

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Dtype of what is not quantised; None where a quantised layer has no bias, factors or original.

        By this name peft finds the dtype that an adapter beside the layer gets.
        """
        if not self.format.quantized:
            return self.weight.dtype
        full = (self.lowrank_a, self.bias, None if self.weight_dense_scale is not None else self.weight_dense)
        return next((tensor.dtype for tensor in full if tensor is not None), None)

    def set_lowrank(self, lowrank_a: Tensor, lowrank_b: Tensor) -> None:
        """Set the low-rank branch: `lowrank_a` A^T (r, K), `lowrank_b` B (N, r), cast like the weight.

        Beside a quantised weight they are cast to `compute_dtype`.
        """
        rank = lowrank_a.shape[0]
        if (
            rank < 1
            or lowrank_a.shape != (rank, self.in_features)
            or lowrank_b.shape != (self.out_features, rank)
        ):
            raise ValueError(
                f"low-rank factors of a {self.in_features} -> {self.out_features} layer are "
                f"(r, {self.in_features}) and ({self.out_features}, r), "
                f"got {tuple(lowrank_a.shape)} and {tuple(lowrank_b.shape)}"
            )
        held = self.held_weight
        train, device, dtype = held.requires_grad, held.device, held.dtype
        if self.format.quantized:
            dtype = self.compute_dtype or lowrank_a.dtype
        self.shared_input.forget_factors()
        for name, factor in (("lowrank_a", lowrank_a), ("lowrank_b", lowrank_b)):
            new = factor.detach().to(device, dtype, copy=True).contiguous()  # layers may be given one A
            setattr(self, name, nn.Parameter(new, requires_grad=train))

    def set_refit(self, weight: Tensor, *, keep_dense: bool = False) -> None:
        """Replace W by the refitted W' (N, K); `keep_dense` keeps W beside it for dense rows and steps.

        Raises
        ------
        ValueError
            If the weight is of another shape.
        RuntimeError
            If the layer is quantised: refit first.
        """
        if self.format.quantized:
            raise RuntimeError("the layer is quantised: refit its weight first, then quantise it")
        if weight.shape != self.weight.shape:
            raise ValueError(
                f"a refitted weight here is {tuple(self.weight.shape)}, got {tuple(weight.shape)}"
            )
        if keep_dense:
            keep_original(self)
        new = weight.detach().to(self.weight).contiguous()  # safetensors saves nothing else
        self.weight = nn.Parameter(new, requires_grad=self.weight.requires_grad)
        self.refitted = True

    def quantize(self, gram: Tensor | None = None, *, keep_dense: bool = False) -> None:
        """Quantise the weight to e4m3, in place: from now on the layer is fp8.

        Parameters
        ----------
        gram : Tensor (K, K) or None
            Second moments of what the weight multiplies, S^T S, to choose the scales on
            (`rtlynx.math.fp8.quantize_weight`); None takes the plain ones.
        keep_dense : bool
            Keep the original W (N, K) beside it, for dense rows and steps.

        Raises
        ------
        ValueError
            If the weight is not finite, or `norm` is "paper", which fp8 layers do not know.
        RuntimeError
            If the layer is quantised already, does not run sparse, or `keep_dense` comes after a refit that
            did not keep the original.
        """
        if self.format.quantized:
            raise RuntimeError("the layer is quantised already")
        self.set_quantized(quantize_weight(self.weight, gram), keep_dense=keep_dense)

    def set_quantized(
        self, weight: Quantized, *, keep_dense: bool = False, refitted: bool = False, sparse: bool = False
    ) -> None:
        """Take a weight that was quantised elsewhere: values (N, K) and scale (N,); see `quantize`.

        `refitted` says that it is a refitted weight W', `sparse` that it is 2:4-sparse ("fp8-weight-sparse").
        """
        values, scale = weight
        shape = (self.out_features, self.in_features)
        if values.dtype is not E4M3 or values.shape != shape or scale.shape != shape[:1]:
            raise ValueError(
                f"a quantised weight here is {shape} of {E4M3} with a scale of {shape[:1]}, got "
                f"{tuple(values.shape)} of {values.dtype} with a scale of {tuple(scale.shape)}"
            )
        if self.norm == "paper":
            raise ValueError("fp8 layers know the norm scale 'scale', not the paper's printed formula")
        if self.dense_reason is not None:
            raise RuntimeError(f"the layer runs dense and is not quantised: {self.dense_reason}")
        if keep_dense:
            keep_original(self)
        device = self.held_weight.device
        self.weight = nn.Parameter(values.detach().to(device).contiguous(), requires_grad=False)
        self.weight_scale = scale.detach().to(device, torch.float32).contiguous()
        dense = format_of(sparse=self.pattern.n < self.pattern.m, quantized=True)
        self.format = FP8_WEIGHT_SPARSE if sparse else dense
        self.refitted = self.refitted or refitted

    def forward(self, input: Tensor | PreparedInput) -> Tensor:
        """X (..., K) -> Y (..., N); X a tensor, or what `rtlynx.nn.prologue.read` made of it."""
        if isinstance(input, PreparedInput):
            return input.output_of(self)
        assert self.settings
        x = as_multiplied(input)
        if self.dense_reason is not None:
            return dense_output(self, x)
        call = self.call()
        if call is not None and call.dense:
            return dense_output(self, x)
        ranges = call.split(x.shape[-2]) if call is not None and self.text_rows_dense else None
        if ranges is None:
            return self._sparse(input, x, None)[0]
        (start, stop), others = ranges
        pieces = self._sparse(input, x, others) if others else []
        pieces.insert(1 if start > 0 else 0, dense_output(self, x[..., start:stop, :]))
        return torch.cat(pieces, dim=-2)

    def _sparse(self, input: Tensor, x: Tensor, ranges: RowRanges | None) -> list[Tensor]:
        """The output for each range of tokens of `x`, or for all of them; `input` is x before a cast."""
        backend = self.backend or choose_backend(self, x)
        # Apart, since packed tiles cannot be sliced, and cuBLAS wants scales at a multiple of 16 bytes.
        pieces = [x] if ranges is None else [x[..., slice(*one), :] for one in ranges]
        prepared = self.shared_input.compress(
            input,
            (backend, self.pattern, self.norm, self.precision, x.dtype, ranges),
            lambda: [backend.prepare(self, piece) for piece in pieces],
            backend.lowrank_factor(self),
        )
        return [backend.multiply(self, piece, one) for piece, one in zip(pieces, prepared, strict=True)]

    def call(self) -> CallState | None:
        """The state of the model's call under way; None where the layer does the same in every call.

        Raises
        ------
        RuntimeError
            If the layer depends on the call and none is under way.
        """
        return current_call(lent=self.lent) if self.depends_on_call else None

    @property
    def depends_on_call(self) -> bool:
        """Whether some rows or steps run dense, with the original weight."""
        return self.text_rows_dense or self.dense_steps

    def fp8_parameters(self) -> fp8.Fp8Parameters:
        """What a quantised layer multiplies with where it keeps all of its input, or no kernels serve it."""
        of, scale = self._parameters, self.weight_scale
        assert scale is not None
        weight, packed = self.multiplied_weight()
        return fp8.Fp8Parameters(weight, scale, of["bias"], of["lowrank_a"], of["lowrank_b"], packed)

    def prepare(self) -> None:
        """Make what kernels, where they serve, read in place of parameters: compiled code finds it."""
        weight = self.held_weight
        if self.format.weight_sparse:
            self.pack()
        elif weight.is_cuda and self.dense_reason is None:
            with torch.no_grad():
                x = weight.new_empty(0, self.in_features, dtype=torch.bfloat16)
                if unsupported_reason(x, *self._operands()) is None:
                    self.multiplied()

    def kept_copies(self) -> list[Tensor]:
        """What the layer holds beside its parameters and buffers at present."""
        return [kept for kept in (self._packed_weight.kept, self._folded_lowrank_b.kept) if kept is not None]

    def train(self, mode: bool = True) -> SparseLinear:
        """As of any module; what was made of the parameters, which training changes, is made anew."""
        self._packed_weight.drop()
        self._folded_lowrank_b.drop()
        if not mode:
            self.prepare()
        return super().train(mode)

    def supported(self, x: Tensor) -> bool:
        """Whether the kernels serve this layer for the input `x` (..., K)."""
        return kernels_support(x, *self._operands())

    def _operands(self) -> tuple[Pattern, Norm, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What decides whether kernels serve the layer, as `rtlynx.ops.dispatch` takes it."""
        of = self._parameters
        factors = of["lowrank_a"], of["lowrank_b"]
        return self.pattern, self.norm, self.weight, of["bias"], *factors

    def multiplied(self) -> Weights:
        """What the kernels multiply with."""
        weight, scale, pattern = self.weight, self.weight_scale, self.pattern
        lowrank_b: Tensor | None = self._parameters["lowrank_b"]
        if pattern.grouping != "adjacent":
            weight = self._packed_weight.get((weight,), pattern, partial(compute_order, weight, pattern))
        if lowrank_b is not None and scale is not None:
            lowrank_b = self._folded_lowrank_b.get(
                (lowrank_b, scale), None, partial(fp8.fold_lowrank_b, lowrank_b, scale)
            )
        return Weights(weight, lowrank_b, self._parameters["bias"], scale)

    def original_weight(self) -> Tensor:
        """The weight of the dense layer.

        Raises
        ------
        RuntimeError
            If the weight was refitted or quantised and the original was not kept, or in eight bits alone.
        """
        return original_of(self)

    def extra_repr(self) -> str:
        pattern = f"{self.pattern.n}:{self.pattern.m} {self.pattern.grouping}"
        if self.format.quantized:
            pattern = "fp8, 2:4 weights" if self.format.weight_sparse else f"fp8, {pattern}"
        state = f"dense: {self.dense_reason}" if self.dense_reason else f"{pattern}, norm={self.norm}"
        rank = f", rank={self.rank}" if self.rank else ""
        return f"{super().extra_repr()}, {state}{rank}{', refitted' if self.refitted else ''}"
