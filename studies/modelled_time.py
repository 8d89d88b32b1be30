"""Milliseconds of the linear layers of one full-size step on an H100, from the linear benchmark's tables.

The study's models are small; what their recipes would cost is modelled on the full-size model of the same
architecture (FLUX.1, Qwen-Image, Z-Image at 1024x1024), a guidance pass counting as one step:

- Only layers that can be sparse count. Attention, norms, modulation and embedders are not in it.
- Each block of the small model stands for the same share of the full-size model's blocks of its kind.
- A layer, or the layers that read one input joined into one, takes what its row of
  benchmarks/results/linear-{bf16,fp8}-h100.json says, in proportion to tokens x inputs x outputs where the
  row has others: dense `cublas_us`, 2:4 `ours_us` and `ours_paper_rank_us` (compression included), dense fp8
  `fp8_linear_us` (quantisation included).
- Other ranks are interpolated between rank 0 (`ours_gemm_us` + `ours_compress_plain_us`), the table's rank
  and the paper's, and extended beyond; a rank is a share of the inputs, rounded up to a multiple of 16.
  Layers that keep factors of their own count with the sum of their ranks.
- Where the joined layers take several forms, each form multiplies its share of the outputs and compresses or
  quantises once.
- Text-only layers (512 tokens) count dense in every form: kernels gain nothing there
  (threshold-h100.json).
- Weight 2:4 takes `ours_gemm_us` alone: its input is not compressed. A low-rank branch beside it is extra
  dense work, by FLOPs. In fp8 it quantises its input, as dense fp8 does (`cublas_fp8_quant_us`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
RANK_MULTIPLE = 16


@dataclass(frozen=True)
class Layer:
    """What a layer of the small model is.

    form : one of `rtlynx.math.formats.FORMAT_NAMES`, "weight-2:4" or "weight-2:4-fp8".
    rank : of its low-rank branch, as a share of its inputs.
    shared : whether layers that read one input share one A.
    text_rows_dense : whether text tokens run dense, where image and text share the layer.
    """

    form: str = "dense"
    rank: float = 0.0
    shared: bool = True
    text_rows_dense: bool = False


@dataclass(frozen=True)
class Part:
    """Layers of each block that read one input, at full size.

    stack : name of the list of blocks; names : layers inside a block -> their outputs.
    row : of the tables. blocks : how many there are. tokens, text : M, and how many of it are text.
    inputs : K.
    """

    stack: str
    names: Mapping[str, int]
    row: str
    blocks: int
    tokens: int
    inputs: int
    text: int = 0

    @property
    def text_only(self) -> bool:
        return self.text == self.tokens


def _double(blocks: int, stream: tuple[int, int], names: Sequence[str]) -> tuple[Part, ...]:
    """One stream of a double block: q, k, v | out | up | down; `stream` is (tokens, of them text)."""
    stack, (tokens, text) = "transformer_blocks", stream
    *qkv, out, up, down = names
    return (
        Part(stack, dict.fromkeys(qkv, 3072), "flux-qkv", blocks, tokens, 3072, text),
        Part(stack, {out: 3072}, "flux-o", blocks, tokens, 3072, text),
        Part(stack, {up: 12288}, "flux-up", blocks, tokens, 3072, text),
        Part(stack, {down: 3072}, "flux-down", blocks, tokens, 12288, text),
    )


_IMAGE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_QKV = _IMAGE[:3]


def _z_image(stack: str, blocks: int, tokens: int, text: int) -> tuple[Part, ...]:
    names = [f"attention.{name}" for name in ("to_q", "to_k", "to_v")]
    mlp = {"feed_forward.w1": 10240, "feed_forward.w3": 10240}
    return (
        Part(stack, dict.fromkeys(names, 3840), "zimage-qkv", blocks, tokens, 3840, text),
        # No row of this shape: FLUX's, by FLOPs.
        Part(stack, {"attention.to_out.0": 3840}, "flux-o", blocks, tokens, 3840, text),
        Part(stack, mlp, "zimage-w13", blocks, tokens, 3840, text),
        Part(stack, {"feed_forward.w2": 3840}, "zimage-w2", blocks, tokens, 10240, text),
    )


# Class of the transformer -> its full-size layers. Z-Image's two caption refiners (32 tokens) are left out.
FULL_SIZE: dict[str, tuple[Part, ...]] = {
    "FluxTransformer2DModel": (
        *_double(19, (4096, 0), (*_IMAGE, "ff.net.0.proj", "ff.net.2")),
        *_double(19, (512, 512), (*_TEXT, "ff_context.net.0.proj", "ff_context.net.2")),
        Part(
            "single_transformer_blocks",
            {**dict.fromkeys(_QKV, 3072), "proj_mlp": 12288},
            *("flux-single-in", 38, 4608, 3072, 512),
        ),
        Part("single_transformer_blocks", {"proj_out": 3072}, "flux-single-out", 38, 4608, 15360, 512),
    ),
    "QwenImageTransformer2DModel": (
        *_double(60, (4096, 0), (*_IMAGE, "img_mlp.net.0.proj", "img_mlp.net.2")),
        *_double(60, (512, 512), (*_TEXT, "txt_mlp.net.0.proj", "txt_mlp.net.2")),
    ),
    "ZImageTransformer2DModel": (
        *_z_image("noise_refiner", 2, 4096, 0),
        *_z_image("layers", 30, 4128, 32),
    ),
}


def step_ms(
    architecture: str,
    layers: Mapping[str, Layer],
    *,
    dense_steps: float = 0.0,
    dense: Mapping[str, Layer] | None = None,
    computed: float = 1.0,
) -> float | None:
    """Modelled milliseconds of one average step.

    Parameters
    ----------
    architecture : class name of the transformer.
    layers : name -> layer, every candidate of the small model, dense ones too.
    dense_steps : share of the steps that run dense.
    dense : name -> what each layer is then; default plain dense.
    computed : share of calls that run all blocks; the others stop after the first (first-block caching).

    Returns
    -------
    float or None
        None for an architecture that is not in `FULL_SIZE`.
    """
    parts = FULL_SIZE.get(architecture)
    if parts is None:
        return None
    sparse = sum(_part_us(part, layers) for part in parts)
    apart = sum(_part_us(part, dense or dict.fromkeys(layers, Layer())) for part in parts)
    all_blocks = (1 - dense_steps) * sparse + dense_steps * apart
    if computed < 1:
        stack = parts[0].stack
        first = sum(
            _part_us(part, layers, only=_blocks(layers, stack)[0]) / part.blocks
            for part in parts
            if part.stack == stack
        )
        all_blocks = computed * all_blocks + (1 - computed) * first
    return all_blocks / 1000


def _part_us(part: Part, layers: Mapping[str, Layer], only: str | None = None) -> float:
    """Microseconds of all full-size blocks of one kind; `only` takes one small block for all of them."""
    blocks = [only] if only is not None else _blocks(layers, part.stack)
    if not blocks:
        raise ValueError(f"no layer of {part.stack!r} among {', '.join(list(layers)[:3])} ...")
    times = [
        _joined_us(part, {name: layers[f"{part.stack}.{block}.{name}"] for name in part.names})
        for block in blocks
    ]
    return part.blocks * sum(times) / len(times)


def _blocks(layers: Mapping[str, Layer], stack: str) -> list[str]:
    """Indices of the blocks of `stack`, as in names."""
    names = (name.split(".") for name in layers)
    return list(dict.fromkeys(name[1] for name in names if name[0] == stack))


def _joined_us(part: Part, members: Mapping[str, Layer]) -> float:
    """Microseconds of the layers of one block that read one input."""
    outputs = sum(part.names.values())
    bf16, fp8 = _table("bf16")[part.row], _table("fp8")[part.row]
    size = part.tokens * part.inputs * outputs / (bf16["M"] * bf16["K"] * bf16["N"])
    if part.text_only:
        return size * bf16["cublas_us"]
    by_form: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for name, layer in members.items():
        by_form[layer.form, layer.text_rows_dense].append(name)
    total = 0.0
    for (form, text_dense), names in by_form.items():
        of = [members[name] for name in names]
        share = sum(part.names[name] for name in names) / outputs
        ranks = [_padded(layer.rank * part.inputs) for layer in of]
        rank = max(ranks) if of[0].shared else sum(ranks)
        us = _form_us(form, share, rank, bf16, fp8)
        if text_dense and form != "dense":
            text = part.text / part.tokens
            us = (1 - text) * us + text * share * bf16["cublas_us"]
        total += us
    return size * total


def _form_us(
    form: str, share: float, rank: int, bf16: Mapping[str, float], fp8: Mapping[str, float]
) -> float:
    """Microseconds of a share of a row's outputs in one form."""
    if form == "dense":
        return share * bf16["cublas_us"]
    if form == "weight-2:4":
        extra = rank * (bf16["K"] + share * bf16["N"]) / (bf16["K"] * bf16["N"])
        return share * bf16["ours_gemm_us"] + extra * bf16["cublas_us"]
    if form in ("weight-2:4-fp8", "fp8-weight-sparse"):
        return share * fp8["ours_gemm_us"] + fp8["cublas_fp8_quant_us"]
    if form == "fp8-dense":
        return share * fp8["cublas_fp8_us"] + fp8["cublas_fp8_quant_us"]
    if form not in ("bf16-sparse", "fp8-sparse"):
        raise ValueError(f"no time is known for the form {form!r}")
    row = bf16 if form == "bf16-sparse" else fp8
    plain, table, paper = row["ours_compress_plain_us"], row["ours_compress_us"], _paper_compress(row)
    compress = _at_rank(rank, row, plain, table, paper)
    whole = _at_rank(rank, row, row["ours_gemm_us"] + plain, row["ours_us"], row["ours_paper_rank_us"])
    return share * (whole - compress) + compress


def _paper_compress(row: Mapping[str, float]) -> float:
    """Compression at the paper's rank, which the table has only as part of the whole layer."""
    return max(row["ours_compress_us"], row["ours_paper_rank_us"] - row["ours_gemm_lowrank_us"])


def _at_rank(rank: int, row: Mapping[str, float], none: float, table: float, paper: float) -> float:
    """Time at `rank` from times at 0, at the table's rank and at the paper's; lines between and beyond."""
    points = [(0, none), (row["table_rank"], table)]
    if row["paper_rank"] > row["table_rank"]:
        points.append((row["paper_rank"], paper))
    x, y = zip(*points, strict=True)
    if rank <= x[-1]:
        return float(np.interp(rank, x, y))
    return y[-1] + (rank - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2])


def _padded(rank: float) -> int:
    return -(-round(rank) // RANK_MULTIPLE) * RANK_MULTIPLE


@cache
def _table(dtype: str) -> dict[str, dict[str, Any]]:
    document = json.loads((RESULTS / f"linear-{dtype}-h100.json").read_text())
    return {row["shape"]: {**row, "table_rank": document["rank"]} for row in document["rows"]}


def all_dense(names: Iterable[str]) -> dict[str, Layer]:
    """The dense model: every candidate as it is."""
    return dict.fromkeys(names, Layer())
