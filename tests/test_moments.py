"""Moments are those of float64, whatever the means, the order of tokens and who saw them."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from hypothesis import example, given, settings
from hypothesis import strategies as st
from process_helpers import in_two_processes
from safetensors.torch import load_file, save_file

import rtlynx.calibration.moments
from rtlynx.calibration.moments import RunningMoments, balanced

TOKENS, K = 60, 6
FIELDS = ("dense", "cross", "kept", "dense_mean", "kept_mean")


def tokens(seed, count=TOKENS, k=K, mean=0.0):
    """X whose channels lean on each other, and an S of it that has a mean of its own; float64."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.eye(k, dtype=torch.float64) + 0.3 * torch.randn(k, k, generator=gen, dtype=torch.float64)
    x = mean + torch.randn(count, k, generator=gen, dtype=torch.float64) @ mix
    return x, x * (torch.rand(count, k, generator=gen) > 0.5)


def seen(*parts, dtype=torch.float64):
    moments = RunningMoments(parts[0][0].shape[1], dtype=dtype)
    for x, s in parts:
        moments.add(x, s)
    return moments


def field(moments, name):
    """One tensor of a name, of running moments that of their first way."""
    value = getattr(moments, name)
    return value[0] if isinstance(value, list) else value


def assert_near(found, wanted, tolerance):
    for name in FIELDS:
        one, other = field(found, name), field(wanted, name)
        assert float((one - other).norm()) <= tolerance * float(other.norm()), name


def state(moments):
    return {name: field(moments, name).clone() for name in FIELDS} | {"count": moments.count}


def test_moments_per_token_by_definition():
    x, s = tokens(0, mean=2.0)
    found = seen((x, s)).mean()
    wanted = (x.T @ x / TOKENS, s.T @ x / TOKENS, s.T @ s / TOKENS, x.mean(0), s.mean(0))
    for name, value in zip(FIELDS, wanted, strict=True):
        torch.testing.assert_close(getattr(found, name), value)
    centred, (x, s) = found.centred(), (x - x.mean(0), s - s.mean(0))
    wanted = (x.T @ x / TOKENS, s.T @ x / TOKENS, s.T @ s / TOKENS, 0 * x[0], 0 * x[0])
    for name, value in zip(FIELDS, wanted, strict=True):
        torch.testing.assert_close(getattr(centred, name), value)


@given(st.lists(st.integers(0, TOKENS), max_size=8), st.randoms(use_true_random=False))
@example([0, 0, 7, 7, TOKENS], None)  # calls without tokens: first, between others, last
@settings(max_examples=60, deadline=None)
def test_order_and_splitting_of_calls_do_not_matter(cuts, random):
    x, s = tokens(1, mean=3.0)
    x = x + torch.linspace(-20, 20, TOKENS).double()[:, None]  # so that calls differ in their means
    cuts = [0, *sorted(cuts), TOKENS]
    parts = [(x[i:j], s[i:j]) for i, j in itertools.pairwise(cuts)]
    if random is not None:
        random.shuffle(parts)
    found = seen(*parts)
    assert found.count == TOKENS
    assert_near(found, seen((x, s)), 1e-12)


def test_what_several_ways_see_is_what_each_sees_alone():
    x, s = tokens(5, mean=2.0)
    both = RunningMoments(K, 2, dtype=torch.float64)
    for part in (slice(0, 20), slice(20, None)):
        both.add(x[part], s[part], s[part].square())
    for way, other in enumerate((s, s.square())):
        assert_near(balanced([both], "tokens", way), seen((x, other)).mean(), 1e-12)


def test_wide_moments_are_multiplied_in_blocks_and_mirrored(monkeypatch):
    x, s = tokens(6, k=22, mean=2.0)
    whole = seen((x[:7], s[:7]), (x[7:], s[7:])).mean()
    monkeypatch.setattr(rtlynx.calibration.moments, "_WIDE", 22)
    blocked = seen((x[:7], s[:7]), (x[7:], s[7:]))
    assert float(blocked.dense[-1, 0]) != float(blocked.dense[0, -1])  # left out, and filled in at the end
    assert_near(blocked.mean(), whole, 1e-12)


@pytest.mark.parametrize("mean", [0.0, 100.0, 1000.0])
def test_a_large_mean_leaves_the_covariance_in_float32(mean):
    x, s = (t.float() for t in tokens(2, count=4096 * 4, k=24, mean=mean))
    found = seen(*zip(x.split(4096), s.split(4096), strict=True), dtype=torch.float32).mean()
    x, s = x.double(), s.double()
    assert_near(found, seen((x, s)).mean(), 1e-6)
    covariance, wanted = found.centred().dense, torch.cov(x.T, correction=0)
    assert float((covariance - wanted).abs().max() / wanted.diagonal().max()) < 1e-5
    assert float(torch.linalg.eigvalsh(covariance)[0]) > 0.5 * float(torch.linalg.eigvalsh(wanted)[0])


def test_channels_that_never_change_have_no_variance_to_speak_of():
    x, s = (t.float() for t in tokens(3, count=4096))
    x[:, 0] = s[:, 0] = 1000.1
    centred = seen((x[:1000], s[:1000]), (x[1000:], s[1000:]), dtype=torch.float32).mean().centred()
    assert abs(float(centred.dense[0, 0])) < 1e-7


def test_no_tokens_change_nothing():
    moments = seen(tokens(4))
    before = state(moments)
    moments.add(torch.zeros(2, 0, K), torch.zeros(2, 0, K))
    torch.testing.assert_close(state(moments), before, rtol=0, atol=0)
    nothing = RunningMoments(K)
    nothing.add(torch.zeros(0, K), torch.zeros(0, K))
    assert nothing.count == 0
    with pytest.raises(ValueError, match="no tokens"):
        nothing.mean()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_are_not_finite_are_refused_and_change_nothing(value, where, dtype):
    x, s = (t.to(dtype) for t in tokens(5))
    moments = seen((x, s), dtype=torch.float32)
    before = state(moments)
    (x, s)[where][3, 2] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        moments.add(x, s)
    torch.testing.assert_close(state(moments), before, rtol=0, atol=0)


def test_the_largest_tokens_of_float32_are_finite():
    """Their sum is not."""
    x = torch.full((2, K), torch.finfo(torch.float32).max)
    assert float(seen((x, x)).dense_mean[0]) == float(x[0, 0])


def test_kinds_of_tokens_with_other_means_are_mixed_by_their_weight():
    image, text = tokens(6, count=50, mean=4.0), tokens(7, count=10, mean=-9.0)
    kinds = balanced([seen(image), RunningMoments(K), seen(text)], "kinds")
    torch.testing.assert_close(kinds.dense, (image[0].T @ image[0] / 50 + text[0].T @ text[0] / 10) / 2)
    torch.testing.assert_close(kinds.kept_mean, (image[1].mean(0) + text[1].mean(0)) / 2)
    every = [torch.cat(pair) for pair in zip(image, text, strict=True)]
    assert_near(balanced([seen(image), seen(text)], "tokens"), seen(every).mean(), 1e-12)


# ------------------------------------------------------------------------------------------ two processes

SHARES = {"unequal": (13, TOKENS), "one saw none": (0, TOKENS), "nobody": (0, 0)}


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, (first, last) in SHARES.items():
        x, s = tokens(8, mean=1000.0)
        x[first:] += 5
        part = slice(0, first) if rank == 0 else slice(first, last)
        moments = seen((x[part], s[part]), dtype=torch.float32)
        moments.all_reduce()
        found = {key: field(moments, key) for key in FIELDS} | {"count": torch.tensor(moments.count)}
        save_file(found, Path(folder) / f"{name}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_moments_of_one(tmp_path):
    in_two_processes(_one_of_two, str(tmp_path))
    for name, (first, last) in SHARES.items():
        ours, theirs = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        x, s = tokens(8, mean=1000.0)
        x[first:] += 5
        wanted = seen((x[:last], s[:last]))
        assert int(ours["count"]) == last, name
        for key in FIELDS:
            torch.testing.assert_close(ours[key].double(), field(wanted, key), rtol=1e-5, atol=1e-2)
