"""`Recipe(dense_sigmas="auto")`: calibration chooses by pictures which last steps run dense, at one price."""

import json
from dataclasses import replace

import pytest
import torch
from calibration_helpers import PROMPTS as ALL_PROMPTS
from calibration_helpers import RIDGE, assert_same, calls, solution
from diffusers import FluxTransformer2DModel
from helpers import tiny_flux
from mutations import signed
from pipeline_helpers import TinyPipeline
from process_helpers import in_two_processes
from zoo_helpers import randomize

import rtlynx.calibration.distill
from rtlynx import (
    Budget,
    CalibrationOptions,
    Distillation,
    Recipe,
    calibrate,
    fp8_attention,
    load,
    save,
    schedule,
    set_dense_steps,
    sparsify,
)
from rtlynx.calibration.budget import choose, inputs_of
from rtlynx.calibration.prices import ModelPrices
from rtlynx.calibration.recording import Recording
from rtlynx.cli.commands.calibrate import _write_plots
from rtlynx.cli.inputs import recipe_of
from rtlynx.cli.inspection import describe
from rtlynx.cli.output import print_overview, print_report, report_json
from rtlynx.evaluate import plot_dense_steps
from rtlynx.models import sparse_layers, state_of
from rtlynx.models.plan import make_plan
from rtlynx.storage.files import CheckpointError

PROMPTS, STEPS, SHARE = ALL_PROMPTS[:4], 4, 0.8
AUTO = Recipe(
    rank=None, ridge=RIDGE, precision="auto", budget=Budget(speedup_share=SHARE),
    dense_sigmas="auto", dense_precision="fp8", text_rows="dense",
)  # fmt: skip
OPTIONS = CalibrationOptions(heldout=0.5, steps_per_prompt=2, pipeline_kwargs={"num_inference_steps": STEPS})
HELD_OUT = {i: PROMPTS[i] for i in (1, 3)}


class Gated(FluxTransformer2DModel):
    """Its blocks count only at noise levels that `acts` names; elsewhere the velocity is half the state."""

    acts = staticmethod(lambda sigma: True)

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids,
                return_dict=True):  # fmt: skip
        given = (hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids)
        names = ("encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
        y = super().forward(hidden_states, **dict(zip(names, given[1:], strict=True)), return_dict=False)[0]
        return (0.5 * hidden_states + y * self.acts(float(timestep[0])),)


class ActsLate(Gated):
    acts = staticmethod(lambda sigma: sigma < 1.5 / STEPS)


class ActsEarly(Gated):
    acts = staticmethod(lambda sigma: sigma > 1 - 0.5 / STEPS)


def pipeline_of(kind=None):
    model = randomize(tiny_flux(num_attention_heads=2))
    if kind is not None:
        model.__class__ = kind
    return TinyPipeline(model)


def calibrated(recipe=AUTO, kind=None, options=OPTIONS, **settings):
    pipeline = pipeline_of(kind)
    return pipeline, calibrate(pipeline, PROMPTS, recipe, options, progress=False, **settings)


def drawn(pipeline):
    """Held-out prompts, each from the noise that it has in calibration."""
    noise = [torch.Generator().manual_seed(i) for i in HELD_OUT]
    return pipeline(list(HELD_OUT.values()), noise, num_inference_steps=STEPS)


@pytest.fixture(scope="module")
def chosen():
    return calibrated()


@pytest.fixture(scope="module")
def late():
    return calibrated(kind=ActsLate)


# ------------------------------------------------------------------------------------------ the choice


def test_the_candidate_of_least_error_is_taken_and_errors_are_those_of_fixed_recipes(chosen):
    pipeline, report = chosen
    reference, errors = drawn(pipeline_of()), {}
    assert [one.last_steps for one in report.choice.candidates] == [0, 1, 2]
    for one in report.choice.candidates:
        later = replace(AUTO, budget=Budget(speedup_share=one.speedup_share), dense_sigmas=((-2, -1),))
        fixed = calibrated(later)[0]
        set_dense_steps(fixed, dense_sigmas=one.dense_sigmas)
        errors[one.last_steps] = float((drawn(fixed) - reference).square().mean())
        assert one.error == pytest.approx(errors[one.last_steps], rel=1e-2)
    best = report.choice.best_candidate
    assert best.last_steps == min(errors, key=errors.get)
    assert len({round(error, 9) for error in errors.values()}) == len(errors)
    recipe = state_of(pipeline.transformer).plan.recipe
    assert recipe.dense_sigmas == best.dense_sigmas
    assert recipe.budget == Budget(speedup_share=best.speedup_share)
    assert float((drawn(pipeline) - reference).square().mean()) == pytest.approx(best.error, rel=1e-2)


def test_candidates_draw_with_attention_that_follows_their_dense_steps():
    """So that a step in dense fp8, whose attention is in eight bits no more, is nearer to the dense model."""
    pipeline, reference = fp8_attention(pipeline_of()), drawn(pipeline_of())
    report = calibrate(pipeline, PROMPTS, AUTO, OPTIONS, progress=False)
    one = report.choice.candidates[-1]
    assert one.last_steps == 2
    fixed = fp8_attention(pipeline_of())
    later = replace(AUTO, budget=Budget(speedup_share=one.speedup_share), dense_sigmas=((-2, -1),))
    calibrate(fixed, PROMPTS, later, OPTIONS, progress=False)
    set_dense_steps(fixed, dense_sigmas=one.dense_sigmas)
    assert one.error == pytest.approx(float((drawn(fixed) - reference).square().mean()), rel=1e-3)


def test_bounds_divide_the_steps_that_run_dense_from_the_others(chosen):
    for one in chosen[1].choice.candidates:
        recipe = Recipe(dense_sigmas=one.dense_sigmas)
        dense = [recipe.is_dense_step(i, STEPS, 1 - i / STEPS) for i in range(STEPS)]
        assert dense == [False] * (STEPS - one.last_steps) + [True] * one.last_steps
        twice = [recipe.is_dense_step(i, 2 * STEPS, 1 - i / (2 * STEPS)) for i in range(2 * STEPS)]
        assert abs(sum(twice) - 2 * one.last_steps) <= 1


def saved_us(plan, report, formats, last, nothing=False):
    """What a picture saves whose `last` steps run in dense fp8, by the prices of everything that runs.

    `nothing` of it left: what there is to save.
    """
    prices = ModelPrices(plan, report.tokens)

    def us(format_of):
        layers = [layer.in_format(format_of(layer.name)) for layer in plan.layers]
        return sum(prices.us(readers) for readers in inputs_of(layers).values())

    def in_dense_step(name):
        return "fp8-dense" if name in formats else "dense"

    dense, sparse = us(lambda name: "dense"), us(lambda name: formats.get(name, "dense"))
    return STEPS * dense - (0 if nothing else (STEPS - last) * sparse + last * us(in_dense_step))


def test_each_candidate_saves_what_the_budget_wants_and_no_input_more(chosen):
    report, plan = chosen[1], make_plan(pipeline_of().transformer, AUTO)
    best = {}
    for cost in report.costs:
        best[cost.name] = max(best.get(cost.name, 0), cost.saving)
    wanted = SHARE * STEPS * sum(best.values())

    def mix(share):
        return choose(report.costs, Budget(speedup_share=share), lambda _: 0.0).formats

    mixes = [mix(i / 500) for i in range(1, 501)]  # of ever more inputs; all that there are
    expected = {}
    for last in (1, 2):  # up to half of four
        saving = [saved_us(plan, report, formats, last) for formats in mixes]
        expected[last] = next(formats for formats, us in zip(mixes, saving, strict=True) if us >= wanted)
    assert report.choice.candidates[0].speedup_share == SHARE
    assert {one.last_steps: mix(one.speedup_share) for one in report.choice.candidates[1:]} == expected
    for one in report.choice.candidates:
        saved = saved_us(plan, report, mix(one.speedup_share), one.last_steps)
        assert 0 < one.time < 1
        assert one.time == pytest.approx(1 - saved / saved_us(plan, report, {}, 0, nothing=True))


def test_dense_steps_that_no_mix_makes_up_for_are_not_compared():
    report = calibrated(replace(AUTO, budget=Budget(speedup_share=0.999)))[1]
    (only,) = report.choice.candidates
    assert (only.last_steps, only.speedup_share) == (0, 0.999)


@pytest.mark.parametrize("dense", [True, False])
def test_a_model_runs_those_steps_dense_that_its_damage_is_in(dense, late):
    pipeline, report = late if dense else calibrated(kind=ActsEarly)
    best = report.choice.best_candidate
    assert len(report.choice.candidates) > 1
    assert (best.last_steps > 0) is dense
    recipe = state_of(pipeline.transformer).plan.recipe
    assert recipe.has_dense_steps is dense
    assert {layer.dense_steps for layer in sparse_layers(pipeline.transformer).values()} <= {dense, False}
    if not dense:
        assert recipe.budget == AUTO.budget


# --------------------------------------------------------------------------------------- what is kept


def test_a_checkpoint_holds_the_chosen_ranges(tmp_path, late):
    pipeline, report = late
    save(pipeline, tmp_path / "lynx")
    text = (tmp_path / "lynx" / "rtlynx.json").read_text()
    ranges = [list(one) for one in report.choice.best_candidate.dense_sigmas]
    assert ranges
    assert json.loads(text)["recipe"]["dense_sigmas"] == ranges
    again = load(pipeline_of(ActsLate), tmp_path / "lynx")
    assert state_of(again.transformer).plan.recipe == state_of(pipeline.transformer).plan.recipe
    assert torch.equal(drawn(again), drawn(pipeline))


def test_a_checkpoint_that_leaves_the_choice_open_is_refused(tmp_path, late):
    save(late[0], tmp_path / "lynx")
    index = tmp_path / "lynx" / "rtlynx.json"
    index.write_text(json.dumps(signed({**json.loads(index.read_text()), "recipe": AUTO.to_dict()})))
    with pytest.raises(CheckpointError, match="damaged: its recipe leaves the choice of dense_sigmas"):
        load(pipeline_of(ActsLate), tmp_path / "lynx")


def test_a_folder_serves_auto_alone_and_other_budgets_of_it(tmp_path, chosen):
    options = replace(OPTIONS, folder=tmp_path)
    calibrated(options=options)
    again, report = calibrated(options=options)
    assert_same(solution(chosen[0].transformer), solution(again.transformer))
    assert report.choice.candidates == chosen[1].choice.candidates
    drawings = 1 + len(report.choice.candidates)  # of the held-out prompts, in one batch
    assert [sorted(batch) for batch in again.batches] == [sorted(HELD_OUT.values())] * drawings
    _, other = calibrated(replace(AUTO, budget=Budget(speedup_share=0.7)), options=options)
    assert other.choice.candidates[0].speedup_share == 0.7
    with pytest.raises(CheckpointError, match="with other recipe"):
        calibrated(replace(AUTO, dense_sigmas=((0, 0.2),)), options=options)


def test_distillation_trains_on_steps_that_stay_sparse(monkeypatch):
    seen, original = set(), rtlynx.calibration.distill.outputs

    def watched(model, rows, device):
        seen.update(float(row.argument("timestep")) for row in rows)
        return original(model, rows, device)

    monkeypatch.setattr(rtlynx.calibration.distill, "outputs", watched)
    quick = Distillation(steps=2, batch_size=16, on_policy_prompts=2)
    options = replace(OPTIONS, steps_per_prompt=STEPS)
    _, report = calibrated(kind=ActsLate, options=options, distill=quick)
    best = report.choice.best_candidate
    assert best.last_steps > 0
    assert seen == {1 - i / STEPS for i in range(STEPS - best.last_steps)}


class Varied(TinyPipeline):
    """Prompts one at a time, each with a number of steps of its own."""

    def __call__(self, prompt, generator, num_inference_steps=STEPS, output_type="pil"):
        return super().__call__([prompt], [generator], num_inference_steps)


@pytest.mark.parametrize("stored", [False, True])
def test_a_recorded_call_is_of_the_step_that_it_was_drawn_at(monkeypatch, tmp_path, stored):
    """The last of two steps runs dense, at a noise level that of four steps is that of a sparse one."""
    recordings, settle = [], Recording.settle_dense_steps
    monkeypatch.setattr(
        Recording, "settle_dense_steps", lambda self, *of: (recordings.append(self), settle(self, *of))
    )
    prompts = [
        {"prompt": one, "num_inference_steps": 2 if i == 2 else STEPS} for i, one in enumerate(PROMPTS)
    ]
    options = CalibrationOptions(
        heldout=0.5, steps_per_prompt=STEPS, batch_size=1, folder=tmp_path / "work" if stored else None
    )
    pipeline = Varied(pipeline_of(ActsLate).transformer)
    report = calibrate(pipeline, prompts, AUTO, options, progress=False)
    last = report.choice.best_candidate.last_steps
    assert last == 1
    (recording,) = recordings
    sparse = [[float(call["timestep"]) for call in recording.sparse_calls(i)] for i in range(4)]
    whole = [1 - i / STEPS for i in range(STEPS - last)]
    assert sparse == [whole, [1.0], whole, whole]


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    pipeline, report = calibrated(options=replace(OPTIONS, batch_size=1, folder=folder / "work"))
    candidates = [(one.last_steps, one.error) for one in report.choice.candidates]
    judged = [prompt for (prompt,) in pipeline.batches[-len(candidates) :]]
    (folder / f"{rank}.json").write_text(json.dumps([candidates, judged]))
    torch.distributed.destroy_process_group()


def test_two_processes_draw_a_part_each_and_agree(tmp_path):
    in_two_processes(_one_of_two, tmp_path)
    (ours, mine), (theirs, others) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert ours == theirs
    assert [len({*prompts}) for prompts in (mine, others)] == [1, 1]
    assert {*mine, *others} == {*HELD_OUT.values()}
    alone = calibrated(options=replace(OPTIONS, batch_size=1, folder=tmp_path / "work"))[1]  # same solutions
    for (last, error), one in zip(ours, alone.choice.candidates, strict=True):
        assert last == one.last_steps
        assert error == pytest.approx(one.error, rel=1e-4)


# ------------------------------------------------------------------------------------------- the report


def test_the_report_shows_what_was_compared(chosen, capsys, tmp_path):
    report = chosen[1]
    print_report(report)
    said = capsys.readouterr().out
    assert "Dense steps" in said
    assert "in steps that run sparse" in " ".join(said.split())
    rows = report_json(report, tmp_path)["budget"]["dense_steps"]
    assert [row["error"] for row in rows] == [one.error for one in report.choice.candidates]
    taken = [row for row in rows if row["chosen"]]
    assert [row["last_steps"] for row in taken] == [report.choice.best_candidate.last_steps]
    for row in rows:
        assert f"{row['last_steps']} of {STEPS}" in said
        assert f"{row['error']:.3e}" in said
        assert f"{row['time']:.1%}" in said
    print_overview(describe(pipeline_of(), AUTO), {})
    assert "It also decides how many of the last steps run in dense fp8." in capsys.readouterr().out
    fixed = calibrated(replace(AUTO, dense_sigmas=()))[1]
    assert fixed.choice.candidates == ()
    assert fixed.choice.best_candidate is None


def test_what_was_compared_is_plotted_beside_the_layers(chosen, tmp_path):
    pipeline, report = chosen
    (axes,) = plot_dense_steps(report).axes
    compared = report.choice.candidates
    drawn = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])): line.get_gid() for line in axes.lines}
    assert drawn == {
        (100 * one.time, one.error): "chosen" if one is report.choice.best_candidate else None
        for one in compared
    }
    labels = [text.get_text().removesuffix(", chosen") for text in axes.texts]
    assert labels == [str(one.last_steps) for one in compared]
    files = _write_plots(pipeline, report, tmp_path / "layers.svg")
    assert [file.name for file in files] == ["layers.svg", "layers-dense-steps.svg"]
    assert f"Last of {STEPS} steps in dense fp8" in files[1].read_text()
    nothing = replace(report, choice=replace(report.choice, candidates=()))
    assert _write_plots(pipeline, nothing, tmp_path / "alone.png") == [tmp_path / "alone.png"]
    with pytest.raises(ValueError, match="compared no numbers of dense last steps"):
        plot_dense_steps(nothing)


def test_the_recipe_is_auto_from_the_command_line_and_through_json():
    recipe = recipe_of(None, ["dense_sigmas=auto", "dense_precision=fp8"], Recipe.recommended)
    assert recipe == Recipe.recommended()
    assert Recipe.from_json(json.dumps(recipe.to_dict())) == recipe
    assert recipe.to_dict()["dense_sigmas"] == "auto"
    assert hash(recipe) == hash(Recipe.from_dict(recipe.to_dict()))


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_precision": "bf16"}, "dense_precision='fp8'"),
        (
            {"budget": Budget(error=0.1)},
            r"budget=Budget\(speedup_share=\.\.\.\), got budget=Budget\(error=0.1",
        ),
        ({"budget": None, "precision": "fp8"}, r"got budget=None"),
        ({"dense_steps": 1}, "leave out dense_steps"),
        ({"dense_last_steps": 1}, "leave out dense_steps and dense_last_steps"),
        ({"dense_sigmas": "all"}, "dense_sigmas is a list of .* or 'auto'; got 'all'"),
    ],
)
def test_recipes_that_leave_nothing_to_choose_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(AUTO, **changes)


def as_without_dense_steps(make, message, recipe=AUTO, data=PROMPTS, options=OPTIONS, times=1, **settings):
    """Calibrate, which warns each time; the recipe and the layers are those of no dense steps."""
    plain, fixed = make(), replace(recipe, dense_sigmas=())
    calibrate(plain, data, fixed, replace(options, folder=None), progress=False, **settings)
    warning = rf"no step runs dense, since dense_sigmas 'auto' .*{message}"
    for _ in range(times):
        pipeline = make()
        with pytest.warns(RuntimeWarning, match=warning):
            report = calibrate(pipeline, data, recipe, options, progress=False, **settings)
        model, other = (getattr(one, "transformer", one) for one in (pipeline, plain))
        assert report.choice is None or report.choice.candidates == ()
        assert state_of(model).plan.recipe == fixed
        assert_same(solution(model), solution(other))


def test_what_cannot_compare_pictures_warns_and_runs_no_step_dense():
    given = calls(2)
    as_without_dense_steps(lambda: pipeline_of().transformer, "prompts, not calls", data=None, calls=given)
    sequential = replace(OPTIONS, sequential=True)
    recipe = replace(AUTO, precision="fp8")
    as_without_dense_steps(pipeline_of, "one-shot", recipe, options=sequential)


def test_sparsify_and_set_dense_steps_do_not_choose():
    pipeline = pipeline_of()
    with pytest.raises(ValueError, match=r"rtlynx\.calibrate"):
        sparsify(pipeline, AUTO)
    assert pipeline.batches == []
    sparsify(pipeline, Recipe.immediate(dense_last_steps=1))
    with pytest.raises(ValueError, match="only calibration chooses"):
        set_dense_steps(pipeline, dense_sigmas="auto")


class Unscheduled(TinyPipeline):
    """Says neither schedule nor noise levels."""

    def _denoise(self, *arguments):
        with schedule([1000.0]):  # the levels of timesteps beyond 1 are not known
            return super()._denoise(*arguments)


class Renoising(TinyPipeline):
    """Goes back to noise half-way."""

    def _denoise(self, x, text, pooled, timesteps, guidance_scale):
        times = [1.0, 0.5, 0.75, 0.25]
        with schedule([1000, 500, 750, 250], times):
            return super()._denoise(x, text, pooled, [1000 * t for t in times], guidance_scale)


class Wordless(TinyPipeline):
    """Gives what is no picture."""

    def __call__(self, *arguments, **settings):
        super().__call__(*arguments, **settings)
        return {"answer": 42}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unscheduled, r"FluxTransformer2DModel does not tell them: .*rtlynx\.schedule"),
        (Renoising, r"do not fall \(1, 0\.5, 0\.75, 0\.25\)"),
        (Wordless, "compares pictures, and Wordless draws no pictures, but a dict"),
    ],
)
def test_pipelines_that_tell_too_little_warn_and_run_no_step_dense(kind, message, tmp_path):
    def make():
        pipeline = kind(randomize(tiny_flux(num_attention_heads=2)))
        if kind is Unscheduled:
            pipeline._denoise = lambda *given: Unscheduled._denoise(pipeline, *given[:3], [1000.0], given[4])
        return pipeline

    # The second time on what the folder holds.
    as_without_dense_steps(make, message, options=replace(OPTIONS, folder=tmp_path), times=2)
