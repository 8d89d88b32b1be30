"""2:4-sparse weights: the choice of what stays and the refit, against independent formulas."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtlynx.calibration import weight_pruning
from rtlynx.calibration.moments import RunningMoments
from rtlynx.calibration.solve import solve_pruned
from rtlynx.calibration.weight_pruning import damped, least_squares, prune, prune_by, sparsegpt
from rtlynx.math.fp8 import dequantize, is_two_of_four, quantize_tokens, quantize_weight


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(k, seed=1):
    """Moments of inputs that lean on each other, where updates of what is kept pay."""
    x = normal(256, k, seed=seed) @ normal(k, k, seed=seed + 1)
    return x.T @ x / 256


def exact(weight, kept, hessian):
    """Each row's least-squares solution on what it keeps, by its normal equations."""
    found = torch.zeros_like(weight)
    for row, (w, keep) in enumerate(zip(weight, kept, strict=True)):
        found[row, keep] = torch.linalg.solve(hessian[keep][:, keep], hessian[keep] @ w)
    return found


def error(weight, found, gram):
    off = weight - found
    return float(((off @ gram) * off).sum())


def test_sparsegpt_by_hand():
    """Inputs in two pairs of equal ones, nearly: one of a pair does the work of both."""
    pair = torch.tensor([[1.0, 0.999], [0.999, 1.0]], dtype=torch.float64)
    found, kept = sparsegpt(torch.ones(1, 4, dtype=torch.float64), torch.block_diag(pair, pair))
    assert kept.tolist() == [[False, True, False, True]]
    assert found[0].tolist() == pytest.approx([0, 1.999, 0, 1.999])


def test_sparsegpt_is_the_surgeons_update_column_by_column():
    """The optimal brain surgeon's formula, with the inverse of what is left made anew for each column."""
    weight, hessian = normal(3, 12), correlated(12)
    expected, left = weight.clone(), list(range(12))
    found, kept = sparsegpt(weight, hessian)
    for j in range(12):
        inverse = hessian[left][:, left].inverse()
        off = torch.where(kept[:, j], 0.0, expected[:, j]) / inverse[0, 0]
        expected[:, left] -= off[:, None] * inverse[0]
        left.pop(0)
    assert torch.allclose(found, expected, atol=1e-9)


def test_columns_in_blocks_are_columns_in_one(monkeypatch):
    weight, hessian = normal(5, 24), correlated(24)
    whole = sparsegpt(weight, hessian)
    monkeypatch.setattr(weight_pruning, "COLUMNS", 8)
    for a, b in zip(whole, sparsegpt(weight, hessian), strict=True):
        assert torch.allclose(a.double(), b.double())


@pytest.mark.parametrize("k", [4, 8, 16])
def test_least_squares_are_those_of_the_normal_equations(k):
    weight, hessian = normal(6, k), correlated(k)
    start, kept = sparsegpt(weight, hessian)
    found = least_squares(weight, start, kept, hessian)
    assert torch.allclose(found, exact(weight, kept, hessian), atol=1e-6)
    assert error(weight, found, hessian) <= error(weight, start, hessian) + 1e-12


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), groups=st.integers(1, 6))
def test_no_group_keeps_more_than_two_and_rows_are_solved_apart(seed, n, groups):
    k = 4 * groups
    weight, hessian = normal(n, k, seed=seed), damped(correlated(k, seed=seed))
    found = prune(weight, hessian)
    assert is_two_of_four(found)
    rows = torch.cat([prune(row[None], hessian) for row in weight])
    torch.testing.assert_close(found, rows, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_nearer_than_the_largest_weights_refitted(seed):
    """Of many outputs together: for one, and for few inputs, a greedy choice may lose to another."""
    weight, hessian = normal(64, 64, seed=seed), damped(correlated(64, seed=seed))
    largest = prune_by(weight, weight.abs())
    refitted = exact(weight, largest != 0, hessian)
    assert error(weight, prune(weight, hessian), hessian) < 0.95 * error(weight, refitted, hessian)


def moments_of(x):
    found = RunningMoments(x.shape[1], dtype=torch.float64)
    found.add(x, quantize_tokens(x).dequantize())
    return found.mean()


@pytest.mark.parametrize("intercept", [False, True])
def test_a_solved_layer_is_least_squares_on_quantised_tokens(intercept):
    """From stacked tokens, for the mask that was chosen: what is kept, then its scales, then the bias."""
    x = normal(500, 16) @ normal(16, 16, seed=1) + 3
    weight, bias, ridge = normal(10, 16, seed=2), normal(10, seed=3), 0.05
    biases = [bias] if intercept else None
    [found] = solve_pruned(moments_of(x), [weight], ridge=ridge, biases=biases)
    assert found.weight_sparse
    assert found.refitted
    assert is_two_of_four(found.weight)
    s = quantize_tokens(x).dequantize().double()
    seen, wanted = (s - s.mean(0), x - x.mean(0)) if intercept else (s, x)
    gram, cross = seen.T @ seen / len(x), seen.T @ wanted / len(x)
    lam = ridge * gram.diagonal().mean()
    damped_gram = gram + lam * torch.eye(16, dtype=torch.float64)
    kept, expected = found.weight.float() != 0, torch.zeros_like(weight)
    assert int(kept.sum()) == weight.numel() // 2
    for row, (w, keep) in enumerate(zip(weight, kept, strict=True)):
        expected[row, keep] = torch.linalg.solve(damped_gram[keep][:, keep], (cross @ w + lam * w)[keep])
    quantised = quantize_weight(expected, gram)
    # Conjugate gradients stop short of the exact solution: a few entries may round otherwise.
    got = dequantize(found.weight, found.weight_scale).double()
    assert float((got - quantised.dequantize()).norm() / expected.norm()) < 0.01
    y, target = s @ got.T, x @ weight.T
    if intercept:
        y, target = y + found.bias, target + bias
        assert torch.allclose(y.mean(0), target.mean(0), atol=1e-6)
    energy = (x @ weight.T).square().sum()
    assert found.error == pytest.approx(float((y - target).square().sum() / energy), rel=1e-6)
    assert found.error < found.error_before


def test_joint_layers_are_those_solved_apart():
    moments = moments_of(normal(200, 12) @ normal(12, 12, seed=1))
    parts = normal(4, 12, seed=2), normal(8, 12, seed=3)
    for part, found in zip(parts, solve_pruned(moments, parts, ridge="auto"), strict=True):
        [alone] = solve_pruned(moments, [part], ridge="auto")
        assert torch.equal(alone.weight.view(torch.uint8), found.weight.view(torch.uint8))
        assert found.weight_sparse
        assert (found.error, found.error_before) == pytest.approx((alone.error, alone.error_before))


def test_a_choice_near_the_best_of_all_masks():
    """Against brute force over the 36 masks of each output of 8 inputs."""
    weight, gram = normal(6, 8), correlated(8)
    pairs, best = list(itertools.combinations(range(4), 2)), 0.0
    for row in weight:
        tried = []
        for one, other in itertools.product(pairs, pairs):
            kept = torch.zeros(1, 8, dtype=torch.bool)
            kept[0, [*one, *(4 + i for i in other)]] = True
            tried.append(error(row[None], exact(row[None], kept, gram), gram))
        best += min(tried)
    assert best * (1 - 1e-9) <= error(weight, prune(weight, gram), gram) < 2.5 * best
