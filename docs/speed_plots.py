"""The plot of a results file of bf16 layers."""

from pathlib import Path

from matplotlib.figure import Figure
from tables import speedup


def draw_speed(results: dict, path: Path, source: str) -> None:
    """Bars: whole layers' speed relative to cuBLAS; marks: the GEMM alone.

    source : digest of the results file; the plot carries it, so that a test sees when it is stale.
    """
    rows = results["rows"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    series = (
        ("cuSPARSELt", "compress + GEMM", "#9aa5b1", -0.2, _cusparselt_whole, "cusparselt_gemm_us"),
        ("rtlynx", "whole layer", "#2f7d4f", 0.2, lambda row: row["ours_us"], "ours_gemm_us"),
    )
    for name, extent, colour, offset, whole, gemm in series:
        places = [index + offset for index in range(len(rows))]
        times = [whole(row) for row in rows]
        bars = [row["cublas_us"] / us if us else 0.0 for row, us in zip(rows, times, strict=True)]
        marks = [speedup(row, gemm) or float("nan") for row in rows]
        axes.bar(places, bars, 0.38, color=colour, label=f"{name}: {extent}")
        style = {"color": colour, "markeredgecolor": "black", "markersize": 5}
        axes.plot(places, marks, "D", label=f"{name}: GEMM alone", **style)
    axes.axhline(1, color="black", linewidth=1)
    axes.text(1.01, 1, "cuBLAS", va="center", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_xticks(range(len(rows)), [row["shape"] for row in rows], rotation=25, ha="right")
    axes.set_ylabel("speed relative to cuBLAS")
    axes.set_title(f"One linear layer, bf16, {results['device']}")
    axes.legend(ncols=2, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Source": source, "Software": None})


def _cusparselt_whole(row: dict) -> float | None:
    parts = row["cusparselt_compress_us"], row["cusparselt_gemm_us"]
    return None if None in parts else sum(parts)
