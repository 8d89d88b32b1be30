"""What a user can choose, validated by hand: pydantic names no nearest key, and not what a rank is."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from rtlynx.math.formats import FORMAT_NAMES, FP8_WEIGHT_SPARSE, FormatName
from rtlynx.math.scores import MAGNITUDE
from rtlynx.math.selection import Pattern
from rtlynx.renaming import by_new_names, renamed

# A rank given as a share of K is never less than this: a handful of directions at toy widths.
MIN_SHARE_RANK = 4
# The paper's share of the inputs, and where "auto" stops: up to 64 columns of T cost little on the kernels,
# 2 % of 12,288 inputs most of what sparsity saves (`ours_paper_rank_us` in benchmarks/results/linear-*.json).
SHARE, MOST_AUTO_RANK = 0.02, 64
RECOMMENDED_SPEEDUP_SHARE = 0.9
# What a recipe says of layers that may drop weights.
_DROPS_WEIGHTS = {"n": 2, "m": 4, "score": MAGNITUDE.name, "refit": True, "rank": None}
# More processes than any one layer is spread over; each adds parts to strided groups.
MOST_TP_DEGREE = 1024
# `dense_sigmas` that hold for no step: original weights are kept for steps that are chosen later.
NO_STEP = ((-2.0, -1.0),)

# Fields by their names of version 0.1, which files and code may still use.
_FORMER_RECIPE, _FORMER_BUDGET = {"forms": "formats"}, {"saving": "speedup_share"}


@renamed(_FORMER_BUDGET)
@dataclass(frozen=True)
class Budget:
    """How much sparsity a model gets: a limit on its error, or the time that it is to save. Give one.

    Parameters
    ----------
    error : float, optional
        Sparsify the layers of best time saved per error while the relative squared error added to the
        model's own output, summed over inputs, stays at or below this.
    speedup_share : float in (0, 1], optional
        Sparsify as few, as harmless layers as reach this share of the time that sparsifying all would save.

    Notes
    -----
    Layers that read one input are chosen together. Their time is that of their products and of preparing the
    input, by a latency model that was fitted to a Hopper card (`rtlynx.calibration.prices`).

    Raises
    ------
    ValueError
        If there is no limit or both, or it is out of range.
    """

    error: float | None = None
    speedup_share: float | None = None

    def __post_init__(self) -> None:
        if (self.error is None) == (self.speedup_share is None):
            raise ValueError("a budget has one limit: error or speedup_share")
        if self.error is not None and not (is_number(self.error) and self.error > 0):
            raise ValueError(f"budget error is a number above 0, got {self.error!r}")
        if self.speedup_share is not None and not (
            is_number(self.speedup_share) and 0 < self.speedup_share <= 1
        ):
            raise ValueError(f"budget speedup_share is a share in (0, 1], got {self.speedup_share!r}")


@renamed(_FORMER_RECIPE)
@dataclass(frozen=True)
class Recipe:
    """How a model is made sparse. `Recipe.recommended` is what calibration uses where none is given.

    Parameters
    ----------
    n : int
        Keep n of every m neighbouring activations.
    m : int
        How many compete.
    grouping : "auto" | "adjacent" | "strided"
        Which m compete. Auto: strided for attention outputs, whose groups then span different heads, and for
        outputs fed by attention and MLP together (each part in itself); adjacent elsewhere.
    tp_degree : int
        Keep strided groups and permutations inside each of that many equal shards of an input, so that tensor
        parallelism of this degree, or one that divides it, serves the model.
    norm : "auto" | "none" | "scale" | "paper"
        Per-token norm compensation. Auto: on where the weight is not refitted. "paper": with the printed
        epsilon.
    rank : int | float | "auto" | None
        Rank of the low-rank branch: a whole number, a share of the layer's inputs (at least 4), or None.
        Auto: 2 % of the inputs and at most 64.
    refit : bool
        Refit the weight to the selected activations (needs calibration; costs nothing at inference).
    intercept : bool
        Refit the bias with the weight; a layer without one gets one. Needs `refit`.
    rotate_values : bool | "auto"
        Rotate the values of each attention head such that strong channels compete with weak ones in the
        layers that read it (needs calibration; costs nothing at inference). Their groups are adjacent then.
        Auto: where it is known which layers make and read them.
    permute_hidden : bool
        Permute the hidden features of MLPs so that strong ones compete with weak ones (needs calibration;
        costs nothing at inference, changes nothing of the dense model). They stay inside each of `tp_degree`
        shards.
    lowrank_solver : "closed-form" | "trained"
        Trained: as in the paper, by AdamW on the layer's output error for `train_steps` steps.
    lowrank_sharing : "shared" | "own"
        Layers that read one tensor share one A (one regression on their concatenated outputs) or keep their
        own (the paper).
    train_steps : int
        Steps of the "trained" solver.
    ridge : float | "auto"
        Regularisation towards W (and of the low-rank branch towards 0), relative to the mean diagonal of the
        moments. Auto: chosen on held-out prompts, layer by layer.
    balance : "kinds" | "tokens"
        Where image and text tokens share a layer: give each kind the same weight, or each token.
    text_stream : "dense" | "sparse"
        Layers of the text stream, and of the audio stream of LTX-2. They carry the prompt, or the sound,
        through few tokens: most of the damage, hardly any of the time. With precision "fp8" dense means
        "fp8-dense": in eight bits, nothing dropped; with "auto" the budget chooses between that and dense.
    text_rows : "sparse" | "dense"
        Text tokens in blocks that image and text share.
    dense_steps : int
        Run the first steps of each picture densely. Diffusers pipelines tell which step a call is; sampling
        loops of your own say so with `rtlynx.schedule`.
    dense_last_steps : int
        Run the last steps of each picture densely: no later step corrects their errors.
    dense_sigmas : tuple of (low, high), or "auto"
        Run the steps densely whose noise level sigma lies in one of these ranges, low < sigma <= high:
        whatever the number of steps. Sigma falls from 1 (noise) to 0 (picture). A range from 0 always holds
        for the last of several steps. Auto: calibration draws pictures and chooses how many of the last steps
        run in dense fp8, and which formats the others take, at the time that the budget's `speedup_share`
        means over all steps of a picture. Where it cannot compare pictures, it warns and none runs dense.
    dense_precision : "bf16" | "fp8"
        What dense rows and steps multiply: the original weight in the model's dtype, or in e4m3, which takes
        half the memory and less time.
    skip : tuple[str, ...]
        Glob patterns of layer names that stay dense.
    budget : Budget or None
        Leave further layers dense by measured error and modelled time.
    precision : "bf16" | "fp8" | "auto"
        Of the sparse layers' products: the model's own dtype, or e4m3 weights and inputs with a scale for
        each output channel and token. Auto: the budget chooses for each input between fp8 that drops
        activations, fp8 that drops none, and dense (see also `drop`).
    drop : "activations" | "weights" | "auto"
        What sparse fp8 layers drop: half of their inputs, chosen token by token, or half of their weights,
        which calibration chooses and refits ("fp8-weight-sparse"; 2:4, without a low-rank branch). Auto, with
        precision "auto": the budget chooses for each input between both.
    formats : mapping
        Glob pattern of layer names -> what these layers are, whatever else the recipe says but `skip`:
        "bf16-sparse" | "fp8-sparse" | "fp8-weight-sparse" (see `drop`) | "fp8-dense" (quantised, nothing
        dropped, not compensated) | "dense".
        The first pattern that matches counts.
    score : str
        Which n of m are kept: those of highest score (`rtlynx.math.scores`).
    modulation : "dense" | "fp8"
        Layers that make shifts, scales and gates of the timestep (adaLN): as they are, or their weights in
        e4m3 with a scale for each output channel. Each step reads all of them for one token a picture.

    Raises
    ------
    ValueError
        If a value is out of range or values contradict each other.
    """

    n: int = 2
    m: int = 4
    grouping: Literal["auto", "adjacent", "strided"] = "auto"
    tp_degree: int = 1
    norm: Literal["auto", "none", "scale", "paper"] = "auto"
    rank: int | float | Literal["auto"] | None = "auto"
    refit: bool = True
    intercept: bool = False
    rotate_values: bool | Literal["auto"] = False
    permute_hidden: bool = False
    lowrank_solver: Literal["closed-form", "trained"] = "closed-form"
    lowrank_sharing: Literal["shared", "own"] = "shared"
    train_steps: int = 2000
    ridge: float | Literal["auto"] = "auto"
    balance: Literal["kinds", "tokens"] = "kinds"
    text_stream: Literal["dense", "sparse"] = "dense"
    text_rows: Literal["sparse", "dense"] = "sparse"
    dense_steps: int = 0
    dense_last_steps: int = 0
    dense_sigmas: tuple[tuple[float, float], ...] | Literal["auto"] = ()
    dense_precision: Literal["bf16", "fp8"] = "bf16"
    skip: tuple[str, ...] = ()
    budget: Budget | None = None
    precision: Literal["bf16", "fp8", "auto"] = "bf16"
    drop: Literal["activations", "weights", "auto"] = "activations"
    formats: Mapping[str, FormatName] = field(default_factory=dict, hash=False)
    score: str = MAGNITUDE.name
    modulation: Literal["dense", "fp8"] = "dense"

    def __post_init__(self) -> None:
        Pattern(self.n, self.m, score=self.score)
        _check_choice("grouping", self.grouping, ("auto", "adjacent", "strided"))
        _check_choice("norm", self.norm, ("auto", "none", "scale", "paper"))
        _check_choice("lowrank_solver", self.lowrank_solver, ("closed-form", "trained"))
        _check_choice("lowrank_sharing", self.lowrank_sharing, ("shared", "own"))
        _check_choice("balance", self.balance, ("kinds", "tokens"))
        _check_choice("text_stream", self.text_stream, ("dense", "sparse"))
        _check_choice("text_rows", self.text_rows, ("sparse", "dense"))
        _check_choice("modulation", self.modulation, ("dense", "fp8"))
        if not is_whole(self.tp_degree) or not 1 <= self.tp_degree <= MOST_TP_DEGREE:
            raise ValueError(
                f"tp_degree is a whole number above 0 and at most {MOST_TP_DEGREE}, got {self.tp_degree!r}"
            )
        for flag in ("refit", "intercept", "rotate_values", "permute_hidden"):
            auto = flag == "rotate_values" and self.rotate_values == "auto"
            if not auto and not isinstance(getattr(self, flag), bool):
                raise ValueError(f"{flag} is true or false, got {getattr(self, flag)!r}")
        if self.rank is not None and self.rank != "auto":
            if not is_number(self.rank) or self.rank <= 0:
                raise ValueError(
                    f"rank is a whole number or a share of the inputs, above 0, 'auto', or none for no "
                    f"low-rank branch; got {self.rank!r}"
                )
            if isinstance(self.rank, float) and self.rank >= 1:
                raise ValueError(
                    f"rank as a share is below 1, got {self.rank}; give a whole number for a rank"
                )
        if self.ridge != "auto" and not (is_number(self.ridge) and self.ridge > 0):
            raise ValueError(f"ridge is a number above 0 or 'auto', got {self.ridge!r}")
        if not is_whole(self.train_steps) or self.train_steps < 1:
            raise ValueError(f"train_steps is a whole number above 0, got {self.train_steps!r}")
        for name in ("dense_steps", "dense_last_steps"):
            steps = getattr(self, name)
            if not is_whole(steps) or steps < 0:
                raise ValueError(f"{name} is a whole number, 0 or more, got {steps!r}")
        _check_choice("dense_precision", self.dense_precision, ("bf16", "fp8"))
        if self.dense_sigmas == "auto":
            self._check_auto_sigmas()
        else:
            object.__setattr__(self, "dense_sigmas", ranges_of("dense_sigmas", self.dense_sigmas, "auto"))
        if not isinstance(self.skip, list | tuple) or not all(isinstance(glob, str) for glob in self.skip):
            raise ValueError(f"skip is a list of glob patterns, got {self.skip!r}")
        object.__setattr__(self, "skip", tuple(self.skip))
        _check_choice("precision", self.precision, ("bf16", "fp8", "auto"))
        if not isinstance(self.formats, Mapping) or not all(isinstance(glob, str) for glob in self.formats):
            raise ValueError(f"formats is a mapping from glob patterns to formats, got {self.formats!r}")
        for glob, format in self.formats.items():
            _check_choice(f"the format of {glob!r}", format, FORMAT_NAMES)
        object.__setattr__(self, "formats", dict(self.formats))
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise ValueError(f"budget is Budget(error=x) or Budget(speedup_share=x), got {self.budget!r}")
        if self.precision == "auto" and self.budget is None:
            raise ValueError(
                "precision 'auto' lets the budget choose: give a budget, or precision fp8 or bf16"
            )
        self._check_drop()
        if self.uses_fp8 and (self.norm == "paper" or self.lowrank_solver == "trained"):
            raise ValueError(
                "fp8 layers know neither the paper's printed norm formula nor its trained low-rank branch: "
                "use norm='scale' and lowrank_solver='closed-form'"
            )
        if self.refit and self.norm in ("scale", "paper"):
            raise ValueError(
                "a refitted weight already restores the output: norm compensation stays off with it"
            )
        if self.rotate_values and self.grouping == "strided":
            raise ValueError(
                "rotated values make neighbours compete inside each head, and strided groups span heads: use "
                "grouping 'auto' or 'adjacent'"
            )
        if self.intercept and not self.refit:
            raise ValueError("the intercept is refitted together with the weight: it needs refit=True")
        if self.lowrank_solver == "trained" and (self.rank is None or self.refit):
            raise ValueError("the trained low-rank branch is the paper's: it needs a rank and refit=False")

    def _check_drop(self) -> None:
        """ValueError unless the recipe leaves layers that drop weights what they need."""
        _check_choice("drop", self.drop, ("activations", "weights", "auto"))
        if self.drop != "activations" and self.precision == "bf16":
            raise ValueError(
                f"drop={self.drop!r} is for layers in fp8, got precision='bf16': give 'fp8' or 'auto'"
            )
        if self.drop == "auto" and self.precision != "auto":
            raise ValueError(
                f"drop='auto' lets the budget choose, got precision={self.precision!r}: give 'auto', or drop "
                "'weights' or 'activations'"
            )
        if not self.drops_weights:
            return
        for name, wanted in _DROPS_WEIGHTS.items():
            if getattr(self, name) != wanted:
                raise ValueError(
                    "layers that drop weights are 2:4, refitted, and have no low-rank branch: give "
                    f"{name}={wanted!r}, got {name}={getattr(self, name)!r}"
                )

    def _check_auto_sigmas(self) -> None:
        """ValueError unless the recipe says all that the choice of dense steps needs."""
        if self.dense_precision != "fp8":
            raise ValueError(
                "dense_sigmas 'auto' chooses steps that run in dense fp8: give dense_precision='fp8'"
            )
        if self.budget is None or self.budget.speedup_share is None:
            raise ValueError(
                "dense_sigmas 'auto' shares one saving out between dense steps and dense layers: give "
                f"budget=Budget(speedup_share=...), got budget={self.budget!r}"
            )
        if self.dense_steps or self.dense_last_steps:
            raise ValueError(
                "dense_sigmas 'auto' chooses the dense steps itself: leave out dense_steps and "
                "dense_last_steps"
            )

    @classmethod
    def recommended(cls, **changes: Any) -> Recipe:
        """Refitted weights, rotated values, no low-rank branch; calibration chooses formats and dense steps.

        At equal time the nearest to the dense model's pictures in docs/results/quality.md.

        `changes` are fields of `Recipe`. Some rule out a part: layers may drop weights only in fp8, with 2:4,
        `refit` and `rank=None`; dense steps are chosen only in fp8, with a `Budget` of `speedup_share`, and
        where `changes` say nothing of them.
        """
        budget = Budget(speedup_share=RECOMMENDED_SPEEDUP_SHARE)
        settings = {"rank": None, "precision": "auto", "budget": budget, **changes}
        settings.setdefault("intercept", settings.get("refit", True))
        settings.setdefault("rotate_values", settings.get("grouping") != "strided" and "auto")
        if all(settings.get(name, wanted) == wanted for name, wanted in _DROPS_WEIGHTS.items()):
            drop = {"auto": "auto", "fp8": "weights", "bf16": "activations"}
            settings.setdefault("drop", drop.get(settings["precision"], "auto"))
        steps = {"dense_steps", "dense_last_steps", "dense_sigmas", "dense_precision"}
        shared = getattr(settings["budget"], "speedup_share", None) is not None
        if shared and settings["precision"] != "bf16" and not steps & settings.keys():
            settings |= {"dense_sigmas": "auto", "dense_precision": "fp8"}
        return cls(**settings)

    @classmethod
    def immediate(cls, **changes: Any) -> Recipe:
        """The recipe that needs no calibration: selection and norm compensation."""
        return cls(**{"rank": None, "refit": False, **changes})

    @classmethod
    def dense_fp8(cls, **changes: Any) -> Recipe:
        """Every layer in eight bits, nothing dropped, no calibration: what sparsity is compared with."""
        return cls.immediate(**{"formats": {"*": "fp8-dense"}, **changes})

    @classmethod
    def paper(cls, **changes: Any) -> Recipe:
        """The paper's: adjacent groups, norm compensation, a low-rank branch for each layer."""
        layers = {"grouping": "adjacent", "norm": "scale", "refit": False}
        branch = {"rank": SHARE, "lowrank_sharing": "own"}
        return cls(**{**layers, **branch, **changes})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], preset: Callable[..., Recipe] | None = None) -> Recipe:
        """From plain JSON values: changes of `preset` (`Recipe.recommended`, ...), or of `Recipe` itself.

        Raises
        ------
        ValueError
            For unknown keys, with the nearest known one, and for values that `Recipe` refuses.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"a recipe is a JSON object, got {settings!r}")
        values = by_new_names(settings, _FORMER_RECIPE)
        refuse_unknown("recipe", values, {field.name for field in fields(cls)})
        if isinstance(values.get("budget"), Mapping):
            limits = by_new_names(values["budget"], _FORMER_BUDGET)
            refuse_unknown("budget", limits, {field.name for field in fields(Budget)})
            values["budget"] = Budget(**limits)
        return (preset or cls)(**values)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """From a JSON object; ValueError where it is none."""
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the recipe is not valid JSON: {error}") from None
        if not isinstance(settings, dict):
            raise ValueError("the recipe is not a JSON object")
        return cls.from_dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; inverse of `from_dict`."""
        values = asdict(self)
        values["skip"] = list(self.skip)
        values["dense_sigmas"] = (
            "auto" if self.chooses_dense_steps else [list(one) for one in self.dense_ranges]
        )
        values["formats"] = dict(self.formats)
        return values

    @property
    def needs_calibration(self) -> bool:
        """Whether the recipe has anything to solve for or measure on real activations."""
        folded = bool(self.rotate_values) or self.permute_hidden
        return self.refit or folded or self.rank is not None or self.budget is not None

    @property
    def uses_fp8(self) -> bool:
        """Whether any layer may be quantised."""
        return self.precision != "bf16" or any(format.startswith("fp8") for format in self.formats.values())

    @property
    def drops_weights(self) -> bool:
        """Whether any layer may drop weights."""
        return self.drop != "activations" or FP8_WEIGHT_SPARSE.name in self.formats.values()

    @property
    def chooses_dense_steps(self) -> bool:
        """Whether calibration is still to choose the steps that run dense."""
        return self.dense_sigmas == "auto"

    @property
    def dense_ranges(self) -> tuple[tuple[float, float], ...]:
        """The ranges of `dense_sigmas`; none while calibration is still to choose them."""
        return () if isinstance(self.dense_sigmas, str) else self.dense_sigmas

    @property
    def has_dense_steps(self) -> bool:
        """Whether some steps of a picture run dense, or may once calibration has chosen."""
        return self.dense_steps > 0 or self.dense_last_steps > 0 or bool(self.dense_sigmas)

    def is_dense_step(self, index: int, count: int, sigma: float | None) -> bool:
        """Whether step `index` of `count`, at noise level `sigma`, runs dense."""
        at_end = index < self.dense_steps or index >= count - self.dense_last_steps
        if sigma is None or at_end:
            return at_end
        # Of few steps the last begins above a range from 0, and ends at 0. A sigma in float32 is rounded.
        last, sigma = 0 < index == count - 1, sigma - 1e-6
        return any(low < sigma <= high or (last and low <= 0 < high) for low, high in self.dense_ranges)

    @property
    def needs_sigma(self) -> bool:
        """Whether the noise level of a step decides if it runs dense."""
        return self.chooses_dense_steps or any(high > 0 for _, high in self.dense_ranges)

    def describe_dense_steps(self) -> str:
        """The fields that say which steps run dense, as one writes them."""
        names = ["dense_steps", "dense_last_steps", *(["dense_sigmas"] if self.needs_sigma else [])]
        return ", ".join(f"{name}={getattr(self, name)}" for name in names if getattr(self, name)) or "none"

    @property
    def depends_on_call(self) -> bool:
        """Whether what a layer does depends on the model's call: its step, or where its text is."""
        return self.has_dense_steps or self.text_rows == "dense"

    def fixed_format(self, name: str) -> FormatName | None:
        """The format that `formats` gives the layer `name`, or None."""
        return next(
            (format for glob, format in self.formats.items() if fnmatch.fnmatchcase(name, glob)), None
        )

    @property
    def layer_norm(self) -> Literal["none", "scale", "paper"]:
        """`norm` with "auto" resolved."""
        if self.norm == "auto":
            return "none" if self.refit else "scale"
        return self.norm

    def rank_for(self, k: int) -> int:
        """Rank of the low-rank branch of a layer of `k` inputs, 0 without one; never above k."""
        if self.rank is None:
            return 0
        if self.rank == "auto":
            return min(k, MOST_AUTO_RANK, max(MIN_SHARE_RANK, round(SHARE * k)))
        if isinstance(self.rank, float):
            return min(k, max(MIN_SHARE_RANK, round(self.rank * k)))
        return min(k, self.rank)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def ranges_of(name: str, value: Any, word: str) -> tuple[tuple[float, float], ...]:
    """`value` as tuples of (low, high); ValueError, which says that `word` is taken too, where it is none."""
    pairs = isinstance(value, list | tuple) and all(
        isinstance(one, list | tuple) and len(one) == 2 and all(map(is_number, one)) and one[0] < one[1]
        for one in value
    )
    if not pairs:
        raise ValueError(f"{name} is a list of (low, high), low below high, or {word!r}; got {value!r}")
    return tuple((float(low), float(high)) for low, high in value)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}; got {value!r}")


def refuse_unknown(what: str, given: Mapping[str, Any], known: set[str]) -> None:
    """ValueError for a key of `given` that is not `known`, with the nearest known one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
            raise ValueError(f"unknown {what} key {key!r}{hint}")
