"""The latency model of linear layers on a Hopper card: formulas fitted to measured times, in prices.json.

A price is the modelled time of a layer. benchmarks/prices.py makes the file and says what it was made of.
Times are of one layer in a stream of work on a loaded card, without the host's. Norms and activations in
front of layers are not in it, whether a fused block computes them or not.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rtlynx.math.formats import DENSE, FP8_DENSE, FormatName
from rtlynx.models.plan import LayerPlan, Plan

FILE = Path(__file__).with_name("prices.json")
# Kernels gain nothing in models narrower than this: they stand for a full-size model, as those of the zoo do.
LEAST_WIDTH = 1024
FULL_WIDTH, FULL_TOKENS = 3072, 4096  # FLUX.1 at 1024 x 1024 pixels


@dataclass(frozen=True)
class ProductLaw:
    """Microseconds of Y (M, N) = X (M, K) W^T in one format, bias included.

    launch_us : of any product.
    work_us : of 10^9 multiply-adds, counting those that 2:4 leaves out.
    output_us : of 10^6 entries of Y.
    lowrank_us : of 10^9 multiply-adds of the low-rank branch's up-projection.
    least_outputs : entries of Y that take as long as fewer do: a tile for each multiprocessor.
    """

    launch_us: float
    work_us: float
    output_us: float
    lowrank_us: float
    least_outputs: float

    def us(self, m: float, k: float, n: float, rank: float = 0, work: float = 1) -> float:
        """Time of a product of M tokens, K inputs and N outputs, with a low-rank branch of `rank`.

        `work` is the share of multiply-adds that another n:m than 2:4 has.
        """
        outputs = max(m * n, self.least_outputs)
        return (
            self.launch_us
            + self.work_us * outputs * k * 1e-9 * work
            + self.output_us * outputs * 1e-6
            + self.lowrank_us * m * n * rank * 1e-9
        )


@dataclass(frozen=True)
class PreparationLaw:
    """Microseconds of selecting, quantising and packing X (M, K) for one format, as far as that does each.

    launch_us : of any preparation.
    input_us : of 10^6 entries of X.
    width_us : of 10^6 entries of X, for each 1,000 inputs: long rows take more than one pass.
    lowrank_us : of 10^9 multiply-adds of the low-rank branch's down-projection.
    """

    launch_us: float
    input_us: float
    width_us: float
    lowrank_us: float

    def us(self, m: float, k: float, rank: float = 0) -> float:
        """Time of preparing M tokens of K inputs, with a low-rank branch of `rank`."""
        entry_us = self.input_us + self.width_us * k * 1e-3 + self.lowrank_us * rank * 1e-3
        return self.launch_us + entry_us * m * k * 1e-6


@dataclass(frozen=True)
class Prices:
    """The laws of a prices file.

    device : the card that was measured.
    products : format -> law; preparations : the same, without dense, which needs none.
    """

    device: str
    products: Mapping[FormatName, ProductLaw]
    preparations: Mapping[FormatName, PreparationLaw]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Prices:
        """From what a prices file holds."""
        products = {format: ProductLaw(**law) for format, law in document["products"].items()}
        preparations = {format: PreparationLaw(**law) for format, law in document["preparations"].items()}
        # Sparse weights take the place of sparse inputs in the same product, and inputs are quantised alone.
        products.setdefault("fp8-weight-sparse", products["fp8-sparse"])
        preparations.setdefault("fp8-weight-sparse", preparations["fp8-dense"])
        return cls(document["device"], products, preparations)


@cache
def packaged_prices() -> Prices:
    """The prices that come with the package."""
    return Prices.of(json.loads(FILE.read_text()))


class ModelPrices:
    """Prices of the inputs of one model.

    A model whose width, the median of its layers' inputs, is below `LEAST_WIDTH` is priced as if it were
    `FULL_WIDTH` wide, and its longest input `FULL_TOKENS` long: what is chosen for it is what would be chosen
    for one of full size.
    Text rows that run dense are not counted, and steps that do only in `dense_step_search`.

    Parameters
    ----------
    plan : Plan
        Of the model.
    tokens : mapping
        Layer name -> tokens in one call. Layers without tokens take no time.
    prices : Prices, optional
        Default `packaged_prices()`.
    """

    def __init__(self, plan: Plan, tokens: Mapping[str, int], prices: Prices | None = None) -> None:
        self._prices, self._tokens, self._recipe = prices or packaged_prices(), tokens, plan.recipe
        width = statistics.median_low(layer.in_features for layer in plan.layers)
        longest = max(tokens.values(), default=0)
        self.stands_for_full_size = width < LEAST_WIDTH
        self._wider = FULL_WIDTH / width if self.stands_for_full_size else 1.0
        self._longer = FULL_TOKENS / longest if self.stands_for_full_size and longest else 1.0

    def us(self, readers: Iterable[LayerPlan]) -> float:
        """Microseconds of the layers that read one input, in one call: each preparation once, each product.

        Other n:m than 2:4, for which there is no kernel, multiplies in proportion.
        """
        total = 0.0
        prepared: dict[FormatName, list[LayerPlan]] = {}
        for layer in readers:
            m, k = self._size(layer)
            if not m:
                continue
            law, pattern = self._prices.products[layer.format.name], layer.pattern
            work = 2 * pattern.n / pattern.m if layer.format.sparse else 1.0
            total += law.us(m, k, layer.out_features * self._wider, self._rank(layer), work)
            if layer.format is not DENSE:
                # What is quantised for dense weights serves sparse ones.
                format = FP8_DENSE if layer.format.weight_sparse else layer.format
                prepared.setdefault(format.name, []).append(layer)
        for name, layers in prepared.items():
            ranks = [self._rank(layer) for layer in layers]
            rank = max(ranks) if self._recipe.lowrank_sharing == "shared" else sum(ranks)
            total += self._prices.preparations[name].us(*self._size(layers[0]), rank)
        return total

    def _size(self, layer: LayerPlan) -> tuple[float, float]:
        """Tokens and inputs as they are priced."""
        return self._tokens.get(layer.name, 0) * self._longer, layer.in_features * self._wider

    def _rank(self, layer: LayerPlan) -> int:
        if not layer.format.sparse or not layer.rank:
            return 0
        return self._recipe.rank_for(round(self._size(layer)[1])) if self.stands_for_full_size else layer.rank
