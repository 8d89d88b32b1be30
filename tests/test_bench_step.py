"""The benchmark of a denoising step, as far as it needs no card."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL, flux_call, tiny_flux
from rich.console import Console

from rtlynx.models import sparse_layers
from rtlynx.models.attention import fp8_attention
from rtlynx.nn.cached_tensor import CachedTensor
from rtlynx.timing import step, step_variants
from rtlynx.timing.full_models import MODELS, TIMESTEP, Size
from rtlynx.timing.overview import step_overview
from rtlynx.timing.results import step_speed_up
from rtlynx.timing.step_split import kind
from rtlynx.timing.sustained import Measurement


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_inputs_fit_the_model(name, batch):
    torch.manual_seed(0)
    model = SMALL[name]().eval()
    calls = MODELS[name].calls(Size(side=128, batch=batch, text_tokens=7), torch.randn)
    assert len(calls) == (
        2 if name in ("chroma", "hunyuan-video-1.5", "qwen-edit", "qwen-image", "wan2.2-14b") else 1
    )
    outputs = step.step_of(model, calls)()
    assert len(outputs) == len(calls) * {"z-image": batch, "ltx-2": 2}.get(name, 1)
    assert all(bool(torch.isfinite(one).all()) for one in outputs)


def test_a_picture_has_a_token_for_16_by_16_pixels():
    assert Size().image_tokens == 4096
    assert Size(side=512).image_tokens == 1024


def first_step(model, call):
    kind, *_ = step.kinds_of_steps(model, [call], [1.0, 0.1]).values()
    return kind.users()[0]


@torch.no_grad()
@pytest.mark.parametrize("form", ["_DENSE", "_RECOMMENDED", "_WEIGHTS"])
def test_variants_of_one_form_share_its_weights_and_draw_alike(form):
    form, call, (direct, model) = (
        getattr(step_variants, form),
        flux_call(timestep=TIMESTEP),
        (tiny_flux(), tiny_flux()),
    )
    form.change(direct)
    forms = step.Forms(model)
    one, other = forms.copy_of(form), forms.copy_of(form)
    fp8_attention(other)  # changes neither `one` nor the copies to come
    wanted, attended = first_step(direct, call), first_step(other, call)
    for twin in (one, forms.copy_of(form)):
        assert torch.equal(first_step(twin, call), wanted)
    assert not torch.equal(attended, wanted)
    held = [{one.data_ptr() for one in (*twin.parameters(), *twin.buffers())} for twin in (one, other)]
    assert held[0] == held[1]
    assert not sparse_layers(model)


def test_what_layers_made_of_their_weights_goes_along_to_copies_that_share_them():
    weight, made = torch.ones(4), []
    cache = CachedTensor()
    cache.get((weight,), None, lambda: made.append(1) or weight + 1)
    shared = copy.deepcopy(cache, {id(weight): weight})
    shared.get((weight,), None, lambda: made.append(2) or weight + 1)
    assert made == [1]
    assert copy.deepcopy(cache).kept is None


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN", "linear"),
        ("compress", "linear"),
        ("quantize", "linear"),
        ("gemm", "linear"),
        ("cutlass_3x_gemm_f8", "linear"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
        ("triton_poi_fused_add_mul_0", "rest"),
        ("triton_red_fused__fused_rms_norm__scaled_dot_product_cudnn_attention__to_copy_add_1", "rest"),
        ("triton_poi_fused__unsafe_view_clone_concat_gelu_quantize_permute_split_with_sizes_view_4", "rest"),
        ("triton_tem_fused_flex_attention_2", "attention"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel, expected):
    assert kind(kernel) == expected


class Wrapped(torch.Tensor):
    """Eight bits and a scale behind the face of a bfloat16 tensor, as torchao holds them."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.bfloat16)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, shape, strides):
        return Wrapped(**inner)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_memory_counts_each_storage_once_and_what_wrappers_hold():
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.zeros(8, 4))
    model.b = torch.nn.Parameter(model.a[:2])
    assert step.held_bytes(model) == 8 * 4 * 4
    model.register_buffer("c", Wrapped(torch.zeros(16, 4, dtype=torch.uint8), torch.zeros(16)))
    assert step.held_bytes(model) == 8 * 4 * 4 + 16 * 4 + 16 * 4


def test_a_variant_with_a_schedule_gives_a_row_a_kind_and_their_mean(monkeypatch):
    names = ("a, sparse step", "a, dense step")

    def prepare(variant, *rest):
        return {
            name: ready(steps=steps)._replace(peak_gib=peak)
            for name, steps, peak in zip(names, (24, 4), (30.0, 31.0), strict=True)
        }

    taken = {
        f"{name}/{how}": Measurement(us, [us], 1500.0, 700.0)
        for name, us in zip(names, (80_000.0, 94_000.0), strict=True)
        for how in ("gpu", "wall")
    }
    monkeypatch.setattr(step, "prepare", prepare)
    monkeypatch.setattr(step, "measure", lambda *rest: taken)
    bench = step.Bench(None, [], [], None, 1.0, 1, print)
    rows = step.measure_together([step_variants.Variant("a", None)], bench)
    assert [row["name"] for row in rows] == [*names, "a"]
    assert [row["gpu_ms"] for row in rows] == [80.0, 94.0, 82.0]
    assert (rows[2]["wall_ms"], rows[2]["linear_ms"], rows[2]["peak_gib"]) == (82.0, 49.2, 31.0)
    assert (rows[2]["steps"], rows[2]["dense_steps"]) == (28, 4)
    del taken["a, dense step/gpu"]
    *_, mean = step.measure_together([step_variants.Variant("a", None)], bench)
    assert (mean["gpu_ms"], mean["wall_ms"]) == (None, 82.0)
    console = Console(width=150, record=True)
    console.print(step_overview(document() | {"variants": [document()["variants"][0], *rows]}))
    assert "4 of 28 steps dense" in console.export_text()


def test_copies_of_weights_decide_which_variants_the_card_holds_together(monkeypatch):
    model, quantised = tiny_flux(), tiny_flux()
    step_variants.dense_fp8(quantised)
    weights = 4 * sum(one.numel() for one in model.parameters())
    copy_bytes = sum(layer.weight.numel() for layer in sparse_layers(quantised).values())
    card = SimpleNamespace(total_memory=(weights + 2.5 * copy_bytes) / step.ROOM)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    forms = [step_variants.Form(change, count) for change, count in ((abs, 1), (all, 1), (any, 1.6), (id, 9))]
    a, b, c, d = (step_variants.Variant(name, form) for name, form in zip("abcd", forms, strict=True))
    other = a._replace(name="other")
    assert step.groups_of(model, [a, b, other]) == [[a, other, b]]
    assert step.groups_of(model, [a, c, other]) == [[a, other], [c]]
    assert step.groups_of(model, [d, a, b]) == [[d], [a, b]]  # (which may turn out not to fit)


def ready(shares=None, steps=None):
    return step.Ready(None, None, shares or {"linear": 0.6, "attention": 0.3, "rest": 0.1}, 30.0, steps)


def test_a_row_splits_gpu_time_and_leaves_out_what_was_not_measured():
    gpu, wall = (Measurement(us, [us], 1500.0, 700.0) for us in (100_000.0, 104_000.0))
    row = step.variant_row("ours", ready(), {"ours/gpu": gpu, "ours/wall": wall}, {})
    assert (row["gpu_ms"], row["wall_ms"], row["linear_ms"]) == (100.0, 104.0, 60.0)
    assert row["reason"] is None
    row = step.variant_row("ours", ready(), {"ours/wall": wall}, {"ours/gpu": "lost", "other/gpu": "hot"})
    assert (row["gpu_ms"], row["wall_ms"], row["linear_ms"]) == (None, 104.0, None)
    assert row["reason"] == "lost"


def test_cuda_graphs_of_blocks_are_made_before_a_graph_of_a_step_is_captured(monkeypatch):
    made = []

    def prepare(variant, *rest):
        made.append(variant.name)
        if variant.name == "b":
            raise RuntimeError("out of luck")
        return {variant.name: ready()}

    monkeypatch.setattr(step, "prepare", prepare)
    monkeypatch.setattr(step, "measure", lambda *rest: {})
    variants = [
        step_variants.Variant("a", None),
        step_variants.Variant("b", None, mode="reduce-overhead"),
        step_variants.Variant("c", None),
    ]
    rows = step.measure_together(variants, step.Bench(None, [], [], None, 1.0, 1, print))
    assert made == ["b", "a", "c"]
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    assert rows[1]["reason"] == "RuntimeError: out of luck"


class NoForms:
    def forget(self):
        pass


def test_groups_stand_beside_their_own_reference(monkeypatch):
    reference = iter((100.0, 104.0))

    def together(variants, of):
        assert next(iter(variants)).name == step.REFERENCE
        times = {step.REFERENCE: next(reference), "a": 50.0, "b": 26.0}
        rows = [
            {"name": one.name, "gpu_ms": times[one.name], "wall_ms": None, "reason": None} for one in variants
        ]
        kinds = [rows[1] | {"name": "a, sparse step"}] if rows[1]["name"] == "a" else []
        return [rows[0], *kinds, rows[1]]

    monkeypatch.setattr(step, "measure_together", together)
    first = [
        step_variants.Variant("a", None),
        *(one for one in step_variants.VARIANTS if one.name == step.REFERENCE),
    ]
    bench = step.Bench(NoForms(), [], [], None, 1.0, 1, print)
    rows = step.measure_in_groups([first, [step_variants.Variant("b", None)]], bench)
    assert step_speed_up(rows, "a") == pytest.approx(100 / 50)
    assert step_speed_up(rows, "b") == pytest.approx(104 / 26)
    assert step_speed_up(rows, "b", "a") == pytest.approx(4 / 2)
    assert [row["name"] for row in rows] == [step.REFERENCE, "a, sparse step", "a", "b"]
    assert rows[0]["drift"] == pytest.approx(0.04)
    assert [row["beside"]["gpu_ms"] for row in rows[1:]] == [100.0, 100.0, 104.0]


def test_variants_measured_in_groups_can_be_measured_again_alone():
    def results(commit, *rows, **other):
        return {"device": "a card", "together": False, "commit": commit, "variants": list(rows)} | other

    def row(name, ms, beside):
        return {"name": name, "gpu_ms": ms, "beside": {"gpu_ms": beside}}

    reference = {"name": step.REFERENCE, "gpu_ms": 100.0, "drift": 0.02}
    old = results("one", reference, row("a", 50.0, 100.0), row("b", None, 102.0))
    again = results("two", reference | {"gpu_ms": 110.0}, row("b", 26.0, 110.0), row("c", 20.0, 105.0))
    whole = step.renewed(old, again)
    assert whole["variants"] == [
        reference | {"drift": pytest.approx(0.1)},
        row("a", 50.0, 100.0),
        row("b", 26.0, 110.0) | {"commit": "two"},
        row("c", 20.0, 105.0) | {"commit": "two"},
    ]
    assert whole["commit"] == "one"
    with pytest.raises(ValueError, match="differ in device, torch"):
        step.renewed(old, again | {"device": "another", "torch": "3"})
    with pytest.raises(ValueError, match="measured together"):
        step.renewed(old | {"together": True}, again | {"together": True})


def document():
    row = {"wall_ms": 110.0, "linear_ms": 60.0, "attention_ms": 30.0, "rest_ms": 10.0, "peak_gib": 25.0}
    return {
        "device": "a card",
        "model": "flux1-dev",
        "resolution": 1024,
        "batch": 1,
        "variants": [
            {"name": "bf16 compiled", "gpu_ms": 100.0, **row, "reason": None},
            {"name": "rtlynx fp8-2:4", "gpu_ms": 50.0, **row, "reason": None},
            {"name": "fp8 compiled (torchao)", "gpu_ms": None, "wall_ms": None, "reason": "no torchao"},
        ],
    }


def test_the_command_prints_and_writes_a_step(command, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("rtlynx.timing.card.Card", lambda: "card")
    monkeypatch.setattr(step, "run", lambda *args, **options: asked.append((args, options)) or document())
    file = tmp_path / "step.json"
    code, out, _ = command("bench", "--model", "flux1-dev", "--seconds", 2, "--out", file)
    assert not code
    assert asked[0][0] == ("flux1-dev", "card")
    assert asked[0][1]["seconds"] == 2
    assert json.loads(file.read_text()) == document()
    assert "rtlynx fp8-2:4" in out


def test_the_table_says_speed_ups_and_why_there_is_none():
    console = Console(width=120, record=True)
    console.print(step_overview(document()))
    lines = {
        line.split("│")[1].strip(): line for line in console.export_text().splitlines() if line.count("│") > 3
    }
    assert "2.00x" in lines["rtlynx fp8-2:4"]
    assert "x" not in lines["fp8 compiled (torchao)"].split("│")[-2]
    assert "no torchao" in lines


def test_speed_ups_are_over_the_reference_beside_a_variant_where_there_is_one():
    rows = [
        {"name": "bf16 compiled", "gpu_ms": 100.0},
        {"name": "paired", "gpu_ms": 50.0, "beside": {"gpu_ms": 110.0}},
        {"name": "together", "gpu_ms": 50.0},
        {"name": "failed", "gpu_ms": None},
    ]
    assert step_speed_up(rows, "paired") == pytest.approx(2.2)
    assert step_speed_up(rows, "together") == pytest.approx(2.0)
    assert step_speed_up(rows, "paired", "together") == pytest.approx(2.2 / 2.0)
    assert step_speed_up(rows, "failed") is None
    assert step_speed_up(rows, "absent") is None
