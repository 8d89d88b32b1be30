"""`rtlynx evaluate` on a Hopper card: the kernels draw, and memory is measured."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("rtlynx_zoo")
pytest.importorskip("torchmetrics")

from evaluation_helpers import evaluate, with_stand_ins

pytestmark = pytest.mark.gpu


def test_the_kernels_draw_and_memory_is_measured(tmp_path):
    results = evaluate(tmp_path / "out", device="cuda", metrics=with_stand_ins())
    _, fp8, sparse = results["variants"]
    assert not results["simulated"]
    assert "peak_memory_bytes" not in results["unavailable"]
    assert all(row["peak_memory_bytes"] > 1e7 for row in results["variants"])
    assert fp8["psnr"] > sparse["psnr"] > 5
    assert "times as fast as dense" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
