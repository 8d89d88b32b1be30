"""What host code remembers of arguments: never more than what it remembered depends on."""

import pytest
import torch
from torch import nn

from rtlynx.cuda import forms, tuning
from rtlynx.cuda.sm90 import gemm, weight_sparse
from rtlynx.cuda.sm90.prologues import PROLOGUES, _bind, bind
from rtlynx.cuda.sm90.weights import Weights
from rtlynx.math.formats import FP8_SPARSE
from rtlynx.math.fp8 import quantize_tokens
from rtlynx.math.tiles import packed_a_bytes


def normal(*shape):
    return torch.randn(*shape).bfloat16()


@torch.no_grad()
def test_a_form_is_asked_once_and_a_refusal_each_time():
    asked = []

    @forms.by_form
    def rows(x, _parts):
        asked.append(x)
        if x.ndim != 2:
            raise ValueError("x is (M, K)")
        return x.shape[0]

    assert [rows(normal(3, 8), [4, 4]), rows(normal(3, 8), [4, 4])] == [3, 3]
    assert len(asked) == 1
    others = [normal(4, 8), torch.randn(3, 8), normal(8, 3).T, normal(3, 8).to("meta")]
    assert [rows(one, [4, 4]) for one in others] == [4, 3, 3, 3]
    assert rows(normal(3, 8), [8]) == 3
    assert len(asked) == 6
    for _ in range(2):
        with pytest.raises(ValueError, match="M, K"):
            rows(normal(8), [4, 4])


def test_where_gradients_are_recorded_nothing_is_remembered():
    asked = []
    wants = forms.by_form(lambda x: asked.append(x) or x.requires_grad)
    plain, trained = normal(2, 4), nn.Parameter(normal(2, 4))
    assert [wants(plain), wants(trained)] == [False, True]
    assert len(asked) == 2


@torch.no_grad()
def test_forms_without_end_are_not_kept(monkeypatch):
    monkeypatch.setattr(forms, "_MOST", 2)
    known = {}
    for form in range(5):
        forms.keep(known, (form,), form)
    assert known == {(4,): 4}


@torch.no_grad()
@pytest.mark.parametrize("name", PROLOGUES)
def test_a_known_form_packs_as_a_new_one(name):
    """At other addresses too, aligned or not."""
    prologue = PROLOGUES[name]

    def arguments(offset):
        made = []
        for _, kind in prologue.arguments:
            if kind == "choice":
                made.append(torch.arange(18, dtype=torch.int32)[offset:][:10].view(2, 5))
                continue
            rows = kind == "rows"
            shape = (2, 5, 32) if rows else (32,) if kind == "columns" else (2, 32)
            entries = 10 * 32 if rows else 32 if kind == "columns" else 64
            made.append(1e-6 if kind == "float" else normal(entries + 8)[offset:][:entries].view(shape))
        return made

    kept = [arguments(offset) for offset in (0, 8, 0)]
    for given in kept:
        found, expected = bind(prologue, given), _bind(prologue, given)
        assert found[:6] == expected[:6]
    odd = arguments(1)
    found, expected = bind(prologue, odd), _bind(prologue, odd)
    assert (found is None) is (expected is None)


@torch.no_grad()
def test_products_are_of_weights_at_their_places(monkeypatch):
    monkeypatch.setattr(gemm, "_encode", lambda *key: repr(key).encode()[:128].ljust(128))
    of, other = (Weights(normal(64, 64), None, normal(64)) for _ in range(2))
    checks = []

    def product(layers, *where):
        return gemm.product_of(layers, *(where or (128, (0,), 0)), ("form",), lambda: checks.append(1))

    first = product([of])
    of.weight.zero_()  # contents are no part of it
    assert product([of]) is product([of])
    assert len(checks) == 1
    assert product([other]).maps != first.maps
    assert product([of._replace(bias=None)]).vectors != first.vectors
    assert product([of, other], 128, (0, 0), 0).n == 128
    assert product([of], 256, (0,), 0).plan != first.plan
    with tuning.forced(tuning.CANDIDATES[of.format][-1]):
        assert product([of]).plan.config is tuning.CANDIDATES[of.format][-1]
    assert product([of], 0, (0,), 0).plan is None
    asked = len(checks)
    with torch.enable_grad():
        product([of])
    assert len(checks) == asked + 1


@torch.no_grad()
def test_copies_that_kernels_read_are_not_remembered(monkeypatch):
    monkeypatch.setattr(gemm, "_encode", lambda *key: bytes(128))
    of = Weights(normal(64, 65)[:, :64], None, None)  # rows at no multiple of 16 bytes
    one, two = (gemm.product_of([of], 128, (0,), 0) for _ in range(2))
    assert one is not two
    assert one.owners[0].weight is not of.weight


@torch.no_grad()
def test_products_by_sparse_weights_are_of_inputs_at_their_places(monkeypatch):
    monkeypatch.setattr(gemm, "_encode", lambda *key: repr(key).encode()[:128].ljust(128))
    launched = []
    monkeypatch.setattr(gemm, "start_gemm", lambda product, *_: launched.append(product))
    x, checks = quantize_tokens(normal(33, 64)), []
    weight = torch.zeros(packed_a_bytes(72, 64, FP8_SPARSE), dtype=torch.uint8)
    of = Weights(weight, None, None, torch.ones(72))

    def launch(values, bias=None, count=1, weight=weight):
        layers = [of._replace(bias=bias, weight=weight)] * count
        y = weight_sparse.launch_weight_sparse(
            values, x.scale, layers, [None] * count, (count,), lambda: checks.append(1)
        )
        assert y.shape == (33, 72 * count)
        return launched[-1]

    first = launch(x.values)
    assert launch(x.values) is launch(x.values)
    assert len(checks) == 1
    assert launch(x.values, count=3) is launch(x.values, count=3)
    assert launch(x.values, weight=weight.clone()).maps != first.maps
    assert launch(x.values)._replace(owners=()) == first._replace(owners=())
    assert launch(x.values.clone()).maps != first.maps
    assert launch(x.values, normal(72)).vectors != first.vectors
    aside = torch.zeros(33, 65, dtype=torch.uint8).view(x.values.dtype)[:, :64]  # copied to be read
    assert launch(aside) is not launch(aside)
