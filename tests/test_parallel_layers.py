"""One layer that PyTorch cuts in two, by hand: its norm scale is of whole tokens, beside kernels, too."""

from functools import partial

import pytest
import torch
from checkpoint_helpers import RIDGE
from helpers import relative_error
from parallel_helpers import LIMIT, assert_close, message, run_together
from process_helpers import PROCESSES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import rtlynx.nn.sparse_linear
from rtlynx import (
    Recipe,
    calibrate,
    load,
    nm_mask,
    norm_scale,
    save,
    sparsify,
)
from rtlynx.math.fp8 import quantize_tokens

K, N, RANK = 64, 24, 4
ONE_SPARSE = ("*.up",)  # a layer that shares its input with none takes the shortest way


class Block(nn.Module):
    """Two layers; what is as wide as the input of the second one (or a shard of it) goes there at once."""

    def __init__(self, k):
        super().__init__()
        self.up, self.down = nn.Linear(N, k), nn.Linear(k, N)

    def forward(self, x):
        return self.down(self.up(x) if x.shape[-1] == N else x)


class Pair(nn.Module):
    """A model without a plan of its own: the generic rule's, and PyTorch's tensor parallelism by hand."""

    def __init__(self, k=K):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(k)])

    def forward(self, x):
        return self.blocks[0](x)


def cut_by_hand(model):
    mesh = init_device_mesh("cpu", (PROCESSES,))
    return parallelize_module(
        model, mesh, {"blocks.0.up": ColwiseParallel(), "blocks.0.down": RowwiseParallel()}
    )


def hostile_tokens():
    """Tokens whose norm scale two shards see differently, and of magnitudes where squares leave float32."""
    x = torch.randn(8, K, generator=torch.Generator().manual_seed(3))
    x[0, : K // 2] = 1.0  # flat: s is sqrt(2) here, near 1 on the other side
    x[0, K // 2 :] *= torch.tensor([10.0, 0.01, 0.01, 0.01]).repeat(K // 8)
    x[1] *= 1e-30
    x[2] *= 1e25
    x[3, : K // 2] = 0
    x[4] = 0
    x[5, : K // 2] *= 1e-12
    x[6, 3] = torch.inf
    x[7, K - 1] = torch.nan
    return x


def row_parallel(norm, folder):
    model = cut_by_hand(Pair())
    sparsify(model, Recipe.immediate(norm=norm))
    rank = torch.distributed.get_rank()
    x = hostile_tokens().chunk(PROCESSES, dim=-1)[rank]
    with torch.no_grad():
        return {"y": model(x)}


def row_by_kernels(precision, rank, folder):
    """The operators that run on a card, here in their CPU implementation."""
    rtlynx.nn.sparse_linear.kernels_support, original = (
        (lambda *_: True),
        rtlynx.nn.sparse_linear.kernels_support,
    )
    try:
        model = cut_by_hand(Pair().bfloat16())
        name = f"pair-{precision}-{rank}"
        if rank:
            load(model, folder / name)
        else:
            sparsify(model, Recipe.immediate(precision=precision, skip=ONE_SPARSE))
        half = hostile_tokens()[:1].bfloat16().chunk(PROCESSES, dim=-1)[torch.distributed.get_rank()]
        with torch.no_grad():
            return {"y": model(half)}
    finally:
        rtlynx.nn.sparse_linear.kernels_support = original


def row_gradient(folder):
    model = sparsify(cut_by_hand(Pair()), Recipe.immediate())
    return message(lambda: model(torch.randn(3, N, requires_grad=True)))


def row_splits_groups(folder):
    return message(lambda: sparsify(cut_by_hand(Pair(k=20)), Recipe.immediate()))


KERNELS = [(precision, rank) for precision in ("bf16", "fp8") for rank in (0, RANK)]
CASES = {
    **{f"row-{norm}": partial(row_parallel, norm) for norm in ("scale", "paper", "none")},
    **{f"kernels-{p}-{r}": partial(row_by_kernels, p, r) for p, r in KERNELS},
    "row-gradient": row_gradient,
    "row-splits-groups": row_splits_groups,
}


def pair(precision, rank):
    """`Pair` in bfloat16, sparse by norm and, with a rank, low-rank factors."""
    model, recipe = Pair().bfloat16(), Recipe.immediate(precision=precision, skip=ONE_SPARSE)
    if not rank:
        return sparsify(model, recipe)
    recipe = Recipe(precision=precision, rank=rank, skip=ONE_SPARSE, refit=False, ridge=RIDGE)
    gen = torch.Generator().manual_seed(1)
    calls = [{"x": torch.randn(64, N, generator=gen).bfloat16()} for _ in range(8)]
    calibrate(model, calls=calls, recipe=recipe, progress=False)
    return model


@pytest.fixture(scope="module")
def pairs():
    return {(precision, rank): pair(precision, rank) for precision, rank in KERNELS}


@pytest.fixture(scope="module")
def results(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    for (precision, rank), made in pairs.items():
        save(made, folder / f"pair-{precision}-{rank}")
    return run_together(folder, CASES)


@pytest.mark.parametrize("norm", ["scale", "paper", "none"])
def test_norm_scale_is_of_the_whole_token(results, norm):
    model = sparsify(Pair(), Recipe.immediate(norm=norm))
    with torch.no_grad():
        expected = model(hostile_tokens())
    for theirs in results.tensors(f"row-{norm}"):
        for row, right in zip(theirs["y"], expected, strict=True):
            assert torch.isfinite(row).tolist() == torch.isfinite(right).tolist()
            if torch.isfinite(right).all():
                assert relative_error(row, right) < LIMIT


@pytest.mark.parametrize(("precision", "rank"), KERNELS)
def test_norm_scale_beside_kernels(results, pairs, precision, rank):
    """The pass over X knows the scale of a shard alone, which is far from the whole token's here."""
    layer = pairs[precision, rank].blocks[0].down
    assert layer.rank == rank
    x = hostile_tokens()[:1].bfloat16()
    mask = nm_mask(x)
    halves = [slice(0, K // 2), slice(K // 2, K)]
    kept = x.double() * mask
    weight = layer.weight.double()
    if precision == "fp8":
        weight = weight * layer.weight_scale.double().unsqueeze(-1)
        kept = torch.cat([quantize_tokens(x[:, h], mask[:, h]).dequantize().double() for h in halves], dim=-1)
    lowrank = x.double() @ layer.lowrank_a.double().T @ layer.lowrank_b.double().T if rank else 0.0
    expected = norm_scale(x, mask).double() * (kept @ weight.T) + lowrank + layer.bias.double()
    alone = torch.cat([norm_scale(x[:, h], mask[:, h]).double() * kept[:, h] for h in halves], dim=-1)
    assert relative_error(alone @ weight.T + lowrank + layer.bias.double(), expected) > 0.03
    assert_close(results.tensors(f"kernels-{precision}-{rank}"), expected, 8e-3)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("row-gradient", "RuntimeError: .*no gradient"),
        ("row-splits-groups", "ValueError: .*down: 2 tensor-parallel shards of its 20 inputs"),
    ],
)
def test_refusals(results, case, words):
    results.check_refusal(case, words)
