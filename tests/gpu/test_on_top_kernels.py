"""Pipelines, ControlNets and IP-Adapters on top of sparse models on the card: fused as layer by layer."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers import relative_error
from on_top_cases import (
    CASES,
    IP_PIPELINES,
    draw,
    made,
    picture_tokens,
    with_adapter,
)
from pipeline_cases import with_inputs

from rtlynx import Recipe, sparsify
from rtlynx.models import architecture_of
from rtlynx.models.fusion import unfuse_blocks
from rtlynx.nn.prepared import PreparedInput

pytestmark = pytest.mark.gpu

FP8 = Recipe.immediate(precision="fp8")


@pytest.fixture(autouse=True)
def _no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = False


def check(pipeline, case, monkeypatch, fused):
    """`fused`: whether blocks read what kernels prepare. They are as near to float32 as layer by layer."""
    read, output_of = [], PreparedInput.output_of
    monkeypatch.setattr(PreparedInput, "output_of", lambda x, layer: read.append(x) or output_of(x, layer))
    y = draw(pipeline, case)
    assert bool(read) is fused
    read.clear()
    unfuse_blocks(pipeline.transformer)
    plain = draw(pipeline, case)
    exact = draw(pipeline.to(torch.float32), case)
    assert not read
    assert bool(torch.isfinite(y).all())
    assert relative_error(y, exact) < 1.4 * relative_error(plain, exact)


@pytest.mark.parametrize("name", CASES)
def test_a_sparse_model_draws_fused_what_it_draws_layer_by_layer(name, monkeypatch):
    pipeline = sparsify(made(name, monkeypatch, device="cuda"), FP8)
    fused = bool(architecture_of(pipeline.transformer).fused)
    check(pipeline, CASES[name][1], monkeypatch, fused)


@pytest.mark.parametrize("name", IP_PIPELINES)
def test_so_it_does_with_an_ip_adapter(name, monkeypatch):
    plain = CASES[name][1]
    case = replace(plain, inputs=with_inputs(plain.inputs, picture_tokens))
    pipeline = with_adapter(sparsify(made(name, monkeypatch, device="cuda"), FP8))
    check(pipeline, case, monkeypatch, True)
