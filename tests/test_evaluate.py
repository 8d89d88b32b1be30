"""Metrics against formulas written down independently; layer errors and energies against work by hand."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from formula_helpers import by_hand, slow_mask
from helpers import flux_call, output, tiny_flux, watched
from pipeline_helpers import TinyPipeline
from torch import nn

import rtlynx
from rtlynx import Pattern, Recipe
from rtlynx.evaluate import compare, energy_kept, kid, layer_errors, psnr, ssim
from rtlynx.evaluate.layers import (
    Distribution,
    activation_distributions,
    gaussian_energy_kept,
    mean_error,
    weight_distributions,
)
from rtlynx.models import sparse_layers
from rtlynx.models.plan import make_plan


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pictures(n, seed):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- PSNR, SSIM


def test_psnr_is_the_mean_over_pictures_of_their_own():
    a, b = pictures(3, 0), pictures(3, 1)
    b[0] = (a[0] + 0.01).clamp(0, 1)  # one far better than the others: a pooled error would hide it
    each = [10 * math.log10(1 / float((x - y).double().square().mean())) for x, y in zip(a, b, strict=True)]
    assert psnr(a, b) == pytest.approx(sum(each) / 3, rel=1e-5)


def test_ssim_of_a_constant_shift_is_the_luminance_term():
    a, b = torch.full((2, 3, 32, 32), 0.4), torch.full((2, 3, 32, 32), 0.6)
    c1 = 0.01**2
    assert ssim(a, b) == pytest.approx((2 * 0.4 * 0.6 + c1) / (0.4**2 + 0.6**2 + c1), rel=1e-6)


def test_dense_against_itself_is_null_and_one():
    a = pictures(4, 0)
    assert psnr(a, a.clone()) is None
    assert ssim(a, a.clone()) == 1.0


def test_unusable_pictures_are_refused():
    a = pictures(2, 0)
    broken = a.clone()
    broken[1, 0, 0, 0] = math.nan
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="NaN"):
            metric(broken, a)
        with pytest.raises(ValueError, match="shape"):
            metric(a[:1], a)


# ----------------------------------------------------------------------------------------------------- KID


def slow_kid(x, y, gamma):
    """The unbiased estimate, pair by pair in float64."""

    def k(a, b):
        return (gamma * sum(p * q for p, q in zip(a, b, strict=True)) + 1) ** 3

    x, y = x.double().tolist(), y.double().tolist()
    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (5, 9), (12, 7)])
@pytest.mark.parametrize("gamma", [None, 1.0])
def test_kid_matches_a_double_loop(n, m, gamma):
    x, y = normal(n, 6, seed=1), normal(m, 6, seed=2) + 0.5
    assert kid(x, y, gamma=gamma).value == pytest.approx(slow_kid(x, y, gamma or 1 / 6), rel=1e-9)


def test_kid_matches_torchmetrics_on_equal_sizes():
    from torchmetrics.image.kid import poly_mmd

    x, y = normal(20, 8, seed=1, dtype=torch.float64), normal(20, 8, seed=2, dtype=torch.float64) * 1.3
    assert kid(x, y).value == pytest.approx(float(poly_mmd(x, y)), rel=1e-9)


def test_kid_jackknife_matches_leaving_out_one_by_one():
    x, y = normal(6, 5, seed=3), normal(9, 5, seed=4) + 1
    variance = 0.0
    for mine, other in ((x, y), (y, x)):
        n = len(mine)
        without = [slow_kid(torch.cat((mine[:i], mine[i + 1 :])), other, 1 / 5) for i in range(n)]
        mean = sum(without) / n
        variance += (n - 1) / n * sum((one - mean) ** 2 for one in without)
    assert kid(x, y).stderr == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_kid_is_unbiased_and_its_error_is_right():
    """Over many pairs of samples: mean 0 for one distribution; spread as the standard error says for two."""
    same = torch.tensor([kid(normal(20, 8, seed=i), normal(60, 8, seed=1000 + i)).value for i in range(200)])
    assert abs(float(same.mean())) < 3 * float(same.std()) / math.sqrt(200)
    apart = [kid(normal(20, 8, seed=i) + 0.7, normal(60, 8, seed=1000 + i)) for i in range(200)]
    spread = float(torch.tensor([one.value for one in apart]).std())
    claimed = math.sqrt(sum(one.stderr**2 for one in apart) / 200)
    assert claimed == pytest.approx(spread, rel=0.25)


def test_two_halves_of_one_set_are_no_distance_apart():
    both = torch.nn.functional.normalize(normal(300, 16, seed=5), dim=1)
    distance = kid(both[:100], both[100:], gamma=1.0)
    assert abs(distance.value) < 3 * distance.stderr


def test_kid_of_too_few_samples():
    x = normal(4, 3)
    assert kid(x[:2], x).stderr is None
    with pytest.raises(ValueError, match="two samples"):
        kid(x[:1], x)
    with pytest.raises(ValueError, match="features are"):
        kid(x, normal(4, 5))


# --------------------------------------------------------------------------------------------- layer error


@torch.no_grad()
def expected_error(pairs, stand_in):
    """‖Y − Ŷ‖² / ‖Y‖² from recorded inputs and outputs of the dense layer."""
    wrong = sum(float((stand_in(x).double() - y.double()).square().sum()) for x, y in pairs)
    return wrong / sum(float(y.double().square().sum()) for _, y in pairs)


@torch.no_grad()
def test_layer_error_by_hand():
    dense, sparse = tiny_flux(), tiny_flux()
    rtlynx.sparsify(sparse, Recipe.immediate(grouping="adjacent"))
    calls = [flux_call(seed=i, batch=2) for i in range(2)]
    layers = sparse_layers(sparse)
    found = layer_errors(dense, {"sparse": layers}, calls)["sparse"]
    assert list(found) == list(layers)
    with watched(dense, list(layers)) as seen:
        for call in calls:
            output(dense, call)
    for name in layers:
        linear = dense.get_submodule(name)

        def stand_in(x, linear=linear):
            return by_hand(x, linear.weight, linear.bias, mask=slow_mask(x), norm="scale")

        assert found[name] == pytest.approx(expected_error(seen[name], stand_in), rel=1e-4)
    assert mean_error(found) == pytest.approx(sum(found.values()) / len(found))
    assert mean_error({}) == 0.0


def test_layer_error_of_pruned_weights_and_of_dense_itself():
    dense = tiny_flux()
    name = "transformer_blocks.0.ff.net.0.proj"
    linear = dense.get_submodule(name)
    pruned = nn.Linear(linear.in_features, linear.out_features)
    pruned.load_state_dict(linear.state_dict())
    with torch.no_grad():
        pruned.weight.mul_(slow_mask(linear.weight))
    calls = [flux_call()]
    variants = {"pruned": {name: pruned}, "same": {name: copy.deepcopy(linear)}, "none": {}}
    found = layer_errors(dense, variants, calls)
    with watched(dense, [name]) as seen:
        output(dense, calls[0])
    assert found["pruned"][name] == pytest.approx(expected_error(seen[name], pruned), rel=1e-5)
    assert found["pruned"][name] > 0.01
    assert found["same"] == {name: 0.0}
    assert found["none"] == {}


def test_layer_error_leaves_no_hooks_behind():
    dense = tiny_flux()
    name = "transformer_blocks.0.ff.net.2"
    broken = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        layer_errors(dense, {"broken": {name: broken}}, [flux_call()])
    assert not dense.get_submodule(name)._forward_hooks


# ------------------------------------------------------------------------------------------------- energies


def test_energy_kept_of_constructed_tensors():
    assert energy_kept(torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0, -4.0, 3.0, 0.0]])) == 1.0
    assert energy_kept(torch.ones(3, 8)) == 0.5
    assert energy_kept(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(25 / 30)
    assert energy_kept(torch.zeros(2, 4)) == 1.0
    # Adjacent groups hold one large entry each, strided ones all four or none.
    x = torch.tensor([1.0, 0, 0, 0] * 4)
    assert energy_kept(x) == 1.0
    assert energy_kept(x, Pattern(2, 4, "strided")) == 0.5


def test_energy_kept_of_normal_entries():
    assert gaussian_energy_kept() == pytest.approx(energy_kept(normal(4000, 400)), abs=2e-3)


def test_distributions_of_weights_and_activations():
    model = tiny_flux()
    layers = make_plan(model, Recipe.immediate()).sparse
    weights = weight_distributions(model, layers)
    found = activation_distributions(model, layers, [flux_call()])
    assert list(weights) == list(found) == [layer.name for layer in layers]
    name = "transformer_blocks.0.attn.to_out.0"
    with watched(model, [name]) as seen:
        output(model, flux_call())
    ((x, _),) = seen[name]
    assert found[name].share == pytest.approx(energy_kept(x), rel=1e-6)
    assert found[name].counts.sum() == x.numel()
    assert weights[name].share == pytest.approx(energy_kept(model.get_submodule(name).weight), rel=1e-6)
    # q, k and v read one tensor, which counts once.
    q, v = (found[f"transformer_blocks.0.attn.to_{one}"] for one in "qv")
    assert Distribution.merged([q, v]).total == q.total
    assert Distribution.merged([q, found[name]]).total == pytest.approx(q.total + found[name].total)


def test_videos_are_no_pictures():
    class Frames(TinyPipeline):
        def __call__(self, prompt, **settings):
            super().__call__(prompt, **{**settings, "output_type": "latent"})
            return SimpleNamespace(frames=torch.zeros(len(prompt), 2, 3, 16, 16))

    dense = Frames(tiny_flux())
    sparse = rtlynx.sparsify(Frames(tiny_flux()), Recipe.immediate())
    with pytest.raises(TypeError, match="Frames draws no pictures, but an array of 5 dimensions"):
        compare(dense, sparse, ["a lynx"], progress=False)
