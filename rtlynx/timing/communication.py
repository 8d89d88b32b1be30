"""What cards send each other in one step, from the models' shapes: a bound on what several cards give.

As diffusers 0.42 does it: nothing is sent while anything is computed, and everything in bfloat16. What a text
and an image stream sum apart counts as one sum of all tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

NVLINK, INFINIBAND = 450e9, 50e9  # bytes a second that a card sends: NVLink 4, and one 400 Gb/s port a card
BFLOAT16 = 2  # bytes


class Traffic(NamedTuple):
    """What a model's step exchanges.

    width : of the residual stream
    attentions : joint attentions, one a block
    sums : row-parallel products whose outputs are summed: two a double block, one a single block
    """

    width: int
    attentions: int
    sums: int


TRAFFIC = {
    "flux1-dev": Traffic(3072, 19 + 38, 2 * 19 + 38),
    "flux2-klein": Traffic(3072, 5 + 20, 2 * 5 + 20),
    "qwen-image": Traffic(3072, 60, 2 * 60),
}


def ulysses_bytes(of: Traffic, tokens: int, cards: int, itemsize: float = BFLOAT16) -> float:
    """Bytes that a card sends: all-to-all of q, k, v and the output, its tokens' share for the other heads.

    Parameters
    ----------
    tokens : image and text, of all cards together.
    itemsize : bytes an entry.
    """
    return of.attentions * 4 * tokens * of.width * itemsize * (cards - 1) / cards**2


def ring_bytes(of: Traffic, tokens: int, cards: int, itemsize: float = BFLOAT16) -> float:
    """Bytes that a card sends: its keys and values, to every other card. See `ulysses_bytes`."""
    return of.attentions * 2 * tokens * of.width * itemsize * (cards - 1) / cards


def tensor_bytes(of: Traffic, tokens: int, cards: int, itemsize: float = BFLOAT16) -> float:
    """Bytes that a card sends: sums of all tokens, each scattered and gathered. See `ulysses_bytes`."""
    return of.sums * 2 * tokens * of.width * itemsize * (cards - 1) / cards


ARRANGEMENTS: dict[str, Callable[[Traffic, int, int], float]] = {
    "Ulysses": ulysses_bytes,
    "ring": ring_bytes,
    "tensor parallel": tensor_bytes,
}


def hosts_seconds(of: Traffic, tokens: int, cards: int, hosts: int) -> float:
    """Seconds a step that `hosts` of so many cards each exchange: Ulysses inside a host, ring across.

    A card exchanges its host's tokens by NVLink, then keys and values of its heads with its counterparts by
    InfiniBand.
    """
    inside = ulysses_bytes(of, tokens // hosts, cards)
    across = ring_bytes(of, tokens, hosts) / cards
    return inside / NVLINK + across / INFINIBAND


def ceiling(one_card_s: float, cards: int, exchange_s: float) -> float:
    """Speed of `cards` over one, if all that is computed splits evenly and exchanges take `exchange_s`."""
    return one_card_s / (one_card_s / cards + exchange_s)
