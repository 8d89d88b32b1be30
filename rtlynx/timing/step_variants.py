"""Variants of a full-size transformer that one step is measured of: dense, ours, and what others offer."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

from torch import nn

from rtlynx.math.formats import FormatName
from rtlynx.math.fp8 import quantize_weight
from rtlynx.math.selection import nm_mask, select
from rtlynx.models import make_plan, sparse_layers
from rtlynx.models.architecture import FEW_TOKENS
from rtlynx.models.attention import fp8_attention
from rtlynx.models.plan import LayerPlan, Plan, architecture_of
from rtlynx.models.sparsify import apply_plan, sparsify
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.recipe import RECOMMENDED_SPEEDUP_SHARE, Recipe
from rtlynx.timing.full_models import normals
from rtlynx.timing.results import BLOCK_GRAPHS, REFERENCE

RANK = 64
LORA_RANK = 16
OURS = "the recommended recipe"  # the form of ours, unless a variant's name says otherwise
# What calibration chose for the model of the box (solutions/recommended), since weights here are random: the
# share of layers left whole in eight bits, by role, and the noise level below which steps run in dense fp8.
DENSE_IN_FP8 = {
    "attention-in": 0.0,
    "attention-out": 2 / 3,
    "mlp-up": 0.0,
    "mlp-down": 0.0,
    "single-out": 0.0,
}
DENSE_BELOW = 0.354


class Variant(NamedTuple):
    """`change` makes a copy of the model, which shares its parameters, into what is measured.

    Where steps at some noise levels then run dense, both kinds of step are measured. `mode` is
    torch.compile's. With "reduce-overhead" each block is a CUDA graph of its own, which a graph of the whole
    step cannot hold: no GPU time. `fp8_weights` says how many copies of all layers' weights in eight bits the
    variant holds.
    """

    name: str
    change: Callable[[nn.Module], object]
    compiled: bool = True
    mode: Literal["default", "reduce-overhead"] = "default"
    fp8_weights: int = 0


def torchao_fp8(model: nn.Module) -> None:
    """Row-wise dynamic fp8 of all linears in the repeated blocks, as torchao's users have it.

    Without its setting of Inductor that tunes each elementwise kernel step by step, which takes many minutes;
    without fast accumulation for few text tokens of many columns, which cuBLAS refuses with a bias.
    """
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    repeated: Any = model._repeated_blocks
    blocks = tuple(name for name, module in model.named_modules() if type(module).__name__ in repeated)

    def chosen(module: nn.Module, name: str) -> bool:
        wide = isinstance(module, nn.Linear) and min(module.in_features, module.out_features) >= 1024
        modulation = "mod" in name or ".norm" in name or "adaLN" in name  # of one token: nothing to gain
        return wide and not modulation and name.startswith(blocks)

    def refused(module: nn.Module, name: str) -> bool:
        return chosen(module, name) and name.endswith(".txt_mlp.net.2")  # Qwen-Image: of 12,288 columns

    config = partial(
        Float8DynamicActivationFloat8WeightConfig, granularity=PerRow(), set_inductor_config=False
    )
    quantize_(model, config(mm_config=Float8MMConfig(use_fast_accum=False)), filter_fn=refused)
    quantize_(model, config(), filter_fn=lambda one, name: chosen(one, name) and not refused(one, name))


def every_layer(
    precision: Literal["bf16", "fp8"],
    *,
    rank: int | None = RANK,
    text: FormatName | None = None,
    **settings: Any,
) -> Callable[[nn.Module], None]:
    """`Recipe()` itself: refitted weights, a low-rank branch in every layer; factors are random too.

    `text` is what layers of the text and audio streams are, where that is not what the recipe makes of them;
    `settings` are further fields of the recipe.
    """

    def change(model: nn.Module) -> None:
        candidates = architecture_of(model).candidates(model)
        formats = {one.name: text for one in candidates if text and one.stream in FEW_TOKENS}
        recipe = Recipe(rank=rank, refit=True, precision=precision, formats=formats, **settings)
        plan = make_plan(model, recipe)
        normal, lowrank_as = normals(3), {}

        def prepare(name: str, layer: Any) -> None:
            k, n = layer.in_features, layer.out_features
            if rank is None or layer.pattern.n == layer.pattern.m:
                return
            if layer.shared_input not in lowrank_as:
                lowrank_as[layer.shared_input] = normal(rank, k) * k**-0.5
            layer.set_lowrank(lowrank_as[layer.shared_input], normal(n, rank) * (0.1 * rank**-0.5))

        apply_plan(model, plan, prepare)

    return change


def recommended(
    precision: Literal["bf16", "fp8"], *, dense_below: float | None = None, **settings: Any
) -> Callable[[nn.Module], None]:
    """Like `Recipe.recommended`: in bf16 the most harmful layers dense, in fp8 some whole.

    The former are taken as trained models have them: outputs of attention and of single-stream blocks, then
    of MLPs. In fp8 layers drop weights, the smaller of four. Steps below the noise level `dense_below` run in
    dense fp8; `settings` are further fields of the recipe. Random weights need no rotation.
    """
    steps: dict[str, Any] = {"dense_sigmas": (), "rotate_values": False}
    if dense_below is not None:
        steps |= {"dense_sigmas": ((0.0, dense_below),), "dense_precision": "fp8"}

    def change(model: nn.Module) -> None:
        recipe = Recipe.recommended(precision=precision, budget=None, **steps, **settings)
        plan = make_plan(model, recipe)
        layers = [layer for layer in plan.sparse if not layer.drops_nothing]
        if precision == "fp8":
            plan = plan.in_formats(dict.fromkeys(spread_out(layers, DENSE_IN_FP8), "fp8-dense"))
        else:
            plan = plan.leave_dense(dict.fromkeys(spread_out(layers, output_shares(layers)), "budget"))
        apply_plan(model, plan, partial(prune, plan))

    return change


def prune(plan: Plan, name: str, layer: SparseLinear) -> None:
    """Give `layer` the larger two of every four weights, where it drops weights by `plan`."""
    planned = plan.layer(name)
    if planned is not None and planned.weight_sparse:
        kept = select(layer.weight, nm_mask(layer.weight))
        layer.set_quantized(quantize_weight(kept), keep_dense=layer.depends_on_call, sparse=True)


def every_weight(model: nn.Module) -> None:
    """Every layer of the image by 2:4 weights in fp8, nothing else."""
    plan = make_plan(model, Recipe(rank=None, precision="fp8", drop="weights"))
    apply_plan(model, plan, partial(prune, plan))


def with_lora(change: Callable[[nn.Module], object], rank: int = LORA_RANK) -> Callable[[nn.Module], None]:
    """`change`, and a LoRA of random values beside each layer that it makes sparse or quantises."""

    def changed(model: nn.Module) -> None:
        change(model)
        normal, state = normals(4), {}
        for name, layer in sparse_layers(model).items():
            k, n = layer.in_features, layer.out_features
            state[f"transformer.{name}.lora_A.weight"] = normal(rank, k) * k**-0.5
            state[f"transformer.{name}.lora_B.weight"] = normal(n, rank) * (0.1 * rank**-0.5)
        cast(Any, model).load_lora_adapter(state, adapter_name="style")

    return changed


def output_shares(
    layers: Sequence[LayerPlan], share: float = 1 - RECOMMENDED_SPEEDUP_SHARE
) -> dict[str, float]:
    """By role, shares of output layers that together hold `share` of all multiplications of `layers`."""
    work = {layer.name: layer.in_features * layer.out_features for layer in layers}
    left = share * sum(work.values())
    shares: dict[str, float] = {}
    for roles in (("attention-out", "single-out"), ("mlp-down",)):
        whole = sum(work[layer.name] for layer in layers if layer.candidate.role in roles)
        taken = min(1.0, left / whole) if whole else 0.0
        shares |= dict.fromkeys(roles, taken)
        left -= taken * whole
    return shares


def spread_out(layers: Sequence[LayerPlan], shares: Mapping[str, float]) -> list[str]:
    """Names of these shares of the layers of each role, evenly spaced over the depth."""
    names = []
    for role, share in shares.items():
        some = [layer.name for layer in layers if layer.candidate.role == role]
        names += [name for i, name in enumerate(some) if int((i + 1) * share) > int(i * share)]
    return names


def dense_fp8(model: nn.Module, **settings: Any) -> None:
    """Every layer in fp8, no activation dropped: the alternative to sparsity on the same fused kernels.

    `settings` are further fields of the recipe.
    """
    sparsify(model, Recipe.dense_fp8(**settings))


def modulation_alone(model: nn.Module) -> None:
    """Modulation in eight bits, and nothing else."""
    sparsify(model, Recipe.immediate(formats={"*": "dense"}, modulation="fp8"))


def in_fp8_attention(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    """`change`, and attention in eight bits besides."""

    def both(model: nn.Module) -> None:
        change(model)
        fp8_attention(model)

    return both


DENSE_FP8 = "rtlynx dense fp8"
EVERY_LAYER, EVERY_WEIGHT = "rtlynx fp8-2:4 (every layer)", "rtlynx fp8-2:4 weights (every layer)"
RECOMMENDED = "rtlynx fp8-2:4 (recommended)"
# What was recommended before, and is in files of then: one mix of sparse and dense fp8 in all steps.
MIXED = "rtlynx fp8-2:4"
TORCHAO = "fp8 compiled (torchao)"
FP8_ATTENTION, FP8_MODULATION = " (fp8 attention)", " (fp8 modulation)"

VARIANTS = (
    Variant("bf16 eager", lambda model: None, compiled=False),
    Variant(REFERENCE, lambda model: None),
    Variant(TORCHAO, torchao_fp8, fp8_weights=1),  # the slowest to compile
    Variant(DENSE_FP8, dense_fp8, fp8_weights=1),
    Variant(RECOMMENDED, recommended("fp8", dense_below=DENSE_BELOW), fp8_weights=3),
    Variant(EVERY_LAYER, every_layer("fp8", rank=None), fp8_weights=1),
    Variant(EVERY_WEIGHT, every_weight, fp8_weights=2),
    # What a user sets where the host cannot keep up.
    Variant(f"{REFERENCE}{BLOCK_GRAPHS}", lambda model: None, mode="reduce-overhead"),
    Variant(f"{DENSE_FP8}{BLOCK_GRAPHS}", dense_fp8, mode="reduce-overhead", fp8_weights=1),
    Variant(
        f"{RECOMMENDED}{BLOCK_GRAPHS}",
        recommended("fp8", dense_below=DENSE_BELOW),
        mode="reduce-overhead",
        fp8_weights=3,
    ),
)
# Other designs, measured where they are named.
DESIGNS = (
    Variant(f"{REFERENCE}{FP8_ATTENTION}", in_fp8_attention(lambda model: None)),
    Variant(f"{DENSE_FP8}{FP8_ATTENTION}", in_fp8_attention(dense_fp8), fp8_weights=1),
    Variant(
        f"{RECOMMENDED}{FP8_ATTENTION}",
        in_fp8_attention(recommended("fp8", dense_below=DENSE_BELOW)),
        fp8_weights=3,
    ),
    Variant(f"{EVERY_WEIGHT}{FP8_ATTENTION}", in_fp8_attention(every_weight), fp8_weights=2),
    Variant(f"{REFERENCE}{FP8_MODULATION}", modulation_alone),
    Variant(f"{DENSE_FP8}{FP8_MODULATION}", partial(dense_fp8, modulation="fp8"), fp8_weights=1),
    Variant(
        f"{RECOMMENDED}{FP8_MODULATION}",
        recommended("fp8", dense_below=DENSE_BELOW, modulation="fp8"),
        fp8_weights=3,
    ),
    Variant(
        f"{RECOMMENDED}{FP8_ATTENTION}{FP8_MODULATION}",
        in_fp8_attention(recommended("fp8", dense_below=DENSE_BELOW, modulation="fp8")),
        fp8_weights=3,
    ),
    Variant(
        f"{RECOMMENDED}, LoRA of rank {LORA_RANK}",
        with_lora(recommended("fp8", dense_below=DENSE_BELOW)),
        fp8_weights=3,
    ),
    Variant(f"{DENSE_FP8}, LoRA of rank {LORA_RANK}", with_lora(dense_fp8), fp8_weights=1),
    Variant("rtlynx bf16-2:4", recommended("bf16")),
    Variant(f"rtlynx bf16-2:4{BLOCK_GRAPHS}", recommended("bf16"), mode="reduce-overhead"),
    Variant("rtlynx bf16-2:4 (every layer)", every_layer("bf16", rank=None)),
    Variant(f"rtlynx bf16-2:4 (every layer, rank {RANK})", every_layer("bf16")),
    Variant(f"rtlynx fp8-2:4 (every layer, rank {RANK})", every_layer("fp8"), fp8_weights=1),
    Variant(
        "rtlynx fp8-2:4 (every layer, text bf16)", every_layer("fp8", rank=None, text="dense"), fp8_weights=1
    ),
    Variant(
        "rtlynx bf16-2:4 (every layer, text rows dense)", every_layer("bf16", rank=None, text_rows="dense")
    ),
)
