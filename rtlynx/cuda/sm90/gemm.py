"""Host side of gemm.cu: tensor maps, parameters, launch."""

from __future__ import annotations

import functools
import itertools
import secrets
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rtlynx.cuda import jit, tuning
from rtlynx.cuda.driver import call, multiprocessors
from rtlynx.cuda.forms import form_of, keep, placed_form_of
from rtlynx.cuda.jit import Defines, Instantiation
from rtlynx.cuda.layout import Layout
from rtlynx.cuda.sm90.compress import Addresses, address_of
from rtlynx.cuda.sm90.weights import Weights, aligned, readable_weights, stored_columns
from rtlynx.cuda.tuning import GemmConfig
from rtlynx.math.formats import FP8_SPARSE, TILE_ROWS, Format
from rtlynx.math.tiles import LOWRANK_BYTES, LOWRANK_COLUMNS

_CONSUMER_WARPS = 8
_THREADS = 128 + 32 * _CONSUMER_WARPS
_M64_TILES = tuning.BLOCK_M // TILE_ROWS
_STAGING_BYTES, _TILE_INFO_BYTES = 2048, 32
_WEIGHT_ROW_BYTES = 128  # of a stage
MAX_LAYERS = 4  # of one product
_M_TILES_PER_SWIZZLE = 16
_LAYER = Layout(*((name, "int") for name in ("column_end", "tile_end", "first_rank_block", "rank_blocks")))
# The kernel's `Parameters`, in seven pieces.
_PARAMETERS = Layout(
    ("weight", "TensorMap", MAX_LAYERS),
    ("lowrank_b", "TensorMap", MAX_LAYERS),
    *((name, "pointer", MAX_LAYERS) for name in ("packed_a", "lowrank", "scale")),
    ("out", "pointer"),
    ("bias", "pointer", MAX_LAYERS),
    ("column_scale", "pointer", MAX_LAYERS),
    *((name, "int") for name in ("rows", "columns", "k_blocks", "total_rank_blocks")),
    *((name, "int") for name in ("num_m_tiles", "num_n_tiles", "m_tiles_per_swizzle")),
    *((name, "int") for name in ("whole_tiles", "split_tiles", "split_ctas", "split_stages")),
    *((name, "pointer") for name in ("workspace", "ready")),
    ("nonce", "uint64"),
    *((name, "int") for name in ("bias_is_float", "num_layers")),
    ("layer", _LAYER, MAX_LAYERS),
)
_pack_maps, _pack_operands, _pack_out, _pack_vectors, _pack_shape, _pack_workspace, _pack_layers = (
    piece.pack
    for piece in _PARAMETERS.pieces("packed_a", "out", "bias", "rows", "workspace", "layer[0].column_end")
)
_NONE = (0,) * (MAX_LAYERS - 1)


def _defines(config: GemmConfig, transposed: bool = False) -> Defines:
    if config.block_n % tuning.STORE_N:
        raise ValueError(f"a tile's columns are a multiple of {tuning.STORE_N}, got {config.block_n}")
    return (
        ("FP8", int(config.format is FP8_SPARSE)),
        ("BLOCK_N", config.block_n),
        ("NUM_STAGES", config.stages),
        ("SKEW", config.skew),
        ("BLOCK_M", tuning.BLOCK_M),
        ("STORE_N", tuning.STORE_N),
        ("CONSUMER_WARPS", _CONSUMER_WARPS),
        ("THREADS", _THREADS),
        ("SHARED_BYTES", _shared_bytes(config)),
        ("MAX_LAYERS", MAX_LAYERS),
        *_PARAMETERS.defines,
        ("TRANSPOSED", int(transposed)),
    )


def _shared_bytes(config: GemmConfig) -> int:
    stage = _M64_TILES * config.format.tile_bytes + config.block_n * _WEIGHT_ROW_BYTES
    affine = config.block_n * 8 if config.format is FP8_SPARSE else 0
    return config.stages * (stage + 16) + _CONSUMER_WARPS * (_STAGING_BYTES + _TILE_INFO_BYTES + affine)


INSTANTIATIONS = [
    Instantiation("gemm.cu", "gemm", _defines(config))
    for configs in tuning.CANDIDATES.values()
    for config in configs
] + [Instantiation("gemm.cu", "gemm", _defines(config, True)) for config in tuning.CANDIDATES[FP8_SPARSE]]

_maps: dict[tuple[int, ...], bytes] = {}
_NO_MAP = bytes(128)


@functools.cache
def _kernel(config: GemmConfig, transposed: bool) -> jit.Kernel:
    return jit.load(
        "gemm.cu",
        "gemm",
        _defines(config, transposed),
        threads=_THREADS,
        shared_bytes=_shared_bytes(config),
        pdl=True,
    )


def _tensor_map(matrix: Tensor, box_columns: int, box_rows: int) -> bytes:
    """Tensor map of a row-major matrix, read in boxes whose rows are one swizzle span.

    A map holds an address and a shape, no contents, so one made for memory that was freed since is right for
    whatever of that shape lies there now.
    """
    rows, columns = matrix.shape
    key = (matrix.data_ptr(), matrix.element_size(), rows, columns, matrix.stride(0), box_columns, box_rows)
    found = _maps.get(key)
    if found is None:
        if len(_maps) >= 16384:
            _maps.clear()
        found = _maps[key] = _encode(*key)
    return found


def _encode(
    address: int, element: int, rows: int, columns: int, row_stride: int, box_columns: int, box_rows: int
) -> bytes:
    from cuda.bindings import driver as cu

    size, swizzle, data_type = cu.cuuint64_t, cu.CUtensorMapSwizzle, cu.CUtensorMapDataType
    (encoded,) = call(
        cu.cuTensorMapEncodeTiled,
        data_type.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        if element == 2
        else data_type.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2,
        address,
        [size(columns), size(rows)],
        [size(row_stride * element)],
        [cu.cuuint32_t(box_columns), cu.cuuint32_t(box_rows)],
        [cu.cuuint32_t(1), cu.cuuint32_t(1)],
        cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle.CU_TENSOR_MAP_SWIZZLE_128B
        if box_columns * element == 128
        else swizzle.CU_TENSOR_MAP_SWIZZLE_64B,
        cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return struct.pack("<16Q", *(int(word) for word in encoded.opaque))


def launch_gemm(
    packed_a: Tensor,
    scale: Tensor | None,
    lowrank: Tensor | None,
    layers: Sequence[Weights],
    rows: int,
    first_ranks: Sequence[int] = (0,),
    check: Callable[[], None] | None = None,
    checked: tuple[Any, ...] = (),
) -> Tensor:
    """Y (rows, N) of `rtlynx::gemm` and `gemm_joint`; see `rtlynx.ops.sparse_linear`.

    `check` refuses operands, once for each form of them and of what `checked` holds besides.
    """
    form = (*form_of((packed_a, scale, lowrank)), *checked)
    has_factors = lowrank is not None and layers and layers[0].lowrank_b is not None
    lowrank_bytes = lowrank.shape[0] if lowrank is not None and has_factors else 0
    product = product_of(layers, rows, first_ranks, lowrank_bytes, form, check)
    packed_a, lowrank = aligned(packed_a), None if lowrank is None else aligned(lowrank)
    given = Addresses(
        packed_a.data_ptr(),
        scale.data_ptr() if scale is not None and scale.shape[0] else 0,
        address_of(lowrank),
    )
    return output_of(product, rows, packed_a, given)


def output_of(product: Product, rows: int, like: Tensor, given: Addresses | None = None) -> Tensor:
    """Y (rows, N) of a launch, on the device of `like`; `given` as of `start_gemm`."""
    n, columns = product.n, stored_columns(product.n)
    out = like.new_empty((rows, columns), dtype=torch.bfloat16)  # (half the time of torch.empty)
    if product.plan is None:
        return out[:, :n]
    workspace = 0
    if product.plan.workspace_bytes:
        sums = like.new_empty(product.plan.workspace_bytes, dtype=torch.uint8)
        workspace = sums.data_ptr()
    start_gemm(product, given, out.data_ptr(), workspace)
    return out if columns == n else out[:, :n].contiguous()


def plan_gemm(shape: GemmShape, format: Format, device: int) -> GemmPlan:
    """How to compute Y on a device."""
    rows, columns, count = shape.rows, sum(shape.widths), multiprocessors(device)
    if shape.transposed:
        rows, columns = sum(-(-n // tuning.BLOCK_M) * tuning.BLOCK_M for n in shape.widths), rows
    return _plan(tuning.choose(rows, columns, shape.k, format, count), count, shape)


class Product(NamedTuple):
    """What a launch needs that depends on shapes and on the places of weights.

    plan : None where there is nothing to compute
    n : columns of Y
    maps, vectors : pieces of the kernel's Parameters, the first with the sparse operands that layers own
    rest : all that follows the vectors where no tile is split
    bias_is_float : whether biases are float32
    owners : copies of weights that kernels could not read, which must live until the launch
    """

    plan: GemmPlan | None
    n: int
    device: int
    maps: bytes
    vectors: bytes
    rest: bytes
    bias_is_float: bool
    owners: tuple[Weights, ...]


_products: dict[tuple[Any, ...], Product] = {}


def product_of(
    layers: Sequence[Weights],
    rows: int,
    first_ranks: Sequence[int],
    lowrank_bytes: int,
    checked: tuple[Any, ...] = (),
    check: Callable[[], None] | None = None,
) -> Product:
    """The product with these layers; as of a tensor map, what was made for memory freed since stays right.

    `check` is called where this, with what `checked` says, has not passed it before, or a gradient may be
    asked for.
    """
    places = placed_form_of([one for of in layers for one in of])
    form = (rows, tuple(first_ranks), lowrank_bytes, checked, places, tuning.forced_config())
    product = None if check is not None and torch.is_grad_enabled() else _products.get(form)
    if product is None:
        if check is not None:
            check()
        readable = [readable_weights(of) for of in layers]
        widths = tuple(of.weight.shape[0] for of in readable)
        ranks = tuple(0 if of.lowrank_b is None else of.lowrank_b.shape[1] for of in readable)
        k = readable[0].weight.shape[1]
        shape = GemmShape(rows, k, widths, ranks, tuple(first_ranks), lowrank_bytes)
        product = new_product(readable, shape)
        if places == placed_form_of([one for of in readable for one in of]):
            product = product._replace(owners=())
            keep(_products, form, product)
    return product


def new_product(layers: Sequence[Weights], shape: GemmShape, sparse: Sequence[Weights] = ()) -> Product:
    """`product_of` layers that kernels can read, of which nothing is remembered.

    Where `shape` is transposed `sparse` are the layers. `layers` have X, T and t in the places of W, B and c.
    """
    n = sum(shape.widths)
    is_float = any(of.bias is not None and of.bias.dtype is torch.float32 for of in layers)
    device = layers[0].weight.get_device()
    if shape.rows == 0 or n == 0:
        return Product(None, n, device, b"", b"", b"", is_float, ())
    plan = plan_gemm(shape, layers[0].format, device)
    columns, tile_k = plan.config.block_n, plan.config.format.tile_k
    none = [0] * (MAX_LAYERS - len(layers))
    no_maps = [_NO_MAP] * len(none)
    maps = _pack_maps(
        *[_tensor_map(of.weight, tile_k, columns) for of in layers],
        *no_maps,
        *[
            _NO_MAP if of.lowrank_b is None else _tensor_map(of.lowrank_b, LOWRANK_COLUMNS, columns)
            for of in layers
        ],
        *no_maps,
    )
    starts, whole = plan.first_columns, (0,) * len(layers)
    if sparse:
        maps += _pack_operands(
            *[of.weight.data_ptr() for of in sparse],
            *none,
            *[address_of(of.lowrank_b) for of in sparse],
            *none,
            *_addresses_at([of.column_scale for of in sparse], starts),
            *none,
        )
    vectors = _pack_vectors(
        *_addresses_at([of.bias for of in layers], starts),
        *none,
        *_addresses_at([of.column_scale for of in layers], whole if sparse else starts),
        *none,
    )
    rest = b"".join((plan.shape, _pack_workspace(0, 0, 0, is_float, len(layers)), plan.layers))
    return Product(plan, n, device, maps, vectors, rest, is_float, (*layers, *sparse))


def start_gemm(product: Product, given: Addresses | None, out: int, workspace: int) -> None:
    """Launch on the current stream. `out` and `workspace` are addresses; `given` what is no layer's own."""
    plan = product.plan
    assert plan is not None
    operands = b""
    if given is not None:
        operands = _pack_operands(given.packed_a, *_NONE, given.lowrank, *_NONE, given.scale, *_NONE)
    rest = product.rest
    if workspace:
        split = workspace, workspace + plan.sum_bytes, _nonce()
        marks = _pack_workspace(*split, product.bias_is_float, len(plan.first_columns))
        rest = b"".join((plan.shape, marks, plan.layers))
    parameters = b"".join((product.maps, operands, _pack_out(out), product.vectors, rest))
    stream = torch._C._cuda_getCurrentRawStream(product.device)
    _kernel(plan.config, plan.transposed).launch((plan.ctas, 1, 1), stream, parameters)


def _addresses_at(vectors: Sequence[Tensor | None], first_columns: Sequence[int]) -> list[int]:
    """Where entry 0 of each vector would lie if its first were that of `first_columns`."""
    return [
        0 if vector is None or not vector.numel() else vector.data_ptr() - first * vector.element_size()
        for vector, first in zip(vectors, first_columns, strict=True)
    ]


class GemmShape(NamedTuple):
    """Of a product: Y (rows, sum of `widths`) from X (rows, k), and where T and its columns lie.

    widths, ranks, first_ranks : one a layer, whose columns of T begin at the last
    lowrank_bytes : of all tiles of T; 0 without factors, or where layers have tiles of their own
    transposed : whether layers have sparse weights, and tiles channels in rows and tokens in columns
    """

    rows: int
    k: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    first_ranks: tuple[int, ...]
    lowrank_bytes: int
    transposed: bool = False


class GemmPlan(NamedTuple):
    """What a launch needs that depends on shapes alone.

    shape, layers : pieces of the kernel's Parameters
    first_columns : of Y, one a layer
    sum_bytes, workspace_bytes : of sums that CTAs leave of split tiles, and with their marks
    """

    config: GemmConfig
    ctas: int
    shape: bytes
    layers: bytes
    first_columns: tuple[int, ...]
    sum_bytes: int
    workspace_bytes: int
    transposed: bool


@functools.lru_cache(maxsize=4096)
def _plan(config: GemmConfig, ctas: int, of: GemmShape) -> GemmPlan:
    num_m64, k_blocks = -(-of.rows // TILE_ROWS), -(-of.k // config.format.tile_k)
    rank_blocks = [-(-rank // LOWRANK_COLUMNS) for rank in of.ranks]
    if of.transposed:
        table, num_m_tiles = _layer_table(of, rank_blocks, tuning.BLOCK_M)
        num_n_tiles = -(-of.rows // config.block_n)
    else:
        table, num_n_tiles = _layer_table(of, rank_blocks, config.block_n)
        num_m_tiles = -(-num_m64 // _M64_TILES)
    stages = k_blocks + rank_blocks[0] if len(set(rank_blocks)) == 1 else 0
    split = tuning.split(num_m_tiles * num_n_tiles, ctas, stages)
    shape = _pack_shape(
        of.rows,
        stored_columns(sum(of.widths)),
        k_blocks,
        of.lowrank_bytes // (num_m64 * LOWRANK_BYTES),
        num_m_tiles,
        num_n_tiles,
        _M_TILES_PER_SWIZZLE,
        split.whole_tiles,
        split.tiles,
        split.ctas,
        split.stages,
    )
    sum_bytes = split.ctas * _M64_TILES * TILE_ROWS * config.block_n * 4
    return GemmPlan(
        config=config,
        ctas=min(ctas, max(split.whole_tiles, split.ctas)),
        shape=shape,
        layers=_pack_layers(*table),
        first_columns=tuple(itertools.accumulate(of.widths[:-1], initial=0)),
        sum_bytes=sum_bytes,
        workspace_bytes=sum_bytes + split.ctas * _CONSUMER_WARPS * 8,
        transposed=of.transposed,
    )


_launches = itertools.count()
_seed = secrets.randbits(64)


def _nonce() -> int:
    """A number that memory does not hold by chance, nor from a launch before."""
    return (_seed + next(_launches) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF | 1


def _layer_table(of: GemmShape, rank_blocks: Sequence[int], block: int) -> tuple[list[int], int]:
    """Layers as the kernel reads them, and the number of their tiles, each `block` columns of Y."""
    table: list[int] = []
    end = tile_end = 0
    for width, first, tiles in zip(of.widths, of.first_ranks, rank_blocks, strict=True):
        end += width
        tile_end += -(-width // block)
        table += [end if of.transposed else stored_columns(end), tile_end, first // LOWRANK_COLUMNS, tiles]
    return table + [0] * (4 * (MAX_LAYERS - len(rank_blocks))), tile_end
