"""Any other tree of linears: those of repeated blocks, less what is known to be small and sensitive."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rtlynx.models.architecture import Architecture, Candidate, Role

# Modulation, embedders, norms and final projections stay dense: few tokens or few channels, large effect.
_SENSITIVE = re.compile(
    r"(^|[._])(mod|modulation|ada\w*|norm\w*|\w*embed\w*|time\w*|\w*router)([._]|$)", re.I
)

_ROLES: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"\.(to_out(\.0)?|to_add_out|out_proj|o_proj)$"), "attention-out"),
    (re.compile(r"\.(to_[qkv]|to_qkv\w*|add_[qkv]_proj|[qkv]_proj|qkv|in_proj)$"), "attention-in"),
    (re.compile(r"\.(net\.0\.proj|w1|w3|up_proj|gate_proj|fc1|linear_in)$"), "mlp-up"),
    (re.compile(r"\.(net\.2|w2|down_proj|fc2|linear_out)$"), "mlp-down"),
)
_TEXT = re.compile(r"(^|\.)(add_[qkv]_proj|to_add_out|ff_context|txt_\w+|context_\w+)(\.|$)")


def find(model: nn.Module) -> list[Candidate]:
    """Linears inside repeated blocks (children of a `ModuleList`); all linears where there are no blocks."""
    linears = {
        name: module
        for name, module in model.named_modules()
        # nn.MultiheadAttention reads the weight of such a one without calling it.
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks = {name: _outermost_block(name, lists) for name in linears}
    repeated = any(block is not None for block in blocks.values())
    found = []
    for name in linears:
        block = blocks[name]
        if _SENSITIVE.search(name) or (repeated and block is None):
            continue
        role = next((role for pattern, role in _ROLES if pattern.search(name)), "linear")
        stream = "text" if _TEXT.search(name) else "image"
        found.append(Candidate(name, block or name, role, stream, reads=name))  # type: ignore[arg-type]
    return found


def _outermost_block(name: str, lists: list[str]) -> str | None:
    inside = [one for one in lists if one == "" or name.startswith(f"{one}.")]
    if not inside:
        return None
    outer = min(inside, key=len)
    rest = name.removeprefix(outer).lstrip(".").split(".")
    # to_out is a ModuleList too ([linear, dropout]): a list of one linear's parts is no list of blocks.
    if len(rest) == 1:
        return None
    return f"{outer}.{rest[0]}" if outer else rest[0]


GENERIC = Architecture(class_name="*", rules=(), find=find)
