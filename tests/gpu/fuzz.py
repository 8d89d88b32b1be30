"""Random calls of the kernels against float64: `python tests/gpu/fuzz.py --minutes 5`.

`--precision` restricts them to one.

Prints the count, or the first case that fails and how to run it alone; the exit code says which.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict

import cases
import prologue_cases
import quantizer_cases
import torch
from cases import BIASES, DATA, LAYOUTS, Case
from prologue_cases import PrologueCase
from quantizer_cases import MATRIX, QuantizerCase

# Above this many products a case takes longer than a hundred small ones.
MOST_WORK = 4e11
PROLOGUES, QUANTIZERS = 0.3, 0.1  # their shares of all cases; the latter of those in fp8
FP8_SHARES = {"both": 0.4, "bf16": 0.0, "fp8": 1.0}


def skewed(draw: random.Random, low: int, high: int, step: int = 1) -> int:
    """A multiple of `step` from `low` to `high`, as often small as large on a logarithmic scale."""
    value = low * (high / low) ** draw.random()
    return max(low, min(high, round(value / step) * step))


def parts_of(draw: random.Random, k: int) -> tuple[int, ...]:
    """Up to four widths that add up to `k`, each a multiple of 4, or of 32 where that goes."""
    step = 32 if k % 32 == 0 and draw.random() < 0.5 else 4
    count = min(draw.randint(1, 4), k // step)
    if count == 1:
        return ()
    cuts = sorted(draw.sample(range(1, k // step), count - 1))
    return tuple((end - begin) * step for begin, end in zip([0, *cuts], [*cuts, k // step], strict=True))


def random_case(draw: random.Random, fp8: float) -> Case:
    """Mostly small, now and then of the size of a real layer, or very many tokens of few features.

    fp8 : the share of cases that are quantised.
    """
    while True:
        kind = draw.random()
        large, tall = kind < 0.03, kind > 0.98
        k = skewed(draw, 4, 15360 if large else 512 if tall else 1536, draw.choice((4, 8, 16, 64, 64, 64)))
        k = max(4, k // 4 * 4)
        rows = skewed(draw, 20_000, 80_000) if tall else skewed(draw, 1, 9000 if large else 600)
        n = skewed(draw, 1, 12288 if large else 700, draw.choice((1, 8, 8, 64)))
        if rows * k * n <= MOST_WORK:
            break
    strided = draw.random() < 0.4
    rank: int | tuple[int, ...] = draw.choice((0, 0, 16, 64, draw.randint(1, 64), draw.randint(1, 320)))
    layers = draw.randint(2, 4)
    if draw.random() < 0.15 and n >= 8 * layers:
        rank = tuple(draw.randint(1, 96) for _ in range(layers))
    data = draw.choice(DATA)
    return Case(
        rows=rows,
        k=k,
        n=n,
        rank=rank,
        grouping="strided" if strided else "adjacent",
        parts=parts_of(draw, k) if strided else (),
        norm=draw.random() < 0.7,
        bias="none" if data == "rows" else draw.choice(list(BIASES)),  # it would hide small rows
        data=data,
        layout=draw.choice(LAYOUTS),
        fp8=draw.random() < fp8,
        seed=draw.randrange(2**31),
    )


def random_prologue_case(draw: random.Random, fp8: float) -> PrologueCase:
    large = draw.random() < 0.03
    k = max(16, skewed(draw, 16, 15360 if large else 1536, draw.choice((4, 8, 16, 64, 64, 64))) // 4 * 4)
    batch = draw.choice((1, 1, 2, 3))
    strided = draw.random() < 0.4
    return PrologueCase(
        draw.choice(prologue_cases.NAMES),
        rows=batch * skewed(draw, 1, 4000 if large else 300),
        k=k,
        batch=batch,
        rank=draw.choice((0, 0, 16, 64, draw.randint(1, 320))),
        grouping="strided" if strided else "adjacent",
        parts=parts_of(draw, k) if strided else (),
        norm=draw.random() < 0.7,
        data=draw.choice(prologue_cases.DATA),
        layout=draw.choice(prologue_cases.LAYOUTS),
        shared=draw.random() < 0.3,
        fp8=draw.random() < fp8,
        seed=draw.randrange(2**31),
    )


def random_quantizer_case(draw: random.Random) -> QuantizerCase:
    large = draw.random() < 0.1
    k = max(16, skewed(draw, 16, 18000 if large else 4500, draw.choice((4, 8, 8, 16, 64))) // 4 * 4)
    name = draw.choice(quantizer_cases.NAMES)
    matrix = name == MATRIX
    batch = 1 if matrix else draw.choice((1, 1, 2, 3))
    return QuantizerCase(
        name,
        rows=batch * skewed(draw, 1, 5000 if large else 300),
        k=k,
        batch=batch,
        data=draw.choice(DATA if matrix else prologue_cases.DATA),
        layout=draw.choice(LAYOUTS if matrix else prologue_cases.LAYOUTS),
        shared=draw.random() < 0.3,
        seed=draw.randrange(2**31),
    )


AnyCase = Case | PrologueCase | QuantizerCase


def random_of_any_kind(draw: random.Random, fp8: float) -> AnyCase:
    kind = draw.random()
    if kind < QUANTIZERS and fp8:
        return random_quantizer_case(draw)
    return (random_prologue_case if kind < QUANTIZERS + PROLOGUES else random_case)(draw, fp8)


def check(case: AnyCase) -> None:
    if isinstance(case, Case):
        cases.check(case)
    elif isinstance(case, PrologueCase):
        prologue_cases.check(case)
    else:
        quantizer_cases.check(case)


def kind_of(case: AnyCase) -> str:
    """What the last line counts it as."""
    if isinstance(case, QuantizerCase):
        return f"{case.quantizer} quantised"
    kind = case.data if isinstance(case, Case) else case.name
    return f"{kind} fp8" if case.fp8 else kind


def from_json(text: str) -> AnyCase:
    fields = json.loads(text)
    if "quantizer" in fields:
        return QuantizerCase(**fields)
    if isinstance(fields.get("rank"), list):
        fields["rank"] = tuple(fields["rank"])
    fields["parts"] = tuple(fields.get("parts", ()))
    return PrologueCase(**fields) if "name" in fields else Case(**fields)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--precision", choices=list(FP8_SHARES), default="both")
    parser.add_argument("--seed", type=int, help="of the first case; a new one each time without it")
    parser.add_argument("--case", help="run this one alone, as printed for a failure")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("the kernels need a Hopper card (compute capability 9.0), and torch sees none")
        return 2
    if options.case:
        check(from_json(options.case))
        print("passes")
        return 0
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**31)
    draw = random.Random(seed)
    print(f"{torch.cuda.get_device_name()}, seed {seed}", flush=True)
    kinds: Counter[str] = Counter()
    start = said = time.monotonic()
    while (now := time.monotonic()) - start < 60 * options.minutes:
        case = random_of_any_kind(draw, FP8_SHARES[options.precision])
        try:
            check(case)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"case {kinds.total()} fails: {type(error).__name__}: {error}")
            print(f"python tests/gpu/fuzz.py --case '{json.dumps(asdict(case))}'")
            return 1
        kinds[kind_of(case)] += 1
        if now - said > 30:
            said = now
            print(f"{kinds.total()} cases in {now - start:.0f} s", flush=True)
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    print(f"{kinds.total()} cases in {time.monotonic() - start:.0f} s, none fails ({counts})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
