"""Sparse models through diffusers' own `save_pretrained` and `from_pretrained`.

A sparse model's `config.json` says under `quantization_config` what `rtlynx.json` says in a checkpoint of
`rtlynx.save`; the tensors lie with the model's others. `import rtlynx` registers the method "rtlynx" with
diffusers as soon as both are imported (`rtlynx.io.registration`). diffusers then hands over the model with
its layers on "meta", the weights of layers one by one, and the model with its weights loaded.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from rtlynx.io.checkpoint import check_index, describe, load, read_index, signed, stored_plan
from rtlynx.io.quantize_on_load import QuantizeOnLoad
from rtlynx.io.schema import reparameterized_tensors
from rtlynx.io.skeleton import empty_solution, wrong_tensor
from rtlynx.math.fp8 import E4M3
from rtlynx.models.fingerprint import full_digests, is_plain, weight_fingerprint
from rtlynx.models.plan import Plan
from rtlynx.models.reparameterize import Reparameterization, mark
from rtlynx.models.sparsify import (
    apply_plan,
    densify,
    make_plan_for_dense,
    observers,
    prepare_layers,
    sparse_layers,
    state_of,
)
from rtlynx.nn.sparse_linear import SparseLinear
from rtlynx.nn.state_dict import OWN, current_key
from rtlynx.recipe import Recipe, refuse_unknown
from rtlynx.storage.files import CheckpointError, first_line

_BaseConfig: Any = object
_BaseQuantizer: Any = object
_unregistered: Exception | None = None
try:
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from diffusers.quantizers.base import DiffusersQuantizer
    from diffusers.quantizers.quantization_config import QuantizationConfigMixin
except Exception as error:  # none, a broken or another one: all but this module works with it
    _unregistered = error
else:
    _BaseConfig, _BaseQuantizer = QuantizationConfigMixin, DiffusersQuantizer


_LONGEST_PATH = 4000
_SINGLE_FILE = Path("the single file")  # of `from_single_file`, which tells no folder


class QuantMethod(StrEnum):
    """Name of the method in diffusers' registry; of a type that diffusers asks for its `.value`."""

    RTLYNX = "rtlynx"


class RTLynxConfig(_BaseConfig):
    """Makes a diffusers model sparse while `from_pretrained` loads it.

    For dense checkpoints: a model that was saved sparse by `save_pretrained` carries its own, and needs
    `import rtlynx` alone. Give one of the two, to the model's `from_pretrained(quantization_config=...)` or
    to a pipeline's as `PipelineQuantizationConfig(quant_mapping={"transformer": RTLynxConfig(...)})`.
    With a recipe, layers that are to hold eight bits alone are quantised one by one as they load.

    Parameters
    ----------
    recipe : Recipe or mapping, optional
        One that needs no calibration; default `Recipe.immediate()`.
    sidecar : path, optional
        A folder that `rtlynx.save` wrote for the checkpoint's weights.

    Raises
    ------
    ValueError
        If the recipe needs calibration or is none, or both are given.
    ImportError
        If the installed diffusers has no quantizer registry that rtlynx knows.
    """

    def __init__(
        self, recipe: Recipe | Mapping[str, Any] | None = None, sidecar: str | Path | None = None
    ) -> None:
        if _unregistered is not None:
            reason = f"{type(_unregistered).__name__}: {_unregistered}"
            raise ImportError(
                f"rtlynx does not know the quantizers of diffusers{_diffusers_version()} ({reason}): "
                "install diffusers 0.42, or use rtlynx.sparsify, rtlynx.save and rtlynx.load"
            ) from _unregistered
        if recipe is not None and sidecar is not None:
            raise ValueError("give a recipe or a sidecar, which has its own recipe; got both")
        if not isinstance(recipe, Recipe | None):
            recipe = Recipe.from_dict(recipe)
        if recipe is not None and recipe.needs_calibration:
            raise ValueError(
                "this recipe has something to calibrate (rank, refit, rotate_values, permute_hidden or "
                "budget), and from_pretrained has no prompts: load the model dense and call rtlynx.calibrate("
                "pipeline, prompts, recipe), whose result save_pretrained keeps, or use Recipe.immediate()"
            )
        self.quant_method = QuantMethod.RTLYNX
        self.recipe = (recipe or Recipe.immediate()) if sidecar is None else None
        self.sidecar = None if sidecar is None else Path(sidecar)
        self.stored: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From JSON values: those of a saved model's `config.json`, or recipe or sidecar.

        Raises
        ------
        CheckpointError
            For unknown keys and values that `RTLynxConfig` refuses.
        """
        values = {key: value for key, value in config_dict.items() if key != "quant_method"}
        if values.keys() & {"format", "layers"}:
            config = RTLynxConfig()
            config.recipe, config.stored = None, values  # checked when it is known which file it is from
        else:
            try:
                refuse_unknown("quantization_config", values, {"recipe", "sidecar"})
                config = RTLynxConfig(**values)
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"quantization_config (config.json): {first_line(error)}") from None
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any] | None:
        """JSON values; inverse of `from_dict`. Of a sparse model's own: what the model is now."""
        method = {"quant_method": self.quant_method.value}
        if self.stored is not None:
            return {**method, **self.stored}
        if self.recipe is not None:
            return {**method, "recipe": self.recipe.to_dict()}
        return {**method, "sidecar": str(self.sidecar)}

    to_diff_dict = to_dict

    def __repr__(self) -> str:
        what = "stored" if self.stored is not None else self.recipe or f"sidecar={str(self.sidecar)!r}"
        return f"{type(self).__name__}({what})"


class _ModelConfig(RTLynxConfig):
    """The `quantization_config` of a sparse model: read off the model whenever it is asked for.

    So what `save_pretrained` writes is right whatever has become of the layers since.
    """

    def __init__(self, model: nn.Module | None) -> None:
        super().__init__()
        self.recipe = None
        self._model = (lambda: None) if model is None else weakref.ref(model)

    def to_dict(self) -> dict[str, Any] | None:
        """What the model is; None where it is gone or dense, and this a copy in some other model's config.

        Raises
        ------
        ValueError
            If an adapter wraps a sparse layer.
        """
        model = self._model()
        if model is None or state_of(model) is None:
            return None
        body = describe(model)
        for name, layer in sparse_layers(model).items():
            entry = body["layers"][name]
            entry["weight"] = weight_fingerprint(layer.weight)
            entry["weight_dense"] = layer.weight_dense is not None
        # All that `save_pretrained` writes beside.
        body["tensors"] = full_digests(_plain_tensors(model.state_dict()))
        body["config"] = _settings(model)
        return {"quant_method": self.quant_method.value, **signed(body)}

    to_diff_dict = to_dict

    def __deepcopy__(self, memo: dict[int, Any]) -> _ModelConfig:
        model = self._model()
        return self if model is None else _ModelConfig(memo.get(id(model), model))

    def __reduce__(self) -> Any:
        return _ModelConfig, (self._model(),)  # weak references are not pickled

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._model()).__name__})"


class RTLynxQuantizer(_BaseQuantizer):
    """What diffusers' loader calls for models of the method "rtlynx".

    The models are not marked `is_quantized`: casts and moves, which diffusers refuses for such ones, are
    right for sparse layers.
    """

    use_keep_in_fp32_modules = True  # as for a dense model

    def __init__(self, quantization_config: RTLynxConfig, **kwargs: Any) -> None:
        if isinstance(quantization_config, _ModelConfig):  # that of another model, as it is now
            quantization_config = RTLynxConfig.from_dict(quantization_config.to_dict() or {})
        super().__init__(quantization_config, **kwargs)
        self._folder = _SINGLE_FILE
        self._found: set[str] = set()  # names of the tensors in the checkpoint's files
        self._layers: dict[str, Any] = {}  # the sparse ones of a model that was saved so
        self._loaded: set[str] = set()  # names of their tensors that came past here
        self._shapes: dict[str, torch.Size] = {}  # of all tensors of the model
        self._quantised = False
        self._on_load: QuantizeOnLoad | None = None  # of a dense checkpoint and a recipe

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return not self._quantised

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what would fail after the weights are loaded; called before that, twice."""
        if find_spec("accelerate") is None:
            raise ImportError("diffusers loads sparse models with accelerate: pip install accelerate")
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices:
            raise ValueError(
                "device_map leaves layers on the disk, where diffusers casts what must keep its dtype: load "
                "the sparse model without it, then use enable_group_offload"
            )
        if len(devices) > 1 and self.quantization_config.stored is None:
            raise ValueError(
                f"device_map spreads a dense checkpoint over {', '.join(sorted(devices))}, and layers with "
                "accelerate's hooks are not made sparse: load on one device, save_pretrained the sparse "
                "model, and load that"
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        loaded_keys = [current_key(key) for key in loaded_keys]
        self._found = set(loaded_keys)
        self._folder = Path(checkpoint_files[0]).parent
        return loaded_keys

    def preprocess_model(self, model: Any, **kwargs: Any) -> Any:
        return self._process_model_before_weight_loading(model, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """`model` is on "meta". One that was saved sparse gets its sparse layers here; others are checked."""
        config = self.quantization_config
        if config.stored is not None:
            plan = self._skeleton(model, config.stored)
            self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            self._layers = {layer.name: model.get_submodule(layer.name) for layer in plan.replaced}
        elif config.sidecar is not None:
            sidecar = self._sidecar()
            plan = stored_plan(model, read_index(sidecar), sidecar)
        else:
            plan = make_plan_for_dense(model, config.recipe)
            self._on_load = QuantizeOnLoad(plan)
        self._quantised = any(layer.quantized for layer in plan.replaced)
        return model

    def _sidecar(self) -> Path:
        """The sidecar's folder: any that the caller named; where a file did, one inside the file's folder."""
        given = self.quantization_config.sidecar
        if not self.pre_quantized or self._folder is _SINGLE_FILE:
            return Path(given)
        place, home = self._folder / "config.json", os.path.realpath(self._folder)
        path = os.path.join(home, given)
        sound = len(path) <= _LONGEST_PATH and path.isprintable()
        inside = os.path.realpath(path) if sound else ""
        if not inside or os.path.commonpath((home, inside)) != home:
            raise CheckpointError(
                f"{place} names a sidecar outside its own folder, {str(given)[:80]!r}: if you trust it, take "
                "it out of the file and give RTLynxConfig(sidecar=...) to from_pretrained"
            )
        return Path(inside)

    def _skeleton(self, model: nn.Module, stored: dict[str, Any]) -> Plan:
        """Put layers without data into `model` that take every tensor of the checkpoint as it is."""
        place = self._folder / "config.json"
        check_index(stored, place, whole_model=True)
        found = _settings(model)
        for key, value in stored.get("config", {}).items():
            if key in found and found[key] != value:
                raise CheckpointError(
                    f"{place}: {key} is {found[key]!r}, and the model was saved with {value!r}: fetch or "
                    "save it again"
                )

        def prepare(name: str, layer: SparseLinear) -> None:
            entry = stored["layers"][name]
            solution = empty_solution(entry, layer.weight.dtype)
            solution.install(layer, keep_dense=bool(entry["weight_dense"]))

        plan = stored_plan(model, stored, self._folder)
        base = {name: entry["base"] for name, entry in stored["layers"].items()}
        done = None
        if plan.reparameterized:
            unknown = dict.fromkeys(one.name for one in plan.reparameterized)
            done = Reparameterization(unknown, records=reparameterized_tensors(stored))
            mark(model, plan.reparameterized, unknown)
        try:
            apply_plan(model, plan, prepare, base, done=done)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{place} does not fit this model: {first_line(error)}") from None
        state = state_of(model)
        assert state is not None
        state.tensors = stored.get("base_tensors")
        state.errors = {name: one["error"] for name, one in stored["layers"].items() if "error" in one}
        return plan

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse tensors of a sparse model that are missing or too many, where diffusers warns."""
        if self.quantization_config.stored is None:
            return missing_keys
        lost = self._signed().keys() - self._found | set(missing_keys)
        missing = sorted(lost, key=lambda key: (key.rpartition(".")[0] not in self._layers, key))
        if missing:
            raise CheckpointError(
                f"{self._folder} lacks {_some(missing)}: fetch or copy the folder again, all of it"
            )
        expected = set(model.state_dict())
        unknown = self._found - expected
        extra = sorted(
            {key for key in unknown if key.rpartition(".")[2] in OWN}
            | {key for key in unknown if any(key.startswith(f"{name}.") for name in self._layers)}
            | (self._found - self._signed().keys() if self._signed() else set())
        )
        if extra:
            raise CheckpointError(
                f"{self._folder} has {_some(extra)}, which its config.json does not know: are these files of "
                "two models? Save the model again, or fetch the folder again"
            )
        return missing_keys

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        if self._on_load is not None:
            return self._on_load.takes(param_name, param_value)
        return param_name.rpartition(".")[0] in self._layers

    def get_special_dtypes_update(self, model: Any, torch_dtype: Any) -> dict[str, Any]:
        """What `device_map="auto"` has to know: how much memory the weights of sparse layers will take."""
        return {} if self._on_load is None else self._on_load.held(torch_dtype or torch.float32)

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check the tensors of one file as they are there, before diffusers casts them."""
        state_dict = {current_key(name): tensor for name, tensor in state_dict.items()}
        for name, tensor in state_dict.items():
            shape = self._shapes.get(name, tensor.shape)
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{self._folder}: {name} is {tuple(tensor.shape)}, should be {tuple(shape)}"
                )
            layer, kind = self._layers.get(name.rpartition(".")[0]), name.rpartition(".")[2]
            if layer is not None and self._shapes:
                wrong = wrong_tensor(layer, kind, tensor)
                if wrong is not None:
                    raise CheckpointError(f"{self._folder}: {name} {wrong}")
        digests = self._signed()
        if digests:
            for name, digest in full_digests(state_dict).items():
                if digests.get(name) != digest:
                    self._refuse_tensor(name)
        return state_dict

    def _signed(self) -> dict[str, str]:
        """Name -> digest of the tensors in the files; none for those of older versions."""
        stored = self.quantization_config.stored
        tensors = {} if stored is None else stored.get("tensors", {})
        return {current_key(name): digest for name, digest in tensors.items()}

    def _refuse_tensor(self, name: str) -> NoReturn:
        raise CheckpointError(
            f"{self._folder}: {name} is not the tensor that its config.json was written for: is it damaged, "
            "or are these files of two models? Save the model again, or fetch the folder again"
        )

    def create_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put one tensor into a layer: `param_value` is cast already, `state_dict`'s is not."""
        if self._on_load is not None:
            self._on_load.put(model, param_name, param_value, target_device)
            return
        name, _, kind = param_name.rpartition(".")
        layer, stored = self._layers[name], state_dict[param_name]
        is_parameter = kind in layer._parameters
        skeleton = layer._parameters[kind] if is_parameter else layer._buffers[kind]
        if kind == "weight" and not self._signed():
            fingerprint = self.quantization_config.stored["layers"][name]["weight"]
            if weight_fingerprint(stored) != fingerprint:
                self._refuse_tensor(param_name)
        value = (stored if stored.dtype is E4M3 or kind.endswith("_scale") else param_value).to(target_device)
        setattr(layer, kind, nn.Parameter(value, skeleton.requires_grad) if is_parameter else value)
        self._loaded.add(param_name)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if config.sidecar is not None:
            return load(model, self._sidecar())
        if self._on_load is not None:
            on_load, self._on_load = self._on_load, None
            return on_load.finish(model)
        expected = {f"{name}.{kind}" for name, layer in self._layers.items() for kind in layer.state_dict()}
        if expected != self._loaded:
            raise CheckpointError(
                f"{self._folder}: {_some(sorted(expected - self._loaded))} did not load: use from_pretrained "
                "without offload_state_dict and ignore_mismatched_sizes"
            )
        prepare_layers(model)
        return model

    def dequantize(self, model: Any) -> Any:
        """`rtlynx.densify`, which also takes this quantizer off the model."""
        return densify(model)


def register() -> None:
    """Make diffusers know the method "rtlynx", and sparse models carry their `quantization_config`."""
    if _unregistered is not None:
        return
    AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.RTLYNX.value] = RTLynxConfig
    AUTO_QUANTIZER_MAPPING[QuantMethod.RTLYNX.value] = RTLynxQuantizer
    if _keep_config not in observers:
        observers.append(_keep_config)


def _keep_config(model: Any) -> None:
    """Put what `model` is into its diffusers config, or take it out."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not hasattr(model, "register_to_config") or not isinstance(quantizer, RTLynxQuantizer | None):
        return
    if state_of(model) is not None:
        model.register_to_config(quantization_config=_ModelConfig(model))
        return
    kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
    model._internal_dict = type(model.config)(kept)  # diffusers has no way to unregister
    if quantizer is not None:
        del model.hf_quantizer


def _plain_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if is_plain(tensor)}


def _settings(model: Any) -> dict[str, Any]:
    """What `config.json` says of the model itself, in JSON values."""
    config = {
        key: value
        for key, value in getattr(model, "config", {}).items()
        if not key.startswith("_") and key != "quantization_config"
    }
    return json.loads(json.dumps(config, default=str))


def _diffusers_version() -> str:
    try:
        return f" {version('diffusers')}"
    except PackageNotFoundError:
        return ", which is not installed"


def _some(names: list[str]) -> str:
    """The first of them, and how many more."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


register()
