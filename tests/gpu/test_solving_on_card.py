"""A card solves layers as a CPU does: recorded launches and products in TF32 change no result that counts."""

import pytest
import torch

from rtlynx.calibration.weight_pruning import COLUMNS, prune, sparsegpt
from rtlynx.math.fp8 import is_two_of_four, quantize_weight

pytestmark = pytest.mark.gpu


def problem(n, k, seed=0):
    """A weight (n, k), and moments of inputs that lean on each other, float64 on the CPU."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * k, k, generator=gen, dtype=torch.float64)
    x = x @ torch.randn(k, k, generator=gen, dtype=torch.float64) / k**0.5
    x *= torch.logspace(-1, 1, k, dtype=torch.float64)  # channels from 0.1 to 10
    gram = x.T @ x / len(x)
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    return torch.randn(n, k, generator=gen, dtype=torch.float64), gram


def error(weight, found, gram):
    off = weight - found.to(weight)
    return ((off @ gram) * off).sum(1)


def test_columns_are_removed_by_one_graph_on_any_stream(monkeypatch):
    replayed, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replayed.append(graph) or replay(graph))
    weight, gram = problem(40, 4 * COLUMNS)
    wanted, _ = sparsegpt(weight, gram)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        found, _ = sparsegpt(weight.cuda(), gram.cuda())
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-8, atol=1e-8)
    assert len(replayed) == 3  # the first run loads the kernels
    assert len(set(replayed)) == 1


@pytest.mark.parametrize("k", [4, 64, COLUMNS, COLUMNS + 4, 5 * COLUMNS, 6 * COLUMNS - 32])
@pytest.mark.parametrize("n", [1, 300])
def test_columns_are_removed_as_on_a_cpu(n, k):
    weight, gram = problem(n, k)
    found, kept = sparsegpt(weight.cuda(), gram.cuda())
    wanted, wanted_kept = sparsegpt(weight, gram)
    assert torch.equal(kept.cpu(), wanted_kept)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-8, atol=1e-8)


def test_a_pruned_weight_is_as_near_as_a_cpu_finds():
    weight, gram = problem(200, 5 * COLUMNS)
    found, wanted = prune(weight.cuda(), gram.cuda()).cpu(), prune(weight, gram)
    assert is_two_of_four(found)
    assert torch.allclose(error(weight, found, gram), error(weight, wanted, gram), rtol=1e-6)


def test_scales_are_as_good_as_those_of_exact_products():
    """And never worse than the largest weight over 448, which exact products confirm on a card too."""
    weight, gram = problem(300, 1024)
    values, scale = quantize_weight(weight.cuda(), gram.cuda())
    found = error(weight, values.float().cpu() * scale.cpu()[:, None], gram)
    wanted = error(weight, quantize_weight(weight, gram).dequantize(), gram)
    plain = error(weight, quantize_weight(weight).dequantize(), gram)
    assert bool((found <= plain * (1 + 1e-9)).all())
    assert bool((found <= wanted * 1.01).all())
    assert float(wanted.sum()) < 0.99 * float(plain.sum())  # so the search counts
