"""What kernels compute in front of a layer: one table, which operators, CUDA code, tests and docs follow.

A *prologue* is an elementwise function of a model's activations whose result is compressed or quantised
without being stored: norm and modulation, an activation, a gate. It is computed in float32 and rounded once
to bfloat16. Adding one takes an entry in `PROLOGUES`, its `struct Prologue` in prologues.cuh and a line in
the model that has it (docs/develop/add-a-prologue.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from rtlynx.cuda.forms import form_of, keep
from rtlynx.cuda.layout import Layout
from rtlynx.cuda.sm90.weights import readable

# rows: activations (..., K) bf16. batches: parameters (B, K), (B, 1, K) or (K,). columns: parameters (K,).
# table: parameters (R, K). choice: which of these rows each token takes, (B, T) or (T,) int32.
# tokens: parameters (B, T, K) or (T, K), of each token its own.
Kind = Literal["rows", "batches", "columns", "table", "choice", "tokens", "float"]

MATRIX = Layout(
    ("data", "pointer"), ("batch_stride", "int64"), ("row_stride", "int64"), ("rows_per_batch", "int")
)


@dataclass(frozen=True, eq=False)
class Prologue:
    """One prologue.

    Attributes
    ----------
    name : str
        Of the operators `<name>_compress` and `<name>_quantize`, and, in capitals, of the CUDA code.
    formula : str
    arguments : tuple of (str, Kind)
        In the order of the operators' and of the reference's.
    reference : callable
        The result in float32, in plain PyTorch; parameters of batches come as (B, 1, K) or (K,), those of
        tokens as (..., K).
    concatenates : bool
        Whether columns of the second matrix follow those of the first; else matrices are of one shape.
    gated : bool
        Whether that second matrix has two halves, which make as many columns of the result as one has.
    many_registers : bool
        Whether kernels of whole rows spill unless threads of long ones get more registers.
    """

    name: str
    formula: str
    arguments: tuple[tuple[str, Kind], ...]
    reference: Callable[..., Tensor]
    concatenates: bool = False
    gated: bool = False
    many_registers: bool = False

    def named(self, *kinds: Kind) -> list[str]:
        """Names of the arguments of these kinds."""
        return [name for name, kind in self.arguments if kind in kinds]

    @property
    def schema(self) -> str:
        """The arguments as operators declare them."""
        return ", ".join(
            f"{'float' if kind == 'float' else 'Tensor'} {name}" for name, kind in self.arguments
        )

    @property
    def macro(self) -> str:
        """What chooses it in prologues.cuh."""
        return f"PROLOGUE_{self.name.upper()}"

    @property
    def inputs(self) -> int:
        """Values that the kernel reads for each value of the result."""
        return (2 if self.gated else 1) if self.concatenates else len(self.named("rows"))

    def columns(self, widths: Sequence[int]) -> int:
        """Of the result, where its matrices have `widths`."""
        if not self.concatenates:
            return widths[0]
        return widths[0] + (widths[1] // 2 if self.gated else widths[1])

    @cached_property
    def layout(self) -> Layout:
        """Of `struct Prologue`."""
        return Layout(
            *((name, MATRIX) for name in self.named("rows")),
            *((name, "pointer") for name in self.named("batches", "columns", "table", "choice", "tokens")),
            *((("modulation_stride", "int"),) if self.named("batches", "table", "tokens") else ()),
            *((("last_choice", "int"),) if self.named("choice") else ()),
            *((name, "float") for name in self.named("float")),
            *((("columns_a", "int"),) if self.concatenates else ()),
            *((("columns_b", "int"),) if self.gated else ()),
        )

    def __reduce__(self) -> Any:
        return _named, (self.name,)  # one object for each, also in copies


class BoundPrologue(NamedTuple):
    """A prologue with the inputs of one call, as kernels take them.

    parameters : bytes of `struct Prologue`
    rows, columns : of the result
    aligned : whether all rows of its inputs start at multiples of 16 bytes
    owners : what must live until the launch: the kernel reads them
    """

    prologue: Prologue
    parameters: bytes
    rows: int
    columns: int
    device: torch.device
    aligned: bool
    owners: tuple[Tensor, ...] = ()


# ------------------------------------------------------------------------------------------------- the table


def _adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale.float()) + shift.float()


def _rms_adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return rms_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale.float()) + shift.float()


def _adaln_by_token(x: Tensor, shift: Tensor, scale: Tensor, choice: Tensor, eps: float) -> Tensor:
    rows = choice.clamp(0, len(shift) - 1).long()
    return _adaln(x, shift[rows], scale[rows], eps)


def _adaln_of_tokens(
    x: Tensor, shift: Tensor, scale: Tensor, common_shift: Tensor, common_scale: Tensor, eps: float
) -> Tensor:
    return _adaln(x, shift.float() + common_shift.float(), scale.float() + common_scale.float(), eps)


def _rms_adaln_of_tokens(
    x: Tensor, shift: Tensor, scale: Tensor, common_shift: Tensor, common_scale: Tensor, eps: float
) -> Tensor:
    return _rms_adaln(x, shift.float() + common_shift.float(), scale.float() + common_scale.float(), eps)


def _rmsnorm_by_token(x: Tensor, weight: Tensor, scale: Tensor, choice: Tensor, eps: float) -> Tensor:
    return _rmsnorm(x, weight, scale[choice.clamp(0, len(scale) - 1).long()], eps)


def _rmsnorm(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    return rms_norm(x.float(), x.shape[-1:], eps=eps) * weight.float() * scale.float()


def _gelu(x: Tensor) -> Tensor:
    return gelu(x.float(), approximate="tanh")


def _silu_gate(a: Tensor, b: Tensor) -> Tensor:
    return silu(a.float()) * b.float()


_OF_TOKENS: tuple[tuple[str, Kind], ...] = (
    *(("x", "rows"), ("shift", "tokens"), ("scale", "tokens")),
    *(("common_shift", "columns"), ("common_scale", "columns"), ("eps", "float")),
)

IDENTITY = Prologue("identity", "x", (("x", "rows"),), Tensor.float)

PROLOGUES: dict[str, Prologue] = {
    one.name: one
    for one in (
        IDENTITY,
        Prologue(
            "adaln",
            "layer_norm(x) * (1 + scale) + shift",
            (("x", "rows"), ("shift", "batches"), ("scale", "batches"), ("eps", "float")),
            _adaln,
            many_registers=True,
        ),
        Prologue(
            "rms_adaln",
            "rms_norm(x) * (1 + scale) + shift",
            (("x", "rows"), ("shift", "batches"), ("scale", "batches"), ("eps", "float")),
            _rms_adaln,
            many_registers=True,
        ),
        Prologue(
            "adaln_by_token",
            "layer_norm(x) * (1 + scale[choice]) + shift[choice], choices beyond the table its last or first",
            (("x", "rows"), ("shift", "table"), ("scale", "table"), ("choice", "choice"), ("eps", "float")),
            _adaln_by_token,
            many_registers=True,
        ),
        Prologue(
            "adaln_of_tokens",
            "layer_norm(x) * (1 + common_scale + scale) + common_shift + shift, of each token its own",
            _OF_TOKENS,
            _adaln_of_tokens,
        ),
        Prologue(
            "rms_adaln_of_tokens",
            "rms_norm(x) * (1 + common_scale + scale) + common_shift + shift, likewise",
            _OF_TOKENS,
            _rms_adaln_of_tokens,
        ),
        Prologue(
            "rmsnorm",
            "rms_norm(x) * weight * scale",
            (("x", "rows"), ("weight", "columns"), ("scale", "batches"), ("eps", "float")),
            _rmsnorm,
            many_registers=True,
        ),
        Prologue(
            "rmsnorm_by_token",
            "rms_norm(x) * weight * scale[choice], choices beyond the table its last or first",
            (
                ("x", "rows"),
                ("weight", "columns"),
                ("scale", "table"),
                ("choice", "choice"),
                ("eps", "float"),
            ),
            _rmsnorm_by_token,
            many_registers=True,
        ),
        Prologue("gelu", "gelu(x), in the form with tanh", (("x", "rows"),), _gelu),
        Prologue(
            "silu_gate",
            "silu(a) * b",
            (("a", "rows"), ("b", "rows")),
            _silu_gate,
            many_registers=True,
        ),
        Prologue(
            "concat_gelu",
            "cat([a, gelu(b)], -1), gelu in the form with tanh",
            (("a", "rows"), ("b", "rows")),
            lambda a, b: torch.cat([a.float(), _gelu(b)], dim=-1),
            concatenates=True,
        ),
        Prologue(
            "concat_silu_gate",
            "cat([a, silu(b1) * b2], -1), b1 and b2 the halves of b",
            (("a", "rows"), ("b", "rows")),
            lambda a, b: torch.cat([a.float(), _silu_gate(*b.chunk(2, dim=-1))], dim=-1),
            concatenates=True,
            gated=True,
            many_registers=True,
        ),
    )
}


def _named(name: str) -> Prologue:
    return PROLOGUES[name]


# ------------------------------------------------------------------------------------ for PyTorch and kernels


def rounded(prologue: Prologue, arguments: Sequence[Any]) -> Tensor:
    """The result of checked `arguments` in plain PyTorch, bfloat16, contiguous."""
    first = arguments[0]
    plain = []
    for (_, kind), value in zip(prologue.arguments, arguments, strict=True):
        if kind == "batches":
            value = _by_batch(value)
            value = value.unsqueeze(1) if first.ndim == 3 else value
        plain.append(value.detach() if isinstance(value, Tensor) else value)
    return prologue.reference(*plain).bfloat16().contiguous()


class _Packing(NamedTuple):
    """What `bind` found for arguments of one form that needed no copy.

    values : fields of `struct Prologue`, in which addresses are to be replaced
    matrices : how many of its inputs are such; their fields come first
    """

    values: list[Any]
    matrices: int
    rows: int
    columns: int


_packings: dict[tuple[Any, ...], _Packing] = {}


def bind(prologue: Prologue, arguments: Sequence[Any]) -> BoundPrologue | None:
    """Checked `arguments` for a kernel; None where it cannot read them 16 bytes at a time."""
    tensors = [one for one in arguments if isinstance(one, Tensor)]
    addresses = [one.data_ptr() for one in tensors]
    form = (prologue, *form_of(arguments))
    known = _packings.get(form)
    if known is None or any(address % 16 for address in addresses):
        bound = _bind(prologue, arguments)
        if bound is not None and addresses == [one.data_ptr() for one in bound.owners]:
            values = list(prologue.layout.unpack(bound.parameters))
            packing = _Packing(values, len(prologue.named("rows")), bound.rows, bound.columns)
            keep(_packings, form, packing)
        return bound
    values, matrices, rows, columns = known
    parameters = prologue.layout.pack(*at_addresses(values, matrices, addresses))
    return BoundPrologue(prologue, parameters, rows, columns, tensors[0].device, True)


def at_addresses(values: Sequence[Any], matrices: int, addresses: Sequence[int]) -> list[Any]:
    """Fields of a prologue's parameters with other addresses: of its `matrices` first, then of vectors."""
    values = list(values)
    values[0 : 4 * matrices : 4] = addresses[:matrices]
    values[4 * matrices : 3 * matrices + len(addresses)] = addresses[matrices:]
    return values


def _bind(prologue: Prologue, arguments: Sequence[Any]) -> BoundPrologue | None:
    """As `bind`, of a form that is new or at addresses where something must be copied."""
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    batched: list[int] = []
    last_choice: list[int] = []
    numbers: list[float] = []
    for (_, kind), value in zip(prologue.arguments, arguments, strict=True):
        if kind == "rows":
            if value.stride(-1) != 1 or (value.dim() > 3 and not value.is_contiguous()):
                return None
            matrices.append(value)
        elif kind == "float":
            numbers.append(value)
        elif kind == "choice":
            vectors.append(value.contiguous())
        else:
            if value.dtype is not torch.bfloat16:
                return None
            if kind in ("batches", "table", "tokens"):
                batched.append(len(vectors))
            if kind == "table":
                last_choice = [len(value) - 1]
            vectors.append(readable(value.flatten(0, -2) if kind == "tokens" else _by_batch(value)))
    stride = _share_stride(vectors, batched)
    packed = [pack_matrix(one, batches=bool(batched)) for one in matrices]
    values: list[Any] = [number for numbers_of_one, _ in packed for number in numbers_of_one]
    values += [one.data_ptr() for one in vectors]
    values += [stride] if batched else []
    values += last_choice
    values += numbers
    widths = [one.shape[-1] for one in matrices]
    rows, columns = matrices[0].numel() // widths[0], prologue.columns(widths)
    if prologue.named("tokens") and rows * (stride // 8) >= 2**31:  # which kernels count in 32 bits
        return None
    if prologue.concatenates:
        values.append(widths[0])
        if widths[0] % 8:
            return None
    if prologue.gated:
        values.append(widths[1] // 2)
    if columns % 8 or not all(aligned for _, aligned in packed):
        return None
    parameters = prologue.layout.pack(*values)
    return BoundPrologue(prologue, parameters, rows, columns, matrices[0].device, True, (*matrices, *vectors))


def bind_matrix(x: Tensor) -> BoundPrologue:
    """X (..., K) itself, whose last stride is 1. `x` must outlive the launch: this does not keep it alive."""
    k = x.shape[-1]
    numbers, aligned = pack_matrix(x)
    return BoundPrologue(IDENTITY, MATRIX.pack(*numbers), x.numel() // k, k, x.device, aligned)


def pack_matrix(x: Tensor, batches: bool = False) -> tuple[tuple[int, int, int, int], bool]:
    """The fields of `MATRIX` for `x` (..., K), which is `expressible`, and whether it is aligned.

    batches : keep the first axis of a (B, T, K) tensor apart even where it need not be.
    """
    address = x.data_ptr()
    if x.dim() == 3 and (batches or not x.is_contiguous()):
        batch, row, together = x.stride(0), x.stride(1), x.shape[1]
    elif x.dim() == 2:
        batch, row, together = 0, x.stride(0), x.shape[0]
    else:
        batch, row, together = 0, x.shape[-1], x.numel() // x.shape[-1]
    return (address, batch, row, together or 1), (address | (batch | row) * 2) % 16 == 0


def expressible(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy where two strides do not tell where its rows lie."""
    return x if x.dim() <= 3 or x.is_contiguous() else x.contiguous()


def _by_batch(parameter: Tensor) -> Tensor:
    """(K,), (B, K) or (B, 1, K) as (B, K)."""
    if parameter.ndim == 1:
        return parameter.unsqueeze(0)
    return parameter.squeeze(1) if parameter.ndim == 3 else parameter


def _share_stride(vectors: list[Tensor], batched: list[int]) -> int:
    """From batch to batch of those of `vectors` that have batches, which are copied where theirs differ."""
    of = [vectors[index] for index in batched]
    batch = max((one.shape[0] for one in of), default=1)
    if batch == 1:
        return 0
    if any(one.shape != of[0].shape or one.stride(0) != of[0].stride(0) for one in of):
        for index in batched:
            vectors[index] = vectors[index].expand(batch, -1).contiguous()
    return vectors[batched[0]].stride(0)
