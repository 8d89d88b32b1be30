"""What other libraries would do to a sparse model's weights unseen, refused with a reason."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Iterable, Iterator
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from rtlynx.models.change_of_basis import REPARAMETERIZED, basis_reason, follow_basis
from rtlynx.nn.prologue import fuse_adapters
from rtlynx.nn.sparse_linear import SparseLinear


def guard(model: nn.Module) -> None:
    """Refuse, on `model` and its attention modules, what would lose sparsity or half-merge an adapter.

    Functions without a `self` take the place of methods: copies of the model carry them along unbound.
    """
    for module in model.modules():
        if callable(getattr(module, "fuse_projections", None)):
            module.fuse_projections = _refuse_fused_projections  # type: ignore[assignment]
    if not all(_takes_change(module) for module in model.modules()):
        model.fuse_lora = _refuse_merge  # type: ignore[assignment]


def unguard(model: nn.Module) -> None:
    """Undo `guard`."""
    model.__dict__.pop("fuse_lora", None)
    for module in model.modules():
        module.__dict__.pop("fuse_projections", None)
        if module.__dict__.get("merge") is _refuse_merge_of_layer:
            del module.__dict__["merge"]


def refuse_merged(model: nn.Module) -> None:
    """RuntimeError where an adapter was merged into a weight, but not into the original kept beside it."""
    for module in model.modules():
        if not getattr(module, "merged", False):
            continue
        base = getattr(module, "base_layer", None)
        if isinstance(base, SparseLinear) and base.weight_dense is not None:
            raise RuntimeError(
                "an adapter is merged into the weights of sparse layers, but not into the original weights "
                "that dense rows and steps use: unmerge it and leave it beside the layers"
            )


def refuse_prepared(model: nn.Module) -> None:
    """ValueError where something was done to `model` that has to come after sparsity, or not at all."""
    kind = type(model).__name__
    if any(isinstance(getattr(module, "base_layer", None), nn.Linear) for module in model.modules()):
        raise ValueError(f"{kind} has adapters attached: make it sparse first, then load the adapters")
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        raise ValueError(
            f"{kind} has fused query, key and value projections, beside which sparse ones would not run: "
            "call its unfuse_qkv_projections() first (sparse layers share their input without fusing)"
        )
    # With streams its groups remember the parameters that they found, and would miss new ones.
    if any(_group_offloaded(module) for module in model.modules()):
        raise ValueError(f"{kind} has group offloading enabled: make it sparse first, then enable offloading")
    for name, module in model.named_modules():
        where = f"{name}, a {type(module).__name__}," if name else f"{kind}"
        if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            raise ValueError(
                f"{where} is a scripted, traced or exported graph, in which layers cannot be replaced: make "
                "the eager model sparse, then export that"
            )
        wrapped = next((one for one in _WRAPPED if one in module._modules), None)
        if wrapped is not None:
            raise ValueError(
                f"{where} wraps another module ({wrapped}), which changes the names of its layers or spreads "
                "its weights: make the model sparse first, then compile or wrap it"
            )


def refuse_borrowed(model: nn.Module) -> None:
    """ValueError where blocks of `model` are another model's, which would become sparse there, too."""
    if type(model).__name__ == "ZImageControlNetModel" and getattr(model, "noise_refiner", None) is not None:
        raise ValueError(
            f"{type(model).__name__} holds blocks of the model that it controls: make that one sparse, which "
            "makes them sparse in both, and leave the ControlNet as it is"
        )


# The name under which torch's wrappers (compile, activation checkpoints, FSDP) hold what they wrap.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that call it as it is: torch.compile's, DataParallel's, peft's."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif any(base.__module__.startswith("peft.") for base in type(model).__mro__) and callable(
            getattr(model, "get_base_model", None)
        ):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def _group_offloaded(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("group_offloading") is not None


# -------------------------------------------------------------------------------------- foreign layers


def refuse_foreign(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers of `model` in whose place a sparse layer would not compute the same.

    Raises
    ------
    TypeError
        If one is no plain `nn.Linear` with a plain weight.
    ValueError
        If one is at home at several places of the model.
    """
    wanted = set(names)
    homes: dict[nn.Module, str] = {}
    for parent_name, parent in model.named_modules():
        for child_name, child in parent._modules.items():
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if child is None:
                continue
            first = homes.setdefault(child, name)
            if first != name and (first in wanted or name in wanted):
                raise ValueError(
                    f"{first} and {name} are one layer under two names, of which one alone would become "
                    "sparse: give each a layer of its own, or leave it out with the recipe's skip"
                )
            reason = foreign_reason(child) if name in wanted else None
            if reason is not None:
                raise TypeError(f"{name} {reason}")


def refuse_meta(model: nn.Module) -> None:
    """ValueError where a tensor of `model` is on "meta"."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f'{name} of {type(model).__name__} is on "meta", without data: load the weights first. Where '
                "offloading (a device_map, sequential offload) put it there: load the model without that, "
                "make it sparse, then enable offloading"
            )


# Packages whose layers hold quantised weights.
_QUANTISERS = ("torchao", "bitsandbytes", "optimum", "diffusers.quantizers", "hqq", "nunchaku", "torch.ao")
_UNQUANTISED = (
    "sparse layers need the original weight. Load the model unquantised and make that sparse: rtlynx's own "
    "recipes quantise (precision='fp8')"
)


def foreign_reason(layer: nn.Module) -> str | None:
    """Why a sparse layer cannot take the place of `layer`; None where it can."""
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if isinstance(layer, SparseLinear):
        return "is sparse already: call rtlynx.densify first"
    if type(layer).__module__.startswith(_QUANTISERS):
        return f"is a {kind}: {_UNQUANTISED}"
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return (
            f"is a {kind}, with a forward of its own that a sparse layer would lose: put a plain nn.Linear "
            "in its place, or leave it out with the recipe's skip"
        )
    if "forward" in layer.__dict__:
        return (
            "is not as it was built: its forward has been replaced (an offload hook?): sparsify the model "
            "first, then enable offloading"
        )
    computed = [name for name in ("weight", "bias") if name not in layer._parameters]
    if computed:
        return (
            f"computes its {computed[0]} at each call (a parametrization, weight_norm or pruning): make it "
            "a plain parameter first, by torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.remove_weight_norm or torch.nn.utils.prune.remove"
        )
    return _foreign_weight(layer)


def _foreign_weight(layer: nn.Linear) -> str | None:
    weight = layer._parameters["weight"]
    assert weight is not None
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "has no weight yet: call the model once, then make it sparse"
    plain = type(weight.data) is Tensor or hasattr(weight, "placements")  # (a shard of tensor parallelism)
    if not plain:
        return f"holds a {type(weight).__module__}.{type(weight).__qualname__} as its weight: {_UNQUANTISED}"
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return (
            f"holds its weight as {weight.dtype}: {_UNQUANTISED}. Where the values need no scale, cast the "
            "model first: model.to(torch.bfloat16)"
        )
    if weight.shape != (layer.out_features, layer.in_features):
        return (
            f"maps {layer.in_features} -> {layer.out_features} features with a weight of shape "
            f"{tuple(weight.shape)} (sharded or packed?): make the model sparse before its weights are spread"
        )
    return None


# -------------------------------------------------------------------------------------------- adapters

_CHANGES = {
    "rotate_values": "the values that {} makes or reads were rotated",
    "permute_hidden": "the hidden features that {} makes or reads were permuted",
}

# Kinds of adapters of peft by how they act, beside a layer whose weight they neither read nor change: they
# add to its output, or scale or rotate its input or output. All others read the weight of the layer, which
# is the original one no more where it was refitted or quantised.
_ADDING = {"lora", "adalora", "loha", "lokr", "vera", "vblora", "randlora", "fourierft", "c3a", "gralora"}
_ADDING |= {"waveft", "lily", "miss"}
_EXACT = _ADDING | {"ia3", "oft", "boft", "road", "beft"}
# Ways of making an adapter's first values, from nothing of the base layer.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "lycoris", "mini")


def prepare_adapters(model: nn.Module) -> None:
    """Let adapters beside layers of `model` follow the bases of these.

    Called before each forward: most are seen when they are loaded, but wrappers can be put in by hand.

    Raises
    ------
    RuntimeError
        If one cannot, or needs the original weight, which is not there.
    """
    if torch.compiler.is_compiling() or not getattr(model, "peft_config", None):
        return
    for wrapper, layer in _adapted(model):
        reason = _reason(layer, _kind(wrapper), _wrapper_reason(wrapper)) if _changed(layer) else None
        if reason is not None:
            name = next(name for name, module in model.named_modules() if module is wrapper)
            _refuse_adapter(name, layer, reason)
        _fit(wrapper, layer)


def _fit(wrapper: nn.Module, layer: Any) -> None:
    """Let adapters in `wrapper` follow the bases of `layer`, and refuse merges that would be wrong."""
    if vars(wrapper).get("merge") is _refuse_merge_of_layer:
        return
    other_basis = hasattr(layer, REPARAMETERIZED)
    if other_basis:
        follow_basis(wrapper, layer)
    if other_basis or layer.format.quantized or layer.pattern.grouping != "adjacent":
        wrapper.merge = _refuse_merge_of_layer  # type: ignore[assignment]


def _changed(layer: nn.Module) -> bool:
    """Whether the weight of `layer` is another than that of the dense model."""
    return hasattr(layer, REPARAMETERIZED) or (isinstance(layer, SparseLinear) and layer.weight_changed)


def _reason(layer: nn.Module, kind: str, needs_weight: str | None) -> str | None:
    """Why an adapter cannot be beside `layer`, whose weight changed; None where it can.

    `needs_weight` says why the adapter, of this kind of peft, needs the original weight, or is None.
    """
    if not hasattr(layer, REPARAMETERIZED):
        return needs_weight
    if needs_weight is not None:
        return f"it needs the original weight ({needs_weight}), which a plain LoRA does not"
    return basis_reason(kind, layer)


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Sparse and reparameterized layers that something of peft wraps, each after its outermost wrapper.

    Lean, and without looking through what adapters are made of: this runs before each step.
    """
    modules = [model]
    while modules:
        module = modules.pop()
        children = module._modules
        if "base_layer" in children or "original_module" in children:
            layer = wrapped_layer(module)
            if isinstance(layer, SparseLinear) or hasattr(layer, REPARAMETERIZED):
                yield module, layer
                continue
        if children:
            modules.extend(child for child in children.values() if child is not None)


def wrapped_layer(module: nn.Module) -> nn.Module:
    """What is at the bottom of wrappers that peft puts around layers."""
    while True:
        inner = module._modules.get("base_layer", module._modules.get("original_module"))
        if inner is None:
            return module
        module = inner


def _kind(wrapper: nn.Module) -> str:
    """ "lora" of peft.tuners.lora.layer.Linear; the whole name of what is no tuner layer of peft's."""
    module = type(wrapper).__module__
    return module.split(".")[2] if module.startswith("peft.tuners.") else f"{module}.{type(wrapper).__name__}"


def _wrapper_reason(wrapper: nn.Module) -> str | None:
    """What an adapter beside a layer does that needs the layer's original weight; None if nothing."""
    kind = _kind(wrapper)
    if kind not in _EXACT or type(wrapper).__name__ == "ParamWrapper":
        return f"adapters of the kind {kind} ({type(wrapper).__name__}) are not known to leave it alone"
    own = vars(wrapper)
    for name, used in own.get("use_dora", {}).items():
        if used:
            return f"DoRA (adapter {name!r}) divides by its norms"
    for name, variant in own.get("lora_variant", {}).items():
        return f"{type(variant).__name__} (adapter {name!r}) is not known to leave it alone"
    if own.get("miss_fn") == "bat":
        return "MiSS with init_weights='bat' multiplies by it"
    return None


def _peft_type(config: Any) -> str:
    """ "lora" of a LoraConfig."""
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def _config_reason(config: Any) -> str | None:
    """What an adapter of this peft config would do that needs the original weight; None if nothing."""
    kind = _peft_type(config)
    if kind not in _EXACT:
        return f"adapters of the kind {kind} are not known to leave it alone"
    if getattr(config, "use_dora", False):
        return "DoRA divides by its norms"
    for name in ("init_lora_weights", "init_weights"):
        init = getattr(config, name, None)
        if init not in _INITS:
            return f"{name}={init!r} is computed from it, and may change it"
    for field in dataclasses.fields(config):
        if field.metadata.get("is_lora_variant") and getattr(config, field.name):
            return f"an adapter with {field.name} is not known to leave it alone"
    return None


def _refuse_adapter(name: str, layer: Any, reason: str) -> NoReturn:
    if hasattr(layer, REPARAMETERIZED):
        settings = dict.fromkeys(change.one.setting for change in getattr(layer, REPARAMETERIZED))
        changes = " and ".join(f"{_CHANGES[one].format(name)} ({one})" for one in settings)
        without = ", ".join(f"{one}=False" for one in settings)
        raise RuntimeError(
            f"this adapter was made for the dense model, and {changes}: {reason}. Or fuse the adapter "
            f"into the dense model, then calibrate that; or calibrate with Recipe({without})"
        )
    what = "quantised to eight bits" if layer.format.quantized else "refitted"
    raise RuntimeError(
        f"this adapter needs the original weight of {name}, which was {what}: {reason}. Use a plain LoRA, "
        "which is exact beside the layer; or fuse the adapter into the dense model, then make that sparse; "
        "or use a sparse model that is neither refitted nor quantised (Recipe.immediate())"
    )


def _check_injection(
    tuner: Any, model: nn.Module, adapter: str, state_dict: dict[str, Tensor] | None
) -> None:
    """RuntimeError where peft's `tuner` is about to give `model` an adapter that it cannot have.

    Before anything of the model is changed.
    """
    config = tuner.peft_config[adapter]
    needs_weight = _config_reason(config)
    for name, layer in model.named_modules():
        if not _changed(layer):
            continue
        name = name.removesuffix(".base_layer")
        reason = _reason(layer, _peft_type(config), needs_weight)
        if reason is None or not _targeted(tuner, config, name, state_dict):
            if not _saved_whole(config, name):
                continue
            reason = "modules_to_save puts a copy of it, trained by itself, in its place"
        if state_dict is None:  # (the loader of diffusers, which gives one, takes back the name itself)
            tuner.peft_config.pop(adapter, None)
            if hasattr(model, "_hf_peft_config_loaded"):
                model._hf_peft_config_loaded = bool(getattr(model, "peft_config", None))  # type: ignore[assignment]
        _refuse_adapter(name, layer, reason)


def _targeted(tuner: Any, config: Any, name: str, state_dict: dict[str, Tensor] | None) -> bool:
    """Whether peft would put the adapter beside the layer `name`, by the tensors or by the config."""
    if state_dict is not None:
        return any(key.removeprefix("_orig_mod.").startswith(f"{name}.") for key in state_dict)
    if getattr(config, "target_modules", None) in (None, "all-linear"):
        return True
    return bool(tuner._check_target_module_exists(config, name))


def _saved_whole(config: Any, name: str) -> bool:
    suffixes = getattr(config, "modules_to_save", None) or ()
    return any(f".{name}".endswith(f".{one}") for one in suffixes)


def _takes_change(layer: nn.Module) -> bool:
    """Whether the change that an adapter makes of the dense model's weight may be made of that of `layer`."""
    if hasattr(layer, REPARAMETERIZED):
        return False
    return not isinstance(layer, SparseLinear) or layer.mergeable


def _takes_merge(wrapper: nn.Module, layer: nn.Module) -> bool:
    """Whether an adapter may become part of the layer's weight, and the layer then gives the whole of it."""
    if not isinstance(layer, SparseLinear) or not _takes_change(layer):
        return False
    adds = _kind(wrapper) in _ADDING and _wrapper_reason(wrapper) is None
    return adds or not layer.rank  # scaled weights beside a branch that is not


def _guard_peft(tuner: type[Any]) -> None:
    """Let peft's base class of tuners ask before it injects or merges an adapter."""
    inject, check_merge = tuner.inject_adapter, tuner._check_merge_allowed

    @wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _check_injection(self, model, adapter_name, kwargs.get("state_dict"))
        inject(self, model, adapter_name, *args, **kwargs)
        for wrapper, layer in _adapted(model):
            _fit(wrapper, layer)

    @wraps(check_merge)
    def check_merge_allowed(self: Any) -> None:
        check_merge(self)
        if not all(_takes_merge(wrapper, layer) for wrapper, layer in _adapted(self.model)):
            _refuse_merge()

    tuner.inject_adapter, tuner._check_merge_allowed = inject_adapter, check_merge_allowed
    fuse_adapters(importlib.import_module("peft.tuners.lora.layer").Linear)


def _notice_peft(module: nn.Module, name: str, _submodule: nn.Module | None) -> None:
    """Guard peft as soon as a tuner takes a model, which it does before it injects anything.

    peft has no hook of its own for that, is slow to import, and may be imported after this.
    """
    if name != "model":
        return
    for base in type(module).__mro__:
        own = base.__name__ == "BaseTuner" and base.__module__ == "peft.tuners.tuners_utils"
        if own and not hasattr(vars(base)["inject_adapter"], "__wrapped__"):
            _guard_peft(base)


register_module_module_registration_hook(_notice_peft)


def _refuse_fused_projections(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        "a sparse model's query, key and value projections are not fused: diffusers would put one dense "
        "layer in their place, without what sparsity, refits and quantisation made of them. Leave the call "
        "out (sparse layers that read one input compress it once), or call rtlynx.densify first"
    )


def _refuse_merge(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        "adapters are not merged into this model: its weights are quantised, rotated or permuted, or what is "
        "kept beside them (original weights for dense rows and steps, low-rank branches, weights in the "
        "order of strided groups) would miss the adapter. Leave out fuse_lora() or the merge: beside the "
        "layers the adapter is exact. Or merge it into the dense model, then make that sparse"
    )


def _refuse_merge_of_layer(safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
    """Takes what diffusers looks for in a method `merge`."""
    _refuse_merge()
