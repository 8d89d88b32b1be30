"""The study's claims, answered from the results: `python studies/claims.py studies/results/quality-*.json`.

A claim is answered yes or no, with its figures, for each model; "not measured" where a row that it needs is
not in the file, "does not apply" where the model cannot have one. What "enough", "equal" and "predicts" mean
is fixed by the constants below, set before any figure was known.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variants import VARIANTS

from rtlynx.storage.files import CheckpointError, read_json

ENOUGH_DB = 0.5  # a rank is enough where more of it gains less than this
WANTED_DB = 3.0
EQUAL_TIME = 0.02  # relative difference of modelled times that still count as equal
FRACTION_OF_TIME = 0.5
PREDICTS = 0.9  # rank correlation, over variants, of an error with PSNR
FEWEST_POINTS = 5
PLAIN_WEIGHTS = ("magnitude", "wanda", "ria", "bawa-style")  # SLiM's low-rank part compensates
PAPER = ("paper:trained", "paper")
OURS = "refit+lowrank+strided"
LARGEST_RANK, PAPERS_RANK = "5%", "2%"
PREDICTORS = ("layer_error", "output_error", "output_error_weighted")


@dataclass(frozen=True)
class Answer:
    """verdict : "yes", "no", a word of its own where the claim asks "which", or why there is none."""

    claim: str
    verdict: str
    figure: str


class Missing(Exception):
    """A row or figure that a claim needs is not there."""


class DoesNotApply(Exception):
    """The model has no such variant; the message says why."""


class Results:
    """Rows by name; of several with one name the one with most pictures."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.architecture = document.get("architecture", "")
        self.rows: dict[str, dict[str, Any]] = {}
        for row in document.get("rows", ()):
            known = self.rows.get(row["name"])
            if known is None or row["n"] >= known["n"]:
                self.rows[row["name"]] = row

    def row(self, name: str) -> dict[str, Any]:
        if name in self.rows:
            return self.rows[name]
        (variant,) = [variant for variant in VARIANTS if variant.name == name]
        reason = variant.missing_for(self.architecture)
        raise Missing(name) if reason is None else DoesNotApply(reason)

    def figure(self, name: str, figure: str = "psnr") -> float:
        value = self.row(name)["figures"][figure]["mean"]
        if value is None:
            raise Missing(f"{figure} of {name}")
        return value

    def spread(self, *names: str) -> float:
        """The largest spread of PSNR over the seeds of some rows, 0 where there was one seed."""
        return max(self.row(name)["figures"]["psnr"]["spread"] or 0.0 for name in names)

    def ms(self, name: str) -> float:
        value = self.row(name)["modelled_ms"]
        if value is None:
            raise Missing(f"modelled time of {name}")
        return value


def activations_over_weights(of: Results) -> tuple[bool, str]:
    activation = of.figure("activation-2:4")
    weights = {name: of.figure(f"weight-2:4:{name}") for name in PLAIN_WEIGHTS}
    best = max(weights, key=lambda name: weights[name])
    listed = ", ".join(f"{name} {value:.1f}" for name, value in weights.items())
    return activation > weights[best], f"activation 2:4 {activation:.1f} dB; weight 2:4 by {listed}"


def norm_helps_pictures_not_layers(of: Results) -> tuple[bool, str]:
    with_norm, without = "activation-2:4+norm", "activation-2:4"
    gain = of.figure(with_norm) - of.figure(without)
    errors = [of.row(name)["errors"]["layer_error"] for name in (without, with_norm)]
    told = gain > of.spread(with_norm, without) and errors[1] >= errors[0]
    return told, f"{gain:+.2f} dB; layer error {errors[0]:.4f} without, {errors[1]:.4f} with"


def two_percent_is_enough(of: Results) -> tuple[bool, str]:
    gains = {}
    for recipe in ("paper", "ours"):
        some = [of.figure(f"rank:{recipe}-{rank}") for rank in ("0%", PAPERS_RANK, LARGEST_RANK)]
        gains[recipe] = some[1] - some[0], some[2] - some[1]
    told = all(more < ENOUGH_DB for _, more in gains.values())
    return told, "; ".join(
        f"{recipe}: 0 to 2 % {first:+.2f} dB, 2 to 5 % {more:+.2f} dB"
        for recipe, (first, more) in gains.items()
    )


def closed_form_matches_training(of: Results) -> tuple[bool, str]:
    trained, closed = PAPER
    gain = of.figure(closed) - of.figure(trained)
    seconds = [of.row(name)["calibration_seconds"] for name in (closed, trained)]
    told = gain >= -of.spread(trained, closed) and seconds[0] <= FRACTION_OF_TIME * seconds[1]
    return told, f"{gain:+.2f} dB in {seconds[0]:.0f} s instead of {seconds[1]:.0f} s"


def ours_beats_the_paper(of: Results) -> tuple[bool, str]:
    paper = max(PAPER, key=of.figure)
    gain, time = of.figure(OURS) - of.figure(paper), of.ms(OURS) / of.ms(paper) - 1
    return (
        gain >= WANTED_DB and time <= EQUAL_TIME,
        f"{gain:+.2f} dB over {paper} at {time:+.1%} modelled time",
    )


def layer_error_predicts(of: Results) -> tuple[bool, str]:
    points = [
        row
        for row in of.rows.values()
        if row["errors"]["layer_error"] > 0
        and row["figures"]["psnr"]["mean"] is not None
        and row["calls_computed"] is None
        and row["steps"] == row["reference_steps"] == max(one["steps"] for one in of.rows.values())
    ]
    if len(points) < FEWEST_POINTS:
        raise Missing(f"{FEWEST_POINTS} sparse rows")
    quality = [row["figures"]["psnr"]["mean"] for row in points]
    found = {name: rank_correlation([-row["errors"][name] for row in points], quality) for name in PREDICTORS}
    listed = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in found.items())
    return found["layer_error"] >= PREDICTS, f"rank correlation with PSNR over {len(points)} rows: {listed}"


def budget_beats_by_hand(of: Results) -> tuple[bool, str]:
    """Answered by the paper's recipe; the figures tell of others too, where they were measured."""
    told, figures = False, []
    for name in ("paper:", "layers:norm-", "layers:refit-"):
        by_budget, by_hand = f"{name}by-budget", f"{name}by-hand"
        if name != "paper:" and not {by_budget, by_hand} <= set(of.rows):
            continue
        gain, time = of.figure(by_budget) - of.figure(by_hand), of.ms(by_budget) / of.ms(by_hand) - 1
        if name == "paper:":
            told = gain > of.spread(by_budget, by_hand) and time <= EQUAL_TIME
        figures.append(f"{gain:+.2f} dB at {time:+.1%} modelled time ({by_budget})")
    return told, "; ".join(figures)


def fp8_within_the_floor(of: Results) -> tuple[bool, str]:
    floor = of.figure("dense:other-seed")
    some = [row for name, row in of.rows.items() if row["forms"].get("fp8-sparse") and _psnr(row) is not None]
    if not some:
        raise Missing("a row with fp8 2:4 layers")
    within = [row for row in some if _psnr(row) >= floor]
    best = min(within, key=_time) if within else max(some, key=_psnr)
    speed = best["modelled_speedup"]
    faster = "" if speed is None else f", {speed:.2f}x"
    return bool(
        within
    ), f"{best['name']}: {_psnr(best):.1f} dB{faster}; dense with other noise {floor:.1f} dB"


CLAIMS: tuple[tuple[str, Callable[[Results], tuple[bool, str]]], ...] = (
    ("2:4 activations draw nearer to dense than 2:4 weights", activations_over_weights),
    (
        "norm compensation helps pictures although it does not help layer error",
        norm_helps_pictures_not_layers,
    ),
    (f"rank 2 % is enough (2 to 5 % gains less than {ENOUGH_DB} dB)", two_percent_is_enough),
    (
        "closed form is as good as training for 2,000 steps, in less than half the time",
        closed_form_matches_training,
    ),
    (
        f"refit + low-rank + strided groups beat the paper's recipe by {WANTED_DB:g} dB at equal time",
        ours_beats_the_paper,
    ),
    (f"layer error predicts picture quality (rank correlation {PREDICTS} or more)", layer_error_predicts),
    ("the budget rule beats the paper's hand-picked layers at equal time", budget_beats_by_hand),
    ("fp8 + 2:4 stays within the noise floor at some budget", fp8_within_the_floor),
)
BREAKS_FIRST = "kind of picture that loses most"


def answers(document: Mapping[str, Any]) -> list[Answer]:
    """Every claim, for one model's results."""
    of, found = Results(document), []
    for claim, judge in CLAIMS:
        try:
            told, figure = judge(of)
            found.append(Answer(claim, "yes" if told else "no", figure))
        except Missing as missing:
            found.append(Answer(claim, "not measured", f"missing: {missing}"))
        except DoesNotApply as reason:
            found.append(Answer(claim, "does not apply", str(reason)))
    return [*found, breaks_first(of)]


def breaks_first(of: Results) -> Answer:
    """Which group of pictures loses most under plain activation 2:4, relative to what other noise does to it.

    The squared error of a group in units of its own under other noise: busy pictures always differ more.
    """
    name = "activation-2:4"
    try:
        mine, floor = (of.row(one)["groups"] for one in (name, "dense:other-seed"))
    except Missing as missing:
        return Answer(BREAKS_FIRST, "not measured", f"missing: {missing}")
    shares = {
        group: mine[group]["mse"] / floor[group]["mse"]
        for group in mine
        if group in floor and floor[group]["mse"]
    }
    if len(shares) < 2 or "all" not in shares:
        return Answer(BREAKS_FIRST, "not measured", "missing: groups of pictures")
    whole = shares.pop("all")
    first = max(shares, key=lambda group: shares[group])
    listed = ", ".join(f"{group} {share:.2f}" for group, share in shares.items())
    examples = ", ".join(of.row(name)["worst"][:4])
    return Answer(
        BREAKS_FIRST,
        first if shares[first] > whole else "none more than the others",
        f"error of {name} over that of other noise: all {whole:.2f}, {listed}; worst: {examples}",
    )


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks, ties sharing their mean; 0 where one is constant."""
    a, b = _ranks(x), _ranks(y)
    mean = (len(a) - 1) / 2
    a, b = [value - mean for value in a], [value - mean for value in b]
    norm = (sum(value**2 for value in a) * sum(value**2 for value in b)) ** 0.5
    return sum(p * q for p, q in zip(a, b, strict=True)) / norm if norm else 0.0


def table(answers_by_model: Mapping[str, Sequence[Answer]]) -> str:
    """Markdown: a row a claim and model."""
    return table_of((model, one) for model, some in answers_by_model.items() for one in some)


def table_of(told: Iterable[tuple[str, Answer]]) -> str:
    """Markdown: a row for each model and answer, in the order given."""
    lines = ["| claim | model | answer | figures |", "|---|---|---|---|"]
    lines += [f"| {one.claim} | {model} | **{one.verdict}** | {one.figure} |" for model, one in told]
    return "\n".join(lines)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def _psnr(row: Mapping[str, Any]) -> Any:
    return row["figures"]["psnr"]["mean"]


def _time(row: Mapping[str, Any]) -> float:
    return float("inf") if row["modelled_ms"] is None else row["modelled_ms"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="files of studies/quality.py")
    options = parser.parse_args(arguments)
    try:
        documents = [read_json(path) for path in options.results]
    except CheckpointError as error:
        parser.error(str(error))
    print(table({document["model"]: answers(document) for document in documents}))


if __name__ == "__main__":
    main()
