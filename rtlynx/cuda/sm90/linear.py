"""Compression and product in one call: two kernels, one workspace, as little host time as it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rtlynx.cuda import tuning
from rtlynx.cuda.forms import keep, placed_form_of
from rtlynx.cuda.sm90.compress import (
    Addresses,
    CompressOptions,
    CompressPlan,
    address_of,
    plan_compress,
    start_compress,
    vectors_fit,
)
from rtlynx.cuda.sm90.gemm import Product, product_of, start_gemm
from rtlynx.cuda.sm90.prologues import (
    IDENTITY,
    BoundPrologue,
    Prologue,
    at_addresses,
    bind,
    bind_matrix,
    expressible,
)
from rtlynx.cuda.sm90.weights import Weights, readable, stored_columns

# Alignment inside the workspace; the allocator's own is more.
_ALIGNMENT = 16


class Call(NamedTuple):
    """What a call needs that depends on the form of its inputs and on the places of weights.

    given : of earlier inputs of this form
    values : fields of `given`, in which addresses are to be replaced
    matrices : how many inputs are such; their fields come first
    lowrank_a : address of A^T, or 0
    to_scale, to_lowrank, to_sums, workspace_bytes : parts of the workspace, of which A is the first
    """

    compression: CompressPlan
    product: Product
    given: BoundPrologue
    values: list[Any]
    matrices: int
    lowrank_a: int
    to_scale: int
    to_lowrank: int
    to_sums: int
    workspace_bytes: int


_calls: dict[tuple[Any, ...], Call] = {}


class CallArguments(NamedTuple):
    """A call before it is known how to launch it.

    inputs : arguments of the prologue
    lowrank_a : contiguous, or None
    first_ranks : as of `gemm_joint`
    how : grouping, parts and whatever else options are made of
    """

    prologue: Prologue
    inputs: Sequence[Any]
    layers: Sequence[Weights]
    lowrank_a: Tensor | None
    first_ranks: tuple[int, ...]
    how: tuple[Any, ...]

    def form(self) -> tuple[Any, ...]:
        """Equal for calls that differ in the places of inputs and in contents alone."""
        tensors = [one for of in self.layers for one in of]
        tensors.append(self.lowrank_a)
        forms = [
            (one.dtype, one.shape, one.stride(), one.data_ptr() % 16) if isinstance(one, Tensor) else one
            for one in self.inputs
        ]
        device, forced = self.inputs[0].get_device(), tuning.forced_config()
        return (self.prologue, device, forced, self.first_ranks, self.how, *forms, *placed_form_of(tensors))


def known_call(arguments: CallArguments) -> tuple[tuple[Any, ...], Call | None]:
    """The form of the call, and what was kept for it; nothing where gradients are recorded."""
    form = arguments.form()
    return form, None if torch.is_grad_enabled() else _calls.get(form)


def plan_call(arguments: CallArguments, options: CompressOptions, form: tuple[Any, ...]) -> Call | None:
    """How to launch a checked call with rows and columns; None where one kernel cannot read its inputs.

    Kept for its form, unless inputs or weights had to be copied.
    """
    prologue, inputs, layers, lowrank_a, first_ranks, _ = arguments
    given: BoundPrologue | None = None
    if prologue is not IDENTITY:
        given = bind(prologue, inputs)
    elif expressible(inputs[0]) is inputs[0]:
        given = bind_matrix(inputs[0])
    if given is None or not (prologue is IDENTITY or _vectors_fit(given, lowrank_a, options)):
        return None
    compression = plan_compress(given, lowrank_a, options)
    lowrank_bytes = 0 if layers[0].lowrank_b is None else compression.lowrank_bytes
    product = product_of(layers, given.rows, first_ranks, lowrank_bytes)
    assert product.plan is not None
    to_lowrank = compression.packed_a_bytes
    to_scale = to_lowrank + compression.lowrank_bytes
    to_sums = to_scale + -(-compression.scales * 4 // _ALIGNMENT) * _ALIGNMENT
    call = Call(
        compression,
        product,
        given,
        list(prologue.layout.unpack(given.parameters)),
        len(prologue.named("rows")),
        address_of(lowrank_a),
        to_scale,
        to_lowrank,
        to_sums,
        to_sums + product.plan.workspace_bytes,
    )
    places = [one.data_ptr() for one in inputs if isinstance(one, Tensor)]
    copied = given.owners and places != [one.data_ptr() for one in given.owners]
    if not copied and not product.owners:
        keep(_calls, form, call._replace(given=given._replace(owners=())))
    return call


def _vectors_fit(given: BoundPrologue, lowrank_a: Tensor | None, options: CompressOptions) -> bool:
    """Whether groups and A^T can be read 16 bytes at a time, as prologues need."""
    fit = vectors_fit(options.grouping, options.parts, given.columns)
    return fit and (lowrank_a is None or readable(lowrank_a) is lowrank_a)


def launch_call(call: Call, inputs: Sequence[Any]) -> Tensor:
    """Y (rows, N), of inputs of the form that `call` is for."""
    given = call.given
    if not given.owners:
        addresses = [one.data_ptr() for one in inputs if isinstance(one, Tensor)]
        parameters = given.prologue.layout.pack(*at_addresses(call.values, call.matrices, addresses))
        given = BoundPrologue(
            given.prologue, parameters, given.rows, given.columns, given.device, given.aligned
        )
    x, n = inputs[0], call.product.n
    columns = stored_columns(n)
    out = x.new_empty((given.rows, columns))
    workspace = x.new_empty(call.workspace_bytes, dtype=torch.uint8)
    start = workspace.data_ptr()
    scale = start + call.to_scale if call.compression.scales else 0
    compressed = Addresses(start, scale, start + call.to_lowrank)
    start_compress(call.compression, given, call.lowrank_a, compressed)
    sums = start + call.to_sums if call.workspace_bytes > call.to_sums else 0
    start_gemm(call.product, compressed, out.data_ptr(), sums)
    return out if columns == n else out[:, :n].contiguous()


def launch_linear(
    x: Tensor,
    of: Weights,
    lowrank_a: Tensor | None,
    how: tuple[Any, ...],
    check: Callable[[], CompressOptions],
) -> Tensor:
    """Y (rows, N) of `rtlynx::linear`; see `rtlynx.ops.sparse_linear`.

    `check` refuses arguments and gives the options that `how` stands for; it is called once for each form of
    them, or always where gradients are recorded.
    """
    arguments = CallArguments(IDENTITY, (expressible(x),), (of,), contiguous(lowrank_a), (0,), how)
    form, call = known_call(arguments)
    if call is None:
        options = check()
        n, k = of.weight.shape
        if x.numel() == 0 or n == 0:
            return x.new_empty((x.numel() // k, n))
        call = plan_call(arguments, options, form)
        assert call is not None
    return launch_call(call, arguments.inputs)


def contiguous(factor: Tensor | None) -> Tensor | None:
    """`factor`, or a copy whose rows follow each other."""
    return factor if factor is None or factor.is_contiguous() else factor.contiguous()
