"""What cards send in a step, beside counts by hand."""

import pytest
import torch

from rtlynx.timing.communication import (
    INFINIBAND,
    NVLINK,
    TRAFFIC,
    ceiling,
    hosts_seconds,
    ring_bytes,
    tensor_bytes,
    ulysses_bytes,
)
from rtlynx.timing.full_models import MODELS

FLUX, TOKENS = TRAFFIC["flux1-dev"], 4096 + 512
TENSOR = TOKENS * 3072 * 2  # bytes of one activation


def test_two_cards_exchange_half_of_their_half():
    # q, k, v and the output: each card holds half of the tokens, and sends half of the heads of those.
    assert ulysses_bytes(FLUX, TOKENS, 2) == 57 * 4 * TENSOR / 4
    assert ring_bytes(FLUX, TOKENS, 2) == 57 * 2 * TENSOR / 2
    # 19 double blocks sum twice, 38 single ones once.
    assert tensor_bytes(FLUX, TOKENS, 2) == 76 * TENSOR


def test_more_cards_send_less_each_by_ulysses_alone():
    for cards in (2, 4, 8):
        fewer, more = cards, 2 * cards
        assert ulysses_bytes(FLUX, TOKENS, more) < ulysses_bytes(FLUX, TOKENS, fewer)
        assert ring_bytes(FLUX, TOKENS, more) > ring_bytes(FLUX, TOKENS, fewer)
        assert tensor_bytes(FLUX, TOKENS, more) > tensor_bytes(FLUX, TOKENS, fewer)


def test_eight_bits_are_half():
    assert ulysses_bytes(FLUX, TOKENS, 2, itemsize=1) == ulysses_bytes(FLUX, TOKENS, 2) / 2


def test_hosts_exchange_keys_and_values_of_their_heads():
    # Two hosts of eight: a card has a sixteenth of the tokens, then an eighth of the heads of half of them.
    inside = 57 * 4 * (TENSOR / 16) * 7 / 8
    across = 57 * 2 * TENSOR / 2 / 8
    assert hosts_seconds(FLUX, TOKENS, 8, 2) == pytest.approx(inside / NVLINK + across / INFINIBAND)
    assert hosts_seconds(FLUX, TOKENS, 8, 1) == pytest.approx(ulysses_bytes(FLUX, TOKENS, 8) / NVLINK)


def test_the_ceiling_is_the_number_of_cards_where_nothing_is_sent():
    assert ceiling(0.08, 2, 0.0) == 2
    assert ceiling(0.08, 2, 0.04) == 1


@pytest.mark.parametrize("name", TRAFFIC)
def test_the_shapes_are_those_of_the_models(name):
    with torch.device("meta"):
        model = MODELS[name].build()
    blocks = len(model.transformer_blocks), len(getattr(model, "single_transformer_blocks", ()))
    traffic = TRAFFIC[name]
    assert (traffic.width, traffic.attentions) == (model.inner_dim, sum(blocks))
    assert traffic.sums == 2 * blocks[0] + blocks[1]
