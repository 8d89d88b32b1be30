"""Parts of a step that are no product and no attention: which kernels, how many bytes; and their tables."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.extend(str(Path(__file__).resolve().parent.parent / folder) for folder in ("benchmarks", "docs"))

import attention
import kernel_tables
import update
from helpers import SMALL
from tables import Place

from rtlynx.models import make_plan
from rtlynx.recipe import Recipe
from rtlynx.timing import step_parts
from rtlynx.timing.full_models import MODELS, Size
from rtlynx.timing.step_split import KernelTime

ON_SITE = Place(Path("docs/results/speed.md"))
CARD = {"device": "NVIDIA H0", "power_limit_w": 700, "torch": "2", "cuda": "13", "commit": "abc"}


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("gemm", None),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN", None),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", None),
        ("quantize", "prepare"),
        ("compress_rows", "prepare"),
        ("attention_inputs", "attention_inputs"),
        ("gemv", "modulation"),
        ("std::enable_if<true, void>::type internal::gemvx::kernel<int>", "modulation"),
        ("triton_poi_fused_silu_0", "modulation"),
        ("triton_poi_fused__unsafe_view_add_mul_split_unsqueeze_6", "gates"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_tanh_1", "gates"),
        ("triton_red_fused__to_copy_abs_add_amax_attention_inputs_mul_slice_view_3", "attention_output"),
        ("triton_poi_fused__to_copy_add_mul_2", "attention_output"),
        ("triton_poi_fused_cat_0", "copies"),
        ("triton_poi_fused__unsafe_view_clone_concat_gelu_quantize_permute_view_4", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
    ],
)
def test_a_kernel_belongs_to_one_part(kernel, part):
    assert step_parts.part_of(kernel) == part


def plan_of(name, **settings):
    with torch.device("meta"):
        model = MODELS[name].build()
    return model, make_plan(model, Recipe(rank=None, precision="fp8", **settings))


def test_bytes_of_flux_are_those_of_its_tensors():
    model, plan = plan_of("flux1-dev", drop="weights")
    width, image, text, double, single = 3072, 4096, 512, 19, 38
    both = image + text
    found = step_parts.bytes_of(plan, {"image": image, "text": text, "joint": both})
    norms = both * width * (2 + 1)
    up = both * 4 * width * (2 + 1)
    assert found["prepare"] == double * (2 * norms + up) + single * (norms + both * width * (1 + 1) + up)
    assert found["attention_inputs"] == (double + single) * 3 * both * width * (2 + 1)
    assert found["attention_output"] == double * both * width * (1 + 1)
    assert found["gates"] == (2 * double + single) * both * width * 6
    weights = (2 * double * 6 + single * 3) * width * width
    assert step_parts.modulation_bytes(model, plan) == 2 * weights


def test_bytes_of_a_gated_mlp_and_of_what_is_dropped():
    width, hidden, tokens = 3840, 10240, {"image": 4096, "text": 32, "joint": 4128}
    rows = 2 * 4096 + 2 * 32 + 30 * 4128
    _, plan = plan_of("z-image", drop="weights")
    found = step_parts.bytes_of(plan, tokens)
    assert found["prepare"] == rows * (2 * width * (2 + 1) + hidden * (4 + 1))
    _, plan = plan_of("z-image", drop="activations")
    dropped = (rows - 2 * 32) * (2 * width + hidden) * (1 - 0.625)  # all but the caption's own blocks
    assert found["prepare"] - step_parts.bytes_of(plan, tokens)["prepare"] == dropped


def test_tokens_of_text_are_those_of_each_forward():
    of = MODELS["qwen-image"]
    calls = of.calls(of.size, torch.zeros)
    assert [step_parts.tokens_of(call, of.size)["joint"] for call in calls] == [4224, 4128]
    of = MODELS["z-image"]
    (call,) = of.calls(of.size, torch.zeros)
    assert step_parts.tokens_of(call, of.size) == {"image": 4096, "text": 32, "joint": 4128}


@torch.no_grad()
def test_a_step_is_run_and_its_kernels_listed(monkeypatch):
    def profiled(step):
        assert all(bool(torch.isfinite(one).all()) for one in step())
        return {"quantize": KernelTime(3, 1.5), "gemm": KernelTime(3, 7.0)}

    small = MODELS["flux1-dev"]._replace(size=Size(side=128, text_tokens=7))
    monkeypatch.setitem(step_parts.MODELS, "flux1-dev", small)
    model = SMALL["flux1-dev"]().eval()
    monkeypatch.setattr(model, "set_attention_backend", lambda _: None)  # of the whole process, in diffusers
    monkeypatch.setattr(step_parts, "build", lambda _: model)
    monkeypatch.setattr(step_parts, "normals", lambda _: torch.randn)
    monkeypatch.setattr(step_parts.step, "compile_blocks", lambda *_: None)
    monkeypatch.setattr(step_parts, "kernels_of", profiled)
    document = json.loads(json.dumps(step_parts.run("flux1-dev")))
    assert document["kernels_ms"] == 8.5
    assert document["kernels"]["gemm"] == {"part": None, "launches": 3, "ms": 7.0}
    rows = {row["part"]: row for row in document["parts"]}
    assert rows["prepare"]["ms"] == 1.5
    both, width = 64 + 7, 256
    assert rows["gates"]["bytes"] == 3 * both * width * 6


def test_the_table_has_each_parts_time_beside_that_of_its_bytes():
    kernels = {
        "quantize": KernelTime(10, 3.0),
        "gemm": KernelTime(9, 50.0),
        "triton_poi_fused_cat_0": KernelTime(1, 0.5),
    }
    must = dict.fromkeys(step_parts.PARTS, 0.0) | {"prepare": 6e9, "gates": 3e9}
    document = CARD | {
        "variant": step_parts.VARIANT,
        "kernels_ms": 53.5,
        "bytes_per_second": step_parts.BYTES_PER_SECOND,
        "parts": step_parts.rows_of(kernels, must),
    }
    table = kernel_tables.step_parts_section(json.loads(json.dumps(document)), Path("f.json"), ON_SITE)
    assert "| norm and modulation, GELU or SiLU gate: to e4m3 | 10 | 3.00 | 6,000 | 2.00 | 1.50 |" in table
    assert "| gate and residual | 0 | – | 3,000 | 1.00 | – |" in table  # noqa: RUF001
    assert "| copies | 1 | 0.50 | – | – | – |" in table  # noqa: RUF001
    assert "| all | 11 | 3.50 | 9,000 | 3.00 | 1.17 |" in table


def test_libraries_that_are_there_have_times_and_errors():
    row = {"name": "flux", "tokens": 4608, "heads": 24, "width": 128}
    row |= {"cudnn_us": 456.2, "fp8_us": 369.0, "sage_us": 600.4, "rel_err": {"sage": 0.0123, "fp8": 0.06}}
    document = CARD | {"cudnn": 91900, "cudnn_frontend": "1.16", "rows": [row]}
    table = kernel_tables.attention_section(document, Path("f.json"), ON_SITE)
    assert "| SageAttention | 600 (0.012) |" in table
    assert "| FlashAttention-3 | – |" in table  # noqa: RUF001
    assert set(kernel_tables.ATTENTION_WORDS) - {"fp8"} == set(attention.PEERS)


def test_nothing_is_said_of_what_was_not_measured(tmp_path):
    assert update.step_parts(tmp_path, ON_SITE) == update.attention(tmp_path, ON_SITE) == ""
