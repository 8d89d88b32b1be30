"""Baselines against work by hand, and against what no formula may break."""

import itertools

import baselines
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(k, seed=1, tokens=64):
    x = normal(tokens, k, seed=seed) * torch.linspace(0.2, 3, k, dtype=torch.float64)
    return x.T @ x / tokens


WEIGHT = torch.tensor([[4.0, -3.0, 2.0, 1.0], [1.0, 2.0, -3.0, 4.0]])
UNIT = torch.eye(4, dtype=torch.float64)


def test_magnitude_by_hand():
    assert baselines.magnitude(WEIGHT, UNIT).weight.tolist() == [[4, -3, 0, 0], [0, 0, -3, 4]]


def test_wanda_by_hand():
    gram = torch.diag(torch.tensor([1.0, 1.0, 9.0, 25.0], dtype=torch.float64))  # norms 1, 1, 3, 5
    # Scores 4, 3, 6, 5 and 1, 2, 9, 20.
    assert baselines.wanda(WEIGHT, gram).weight.tolist() == [[0, 0, 2, 1], [0, 0, -3, 4]]


def test_ria_by_hand():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [9.0, 0.5, 0.5, 10.0]])
    gram = torch.diag(torch.tensor([1.0, 16.0, 1.0, 1.0], dtype=torch.float64))  # norms 1, 4, 1, 1
    expected = torch.tensor(
        [
            [1 / 10 + 1 / 10, (2 / 10 + 2 / 2.5) * 2, 3 / 10 + 3 / 3.5, 4 / 10 + 4 / 14],
            [9 / 20 + 9 / 10, (0.5 / 20 + 0.5 / 2.5) * 2, 0.5 / 20 + 0.5 / 3.5, 10 / 20 + 10 / 14],
        ],
        dtype=torch.float64,
    )
    assert torch.allclose(baselines.ria_score(weight, gram), expected)
    assert baselines.ria(weight, gram).weight.tolist() == [[0, 2, 3, 0], [9, 0, 0, 10]]


def test_bawa_style_by_hand():
    weight = torch.tensor([[3.0, 0.0, 0.0, 1.0], [4.0, 0.0, 0.0, 0.0]])
    gram = torch.diag(torch.tensor([4.0, 1.0, 1.0, 16.0], dtype=torch.float64))
    inputs = torch.tensor([5.0, 0.0, 0.0, 1.0], dtype=torch.float64) / 1.5
    outputs = torch.tensor([10.0**0.5, 4.0], dtype=torch.float64)
    outputs = outputs / outputs.mean()
    score = baselines.bawa_style_score(weight, gram, 1.0, 1.0, 0.5)
    assert float(score[0, 0]) == pytest.approx(float((3 / inputs[0] + 3 / outputs[0]) * 2**0.5))
    assert float(score[0, 3]) == pytest.approx(float((1 / inputs[3] + 1 / outputs[0]) * 4**0.5))
    assert not score[:, 1:3].any()


def test_bawa_style_without_norms_and_damping_is_wanda():
    weight, gram = normal(8, 16), moments(16)
    score = baselines.bawa_style_score(weight, gram, 0.0, 0.0, 1.0)
    assert torch.allclose(score, 2 * baselines.wanda_score(weight, gram))


def test_slim_at_full_rank_is_the_dense_weight():
    weight, gram = normal(4, 8), moments(8)
    whole = baselines.slim(weight, gram, rank=0.999)
    assert whole.rank == 4
    assert torch.allclose(whole.weight, weight)


def test_slim_is_the_best_low_rank_part_in_its_own_metric():
    weight, gram = normal(12, 20), moments(20)
    x = baselines.column_norms(gram)
    solution = baselines.slim(weight, gram, rank=0.1)
    missing = weight - baselines.wanda(weight, gram).weight
    assert solution.rank == 2
    values = torch.linalg.svdvals(missing * x)
    left = float(((weight - solution.weight) * x).square().sum())
    assert left == pytest.approx(float(values[2:].square().sum()), rel=1e-9)  # Eckart, Young
    for seed in range(20):
        other = normal(12, 2, seed=seed) @ normal(2, 20, seed=seed + 100) * 0.1
        assert float(((missing - other) * x).square().sum()) > left


def test_silent_channels_break_nothing():
    gram = moments(8)
    gram[3], gram[:, 3] = 0, 0
    weight = normal(4, 8)
    weight[2] = 0
    for method in baselines.BASELINES.values():
        assert torch.isfinite(method(weight, gram).weight).all()
        assert torch.isfinite(method(weight, torch.zeros_like(gram)).weight).all()


def test_wanda_is_optimal_for_uncorrelated_inputs():
    weight = normal(3, 4)
    gram = torch.diag(torch.tensor([0.3, 2.0, 1.0, 5.0], dtype=torch.float64))
    error = baselines.output_error(weight, baselines.wanda(weight, gram).weight, gram)
    least = 0.0
    for row in weight:  # each output on its own, all six choices
        tried = []
        for kept in itertools.combinations(range(4), 2):
            off = row.clone()
            off[list(kept)] = 0
            tried.append(float(off @ gram @ off))
        least += min(tried)
    assert error == pytest.approx(least / float(((weight @ gram) * weight).sum()))


def exact(weight, kept, hessian):
    """Each row's least-squares solution on what it keeps, by its normal equations."""
    found = torch.zeros_like(weight)
    for row, (w, keep) in enumerate(zip(weight, kept, strict=True)):
        own = hessian[keep][:, keep]
        found[row, keep] = torch.linalg.solve(own, hessian[keep] @ w)
    return found


def correlated(k, seed=1):
    """Moments of inputs that lean on each other, where updates of what is kept pay."""
    x = normal(256, k, seed=seed) @ normal(k, k, seed=seed + 1)
    return x.T @ x / 256


def test_refit_is_near_the_best_of_all_masks():
    """Against brute force over the 36 masks of each output of 8 inputs."""
    weight, gram = normal(6, 8), correlated(8)
    pairs = list(itertools.combinations(range(4), 2))
    best = 0.0
    for row in weight:
        tried = []
        for one, other in itertools.product(pairs, pairs):
            kept = torch.zeros(1, 8, dtype=torch.bool)
            kept[0, [*one, *(4 + i for i in other)]] = True
            off = row - exact(row[None], kept, gram)[0]
            tried.append(float(off @ gram @ off))
        best += min(tried)
    best /= float(((weight @ gram) * weight).sum())
    error = baselines.output_error(weight, baselines.refit(weight, gram).weight, gram)
    assert best <= error < 2.5 * best
    for name in ("magnitude", "wanda"):
        assert error < 0.7 * baselines.output_error(
            weight, baselines.BASELINES[name](weight, gram).weight, gram
        )


def test_refit_in_e4m3_lies_on_the_grid_and_costs_little():
    weight, gram = normal(8, 64), correlated(64)
    whole, rounded = (baselines.BASELINES[name](weight, gram) for name in ("refit", "refit-fp8"))
    assert rounded.fp8
    assert torch.equal(whole.weight != 0, rounded.weight != 0)
    for row in rounded.weight:  # four significant bits, but for one factor a row
        distinct = row[row != 0].abs().log2()
        mantissas = (distinct - distinct[0]).sub((distinct - distinct[0]).floor()).exp2()
        assert len(set(mantissas.mul(1e5).round().tolist())) <= 8 + 7
    errors = [baselines.output_error(weight, one.weight, gram) for one in (whole, rounded)]
    assert errors[0] < errors[1] < 1.5 * errors[0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), groups=st.integers(1, 4))
def test_what_every_baseline_keeps_to(seed, n, groups):
    k = 4 * groups
    weight, gram = normal(n, k, seed=seed), moments(k, seed=seed + 1)
    errors = {}
    for name, method in baselines.BASELINES.items():
        pruned = method(weight, gram)
        errors[name] = baselines.output_error(weight, pruned.weight, gram)
        if pruned.rank:
            continue
        kept = pruned.weight != 0
        assert (kept.reshape(n, groups, 4).sum(-1) == 2).all(), name
        if not name.startswith("refit"):
            assert torch.equal(pruned.weight[kept], weight[kept]), name  # what is kept is not changed
    # Wanda's own choice is on BaWA's grid (exponents 0, 0, 1), which takes the best of it.
    assert errors["bawa-style"] <= errors["wanda"] + 1e-12


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100))
def test_no_score_depends_on_units(seed, scale):
    weight, gram = normal(4, 8, seed=seed), moments(8, seed=seed + 1)
    for name, method in baselines.BASELINES.items():
        once = method(weight, gram).weight
        assert torch.allclose(method(weight * scale, gram).weight, once * scale, rtol=1e-6), name
        assert torch.allclose(method(weight, gram * scale).weight, once, rtol=1e-6, atol=1e-9), name
