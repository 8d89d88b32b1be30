"""How kernels are cut for a shape and a card, on a card that stands in for one."""

import pytest
import torch

from rtlynx.cuda import jit, tuning
from rtlynx.cuda.sm90 import compress as host
from rtlynx.cuda.sm90 import gemm
from rtlynx.cuda.sm90.compress import CompressOptions
from rtlynx.cuda.sm90.prologues import IDENTITY, PROLOGUES, BoundPrologue
from rtlynx.math.formats import BF16_SPARSE, FP8_SPARSE

SMS, SHARED_PER_SM = 132, 228 * 1024


class StandInKernel:
    """A kernel of a card that is one field of multiprocessors, without the borders of a real one."""

    def __init__(self, configuration, cluster, shared_bytes):
        blocks = min(configuration.ctas_per_sm, SHARED_PER_SM // (shared_bytes + 4096))
        self.clusters = SMS * blocks // cluster

    def most_clusters(self):
        return self.clusters


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(host, "_kernel", StandInKernel)
    host._plan.cache_clear()
    host._most_clusters.cache_clear()
    yield
    host._plan.cache_clear()
    host._most_clusters.cache_clear()


def plan(rows, k, rank=64, grouping="adjacent", format=FP8_SPARSE, device=0, prologue=IDENTITY, aligned=True):
    x = BoundPrologue(prologue, b"", rows, k, torch.device("cuda", device), aligned)
    lowrank_a = torch.empty(rank, k, dtype=torch.bfloat16, device="meta") if rank else None
    return host.plan_compress(x, lowrank_a, CompressOptions(grouping, (), True, format))


@pytest.mark.parametrize("grouping", ["adjacent", "strided"])
@pytest.mark.parametrize("rank", [32, 64, 128, 200])
@pytest.mark.parametrize("rows", [1, 64, 4096, 100_000])
@pytest.mark.parametrize("k", [64, 3072, 15360, host.MAX_COLUMNS_FP8])
def test_a_cta_has_room_for_what_waits(card, rows, k, rank, grouping):
    cut = plan(rows, k, rank, grouping)
    k_blocks, slabs = -(-k // 128), -(-rows // 64)
    assert 1 <= cut.cluster <= min(16, k_blocks)
    # 64 rows of 64 kept bf16 for each block of K of a CTA, beside the ring of units.
    assert cut.shared_bytes >= -(-k_blocks // cut.cluster) * 64 * 64 * 2
    assert cut.shared_bytes + host._STATIC_BYTES <= 227 * 1024
    assert cut.grid == (slabs * cut.cluster, max(1, -(-rank // 128)), 1)


@pytest.mark.parametrize("grouping", ["adjacent", "strided"])
@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("k", [32, 96, 3072, 4096, 4128, 12288, 16384])
def test_without_a_factor_ctas_take_whole_rows(card, k, name, grouping):
    cut = plan(100, k, 0, grouping, prologue=PROLOGUES[name])
    config, threads = cut.configuration.config, cut.configuration.threads
    assert cut.grid == (128 // config.rows, 1, 1)  # rows beyond the matrix too: packed blocks have them
    assert threads * config.chunks * 8 >= -(-k // 128) * 128
    assert threads % 32 == 0
    assert threads <= dict(cut.configuration.defines)["MAX_THREADS"] <= 1024
    kernels = {(one.source, one.defines) for one in host.INSTANTIATIONS}
    assert ("compress_rows.cu", cut.configuration.defines) in kernels


def test_what_whole_rows_do_not_serve_is_compressed_in_tiles(card):
    served = plan(100, 3072, 0)
    others = [
        plan(100, 3072, 0, aligned=False),
        plan(100, host.MAX_COLUMNS_FP8, 0),
        plan(100, 3072, 0, format=BF16_SPARSE),
        plan(100, 3072, 32),
    ]
    assert [one.configuration.entry for one in (served, *others)] == ["compress_rows"] + ["compress"] * 4
    assert (served.packed_a_bytes, served.scales) == (others[0].packed_a_bytes, others[0].scales)


def test_what_fits_the_card_at_once_takes_one_round(card):
    cut = plan(4096, 3072)
    together = StandInKernel(cut.configuration, cut.cluster, cut.shared_bytes).most_clusters()
    assert together >= 4096 // 64


def test_clusters_that_a_card_refuses_are_not_taken(card, monkeypatch):
    refusing = type("Refusing", (StandInKernel,), {})
    refusing.most_clusters = lambda self: 0 if self.clusters < 40 else self.clusters
    monkeypatch.setattr(host, "_kernel", refusing)
    cut = plan(4096, 3072)
    assert StandInKernel(cut.configuration, cut.cluster, cut.shared_bytes).most_clusters() >= 40


def test_more_columns_than_fit_are_refused(card):
    with pytest.raises(ValueError, match=r"inputs of up to 20480 features, got 65536"):
        plan(64, 65536)


def test_cards_of_one_machine_are_cut_for_each_as_it_is(card, monkeypatch):
    counts = {0: 132, 1: 40}
    monkeypatch.setattr(host, "multiprocessors", counts.get)
    for format in (BF16_SPARSE, FP8_SPARSE):
        large, small = (plan(4096, 3072, format=format, device=device) for device in counts)
        assert large.cluster > small.cluster
        assert small == plan(4096, 3072, format=format, device=1)


def test_the_tile_of_a_product_is_that_of_the_card():
    shapes = [(m, n, 3072) for m in (256, 1024, 4096) for n in (1152, 1920, 3072, 9216)]
    assert any(tuning.choose(*shape) != tuning.choose(*shape, multiprocessors=78) for shape in shapes)
    assert all(tuning.choose(*shape) == tuning.choose(*shape, multiprocessors=132) for shape in shapes)


@pytest.mark.parametrize("columns", [32, 96])
def test_tiles_that_would_not_be_stored_whole_are_refused(columns):
    config = tuning.GemmConfig(columns, 4)
    with pytest.raises(ValueError, match="multiple of 64"):
        gemm._defines(config)
    defines = dict(gemm.INSTANTIATIONS[0].defines) | {"BLOCK_N": columns}
    with pytest.raises(jit.CompileError, match=r"stored STORE_N columns at a time|BLOCK_N is one of"):
        jit.compile("gemm.cu", tuple(defines.items()))
