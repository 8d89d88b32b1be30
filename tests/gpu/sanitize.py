"""Small calls that reach every path of the kernels, to be run under compute-sanitizer.

    PYTHONPATH=tests compute-sanitizer --tool memcheck --report-api-errors no \
        --kernel-name 'regex=gemm|gemv|compress|quantize|lora|attention_inputs' python tests/gpu/sanitize.py

and likewise racecheck and synccheck; initcheck without the filter, as it must see PyTorch write the inputs.
(API errors are of cuda-bindings, which asks the driver for functions that it does not have.) Compares each
result, too.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import attention_helpers
import fp8_weights_cases
import lora_cases
import prologue_cases
import quantizer_cases
import torch
import weight_sparse_cases
from cases import Case, check
from fp8_weights_cases import Fp8WeightsCase
from lora_cases import CASES as LORAS
from prologue_cases import PrologueCase
from quantizer_cases import QuantizerCase
from weight_sparse_cases import WeightSparseCase

from rtlynx.cuda import tuning
from rtlynx.cuda.sm90 import gemm
from rtlynx.math.formats import FP8_SPARSE
from rtlynx.ops.attention import attention_inputs, qk_norm_rotary

# Of products: fewer than a card runs, so that small shapes are several tiles each and share some.
CTAS = 6
CONFIGS = [config for configs in tuning.CANDIDATES.values() for config in configs]
# With each tile, in its format.
PRODUCTS = [
    Case(600, 64, 1000, rank=5, bias="f32"),  # several tiles a CTA, ragged in both directions
    Case(700, 4096, 300, rank=16, bias="bf16"),  # 9 narrow tiles: one each, and three that two CTAs share
    Case(700, 4096, 500, rank=16, bias="bf16"),  # 9 wide ones
]
CASES = [
    Case(65, 192, 100, rank=64),  # the narrow tile; 64 + 1 rows
    Case(1, 128, 8, norm=False),
    Case(130, 256, 200, rank=(5, 40), norm=False),  # two layers with factors of their own
    Case(70, 256, 64, rank=32, grouping="strided"),
    Case(70, 384, 64, rank=130, grouping="strided", parts=(128, 256)),
    Case(70, 72, 64, rank=20, grouping="strided"),  # element by element
    Case(40, 192, 64, rank=128, layout="odd"),
    Case(130, 192, 64, data="rows"),  # norms in units of the rows
    Case(130, 192, 64, rank=64, data="rows"),
    Case(260, 192, 64, layout="batched"),
]
# Rows and columns: an odd row out, a vector's share of a warp; more columns than two rows take at one time.
QUANTIZED = [(5, 16), (7, 1000), (3, 4104), (2, 12288)]
# Tokens of each stream, entries of a head, rotation, layout.
ATTENTION = [
    ((5, 300), 64, "complex", "dense"),
    ((5, 300), 128, "complex of each batch", "one product"),
    ((0, 33), 128, "none", "odd address"),
    ((70, 9), 64, "cosine and sine", "one product, odd address"),
    ((1100,), 128, "complex", "heads first"),
]
# Rows of one pass and of several, ragged in both directions; rows that are padded first.
FEW_ROWS = [
    Fp8WeightsCase(1, 256, 96, bias="f32", silu=True),
    Fp8WeightsCase(9, 1008, 70, silu=True),
    Fp8WeightsCase(8, 40, 33, bias="none"),
    Fp8WeightsCase(5, 4112, 40, float32=True),
]
# Ragged in both directions, with the narrow tile and the wide one; tiles that two CTAs share; a token alone.
BY_WEIGHT = [
    WeightSparseCase(1000, 80, 601, "f32"),
    WeightSparseCase(300, 4096, 700),
    WeightSparseCase(500, 4096, 700, rank=40),
    WeightSparseCase(1, 144, 8, "none"),
]
# Several that read one X, of which some have factors, ragged in both directions.
TOGETHER = [
    [WeightSparseCase(300, 272, n, rank=rank) for n, rank in ((264, 0), (8, 40), (601, 5))],
    [WeightSparseCase(500, 6144, n) for n in (264, 520)],
    [
        WeightSparseCase(1, 144, n, bias)
        for n, bias in ((8, "none"), (264, "f32"), (16, "bf16"), (100, "f32"))
    ],
]


def main() -> int:
    gemm.multiprocessors = lambda device: CTAS
    # Memory that is written once, so that what torch hands out of it, in small pieces too, counts as such.
    _ = [torch.zeros(1 << 28, device="cuda"), *(torch.zeros(1 << 17, device="cuda") for _ in range(256))]
    del _
    with torch.no_grad():
        for config in CONFIGS:
            with tuning.forced(config):
                for case in PRODUCTS:
                    check(replace(case, fp8=config.format is FP8_SPARSE))
                for by_weight in BY_WEIGHT if config.format is FP8_SPARSE else ():
                    weight_sparse_cases.check(by_weight)
                for together in TOGETHER if config.format is FP8_SPARSE else ():
                    weight_sparse_cases.check_together(together)
        for fp8 in (False, True):
            for case in CASES:
                check(replace(case, fp8=fp8))
            for name in prologue_cases.NAMES:
                for rank, grouping in ((0, "adjacent"), (33, "strided")):
                    of = PrologueCase(name, 130, 512, batch=2, rank=rank, grouping=grouping, fp8=fp8)
                    prologue_cases.check(of, served=True)
        for name in quantizer_cases.NAMES:
            for rows, k in QUANTIZED:
                quantizer_cases.check(QuantizerCase(name, rows, k), served=True)
        for of_loras in LORAS[:6]:
            lora_cases.check(of_loras)
        for few in FEW_ROWS:
            fp8_weights_cases.check(few)
        for tokens, *how in ATTENTION:
            streams = attention_helpers.streams_of(2, tokens, 3, *how, device="cuda")
            made = attention_inputs(*attention_helpers.arguments_of(streams))
            attention_helpers.assert_right(made, streams)
            in_bf16 = qk_norm_rotary(*attention_helpers.arguments_of(streams)[:7])
            attention_helpers.assert_normed(in_bf16, streams)
    torch.cuda.synchronize()
    calls = len(CONFIGS) * len(PRODUCTS) + 2 * (len(CASES) + 2 * len(prologue_cases.NAMES))
    calls += len(quantizer_cases.NAMES) * len(QUANTIZED)
    calls += (
        len(tuning.CANDIDATES[FP8_SPARSE]) * (len(BY_WEIGHT) + len(TOGETHER))
        + len(LORAS[:6])
        + len(FEW_ROWS)
        + 2 * len(ATTENTION)
    )
    print(f"{calls} calls, all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
