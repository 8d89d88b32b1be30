"""Variants of a full-size transformer that one step is measured of: dense, ours, and what others offer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from rtlynx.nn.solution import Solution
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.recipe import RECOMMENDED_SPEEDUP_SHARE, Recipe
from rtlynx.timing.full_models import normals
from rtlynx.timing.results import BLOCK_GRAPHS, REFERENCE

RANK = 64
LORA_RANK = 16
OURS = "the recommended recipe"  # the form of ours, unless a variant's name says otherwise
ByRoles = Mapping[str, Mapping[FormatName, float]]


class Choice(NamedTuple):
    """What calibration chose for a small model of an architecture, since weights here are random.

    shares : roles of the layers that read one input -> format -> share of such inputs. The readers of all
        others drop weights.
    dense_below : the noise level below which steps run in dense fp8, or None.
    """

    shares: ByRoles
    dense_below: float | None


# Of the box's recommended solution, and of the study's rows of the recommended recipe.
FLUX = "FluxTransformer2DModel"  # whose choice serves architectures that were not calibrated
CHOICES = {
    FLUX: Choice(
        {"attention-in + mlp-up": {"fp8-dense": 3 / 6}, "attention-out": {"fp8-dense": 2 / 3}}, 0.146
    ),
    "QwenImageTransformer2DModel": Choice({"attention-out": {"fp8-dense": 5 / 6}}, 0.271),
    "ZImageTransformer2DModel": Choice(
        {
            "attention-in": {"fp8-dense": 3 / 9},
            "attention-out": {"fp8-dense": 2 / 9},
            "mlp-up": {"fp8-dense": 3 / 9, "fp8-sparse": 1 / 9},
            "mlp-down": {"fp8-dense": 2 / 9, "fp8-sparse": 4 / 9},
        },
        None,
    ),
}


class Form(NamedTuple):
    """What a copy of the model, which shares its parameters, is made into. Variants of one form share it.

    weight_copies : how many copies of all layers' weights in eight bits it holds.
    """

    change: Callable[[nn.Module], object]
    weight_copies: float = 0.0


class Variant(NamedTuple):
    """A form of the model, and how it runs.

    Where steps at some noise levels run dense, both kinds of step are measured. `then` changes what shares
    the form's weights. `mode` is torch.compile's. With "reduce-overhead" each block is a CUDA graph of its
    own, which a graph of the whole step cannot hold: no GPU time.
    """

    name: str
    form: Form
    then: Callable[[nn.Module], object] = lambda model: None
    compiled: bool = True
    mode: Literal["default", "reduce-overhead"] = "default"


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
    precision: Literal["bf16", "fp8"], *, schedule: bool = False, **settings: Any
) -> Callable[[nn.Module], None]:
    """Like `Recipe.recommended`: in bf16 the most harmful layers dense, in fp8 what calibration chose.

    The most harmful are outputs of attention and of single-stream blocks, then of MLPs, as in trained models.
    In fp8 layers drop the two smaller of every four weights, unless `CHOICES` says otherwise. With `schedule`
    steps at low noise run in dense fp8, as chosen; `settings` are further fields of the recipe. Random
    weights need no rotation.
    """

    def change(model: nn.Module) -> None:
        choice = CHOICES.get(architecture_of(model).class_name, CHOICES[FLUX])
        steps: dict[str, Any] = {"dense_sigmas": (), "rotate_values": False}
        if schedule and choice.dense_below is not None:
            steps |= {"dense_sigmas": ((0.0, choice.dense_below),), "dense_precision": "fp8"}
        recipe = Recipe.recommended(precision=precision, budget=None, **steps, **settings)
        plan = make_plan(model, recipe)
        layers = [layer for layer in plan.sparse if not layer.drops_nothing]
        if precision == "fp8":
            plan = plan.in_formats(spread_out(layers, choice.shares))
        else:
            shares: ByRoles = {role: {"dense": share} for role, share in output_shares(layers).items()}
            plan = plan.leave_dense(dict.fromkeys(spread_out(layers, shares), "budget"))
        apply_plan(model, plan, partial(prune, plan))

    return change


def prune(plan: Plan, name: str, layer: SparseLinear) -> None:
    """Give `layer` the larger two of every four weights, where it drops weights by `plan`."""
    planned = plan.layer(name)
    if planned is None or not planned.weight_sparse:
        return
    values, scale = quantize_weight(select(layer.weight, nm_mask(layer.weight)))
    bias = layer.weight.new_zeros(layer.out_features) if plan.recipe.intercept else None
    found = Solution(weight=values, weight_scale=scale, bias=bias, weight_sparse=True)
    found.install(layer, keep_dense=layer.depends_on_call)


def every_weight(model: nn.Module) -> None:
    """Every layer of the image by 2:4 weights in fp8, nothing else."""
    plan = make_plan(model, Recipe(rank=None, precision="fp8", drop="weights"))
    apply_plan(model, plan, partial(prune, plan))


def add_lora(model: nn.Module, rank: int = LORA_RANK) -> None:
    """A LoRA of random values beside each layer that is sparse or quantised."""
    normal, state = normals(4), {}
    for name, layer in sparse_layers(model).items():
        k, n = layer.in_features, layer.out_features
        state[f"transformer.{name}.lora_A.weight"] = normal(rank, k) * k**-0.5
        state[f"transformer.{name}.lora_B.weight"] = normal(n, rank) * (0.1 * rank**-0.5)
    cast(Any, model).load_lora_adapter(state, adapter_name="style")


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


def inputs_by_roles(layers: Iterable[LayerPlan]) -> dict[str, list[list[str]]]:
    """Roles of the layers that read one input -> the names of these layers, of each such input in turn."""
    readers: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        readers.setdefault(layer.candidate.reads, []).append(layer)
    found: dict[str, list[list[str]]] = {}
    for some in readers.values():
        roles = " + ".join(sorted({layer.candidate.role for layer in some}))
        found.setdefault(roles, []).append([layer.name for layer in some])
    return found


def spread_out(layers: Sequence[LayerPlan], shares: ByRoles) -> dict[str, FormatName]:
    """Layer -> format, of these shares of the inputs that such layers read, evenly over the depth."""
    found: dict[str, FormatName] = {}
    inputs = inputs_by_roles(layers)
    for roles, formats in shares.items():
        left = inputs.get(roles, [])
        count = len(left)
        for format, share in formats.items():
            part = share * count / max(1, len(left))  # of those that no format before has taken
            taken = [i for i in range(len(left)) if int((i + 1) * part) > int(i * part)]
            found |= {name: format for i in taken for name in left[i]}
            left = [names for i, names in enumerate(left) if i not in taken]
    return found


def dense_fp8(model: nn.Module, **settings: Any) -> None:
    """Every layer in fp8, no activation dropped: the alternative to sparsity on the same fused kernels.

    `settings` are further fields of the recipe.
    """
    sparsify(model, Recipe.dense_fp8(**settings))


def modulation_alone(model: nn.Module) -> None:
    """Modulation in eight bits, and nothing else."""
    sparsify(model, Recipe.immediate(formats={"*": "dense"}, modulation="fp8"))


DENSE_FP8 = "rtlynx dense fp8"
EVERY_LAYER, EVERY_WEIGHT = "rtlynx fp8-2:4 (every layer)", "rtlynx fp8-2:4 weights (every layer)"
RECOMMENDED = "rtlynx fp8-2:4 (recommended)"
# What was recommended before, and is in files of then: one mix of sparse and dense fp8 in all steps.
MIXED = "rtlynx fp8-2:4"
TORCHAO = "fp8 compiled (torchao)"
FP8_ATTENTION, FP8_MODULATION = " (fp8 attention)", " (fp8 modulation)"


_PLAIN = Form(lambda model: None)
_TORCHAO, _DENSE = Form(torchao_fp8, 1), Form(dense_fp8, 1)
_RECOMMENDED, _WEIGHTS = Form(recommended("fp8", schedule=True), 1.6), Form(every_weight, 0.6)
_BF16 = Form(recommended("bf16"))

VARIANTS = (
    Variant("bf16 eager", _PLAIN, compiled=False),
    Variant(REFERENCE, _PLAIN),
    Variant(TORCHAO, _TORCHAO),  # the slowest to compile
    Variant(DENSE_FP8, _DENSE),
    Variant(DENSE_FP8 + FP8_ATTENTION, _DENSE, fp8_attention),
    Variant(RECOMMENDED, _RECOMMENDED),
    Variant(RECOMMENDED + FP8_ATTENTION, _RECOMMENDED, fp8_attention),
    Variant(EVERY_WEIGHT, _WEIGHTS),
    Variant(EVERY_WEIGHT + FP8_ATTENTION, _WEIGHTS, fp8_attention),
    # What `rtlynx.compile` does on one card.
    Variant(REFERENCE + BLOCK_GRAPHS, _PLAIN, mode="reduce-overhead"),
    Variant(DENSE_FP8 + FP8_ATTENTION + BLOCK_GRAPHS, _DENSE, fp8_attention, mode="reduce-overhead"),
    Variant(RECOMMENDED + FP8_ATTENTION + BLOCK_GRAPHS, _RECOMMENDED, fp8_attention, mode="reduce-overhead"),
    Variant(EVERY_WEIGHT + FP8_ATTENTION + BLOCK_GRAPHS, _WEIGHTS, fp8_attention, mode="reduce-overhead"),
)
WITH_LORA = f", LoRA of rank {LORA_RANK}"
# Other designs, measured where they are named.
DESIGNS = (
    Variant(REFERENCE + FP8_ATTENTION, _PLAIN, fp8_attention),
    Variant(REFERENCE + FP8_MODULATION, Form(modulation_alone)),
    Variant(DENSE_FP8 + FP8_MODULATION, Form(partial(dense_fp8, modulation="fp8"), 1)),
    Variant(
        RECOMMENDED + FP8_ATTENTION + FP8_MODULATION,
        Form(recommended("fp8", schedule=True, modulation="fp8"), 1.6),
        fp8_attention,
    ),
    Variant(RECOMMENDED + WITH_LORA, _RECOMMENDED, add_lora),
    Variant(EVERY_WEIGHT + WITH_LORA, _WEIGHTS, add_lora),
    Variant(DENSE_FP8 + WITH_LORA, _DENSE, add_lora),
    Variant(DENSE_FP8 + BLOCK_GRAPHS, _DENSE, mode="reduce-overhead"),
    Variant(RECOMMENDED + BLOCK_GRAPHS, _RECOMMENDED, mode="reduce-overhead"),
    Variant(EVERY_LAYER, Form(every_layer("fp8", rank=None), 1)),
    Variant("rtlynx bf16-2:4", _BF16),
    Variant("rtlynx bf16-2:4" + BLOCK_GRAPHS, _BF16, mode="reduce-overhead"),
    Variant("rtlynx bf16-2:4 (every layer)", Form(every_layer("bf16", rank=None))),
    Variant(f"rtlynx bf16-2:4 (every layer, rank {RANK})", Form(every_layer("bf16"))),
    Variant(f"rtlynx fp8-2:4 (every layer, rank {RANK})", Form(every_layer("fp8"), 1)),
    Variant("rtlynx fp8-2:4 (every layer, text bf16)", Form(every_layer("fp8", rank=None, text="dense"), 1)),
    Variant(
        "rtlynx bf16-2:4 (every layer, text rows dense)",
        Form(every_layer("bf16", rank=None, text_rows="dense")),
    ),
)


def named(names: Sequence[str] | None) -> list[Variant]:
    """Variants and designs by name, in their own order; without names all variants and no design.

    Raises
    ------
    ValueError
        Where a name is none of theirs.
    """
    if names is None:
        return list(VARIANTS)
    known = {variant.name: variant for variant in VARIANTS + DESIGNS}
    unknown = [f'"{name}"' for name in names if name not in known]
    if unknown:
        there = ", ".join(f'"{name}"' for name in known)
        raise ValueError(f"no variant is called {', '.join(unknown)}; there are {there}")
    return [variant for name, variant in known.items() if name in names]
