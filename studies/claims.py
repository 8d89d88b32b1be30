"""The study's claims, answered from the results: `python studies/claims.py studies/results/quality-*.json`.

A claim is answered yes or no, with its figures, for each model; "not measured" where a row that it needs is
not in the file, "does not apply" where the model cannot have one or nothing was set for it. What "nearer",
"equal" and "predicts" mean is fixed by the constants below, what pictures are to reach in `picture_targets`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import picture_targets
from measured_rows import DoesNotApply, Missing, Results
from picture_targets import PictureTarget

from rtlynx.storage.files import CheckpointError, read_json

NEARER_DB = 0.5  # what draws nearer by less draws alike
EQUAL_TIME = 0.02  # relative difference of modelled times that still count as equal
FRACTION_OF_TIME = 0.5
PREDICTS = 0.9  # rank correlation, over variants, of an error with PSNR
FEWEST_POINTS = 5
PREDICTORS = ("layer_error", "output_error", "output_error_weighted")


@dataclass(frozen=True)
class Answer:
    """verdict : "yes", "no", a word of its own where the claim asks "which", or why there is none.

    why : of a "no", in a line; empty where that is not known
    """

    claim: str
    verdict: str
    figure: str
    why: str = ""


def reached(target_of: Callable[[Results], PictureTarget], of: Results) -> tuple[bool, str]:
    """Whether pictures are as near as they are to be."""
    target = target_of(of)
    measured, pictures = picture_targets.measured(target)
    wanted, figure = target.shown(target.wanted), target.shown(measured)
    bound = "most" if target.at_most else "least"
    return target.met, f"{target.by}: {figure} ({pictures:,} pictures), wanted at {bound} {wanted}"


def weights_over_activations(of: Results) -> tuple[bool, str]:
    weights, activations = of.figure("weight-2:4:refit-fp8"), of.figure("fp8:refit")
    return weights - activations >= NEARER_DB, f"weights {weights:.1f} dB, activations {activations:.1f} dB"


def closed_form_matches_training(of: Results) -> tuple[bool, str]:
    trained, closed = "paper:trained", "paper"
    gain = of.figure(closed) - of.figure(trained)
    seconds = [of.row(name)["calibration_seconds"] for name in (closed, trained)]
    told = gain >= -of.spread(trained, closed) and seconds[0] <= FRACTION_OF_TIME * seconds[1]
    return told, f"{gain:+.2f} dB in {seconds[0]:.0f} s instead of {seconds[1]:.0f} s"


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


@dataclass(frozen=True)
class Claim:
    """`judge` gives whether it holds, and figures; `why` says in a line why it fails, for any model."""

    text: str
    judge: Callable[[Results], tuple[bool, str]]
    why: Callable[[Results], str] = lambda of: ""


def _to_reach(text: str, target_of: Callable[[Results], PictureTarget]) -> Claim:
    return Claim(text, partial(reached, target_of), lambda of: target_of(of).why)


# (of the models that figures were set for)
_EVERY, _STEPS, _RECOMMENDED = (
    f"{' / '.join(dict.fromkeys(f'{figure:g}' for figure in wanted.values()))} dB"
    for wanted in (
        picture_targets.EVERY_LAYER,
        picture_targets.WITH_DENSE_STEPS,
        picture_targets.RECOMMENDED,
    )
)
CLAIMS = (
    _to_reach(f"every layer sparse draws at {_EVERY} (the latter: Z-Image)", picture_targets.every_layer),
    _to_reach(
        f"every layer sparse, last steps dense, draws at {_STEPS} at {picture_targets.MORE}",
        picture_targets.with_dense_steps,
    ),
    _to_reach(
        f"the recommended recipe draws at {_RECOMMENDED}, no slower than before",
        picture_targets.recommended,
    ),
    _to_reach(
        "the recommended recipe draws as near as dense pictures of other noise",
        picture_targets.at_noise_floor,
    ),
    _to_reach(
        "the recommended recipe's Fréchet distance is within the dense model's over seeds",
        picture_targets.by_frechet,
    ),
    Claim(
        f"refitted 2:4 weights draw {NEARER_DB:g} dB or more nearer than refitted 2:4 activations, in fp8",
        weights_over_activations,
        lambda of: "both draw alike",
    ),
    Claim(
        "closed form is as good as training for 2,000 steps, in less than half the time",
        closed_form_matches_training,
    ),
    Claim(
        f"layer error predicts picture quality (rank correlation {PREDICTS} or more)",
        layer_error_predicts,
        lambda of: "its mean counts all layers alike, and a few do most of the damage",
    ),
    Claim("the budget rule beats the paper's hand-picked layers at equal time", budget_beats_by_hand),
)
BREAKS_FIRST = "kind of picture that loses most"


def answers(document: Mapping[str, Any]) -> list[Answer]:
    """Every claim, for one model's results."""
    of, found = Results(document), []
    for claim in CLAIMS:
        try:
            told, figure = claim.judge(of)
            answer = Answer(claim.text, "yes", figure)
            found.append(answer if told else replace(answer, verdict="no", why=claim.why(of)))
        except Missing as missing:
            found.append(Answer(claim.text, "not measured", f"missing: {missing}"))
        except DoesNotApply as reason:
            found.append(Answer(claim.text, "does not apply", str(reason)))
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
    for model, one in told:
        figure = one.figure + (f": {one.why}" if one.why else "")
        lines.append(f"| {one.claim} | {model} | **{one.verdict}** | {figure} |")
    return "\n".join(lines)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


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
