"""Models that are not known by name: what each linear layer does, by its name and by what surrounds it.

Only layers of repeated blocks can be sparse. Modulation, embedders, routers and layers of few outputs stay
dense. What reads the prompt is the text stream, which is dense by default.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rtlynx.models.architecture import Architecture, Candidate, Role, Stream

# A layer with so many times fewer outputs than inputs makes a number for each head, or chooses an expert.
NARROW = 32


def _words(*words: str) -> re.Pattern[str]:
    """Any of these between dots and underscores of a name."""
    return re.compile(rf"(^|[._])({'|'.join(words)})(?=[._]|$)", re.I)


# Makes shifts, scales and gates of all tokens at once.
_MODULATION = _words(
    *(r"mod", r"modulations?", r"ada(?!pter)\w*", r"\w*norm\d*", r"film\w*", r"guidance", r"gamma", r"beta"),
    r"scale_(output|bias|shift)",
)
# Turns timesteps, patches, captions and rays of a camera into what the blocks read.
_EMBEDDER = _words(r"\w*embed\w*", r"emb", r"time\w*", r"(caption|text)_projections?", r"plucker")
_ROUTER = _words(r"\w*router")
_GATE = _words(r"gate")  # a router where experts are beside it, else half of a gated MLP
_TEXT = _words(
    *(r"text", r"txt", r"context", r"ctx", r"caption", r"cap", r"prompt", r"llm", r"t5", r"encoder_proj"),
    *(r"add_[qkv]_proj", r"to_add_out", r"to_(q|k|v|out)_t", r"(ff|ffn|mlp)_t", r"perceiver", r"resampler"),
)
_REFINER = _words(r"refiner")  # of text, unless it says what else
_IMAGE = _words(r"noise", r"image", r"img", r"visual", r"video", r"latents?", r"temporal")
_SELF, _CROSS = _words(r"self"), _words(r"cross")
# Between two streams that the model draws both, picture and sound.
_BETWEEN_DRAWN = _words(r"(audio|video)_to_(audio|video)", r"(av|va)_cross")
_SECOND_ATTENTION = _words(r"attn2")
_KEYS_AND_VALUES = _words(r"k", r"v", r"kv", r"key", r"value")
# In a mixture of transformers, what belongs to the drawing one; the other reads the prompt.
_DRAWING_ONE = _words(r"add_[qkv]_proj", r"to_add_out", r"moe_gen")
_MIXTURE = _words(r"moe_gen")
# Arguments of a model's forward that bring it text.
_TEXT_ARGUMENT = _words(r"encoder", r"text", r"txt", r"caption", r"cap", r"prompt", r"llm", r"input_ids")

_ROLES: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"\.(to_out(\.0)?|to_add_out|to_out_t|out_proj\w*|o_proj)$"), "attention-out"),
    (
        re.compile(
            r"\.(to_([qkv]|kv|query|key|value)(_t)?|to_qkv\w*|add_[qkv]_proj|([qkv]|kv)_(proj\w*|linear)"
            r"|(\w+_)?qkv(_proj)?|in_proj)$"
        ),
        "attention-in",
    ),
    (re.compile(r"\.(net\.0\.proj|w1|w3|(gate_|up_|gate_up_)proj|fc1|linear_in|proj_mlp|ff_in)$"), "mlp-up"),
    (re.compile(r"\.(net\.2|w2|down_proj|(\w+_)?fc2|linear_out|ff_out)$"), "mlp-down"),
)
# Others by the part that they are in: an attention's last layer by its name, an MLP's layers by their shape.
_IN_ATTENTION = _words(r"attn\d*", r"attention\d*", r"mha")
_IN_MLP = _words(r"ff", r"ffn", r"feed_?forward", r"mlp", r"transition", r"experts?", r"dense\w*")
_LAST_OF_ATTENTION = re.compile(r"\.((\w+_)?attn_proj|proj|out_layer|dense|c_proj)$")


@dataclass(frozen=True)
class _Layer:
    """One linear layer and where it is.

    block : dotted name of its repeated block, or None.
    inside : its name from there on.
    owners : modules around it, from the nearest to the block.
    """

    name: str
    linear: nn.Linear
    block: str | None
    inside: str
    owners: tuple[nn.Module, ...]


def decide(model: nn.Module) -> dict[str, Candidate | str]:
    """Linear layer -> candidate, or why it stays dense; in the model's own order.

    Where there are no repeated blocks (children of a `ModuleList`), all layers are looked at.
    """
    layers = _layers(model)
    repeated = any(layer.block is not None for layer in layers)
    found: dict[str, Candidate | str] = {}
    for layer in layers:
        reason = _dense_reason(layer, repeated)
        found[layer.name] = _candidate(layer) if reason is None else reason
    _mark_joint(model, found)
    return found


def _layers(model: nn.Module) -> list[_Layer]:
    modules = dict(model.named_modules())
    lists = [name for name, module in modules.items() if _holds_blocks(module)]
    found = []
    for name, module in modules.items():
        # nn.MultiheadAttention reads the weight of a NonDynamicallyQuantizableLinear without calling it.
        if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
            continue
        block = _outermost_block(name, lists)
        owners, owner = [], name
        while owner != (block or ""):
            owner = owner.rpartition(".")[0]
            owners.append(modules[owner])
        inside = name.removeprefix(block or "").lstrip(".")
        found.append(_Layer(name, module, block, inside, tuple(owners)))
    return found


def _holds_blocks(module: nn.Module) -> bool:
    """Whether it is a list of blocks, perhaps with a norm at its end; lists of parts hold linear layers."""
    if not isinstance(module, nn.ModuleList) or any(isinstance(child, nn.Linear) for child in module):
        return False
    return any(True for child in module for _ in child.children())


def _outermost_block(name: str, lists: Iterable[str]) -> str | None:
    inside = [one for one in lists if one == "" or name.startswith(f"{one}.")]
    if not inside:
        return None
    outer = min(inside, key=len)
    index = name.removeprefix(outer).lstrip(".").partition(".")[0]
    return f"{outer}.{index}" if outer else index


def _dense_reason(layer: _Layer, repeated: bool) -> str | None:
    if repeated and layer.block is None:
        return "outside the repeated blocks"
    if _MODULATION.search(layer.name):
        return "makes modulation"
    if _EMBEDDER.search(layer.name):
        return "embeds what conditions the blocks"
    leaf = layer.name.rpartition(".")[2]
    experts = any("expert" in name for name, _ in layer.owners[0].named_children())
    if _ROUTER.search(layer.name) or (_GATE.search(leaf) and experts):
        return "chooses experts"
    few = layer.linear.out_features * NARROW <= layer.linear.in_features
    if few and not _KEYS_AND_VALUES.search(leaf):  # which all heads may share
        return f"makes {NARROW} times fewer features than it reads"
    return None


def _candidate(layer: _Layer) -> Candidate:
    role, stream, rule = _role(layer), *_stream(layer)
    parts: int | tuple[int, ...] = 1
    attention = _attention_width(layer)
    if attention is not None:  # [attention | MLP], as in single blocks of FLUX.1
        parts = (attention, layer.linear.in_features - attention)
        role = "single-out"
    return Candidate(layer.name, layer.block or layer.name, role, stream, layer.name, parts, rule)


def _role(layer: _Layer) -> Role:
    for pattern, role in _ROLES:
        if pattern.search(f".{layer.name}"):
            return role
    owner = layer.inside.rpartition(".")[0]
    if _IN_ATTENTION.search(owner):
        return "attention-out" if _LAST_OF_ATTENTION.search(layer.name) else "attention-in"
    if _IN_MLP.search(owner) and layer.linear.out_features != layer.linear.in_features:
        return "mlp-up" if layer.linear.out_features > layer.linear.in_features else "mlp-down"
    return "linear"


def _attention_width(layer: _Layer) -> int | None:
    """How many of its first inputs attention gives, where an MLP gives the others."""
    owner, width = layer.owners[0], layer.linear.out_features
    beside = hasattr(owner, "proj_mlp") or hasattr(owner, "to_qkv_mlp_proj")
    last = layer.name.rpartition(".")[2] in ("proj_out", "to_out")
    return width if beside and last and layer.linear.in_features > width else None


def _stream(layer: _Layer) -> tuple[Stream, str]:
    """Whose tokens it sees, and which rule says so."""
    if any(_MIXTURE.search(name) for name, _ in layer.owners[-1].named_children()):
        drawn = _DRAWING_ONE.search(layer.inside)
        return ("image", "draws, in a mixture of transformers") if drawn else (
            "text", "reads the prompt, in a mixture of transformers"
        )  # fmt: skip
    if _TEXT.search(layer.name) or (_REFINER.search(layer.name) and not _IMAGE.search(layer.name)):
        return "text", "text by its name"
    if _is_cross_attention(layer) and _KEYS_AND_VALUES.search(layer.name.rpartition(".")[2]):
        return "text", "keys and values of cross-attention"
    return "image", "in a repeated block"


def _is_cross_attention(layer: _Layer) -> bool:
    """Whether it belongs to an attention whose keys and values are of what conditions the model."""
    kinds = [type(owner).__name__ for owner in layer.owners]
    if _SELF.search(layer.inside) or _BETWEEN_DRAWN.search(layer.inside):
        return False
    if _CROSS.search(layer.inside) or any("CrossAttention" in kind for kind in kinds):
        return True
    said = getattr(layer.owners[0], "is_cross_attention", None)  # diffusers' own attentions know
    return said if isinstance(said, bool) else bool(_SECOND_ATTENTION.search(layer.inside))


def _mark_joint(model: nn.Module, found: dict[str, Candidate | str]) -> None:
    """Say which blocks may see text and image tokens in one sequence.

    A model that takes text has to read it somewhere. In a list whose blocks do not all have layers for it,
    text can only be among the other tokens.
    """
    if not any(_TEXT_ARGUMENT.search(name) for name in inspect.signature(type(model).forward).parameters):
        return
    candidates = [one for one in found.values() if isinstance(one, Candidate)]
    with_text = {one.block for one in candidates if one.stream == "text"}
    without = {_list_of(one.block) for one in candidates if one.block not in with_text}
    for one in candidates:
        blocks = _list_of(one.block)
        if one.stream == "image" and blocks in without and not _IMAGE.search(blocks):
            found[one.name] = replace(one, stream="joint", rule="blocks without layers of their own for text")


def _list_of(block: str) -> str:
    return block.rpartition(".")[0]


GENERIC = Architecture(class_name="*", rules=(), decide=decide)
