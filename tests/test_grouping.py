"""Which features compete: the order found is a permutation, and its groups drop less."""

import itertools

import pytest
import torch

from rtlynx.math.grouping import dropped_energy, grouping_permutation


def energies(seed, tokens, k, spread=1.0):
    """Of features that differ in strength, and fire together where they are alike."""
    gen = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, 6, generator=gen) @ torch.randn(6, k, generator=gen)
    strength = (spread * torch.randn(k, generator=gen)).exp()
    return (torch.nn.functional.gelu(causes) * strength).square().double()


def slow_dropped(energies, groups, n):
    return sum(
        sum(sorted(token[i] for i in group)[: len(group) - n])
        for token in energies.tolist()
        for group in groups
    )


@pytest.mark.parametrize(
    ("n", "m", "k"), [(2, 4, 64), (2, 4, 12), (2, 4, 4), (1, 4, 40), (4, 8, 48), (1, 2, 10), (4, 4, 8)]
)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_a_permutation_that_drops_no_more(seed, n, m, k):
    data = energies(seed, 50, k)
    order = grouping_permutation(data, n, m, seed=seed)
    assert sorted(order.tolist()) == list(range(k))
    assert dropped_energy(data[:, order], n, m) <= dropped_energy(data, n, m)
    assert torch.equal(order, grouping_permutation(data, n, m, seed=seed))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (5, 8)])
def test_what_is_dropped_is_the_smallest_of_each_group(n, m):
    data = energies(0, 7, 24)
    groups = torch.arange(24).reshape(-1, m).tolist()
    assert dropped_energy(data, n, m) == pytest.approx(slow_dropped(data, groups, n))


def partitions(features, m):
    """All ways of splitting `features` into groups of m."""
    if not features:
        yield []
        return
    first, *rest = features
    for others in itertools.combinations(rest, m - 1):
        left = [one for one in rest if one not in others]
        yield from ([[first, *others], *more] for more in partitions(left, m))


@pytest.mark.parametrize(("n", "m", "k"), [(1, 2, 4), (2, 4, 8), (1, 4, 8)])
@pytest.mark.parametrize("seed", range(5))
def test_of_two_groups_it_finds_the_best(seed, n, m, k):
    data = energies(seed, 20, k)
    best = min(slow_dropped(data, groups, n) for groups in partitions(list(range(k)), m))
    order = grouping_permutation(data, n, m)
    assert dropped_energy(data[:, order], n, m) == pytest.approx(best)


def test_no_exchange_would_drop_less():
    data = energies(7, 30, 32)
    order = grouping_permutation(data)
    found = dropped_energy(data[:, order])
    for one, other in itertools.combinations(range(32), 2):
        swapped = order.clone()
        swapped[[one, other]] = order[[other, one]]
        assert dropped_energy(data[:, swapped]) >= (1 - 1e-4) * found


def test_strong_neighbours_are_parted():
    """Half the features are strong, and neighbours: the groups dropped half of them, and then none."""
    data = torch.cat((torch.full((10, 64), 100.0), torch.ones(10, 64)), dim=1)
    data = data * (1 + 0.01 * torch.rand(10, 128, generator=torch.Generator().manual_seed(0)))
    order = grouping_permutation(data)
    weak = float(data[:, 64:].sum(dtype=torch.float64))
    assert dropped_energy(data) > 10 * 32 * 100
    assert dropped_energy(data[:, order]) == pytest.approx(weak, rel=1e-6)


def test_features_that_fire_together_are_parted():
    """Of equal strength, so that no order by energy tells them apart."""
    together = torch.arange(64) // 4
    data = (torch.arange(160)[:, None] % 16 == together).double()
    assert dropped_energy(data) == 160 * 2
    assert dropped_energy(data[:, grouping_permutation(data)]) == 0


def test_features_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match="10 features do not split into groups of 4"):
        grouping_permutation(torch.ones(3, 10))
