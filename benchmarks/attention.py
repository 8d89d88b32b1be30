"""Attention in eight bits beside PyTorch's backends in bfloat16: `python benchmarks/attention.py`.

Writes results/attention-<card>.json. `product` is cuDNN's kernel alone, `fp8` what a call costs that begins
and ends with bfloat16, its quantisation compiled. `block_cudnn`, `block_fp8` and `block_fused` begin before
the norms and rotation of queries and keys, as in a compiled block: the last by our one kernel, `inputs`,
beside `copy`, which reads and writes as much. Where they are installed: SageAttention (`pip install
sageattention`, in Triton; int8 and float16), FlashAttention-3 and 4 (bfloat16).
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from script import FOLDER, options_parser
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from rtlynx.math.attention import Stream, quantize_values, rotated, saturated
from rtlynx.ops.attention import attention, attention_fp8, attention_inputs, joint_attention
from rtlynx.timing import results
from rtlynx.timing.card import Card
from rtlynx.timing.shapes import set_count
from rtlynx.timing.sustained import Call, Graphs, attempt, measure

Inputs = tuple[Tensor, Tensor, Tensor]
Attention = Callable[..., object]
EPS = 1e-6  # of norms
JUDGED_HEADS = 2  # of the error: float64 takes its time


class Shape(NamedTuple):
    """Of one attention: (1, tokens, heads, width)."""

    name: str
    tokens: int
    heads: int
    width: int


SHAPES = (
    Shape("flux", 4608, 24, 128),
    Shape("z-image", 4128, 30, 128),
    Shape("qwen-image", 4224, 24, 128),
    Shape("wan", 32760, 40, 128),
)


def by_backend(backend: SDPBackend) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            y = scaled_dot_product_attention(*(one.transpose(1, 2) for one in (q, k, v)))
        return y.transpose(1, 2)

    return run


def by_package(module: str, name: str, **settings: object) -> Attention:
    """A function of a package; ImportError where that is not installed."""
    function = getattr(importlib.import_module(module), name)

    def run(q: Tensor, k: Tensor, v: Tensor) -> object:
        y = function(q, k, v, **settings)
        return y[0] if isinstance(y, tuple) else y  # some give their sums, too

    return run


def in_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, scale=q.shape[-1] ** -0.5, q_exponent=0, k_exponent=0)


def quantized(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return saturated(q), saturated(k), *quantize_values(v)


def in_block(of: Attention, weight: Tensor, rotary: Tensor) -> Attention:
    """`of`, behind the norms and rotation of queries and keys."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> object:
        q, k = (rotated(rms_norm(one, weight.shape, weight, EPS), (rotary,)).type_as(one) for one in (q, k))
        return of(q, k, v)

    return run


def fused(weight: Tensor, rotary: Tensor) -> Attention:
    """`in_block` of attention in eight bits, by one kernel before cuDNN's."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        streams = [Stream(q, k, v, weight, weight, (rotary,))]
        return joint_attention(streams, scale=q.shape[-1] ** -0.5, eps=EPS, q_exponent=0, k_exponent=0)

    return run


PEERS: dict[str, Callable[[], Attention]] = {
    "flash": lambda: by_backend(SDPBackend.FLASH_ATTENTION),
    "cudnn": lambda: by_backend(SDPBackend.CUDNN_ATTENTION),
    "flash_3": lambda: by_package("flash_attn_interface", "flash_attn_func"),
    "flash_4": lambda: by_package("flash_attn.cute", "flash_attn_func"),
    "sage": lambda: by_package("sageattention", "sageattn", tensor_layout="NHD"),
}


def calls_of(sets: list[Inputs], missing: dict[str, str]) -> dict[str, list[Call]]:
    """Variant -> a call of each of `sets`."""
    made = {name: attempt(missing, name, make) for name, make in PEERS.items()}
    variants = {name: one for name, one in made.items() if one is not None}
    _, tokens, _, width = sets[0][0].shape
    weight = sets[0][0].new_ones(width)
    angles = torch.rand(tokens, width // 2, device=weight.device)
    rotary = torch.stack([angles.cos(), angles.sin()], dim=-1)
    ours = {
        "fp8": in_fp8,
        "block_cudnn": in_block(by_backend(SDPBackend.CUDNN_ATTENTION), weight, rotary),
        "block_fp8": in_block(in_fp8, weight, rotary),
        "block_fused": fused(weight, rotary),
    }
    variants |= {name: torch.compile(one, dynamic=False) for name, one in ours.items()}
    # SageAttention takes the mean off the keys where they lie.
    own = {"sage": [(q, k.clone(), v) for q, k, v in sets]} if "sage" in variants else {}
    calls: dict[str, list[Call]] = {
        name: [lambda of=of, one=one: one(*of) for of in own.get(name, sets)]
        for name, one in variants.items()
    }
    quantize = torch.compile(quantized, dynamic=False)
    calls["quantize"] = [lambda of=of: quantize(*of) for of in sets]
    scale = width**-0.5
    lists: tuple = ([], [weight, weight], [rotary], EPS, 0, 0)
    calls["inputs"] = [lambda of=of: attention_inputs(*of, *lists) for of in sets]
    numbers = [torch.stack(of).view(torch.int16) for of in sets]
    calls["copy"] = [lambda of=of: of.to(torch.uint8) for of in numbers]  # as many bytes in and out
    eight_bits = [quantize(*of)[:3] for of in sets]
    calls["product"] = [lambda of=of: attention_fp8(*of, scale) for of in eight_bits]
    return calls


def relative_error(y: Tensor, of: Inputs) -> float:
    """Of a few heads against float64."""
    q, k, v = (one[:, :, :JUDGED_HEADS].double().transpose(1, 2) for one in of)
    parts = [
        (part @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v for part in q.split(4096, dim=2)
    ]  # (all of a video's scores do not fit)
    exact = torch.cat(parts, dim=2).transpose(1, 2)
    return float((y[:, :, :JUDGED_HEADS].double() - exact).norm() / exact.norm())


def row_of(shape: Shape, card: Card, generator: torch.Generator, seconds: float, rounds: int) -> dict:
    """Times and errors of one shape."""
    size = (1, shape.tokens, shape.heads, shape.width)

    def normal() -> Tensor:
        return torch.randn(size, device="cuda", generator=generator, dtype=torch.bfloat16)

    elements = shape.tokens * shape.heads * shape.width
    sets = [(normal(), normal(), normal()) for _ in range(set_count(6 * elements, card.l2_bytes))]
    missing: dict[str, str] = {}
    calls, graphs = calls_of(sets, missing), Graphs()
    made = {name: attempt(missing, name, lambda of=of: graphs.timer(of)) for name, of in calls.items()}
    timers = {name: timer for name, timer in made.items() if timer is not None}
    errors = {name: relative_error(calls[name][0](), sets[0]) for name in timers if name in ("fp8", *PEERS)}
    measured = measure(timers, seconds, rounds, card.sample, missing)
    row: dict = shape._asdict() | {f"{name}_us": round(one.us, 3) for name, one in measured.items()}
    best = min((row[f"{name}_us"] for name in ("flash", "cudnn") if name in measured), default=None)
    row["best_bf16_us"] = best
    return row | {
        "speed_up": results.ratio(row, "best_bf16_us", "fp8_us"),
        "block_speed_up": results.ratio(row, "block_cudnn_us", "block_fused_us"),
        "product_speed_up": results.ratio(row, "best_bf16_us", "product_us"),
        "product_tflops": round(4 * shape.tokens * elements / row["product_us"] * 1e-6, 1)
        if "product" in measured
        else None,
        "rel_err": {name: float(f"{error:.3g}") for name, error in errors.items()},
        "windows": {name: results.window_details(one) for name, one in measured.items()},
        "missing": missing,
    }


@torch.no_grad()
def main() -> None:
    parser = options_parser(__doc__, seconds=1.0)
    parser.add_argument("--shapes", help="comma-separated names, default all")
    options = parser.parse_args()
    names = options.shapes and options.shapes.split(",")
    card = Card()
    generator = torch.Generator("cuda")
    document = card.describe(options.commit) | {
        "cudnn": torch.backends.cudnn.version(),
        "cudnn_frontend": importlib.import_module("cudnn").__version__,
        "seed": generator.seed(),
    }
    rows = []
    for shape in SHAPES:
        if names and shape.name not in names:
            continue
        row = row_of(shape, card, generator, options.seconds, options.rounds)
        rows.append(row)
        torch.cuda.empty_cache()
        print({key: value for key, value in row.items() if key != "windows"}, flush=True)
    document |= results.card_state(rows) | {"rows": rows}
    if options.out or not names:
        results.write(options.out or FOLDER / f"attention-{card.slug}.json", document)


if __name__ == "__main__":
    main()
