"""What is known of one architecture: which linears can be sparse, what they read, how it samples."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from rtlynx.nn.call import TextRows

Role = Literal["attention-in", "attention-out", "mlp-up", "mlp-down", "single-out", "linear", "modulation"]
Stream = Literal["image", "text", "joint", "audio"]

# Roles whose groups are strided by default: their groups then span different heads.
STRIDED_ROLES: tuple[Role, ...] = ("attention-out", "single-out")

# Streams of few tokens that much depends on: dense by default, or in eight bits.
FEW_TOKENS: tuple[Stream, ...] = ("text", "audio")

# Names of the timestep in models that follow the generic rule.
TIMESTEPS = ("timestep", "timesteps", "t", "sigma")


@dataclass(frozen=True)
class LayerRule:
    """Candidates by name.

    pattern : name with `*` for the block index.
    role, stream : what the layer does and whose tokens it sees.
    reads : layers of one block with the same label read the same tensor.
    attention_part : the input is [attention output | MLP], the first part as wide as the layer's output.
    """

    pattern: str
    role: Role
    stream: Stream = "image"
    reads: str | None = None
    attention_part: bool = False


@dataclass(frozen=True)
class AttentionRule:
    """Attentions by name, whose values go through nothing but a layer, the mixing and what reads that.

    pattern : name of a block with `*` for its index.
    attention, values, readers : names in the block of the attention, of the layers that make its values, and
        of those that read what it gives, with their first columns. A block has some of each.
    """

    pattern: str
    attention: str
    values: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class MlpRule:
    """MLPs by name, whose hidden features go through nothing that mixes them.

    pattern : name of a block with `*` for its index.
    between : names in the block of the modules that call the layers, and what comes between these.
    up : of the layers that make the hidden features.
    down : of the layer that reads them, with its last columns.
    """

    pattern: str
    between: tuple[str, ...]
    up: tuple[str, ...]
    down: str


@dataclass(frozen=True)
class Reparameterizable:
    """A tensor inside a model that may be given in another basis: what reads it undoes what makes it does.

    name : dotted name in the model that stands for it.
    makers, readers : layers that make the tensor and layers that read it.
    """

    setting: ClassVar[str]  # field of `Recipe` that asks for it

    name: str
    makers: tuple[str, ...]
    readers: tuple[str, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers whose parameters change."""
        return (*self.makers, *self.readers)

    @property
    def size(self) -> list[int]:
        """How large the tensor is, in what a basis of it depends on."""
        raise NotImplementedError

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that change, of those that are there."""
        biases = (f"{name}.bias" for name in self.makers)
        return (*(f"{name}.weight" for name in self.layers), *biases)


@dataclass(frozen=True)
class Attention(Reparameterizable):
    """One attention of a model, which its name is; it gives what its values give, in the same basis.

    heads, head_dim : of what it gives.
    value_heads : heads of the values, each read by `heads` / `value_heads` heads in a row.
    """

    setting = "rotate_values"

    heads: int
    head_dim: int
    value_heads: int

    @property
    def size(self) -> list[int]:
        """Of the values: heads and their width."""
        return [self.value_heads, self.head_dim]


@dataclass(frozen=True)
class Mlp(Reparameterizable):
    """One MLP of a model, by the name of its down projection.

    between : dotted names of the modules that the hidden features go through.
    width : how many hidden features.
    first : column of the down projection that reads the first of them.
    """

    setting = "permute_hidden"

    between: tuple[str, ...]
    width: int
    first: int = 0

    @property
    def size(self) -> list[int]:
        """How many hidden features."""
        return [self.width]


@dataclass(frozen=True)
class Candidate:
    """One linear layer that can be sparse.

    name : dotted name in the model.
    block : dotted name of the repeated block it belongs to.
    reads : key shared by all layers that read the same tensor as this one.
    parts : parts of the input inside which groups are strided.
    rule : what made it one.
    lent : whether another model calls its block, too.
    """

    name: str
    block: str
    role: Role
    stream: Stream
    reads: str
    parts: int | tuple[int, ...] = 1
    rule: str = ""
    lent: bool = False


@dataclass(frozen=True)
class Architecture:
    """One architecture. `rules` may be replaced by `decide`, a function of the model (the generic rule).

    class_name : the model's class name.
    descending : whether the `timestep` argument falls while sampling.
    text_rows : maps the model's call (argument name -> value) to the range of text tokens in joint blocks.
    fused : class name of a block -> a `forward` of it that lets linear layers read prologues
        (`rtlynx.nn.prologue`); its arguments are the block, its class's own forward, and what that takes.
    attentions : those whose values can be rotated.
    mlps : those whose hidden features can be permuted.
    modulation : names, with `*` for the block index, of layers that make shifts, scales and gates of one
        token a picture.
    lent : names of blocks, with `*` for the index, that a ControlNet calls beside this model.
    """

    class_name: str
    rules: tuple[LayerRule, ...]
    descending: bool = True
    timestep_argument: str = "timestep"
    text_rows: Callable[[dict[str, Any]], TextRows] | None = None
    decide: Callable[[nn.Module], dict[str, Candidate | str]] | None = None
    fused: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    attentions: tuple[AttentionRule, ...] = ()
    mlps: tuple[MlpRule, ...] = ()
    modulation: tuple[str, ...] = ()
    lent: tuple[str, ...] = ()

    def candidates(self, model: nn.Module) -> list[Candidate]:
        """Layers of `model` that can be sparse, in the model's own order."""
        return [one for one in self.decisions(model).values() if isinstance(one, Candidate)]

    def decisions(self, model: nn.Module) -> dict[str, Candidate | str]:
        """Linear layer of `model` -> candidate, or why it is none; in the model's own order."""
        if self.decide is not None:
            return self.decide(model)
        found: dict[str, Candidate | str] = {}
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            found[name] = f"no rule for {self.class_name} names it"
            for rule in self.rules:
                if not fnmatch.fnmatchcase(name, rule.pattern):
                    continue
                block = ".".join(name.split(".")[:2])
                parts: int | tuple[int, ...] = 1
                if rule.attention_part:
                    parts = (module.out_features, module.in_features - module.out_features)
                reads = f"{block}.{rule.reads}" if rule.reads else name
                lent = any(fnmatch.fnmatchcase(block, one) for one in self.lent)
                found[name] = Candidate(name, block, rule.role, rule.stream, reads, parts, rule.pattern, lent)
                break
        return found

    def modulation_of(self, model: nn.Module) -> list[Candidate]:
        """Layers of `model` that make its modulation, in the model's own order."""
        found = []
        for name, module in model.named_modules():
            rule = next((one for one in self.modulation if fnmatch.fnmatchcase(name, one)), None)
            if rule is not None and isinstance(module, nn.Linear):
                block = ".".join(name.split(".")[:2])
                found.append(Candidate(name, block, "modulation", "image", name, rule=rule))
        return found

    def attentions_of(self, model: nn.Module) -> list[Attention]:
        """Attentions of `model` whose values can be rotated, in the model's own order."""
        found = []
        modules = dict(model.named_modules())
        for name, module in modules.items():
            for rule in self.attentions:
                block = name.removesuffix(f".{rule.attention}")
                if block == name or block.count(".") != 1 or not fnmatch.fnmatchcase(block, rule.pattern):
                    continue
                attn: Any = module
                head_dim = attn.inner_dim // attn.heads
                values, readers = (
                    tuple(one for layer in layers if (one := f"{block}.{layer}") in modules)
                    for layers in (rule.values, rule.readers)
                )
                made: Any = modules[values[0]]
                shared = made.out_features // head_dim
                found.append(Attention(name, values, readers, attn.heads, head_dim, shared))
        return found

    def mlps_of(self, model: nn.Module) -> list[Mlp]:
        """MLPs of `model` whose hidden features can be permuted, in the model's own order."""
        found = []
        for down in self.candidates(model) if self.mlps else ():
            for rule in self.mlps:
                if down.name != f"{down.block}.{rule.down}" or not fnmatch.fnmatchcase(
                    down.block, rule.pattern
                ):
                    continue
                up, between = (
                    tuple(f"{down.block}.{one}" for one in some) for some in (rule.up, rule.between)
                )
                inputs: Any = model.get_submodule(down.name).in_features
                first = 0 if isinstance(down.parts, int) else down.parts[0]
                found.append(Mlp(down.name, up, (down.name,), between, inputs - first, first))
        return found

    def timestep_name(self, call: Mapping[str, Any]) -> str | None:
        """The argument of a call of the model that is its timestep; None where it has none."""
        names = (self.timestep_argument, *TIMESTEPS)
        return next((name for name in names if call.get(name) is not None), None)

    def timestep(self, call: Mapping[str, Any]) -> Any:
        """The timestep of a call as the model takes it; None where it has none."""
        name = self.timestep_name(call)
        return None if name is None else call[name]

    def call_arguments(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments of one call of `model`, by name, such that `model(**arguments)` is the same call."""
        signature = inspect.signature(type(model).forward)
        itself, *named = signature.bind_partial(model, *args, **kwargs).arguments.items()
        del itself  # `self`
        arguments: dict[str, Any] = {}
        for name, value in named:
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(value)
            else:
                arguments[name] = value
        return arguments
