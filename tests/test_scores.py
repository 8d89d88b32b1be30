"""A selection rule is an entry of a table: patterns, recipes, layers and files know it by its name."""

import pytest
import torch
from helpers import flux_call, output, tiny_flux

from rtlynx import Pattern, Recipe, load, nm_mask, save, sparsify
from rtlynx.math.scores import SCORES, Score
from rtlynx.math.selection import pattern_mask
from rtlynx.models import sparse_layers
from rtlynx.ops import sparse_linear as ops


@pytest.fixture
def signed(monkeypatch):
    """A rule that keeps the largest values, whatever their magnitude; it has no kernel."""
    monkeypatch.setitem(SCORES, "signed", Score("signed", lambda x: x.float()))
    return "signed"


def test_a_new_rule_selects_by_its_score(signed):
    x = torch.tensor([[-9.0, 1.0, 2.0, -3.0], [5.0, 5.0, 5.0, 5.0]])
    expected = [[False, True, True, False], [True, True, False, False]]  # ties to the lower index
    assert pattern_mask(x, Pattern(score=signed)).tolist() == expected
    assert pattern_mask(x, Pattern(1, 4, score=signed)).tolist() == [
        [False, False, True, False],
        [True] + 3 * [False],
    ]
    assert nm_mask(x).tolist()[0] == [True, False, False, True]


def test_layers_and_files_keep_it(signed, tmp_path):
    model = sparsify(tiny_flux(), Recipe.immediate(score=signed))
    assert {layer.pattern.score for layer in sparse_layers(model).values()} == {signed}
    y = output(model, flux_call())
    assert not torch.equal(y, output(sparsify(tiny_flux()), flux_call()))
    save(model, tmp_path / "lynx")
    again = load(tiny_flux(), tmp_path / "lynx")
    assert torch.equal(output(again, flux_call()), y)


def test_the_operators_take_it(signed):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = ops.compress(x, None, "adjacent", [], False, "bf16-sparse", signed)[0]
    assert not torch.equal(packed, ops.compress(x, None, "adjacent", [], False)[0])


def test_kernels_say_that_they_have_it_not(signed):
    from rtlynx.ops.dispatch import unsupported_reason

    x, weight = torch.empty(3, 64, dtype=torch.bfloat16), torch.empty(8, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        reason = unsupported_reason(x, Pattern(score=signed), "scale", weight, None, None, None)
    assert reason == "the kernels do not select by the score 'signed'"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pattern(score="largest"),
        lambda: Recipe(score="largest"),
        lambda: ops.compress(
            torch.zeros(1, 4).bfloat16(), None, "adjacent", [], False, "bf16-sparse", "largest"
        ),
    ],
)
def test_an_unknown_rule_is_refused_with_those_there_are(make):
    with pytest.raises(ValueError, match="score is one of magnitude; got 'largest'"):
        make()
