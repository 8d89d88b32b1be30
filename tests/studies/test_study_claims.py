"""Claims and plots on invented results."""

import copy
import json

import claims
import plots
import pytest
import torch
from claims import answers, rank_correlation
from measure import write_atlas
from PIL import Image
from plots import pareto, write_plots

from rtlynx.storage.files import sha256_of

# Invented: name -> PSNR, modelled milliseconds, layer error.
INVENTED = {
    "dense": (None, 100.0, 0.0),
    "dense:other-seed": (20.0, 100.0, 0.0),
    "weight-2:4:magnitude": (14.0, 70.0, 0.11),
    "weight-2:4:wanda": (15.0, 70.0, 0.10),
    "weight-2:4:ria": (15.5, 70.0, 0.095),
    "weight-2:4:bawa-style": (15.2, 70.0, 0.094),
    "activation-2:4": (18.0, 75.0, 0.08),
    "activation-2:4+norm": (19.0, 75.0, 0.085),
    "paper:trained": (21.0, 80.0, 0.06),
    "paper": (21.5, 80.0, 0.055),
    "paper:by-hand": (22.0, 90.0, 0.05),
    "paper:by-budget": (23.0, 90.5, 0.05),
    "refit+lowrank+strided": (25.0, 79.0, 0.03),
    "rank:paper-0%": (19.0, 75.0, 0.085),
    "rank:paper-2%": (21.5, 80.0, 0.055),
    "rank:paper-5%": (21.8, 90.0, 0.05),
    "rank:ours-0%": (23.0, 75.0, 0.04),
    "rank:ours-2%": (25.0, 79.0, 0.03),
    "rank:ours-5%": (25.2, 90.0, 0.028),
    "fp8-budget:0.001": (21.0, 60.0, 0.05),
    "fp8-budget:0.01": (19.0, 50.0, 0.07),
}


def invented(**changes):
    rows = []
    for name, (psnr, ms, error) in INVENTED.items():
        group = "sweep" if name.split(":")[0] in ("rank", "fp8-budget") else "main"
        rows.append(
            {
                "name": name,
                "group": group,
                "sweep": "",
                "n": 3000 if group == "main" else 256,
                "steps": 28,
                "reference_steps": 28,
                "figures": {"psnr": {"mean": psnr, "spread": 0.1 if group == "main" and psnr else None}},
                "modelled_ms": ms,
                "modelled_speedup": 100 / ms,
                "calls_computed": None,
                "forms": {"fp8-sparse": 4} if name.startswith("fp8") else {"dense": 4},
                "calibration_seconds": {"paper": 15.0, "paper:trained": 180.0}.get(name),
                "errors": {
                    "layer_error": error,
                    "output_error": error / 2,
                    "output_error_weighted": error / 3,
                    "noise": [1.0, 0.5],
                    "layer_error_by_step": [error, error],
                    "output_error_by_step": [error, error / 2],
                    "layers": {"a.0": error, "b.0": error / 2} if error else {},
                },
                "groups": {
                    "all": {"mse": 0.010 if psnr else 0.0},
                    "faces": {"mse": 0.008},
                    "text": {"mse": 0.03 if name == "activation-2:4" else 0.01},
                },
                "worst": ["OK button", "input numbers"],
            }
        )
    counts = [1] * plots.HISTOGRAM_BINS
    kinds = {kind: {"share": 0.8, "counts": counts} for kind in ("weights", "activations")}
    roles = {"mlp-up": kinds, "mlp-down": kinds}
    return {"model": "tiny", "rows": rows, "distributions": {"normal": 0.87, "roles": roles}, **changes}


def changed(name, **entries):
    document = copy.deepcopy(invented())
    (row,) = [row for row in document["rows"] if row["name"] == name]
    row.update(entries)
    return document


def verdicts(document):
    return [answer.verdict for answer in answers(document)]


def psnr(value, spread=0.1):
    return {"psnr": {"mean": value, "spread": spread}}


def test_every_claim_holds_for_the_invented_results():
    assert verdicts(invented()) == ["yes"] * 8 + ["text"]
    figures = [answer.figure for answer in answers(invented())]
    assert figures[0].startswith("activation 2:4 18.0 dB; weight 2:4 by magnitude 14.0")
    assert figures[3] == "+0.50 dB in 15 s instead of 180 s"
    assert figures[4] == "+3.50 dB over paper at -1.2% modelled time"
    assert figures[7] == "fp8-budget:0.001: 21.0 dB, 1.67x; dense with other noise 20.0 dB"
    assert "all 1.00, faces 1.00, text 3.00; worst: OK button" in figures[8]


@pytest.mark.parametrize(
    ("place", "name", "entries"),
    [
        (0, "weight-2:4:ria", {"figures": psnr(18.5)}),
        (1, "activation-2:4+norm", {"figures": psnr(18.05)}),  # within the spread
        (2, "rank:ours-5%", {"figures": psnr(25.6, None)}),
        (3, "paper", {"figures": psnr(20.8)}),
        (3, "paper", {"calibration_seconds": 100.0}),
        (4, "refit+lowrank+strided", {"figures": psnr(24.0)}),
        (4, "refit+lowrank+strided", {"modelled_ms": 85.0}),
        (6, "paper:by-budget", {"modelled_ms": 95.0}),
        (7, "fp8-budget:0.001", {"figures": psnr(19.9, None)}),
    ],
)
def test_a_claim_that_fails_is_answered_no(place, name, entries):
    assert verdicts(changed(name, **entries))[place] == "no"


def test_layer_error_that_does_not_predict():
    document = copy.deepcopy(invented())
    for row in document["rows"]:
        if row["name"] in ("paper", "rank:paper-5%", "refit+lowrank+strided", "rank:ours-5%"):
            row["errors"]["layer_error"] = 0.2
    (answer,) = [answer for answer in answers(document) if answer.claim.startswith("layer error")]
    assert answer.verdict == "no"
    assert "output error 0.9" in answer.figure


def test_missing_rows_are_not_measured():
    assert (
        verdicts({"model": "tiny", "architecture": "FluxTransformer2DModel", "rows": []})
        == ["not measured"] * 9
    )
    document = invented()
    document["rows"] = [row for row in document["rows"] if row["name"] != "weight-2:4:ria"]
    first = answers(document)[0]
    assert (first.verdict, first.figure) == ("not measured", "missing: weight-2:4:ria")


def test_what_a_model_cannot_have_does_not_apply():
    document = invented() | {"architecture": "QwenImageTransformer2DModel"}
    document["rows"] = [row for row in document["rows"] if ":by-" not in row["name"]]
    (answer,) = [answer for answer in answers(document) if "hand-picked" in answer.claim]
    assert answer.verdict == "does not apply"
    assert "leaves no layer of QwenImageTransformer2DModel dense by hand" in answer.figure


def test_the_row_with_most_pictures_counts():
    document = invented()
    (row,) = [row for row in document["rows"] if row["name"] == "activation-2:4"]
    document["rows"].insert(0, {**row, "n": 8, "figures": psnr(1.0)})
    document["rows"].append({**row, "n": 9, "figures": psnr(1.0)})
    assert claims.Results(document).figure("activation-2:4") == 18.0


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation([1, 1], [1, 2]) == 0


def test_pareto_front_by_hand():
    points = {"a": (1.0, 30.0), "b": (1.2, 25.0), "c": (1.1, 24.0), "d": (1.2, 20.0), "e": (1.5, 10.0)}
    assert pareto(points) == ["a", "b", "e"]
    assert pareto({}) == []


def test_plots_are_written_for_what_is_there(tmp_path, capsys):
    path = tmp_path / "quality-tiny.json"
    path.write_text(json.dumps(invented()))
    names = {file.name for file in write_plots(path)}
    assert names == {f"plot-{name}.png" for name in plots.PLOTS}
    (elsewhere,) = {file.parent for file in write_plots(path, tmp_path / "docs")}
    assert elsewhere == tmp_path / "docs/quality-tiny"
    with Image.open(elsewhere / "plot-front.png") as plot:
        assert plot.text["Source"] == sha256_of(path)
    some = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name in ("dense", "paper"):
        write_atlas(plots.atlas_path(path, name), some)
    write_atlas(plots.atlas_path(path, "activation-2:4-worst"), some[:4])  # two, as its row says
    plots.main([str(path)])
    said = capsys.readouterr().out
    assert "plot-pictures.png" in said
    assert "plot-worst.png" in said
    assert "plot-worst-recommended.png" not in said  # no such row, no such file
    claims.main([str(path)])
    assert capsys.readouterr().out.count("**yes**") == 8
    path.write_text(json.dumps({"model": "tiny", "rows": []}))
    for file in path.with_suffix("").glob("*.png"):
        file.unlink()
    assert write_plots(path) == []


def test_difference_is_magnified_around_grey():
    a, b = torch.full((1, 3, 2, 2), 0.5), torch.full((1, 3, 2, 2), 0.45)
    assert torch.allclose(plots.magnified_difference(a, b), torch.full((1, 3, 2, 2), 0.7))
    assert torch.equal(plots.magnified_difference(a, a), a)
