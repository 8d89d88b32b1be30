"""The closed forms reach the optimum of the problem they claim, found here by other means."""

import math

import numpy as np
import pytest
import torch

from rtlynx.calibration.layer_errors import LayerErrors
from rtlynx.calibration.moments import RunningMoments, balanced
from rtlynx.calibration.solve import RIDGES, solve_joint, solve_layers, solve_lowrank, solve_refit
from rtlynx.math.fp8 import dequantize, quantize_tokens, quantize_weight
from rtlynx.math.selection import nm_mask, norm_scale, select
from rtlynx.math.tf32 import rounded_to_tf32

M, K, N, RANK = 300, 16, 12, 3


def solve_layer(moments, weight, bias=None, **settings):
    return solve_layers(moments, [weight], biases=None if bias is None else [bias], **settings)[0]


def problem(seed: int, norm: bool = False):
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=gen, dtype=torch.float64)
    x = torch.randn(M, K, generator=gen, dtype=torch.float64) @ mix
    w = torch.randn(N, K, generator=gen, dtype=torch.float64)
    mask = nm_mask(x)
    s = select(x, mask) * (norm_scale(x, mask).double() if norm else 1)
    moments = RunningMoments(K, dtype=torch.float64)
    moments.add(x[:100], s[:100])
    moments.add(x[100:], s[100:])
    return x, s, w, moments.mean()


def objective(x, s, w, new, low, lam, mu):
    """The penalised problem, straight from its definition."""
    error = s @ new.T + x @ low - x @ w.T
    return error.square().sum() + lam * (new - w).square().sum() + mu * low.square().sum()


def descend(x, s, w, lam, mu, *, refit: bool, rank: int, seed: int, start=None):
    """Long gradient descent (L-BFGS) from a random start, knowing nothing of the closed form."""
    gen = torch.Generator().manual_seed(seed)
    new = w.clone().requires_grad_(refit)
    a = torch.randn(K, rank, generator=gen, dtype=torch.float64).mul_(0.3).requires_grad_()
    b = torch.randn(N, rank, generator=gen, dtype=torch.float64).mul_(0.3).requires_grad_()
    free = [p for p, used in ((new, refit), (a, rank > 0), (b, rank > 0)) if used]
    optimiser = torch.optim.LBFGS(
        free, max_iter=3000, tolerance_grad=1e-11, tolerance_change=1e-8, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = objective(x, s, w, new, a @ b.T, lam, mu)
        loss.backward()
        return loss

    optimiser.step(closure)
    return float(closure())


@pytest.mark.parametrize("lam", [1.0, 100.0, 3000.0])
def test_refit_reaches_what_descent_reaches(lam):
    x, s, w, moments = problem(0)
    zero = torch.zeros(K, N, dtype=torch.float64)
    closed = float(objective(x, s, w, solve_refit(moments, w, lam / M), zero, lam, 0.0))
    assert closed == pytest.approx(descend(x, s, w, lam, 0.0, refit=True, rank=0, seed=1), rel=1e-6)


@pytest.mark.parametrize("mu", [1e-3, 50.0, 2000.0])
@pytest.mark.parametrize("norm", [False, True])
def test_lowrank_reaches_what_descent_reaches(mu, norm):
    x, s, w, moments = problem(2, norm)
    lowrank_a, lowrank_b = solve_lowrank(moments, w, RANK, mu / M)
    closed = float(objective(x, s, w, w, (lowrank_b @ lowrank_a).T, 0.0, mu))
    found = min(descend(x, s, w, 0.0, mu, refit=False, rank=RANK, seed=seed) for seed in range(3))
    assert closed <= found * (1 + 1e-6)
    assert closed == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize(("lam", "mu"), [(1.0, 1.0), (100.0, 10.0), (3000.0, 3000.0)])
def test_joint_reaches_what_descent_reaches(lam, mu):
    x, s, w, moments = problem(3)
    new, lowrank_a, lowrank_b = solve_joint(moments, w, RANK, lam / M, mu / M)
    closed = float(objective(x, s, w, new, (lowrank_b @ lowrank_a).T, lam, mu))
    found = min(descend(x, s, w, lam, mu, refit=True, rank=RANK, seed=seed) for seed in range(3))
    assert closed <= found * (1 + 1e-6)
    assert closed == pytest.approx(found, rel=1e-4)


def test_joint_beats_one_after_the_other():
    x, s, w, moments = problem(4)
    lam = mu = 300.0
    new, lowrank_a, lowrank_b = solve_joint(moments, w, RANK, lam / M, mu / M)
    joint = objective(x, s, w, new, (lowrank_b @ lowrank_a).T, lam, mu)
    alone = solve_refit(moments, w, lam / M)
    rest = x @ w.T - s @ alone.T
    left, sigma, right = torch.linalg.svd(torch.linalg.lstsq(x, rest).solution, full_matrices=False)
    truncated = left[:, :RANK] * sigma[:RANK] @ right[:RANK]
    assert joint < objective(x, s, w, alone, truncated, lam, mu)


@pytest.mark.parametrize("seed", range(3))
def test_random_search_around_the_solution_never_beats_it(seed):
    x, s, w, moments = problem(5)
    lam, mu = 50.0, 50.0
    new, lowrank_a, lowrank_b = solve_joint(moments, w, RANK, lam / M, mu / M)
    best = float(objective(x, s, w, new, (lowrank_b @ lowrank_a).T, lam, mu))
    gen = torch.Generator().manual_seed(seed)

    def jitter(t, step):
        return t + torch.randn(t.shape, generator=gen, dtype=t.dtype) * t.std() * step

    for step in (1e-3, 1e-2, 1e-1):
        for _ in range(100):
            low = (jitter(lowrank_b, step) @ jitter(lowrank_a, step)).T
            tried = float(objective(x, s, w, jitter(new, step), low, lam, mu))
            assert tried >= best * (1 - 1e-9)


def test_more_outputs_than_inputs_gives_the_same_optimum():
    gen = torch.Generator().manual_seed(6)
    x, s, _, moments = problem(6)
    w = torch.randn(3 * K, K, generator=gen, dtype=torch.float64)
    lowrank_a, lowrank_b = solve_lowrank(moments, w, RANK, 10.0 / M)
    assert lowrank_a.shape == (RANK, K)
    assert lowrank_b.shape == (3 * K, RANK)
    error = x @ w.T - s @ w.T
    gram = x.T @ x + 10.0 * torch.eye(K, dtype=torch.float64)
    full = torch.linalg.solve(gram, x.T @ error)
    root = torch.linalg.cholesky(gram).T
    sigma = torch.linalg.svdvals(root @ full)
    expected = error.square().sum() - sigma[:RANK].square().sum()
    found = (error - x @ (lowrank_b @ lowrank_a).T).square().sum() + 10.0 * (
        lowrank_b @ lowrank_a
    ).square().sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-8)


def test_layer_error_from_moments_is_the_error_of_the_outputs():
    x, s, w, moments = problem(7)
    new, lowrank_a, lowrank_b = solve_joint(moments, w, RANK, 10.0, 10.0)
    y = x @ w.T
    direct = (s @ new.T + x @ lowrank_a.T @ lowrank_b.T - y).square().sum() / y.square().sum()
    errors = LayerErrors(moments, w)
    found = errors.relative(errors.of(new, lowrank_a, lowrank_b))
    assert found == pytest.approx(float(direct), rel=1e-9)


def one_token(x, s):
    return x[:1], s[:1]


def constant_channels(x, s):
    x, s = x.clone(), s.clone()
    x[:, ::4] = 1.0
    s[:, ::4] = 1.0
    return x, s


def rank_deficient(x, s):
    return x[:5], s[:5]


def all_zero(x, s):
    return torch.zeros_like(x), torch.zeros_like(s)


def tiny(x, s):
    return x * 1e-18, s * 1e-18


@pytest.mark.parametrize("make", [one_token, constant_channels, rank_deficient, all_zero, tiny])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "refit"), [(4, False), (0, True), (4, True)])
def test_ill_conditioned_moments_give_finite_solutions_that_do_no_harm(make, dtype, rank, refit):
    x, s, w, _ = problem(8)
    x, s = make(x, s)
    moments = RunningMoments(K, dtype=dtype)
    moments.add(x, s)
    solution = solve_layer(moments.mean(), w, rank=rank, refit=refit, ridge=1e-2)
    for tensor in (solution.weight, solution.lowrank_a, solution.lowrank_b):
        assert tensor is None or bool(torch.isfinite(tensor).all())
    assert math.isfinite(solution.error)
    assert solution.error <= solution.error_before + 1e-9


def test_auto_ridge_is_strong_where_the_fit_does_not_carry_over():
    _, _, w, many = problem(9)
    x, s, _, _ = problem(10)
    other = RunningMoments(K, dtype=torch.float64)
    other.add(x, s)
    few = RunningMoments(K, dtype=torch.float64)
    x, s, _, _ = problem(9)
    few.add(x[:6], s[:6])
    settings = {"rank": 0, "refit": True, "ridge": "auto"}
    alike = solve_layer(many, w, heldout=many, **settings)
    unlike = solve_layer(few.mean(), w, heldout=other.mean(), **settings)
    assert alike.ridge < 0.1
    assert alike.error < alike.error_before
    assert unlike.weight is None  # six tokens of another kind teach nothing: the layer is left alone
    assert unlike.error == unlike.error_before


def test_auto_ridge_takes_the_strongest_of_those_that_do_as_well():
    x, s, w, _ = problem(9)
    fit, other = RunningMoments(K, dtype=torch.float64), RunningMoments(K, dtype=torch.float64)
    fit.add(x[:32], s[:32])
    other.add(x[32:], s[32:])
    settings = {"rank": 2, "refit": True, "heldout": other.mean()}
    errors = {ridge: solve_layer(fit.mean(), w, ridge=ridge, **settings).error for ridge in RIDGES}
    good = [ridge for ridge, error in errors.items() if error <= min(errors.values()) * 1.01]
    chosen = solve_layer(fit.mean(), w, ridge="auto", **settings)
    assert chosen.ridge == max(good)
    assert min(errors, key=errors.get) < chosen.ridge < RIDGES[-1]  # a case in which the choice matters


def test_auto_ridge_without_held_out_prompts_is_refused():
    _, _, w, moments = problem(11)
    with pytest.raises(ValueError, match="held-out"):
        solve_layer(moments, w, rank=0, refit=True, ridge="auto")


def test_balance_gives_each_kind_or_each_token_its_weight():
    x, s, _, _ = problem(12)
    image, text = RunningMoments(K, dtype=torch.float64), RunningMoments(K, dtype=torch.float64)
    image.add(x[:280], s[:280])
    text.add(x[280:], s[280:])
    by_kind = balanced([image, text], "kinds")
    by_token = balanced([image, text], "tokens")
    half = (x[:280].T @ x[:280] / 280 + x[280:].T @ x[280:] / 20) / 2
    torch.testing.assert_close(by_kind.dense, half)
    torch.testing.assert_close(by_token.dense, x.T @ x / M)
    torch.testing.assert_close(balanced([image, RunningMoments(K)], "kinds").dense, x[:280].T @ x[:280] / 280)


# --------------------------------------------------------------------------------------------- fp8 layers


def fp8_problem(seed):
    """`problem` in which S is quantised."""
    x, _, w, _ = problem(seed)
    s = quantize_tokens(x.float(), nm_mask(x)).dequantize().double()
    moments = RunningMoments(K, dtype=torch.float64)
    moments.add(x, s)
    return x, s, w, moments.mean()


def output_error(x, s, w, solution):
    new = dequantize(solution.weight, solution.weight_scale).double()
    error = s @ new.T - x @ w.T
    if solution.lowrank_a is not None:
        error = error + x @ solution.lowrank_a.T @ solution.lowrank_b.T
    return float(error.square().sum() / (x @ w.T).square().sum())


@pytest.mark.parametrize("mu", [1e-3, 2000.0])
def test_lowrank_beside_a_settled_weight_reaches_what_descent_reaches(mu):
    x, s, w, moments = fp8_problem(20)
    settled = quantize_weight(w).dequantize().double()
    lowrank_a, lowrank_b = solve_lowrank(moments, w, RANK, mu / M, settled)
    closed = float(objective(x, s, w, settled, (lowrank_b @ lowrank_a).T, 0.0, mu))
    # descent sees the same problem as one without a sparse product: what is left of Y is the target
    rest = x @ w.T - s @ settled.T
    found = []
    for seed in range(3):
        gen = torch.Generator().manual_seed(seed)
        a = torch.randn(K, RANK, generator=gen, dtype=torch.float64).mul_(0.3).requires_grad_()
        b = torch.randn(N, RANK, generator=gen, dtype=torch.float64).mul_(0.3).requires_grad_()
        optimiser = torch.optim.LBFGS((a, b), max_iter=3000, line_search_fn="strong_wolfe")

        def loss(a=a, b=b):
            return (x @ a @ b.T - rest).square().sum() + mu * (a @ b.T).square().sum()

        def closure(a=a, b=b, optimiser=optimiser, loss=loss):
            optimiser.zero_grad()
            value = loss()
            value.backward()
            return value

        optimiser.step(closure)
        found.append(float(loss().detach()))
    assert closed <= min(found) * (1 + 1e-6)
    assert closed == pytest.approx(min(found), rel=1e-3)


@pytest.mark.parametrize(("rank", "refit"), [(0, False), (RANK, False), (0, True), (RANK, True)])
def test_a_quantised_solution_reports_its_own_error(rank, refit):
    x, s, w, moments = fp8_problem(21)
    solution = solve_layer(moments, w, rank=rank, refit=refit, ridge=1e-2, quantised=True)
    assert solution.weight.dtype == torch.float8_e4m3fn
    assert solution.refitted == refit
    assert (solution.lowrank_a is None) == (rank == 0)
    assert solution.error == pytest.approx(output_error(x, s, w, solution), rel=1e-5)
    plain = quantize_weight(w).dequantize().double()
    before = (s @ plain.T - x @ w.T).square().sum() / (x @ w.T).square().sum()
    assert solution.error_before == pytest.approx(float(before), rel=1e-5)
    assert solution.error <= solution.error_before


def test_lowrank_solved_last_is_better_than_lowrank_solved_before_quantising():
    x, s, w, moments = fp8_problem(22)
    ridge = 1e-2
    last = solve_layer(moments, w, rank=RANK, refit=True, ridge=ridge, quantised=True)
    first = solve_layer(moments, w, rank=RANK, refit=True, ridge=ridge)
    searched = quantize_weight(first.weight, moments.kept)
    assert torch.equal(last.weight_scale, searched.scale)  # the refit is the same, its scales chosen on G
    before = s @ searched.dequantize().double().T + x @ first.lowrank_a.T @ first.lowrank_b.T - x @ w.T
    assert output_error(x, s, w, last) < float(before.square().sum() / (x @ w.T).square().sum())


def test_lowrank_repairs_quantisation_on_tokens_that_it_has_not_seen():
    """Nothing is dropped here: what is left to repair are the eight bits of weights that few channels use."""
    gen = torch.Generator().manual_seed(25)
    x = torch.randn(2000, K, generator=gen, dtype=torch.float64)
    x[:, :RANK] *= 10
    s = quantize_tokens(x.float()).dequantize().double()
    w = torch.randn(N, K, generator=gen, dtype=torch.float64)
    moments = RunningMoments(K, dtype=torch.float64)
    moments.add(x[:1000], s[:1000])
    alone, repaired = (
        solve_layer(moments.mean(), w, rank=rank, refit=False, ridge=1e-3, quantised=True)
        for rank in (0, RANK)
    )
    errors = [output_error(x[1000:], s[1000:], w, solution) for solution in (alone, repaired)]
    assert errors[1] < 0.8 * errors[0]


def test_an_auto_ridge_leaves_a_quantised_layer_quantised_where_nothing_carries_over():
    x, s, w, _ = fp8_problem(23)
    few, other = RunningMoments(K, dtype=torch.float64), RunningMoments(K, dtype=torch.float64)
    few.add(x[:6], s[:6])
    y, t, _, _ = fp8_problem(24)
    other.add(y, t)
    settings = {"rank": 0, "refit": True, "ridge": "auto", "quantised": True}
    unlike = solve_layer(few.mean(), w, heldout=other.mean(), **settings)
    assert (unlike.ridge, unlike.refitted) == (None, False)
    assert unlike.error == pytest.approx(output_error(y, t, w, unlike), rel=1e-5)
    alike = solve_layer(other.mean(), w, heldout=other.mean(), **settings)
    assert alike.refitted
    assert alike.error < alike.error_before


def with_means(seed, mean):
    """`problem` on inputs of a mean, with what it saw as rows of float64."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=gen, dtype=torch.float64) + mean * torch.arange(K) / K
    w, b = (torch.randn(N, *k, generator=gen, dtype=torch.float64) for k in ((K,), ()))
    s = select(x, nm_mask(x))
    moments = RunningMoments(K, dtype=torch.float64)
    moments.add(x, s)
    return x, s, w, b, moments.mean()


@pytest.mark.parametrize("ridge", [1e-2, 1.0])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_an_intercept_is_the_least_squares_solution_with_a_column_of_ones(ridge, mean):
    x, s, w, b, moments = with_means(20, mean)
    solution = solve_layer(moments, w, rank=0, refit=True, ridge=ridge, bias=b)
    one = torch.ones(M, 1, dtype=torch.float64)
    lam = ridge * float(s.square().sum(0).mean())
    old = torch.cat((w, b[:, None]), 1)
    # The ridge as further rows of the problem; none for the column of ones.
    rows = math.sqrt(lam) * torch.eye(K + 1, dtype=torch.float64)[:K]
    inputs, outputs = torch.cat((s, one), 1).numpy(), (torch.cat((x, one), 1) @ old.T).numpy()
    inputs, outputs = np.vstack((inputs, rows)), np.vstack((outputs, rows @ old.T))
    expected = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    assert np.abs(expected[:K].T - solution.weight.numpy()).max() < 1e-9
    assert np.abs(expected[K] - solution.bias.numpy()).max() < 1e-9


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("rank", [0, RANK])
def test_an_intercept_reports_its_own_error_and_leaves_no_mean(rank, quantised):
    x, s, w, b, moments = with_means(21, 2.0)
    settings = {"rank": rank, "refit": True, "ridge": 0.1, "quantised": quantised}
    solution = solve_layer(moments, w, bias=b, **settings)
    new = dequantize(solution.weight, solution.weight_scale) if quantised else solution.weight
    y = s @ new.double().T + solution.bias
    if rank:
        y = y + x @ solution.lowrank_a.T @ solution.lowrank_b.T
    missed = y - x @ w.T - b
    assert missed.mean(0).abs().max() < 1e-9
    error = float(missed.square().sum() / (x @ w.T).square().sum())
    assert solution.error == pytest.approx(error, rel=1e-9)
    assert error < solve_layer(moments, w, **settings).error


def test_an_intercept_is_judged_on_the_tokens_held_out():
    *_, w, b, moments = with_means(22, 2.0)
    x2, s2, *_, heldout = with_means(23, 1.9)
    solution = solve_layer(moments, w, rank=0, refit=True, ridge="auto", heldout=heldout, bias=b)
    missed = s2 @ solution.weight.T + solution.bias - x2 @ w.T - b
    assert solution.error == pytest.approx(float(missed.square().sum() / (x2 @ w.T).square().sum()), rel=1e-9)


def test_a_joint_low_rank_branch_with_an_intercept_reaches_what_descent_reaches():
    x, s, w, b, moments = with_means(24, 2.0)
    solution = solve_layer(moments, w, rank=RANK, refit=True, ridge=0.1, bias=b)
    lam, mu = (0.1 * float(t.square().sum(0).mean()) for t in (s, x))
    low = (solution.lowrank_b @ solution.lowrank_a).T
    # The intercept is free of the ridge: the best one takes the mean of the error.
    centred = [t - t.mean(0) for t in (x, s)]
    closed = float(objective(*centred, w, solution.weight, low, lam, mu))
    found = min(descend(*centred, w, lam, mu, refit=True, rank=RANK, seed=seed) for seed in range(3))
    assert closed == pytest.approx(found, rel=1e-4)


# --------------------------------------------------------------------------------------- numbers of TF32


def test_numbers_of_16_bits_are_numbers_of_tf32():
    """So products of them in TF32 are those in float32."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = every.view(dtype).float()
        values = values[values.isfinite()]
        assert torch.equal(rounded_to_tf32(values), values)


def test_rounding_to_tf32_gives_the_nearest_number_of_ten_bits():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=gen) * 10.0 ** torch.randint(-20, 20, (4096,), generator=gen)
    rounded = rounded_to_tf32(x)
    mantissa, exponent = np.frexp(x.double().numpy())
    wanted = np.ldexp(np.sign(mantissa) * np.floor(np.abs(mantissa) * 2048 + 0.5) / 2048, exponent)
    assert np.array_equal(rounded.double().numpy(), wanted)
    extreme = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    assert torch.equal(rounded_to_tf32(extreme), extreme)
    assert bool(rounded_to_tf32(torch.tensor([torch.nan])).isnan())


def test_errors_of_a_layer_without_a_branch_are_those_of_its_tokens():
    x, s, w, moments = problem(3)
    new = w + 0.1
    wanted = (s @ new.T - x @ w.T).square().sum() / (x @ w.T).square().sum()
    errors = LayerErrors(moments, w)
    assert errors.relative(errors.of(new)) == pytest.approx(float(wanted))
