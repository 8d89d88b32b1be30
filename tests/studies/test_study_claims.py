"""Claims and plots on invented results."""

import copy
import json
from pathlib import Path

import claims
import plots
import pytest
import torch
from claims import answers, rank_correlation
from measure import write_atlas
from measured_rows import Results
from PIL import Image
from plots import pareto, write_plots

from rtlynx.storage.files import sha256_of

# Invented: name -> PSNR, modelled milliseconds, layer error.
INVENTED = {
    "dense": (None, 100.0, 0.0),
    "dense:other-seed": (35.0, 100.0, 0.0),
    "weight-2:4:refit-fp8": (27.0, 49.0, 0.10),
    "activation-2:4": (18.0, 75.0, 0.12),
    "fp8:refit": (23.0, 50.0, 0.11),
    "paper:trained": (21.0, 80.0, 0.14),
    "paper": (21.5, 80.0, 0.13),
    "paper:by-hand": (22.0, 90.0, 0.125),
    "paper:by-budget": (24.0, 90.5, 0.105),
    "saving:auto-90%": (29.0, 55.0, 0.04),
    "drop:fp8-weights": (28.0, 50.0, 0.05),
    "distilled:fp8-weights+rotated": (30.0, 50.0, 0.035),
    "distilled:fp8-weights+rotated+last-3": (34.0, 52.0, 0.03),
    "recommended": (36.0, 54.0, 0.02),
}
SWEEPS = ("drop", "distilled", "fp8", "saving")
MODEL = {"model": "zoo:qwen-emoji", "architecture": "FluxTransformer2DModel"}  # (which has layers by hand)


def invented(**changes):
    rows = []
    for name, (psnr, ms, error) in INVENTED.items():
        group = "sweep" if name.split(":")[0] in SWEEPS else "main"
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
    distributions = {"normal": 0.87, "roles": roles}
    return {**MODEL, "rows": rows, "distributions": distributions, **changes}


def changed(name, **entries):
    document = copy.deepcopy(invented())
    (row,) = [row for row in document["rows"] if row["name"] == name]
    row.update(entries)
    return document


def verdicts(document):
    return [answer.verdict for answer in answers(document)]


def answer_to(document, beginning):
    (answer,) = [answer for answer in answers(document) if answer.claim.startswith(beginning)]
    return answer


def psnr(value, spread=0.1):
    return {"psnr": {"mean": value, "spread": spread}}


def test_every_claim_holds_for_the_invented_results():
    found = answers(invented())
    verdicts = [answer.verdict for answer in found]
    assert verdicts == ["yes"] * 4 + ["does not apply"] + ["yes"] * 4 + ["text"]
    assert not any(answer.why for answer in found)
    figures = [answer.figure for answer in found]
    assert figures[0] == "distilled:fp8-weights+rotated: 30.0 dB (256 pictures), wanted at least 29.0 dB"
    assert figures[3] == "recommended: 36.0 dB (3,000 pictures), wanted at least 35.0 dB"
    assert figures[5] == "weights 27.0 dB, activations 23.0 dB"
    assert figures[6] == "+0.50 dB in 15 s instead of 180 s"
    assert "all 1.00, faces 1.00, text 3.00; worst: OK button" in figures[9]


@pytest.mark.parametrize(
    ("place", "name", "entries"),
    [
        (0, "distilled:fp8-weights+rotated", {"figures": psnr(28.9)}),
        (1, "distilled:fp8-weights+rotated+last-3", {"figures": psnr(32.9)}),
        (1, "distilled:fp8-weights+rotated+last-3", {"modelled_ms": 52.1}),  # then no step runs dense
        (2, "recommended", {"figures": psnr(32.9)}),
        (3, "recommended", {"figures": psnr(34.9)}),
        (3, "dense:other-seed", {"figures": psnr(36.1)}),
        (5, "fp8:refit", {"figures": psnr(26.6)}),  # alike
        (6, "paper", {"figures": psnr(20.8)}),
        (6, "paper", {"calibration_seconds": 100.0}),
        (8, "paper:by-budget", {"modelled_ms": 95.0}),
    ],
)
def test_a_claim_that_fails_is_answered_no(place, name, entries):
    assert verdicts(changed(name, **entries))[place] == "no"


def test_a_recipe_that_is_slower_than_what_was_recommended_before_reaches_nothing():
    assert verdicts(changed("recommended", modelled_ms=55.1))[2:4] == ["not measured"] * 2


def test_few_pictures_answer_nothing():
    document = changed("distilled:fp8-weights+rotated", n=255)
    (other,) = [row for row in document["rows"] if row["name"] == "drop:fp8-weights"]
    document["rows"].remove(other)
    assert verdicts(document)[0] == "not measured"


def test_clothing_is_judged_by_its_distance_to_real_pictures():
    document = invented(model="zoo:flux-fashion")
    names = "dense", "dense:other-seed", "recommended"
    dense, other, own = (
        next(row for row in document["rows"] if row["name"] == name)["figures"] for name in names
    )
    dense["frechet"] = {"mean": 1.5, "by_seed": [1.4, 1.5, 1.6]}
    other["frechet"] = {"mean": 1.6, "by_seed": [1.5, 1.7, 1.6]}
    for mean, verdict in ((1.69, "yes"), (1.71, "no")):
        own["frechet"] = {"mean": mean, "by_seed": [mean] * 3}
        answer = answer_to(document, "the recommended recipe's Fréchet")
        assert answer.verdict == verdict
        assert answer.figure == f"recommended: {mean} (3,000 pictures), wanted at most 1.70"
    assert answer_to(document, "every layer sparse draws").verdict == "does not apply"


def test_layer_error_that_does_not_predict():
    document = copy.deepcopy(invented())
    for row in document["rows"]:
        if row["name"] in ("recommended", "saving:auto-90%", "drop:fp8-weights"):
            row["errors"]["layer_error"] = 0.2
    answer = answer_to(document, "layer error")
    assert answer.verdict == "no"
    assert "output error 0.9" in answer.figure
    assert answer.why in claims.table_of([("x", answer)])


@pytest.mark.parametrize("file", sorted((Path(claims.__file__).parent / "results").glob("quality-*.json")))
def test_whatever_fails_says_why(file):
    failed = [answer for answer in answers(json.loads(file.read_text())) if answer.verdict == "no"]
    assert [answer.claim for answer in failed if not answer.why] == []


def test_missing_rows_are_not_measured():
    document = {"model": "zoo:z-image-emoji", "architecture": "FluxTransformer2DModel", "rows": []}
    assert verdicts(document) == ["not measured"] * 4 + ["does not apply"] + ["not measured"] * 5
    document = invented()
    document["rows"] = [row for row in document["rows"] if row["name"] != "fp8:refit"]
    answer = answer_to(document, "refitted 2:4 weights")
    assert (answer.verdict, answer.figure) == ("not measured", "missing: fp8:refit")


def test_what_a_model_cannot_have_does_not_apply():
    document = invented() | {"architecture": "QwenImageTransformer2DModel"}
    document["rows"] = [row for row in document["rows"] if ":by-" not in row["name"]]
    answer = answer_to(document, "the budget rule beats the paper's hand-picked")
    assert answer.verdict == "does not apply"
    assert "leaves no layer of QwenImageTransformer2DModel dense by hand" in answer.figure


def test_the_row_with_most_pictures_counts():
    document = invented()
    (row,) = [row for row in document["rows"] if row["name"] == "activation-2:4"]
    document["rows"].insert(0, {**row, "n": 8, "figures": psnr(1.0)})
    document["rows"].append({**row, "n": 9, "figures": psnr(1.0)})
    assert Results(document).figure("activation-2:4") == 18.0


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
