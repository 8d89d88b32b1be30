"""What is no product and no attention in a step: the time of each part, and the bytes that it must move."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from rtlynx.models import sparse_layers
from rtlynx.models.plan import LayerPlan, Plan
from rtlynx.models.sparsify import state_of
from rtlynx.timing import step
from rtlynx.timing.full_models import MODELS, Call, Size, build, normals
from rtlynx.timing.step_split import KernelTime, kernels_of, kind
from rtlynx.timing.step_variants import EVERY_WEIGHT, FP8_ATTENTION, named

BYTES_PER_SECOND = 3e12
VARIANT = EVERY_WEIGHT + FP8_ATTENTION  # few kinds of blocks, which compile fast
# What is counted for these alone.
COUNTED = ("flux1-dev", "qwen-image", "z-image")

# prepare : norms with modulation and activations, to what products read
# attention_inputs : norm and rotation of queries and keys; these and values to e4m3
# attention_output : from attention's e4m3 to what the product behind it reads
# gates : gate and residual, with the norm before the gate in Z-Image
# modulation : shifts, scales and gates of one token, which read weights
# copies, other : nothing must be moved for these
PARTS = ("prepare", "attention_inputs", "attention_output", "gates", "modulation", "copies", "other")

OURS = {
    **dict.fromkeys(("quantize", "compress", "compress_rows"), "prepare"),
    "attention_inputs": "attention_inputs",
    "gemv": "modulation",
}
# Inductor names a kernel after the operators in it, and after some that it only reads. The first that fits.
BY_OPERATORS = (
    (r"amax|attention_fp8|attention_inputs", "attention_output"),
    (r"silu(?!_gate)", "modulation"),
    (r"rms_norm|rsqrt|layer_norm", "gates"),
    (r"_to_copy", "attention_output"),
    (r"mul|add|addcmul|tanh", "gates"),
    (r"cat|clone|stack|copy|copy_", "copies"),
)

# Bytes of an entry as products read it.
PREPARED = {"dense": 2, "bf16-sparse": 1.125, "fp8-sparse": 0.625, "fp8-dense": 1, "fp8-weight-sparse": 1}
BF16, E4M3 = 2, 1


def part_of(kernel: str) -> str | None:
    """One of `PARTS`, by a kernel's name; None for products, attention, and what cards send each other."""
    name = kernel.lower()
    if name in OURS:
        return OURS[name]
    if name.startswith("triton_") and kind(kernel) == "rest":
        fits = (part for words, part in BY_OPERATORS if re.search(rf"(?<![a-z])(?:{words})(?![a-z])", name))
        return next(fits, "other")
    if "gemv" in name:
        return "modulation"
    if kind(kernel) != "rest":
        return None
    return "copies" if any(word in name for word in ("memcpy", "catarray", "copy_kernel")) else "other"


def tokens_of(call: Call, size: Size) -> dict[str, int]:
    """Tokens of each stream in one forward."""
    given = call.get("encoder_hidden_states")
    text = size.text_tokens if given is None else given.shape[1]
    return {"image": size.image_tokens, "text": text, "joint": size.image_tokens + text}


def bytes_of(plan: Plan, tokens: Mapping[str, int]) -> dict[str, float]:
    """Part -> bytes that one forward must move, each tensor read once and written once, by attention in e4m3.

    Parameters
    ----------
    tokens : of each stream.
    """
    inputs: dict[str, list[LayerPlan]] = {}
    hidden: dict[tuple[str, str], int] = {}  # columns that the MLP's first layers of a block and stream make
    for layer in plan.layers:
        of = layer.candidate
        inputs.setdefault(of.reads, []).append(layer)
        if of.role == "mlp-up":
            key = of.block, of.stream
            hidden[key] = hidden.get(key, 0) + layer.out_features
    found = dict.fromkeys(PARTS, 0.0)
    for readers in inputs.values():
        first = readers[0]
        of, rows = first.candidate, tokens[first.candidate.stream]
        made = BF16 * hidden.get((of.block, of.stream), 0)
        read = {
            "attention-out": E4M3 * first.in_features,
            "mlp-down": made,
            "single-out": E4M3 * first.out_features + made,
        }.get(of.role, BF16 * first.in_features)
        written = first.in_features * sum({PREPARED[layer.format.name] for layer in readers})
        part = "attention_output" if of.role == "attention-out" else "prepare"
        found[part] += rows * (read + written)
        columns = sum(layer.out_features for layer in readers if layer.candidate.role == "attention-in")
        found["attention_inputs"] += rows * columns * (BF16 + E4M3)
        if of.role in ("attention-out", "mlp-down", "single-out"):
            found["gates"] += rows * first.out_features * 3 * BF16
    return found


def modulation_bytes(model: nn.Module, plan: Plan) -> int:
    """Of the weights that make modulation, which each forward reads once."""
    width = E4M3 if plan.modulation else BF16
    layers: list[Any] = [model.get_submodule(one.name) for one in plan.architecture.modulation_of(model)]
    return sum(layer.in_features * layer.out_features * width for layer in layers)


def rows_of(kernels: Mapping[str, KernelTime], must: Mapping[str, float]) -> list[dict]:
    """A row for each part, of kernels measured and bytes counted."""
    parts = {part: [one for name, one in kernels.items() if part_of(name) == part] for part in PARTS}
    return [
        {
            "part": part,
            "launches": round(sum(one.launches for one in taken)),
            "ms": round(sum(one.ms for one in taken), 3),
            "bytes": round(must[part]),
            "bytes_ms": round(must[part] / BYTES_PER_SECOND * 1e3, 3),
        }
        for part, taken in parts.items()
    ]


def run(name: str, variant_name: str = VARIANT) -> dict:
    """Profile a step of MODELS[`name`] on the card: what a results file says beside the card."""
    of, (variant,) = MODELS[name], named([variant_name])
    model: Any = build(of)
    model.set_attention_backend("_native_cudnn")
    variant.form.change(model)
    variant.then(model)
    for layer in sparse_layers(model).values():
        layer.prepare()
    state = state_of(model)
    assert state is not None
    calls = of.calls(of.size, normals(7))
    must = dict.fromkeys(PARTS, 0.0)
    for call in calls:
        for part, count in bytes_of(state.plan, tokens_of(call, of.size)).items():
            must[part] += count
    must["modulation"] = len(calls) * modulation_bytes(model, state.plan)
    step.compile_blocks(model, variant)
    (suffix, taken), *_ = step.kinds_of_steps(model, calls, of.sampling.sigmas(of.size)).items()
    taken.users()  # compiles
    kernels = kernels_of(taken.users)
    return {
        "model": name,
        "variant": variant_name + suffix,
        **of.size.described(),
        "forwards": len(calls),
        "bytes_per_second": BYTES_PER_SECOND,
        "kernels_ms": round(sum(one.ms for one in kernels.values()), 3),
        "parts": rows_of(kernels, must),
        "kernels": {
            kernel: {"part": part_of(kernel), "launches": round(one.launches, 1), "ms": round(one.ms, 4)}
            for kernel, one in sorted(kernels.items(), key=lambda item: -item[1].ms)
        },
    }
