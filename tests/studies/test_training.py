"""How the zoo's models are trained: the shipped model's recipe unchanged, and a run of each architecture."""

import argparse
import itertools
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import rtlynx_zoo as zoo
import torch
import torch.nn.functional as F
from rtlynx_zoo import text
from rtlynx_zoo.velocity import position_ids, z_image_velocity
from training import train
from training.architectures import ARCHITECTURES, z_image_batch_velocity
from zoo_helpers import TINY, randomize, seeds, write_archive, write_fashion_archive

from rtlynx.evaluate.full_demo import run_full_demo
from rtlynx.storage.files import CheckpointError

ZOO_NAMES = {
    "flux": "flux-emoji",
    "flux-fashion": "flux-fashion",
    "qwen-image": "qwen-emoji",
    "z-image": "z-image-emoji",
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Of each architecture."""
    folder = tmp_path_factory.mktemp("data")
    emoji, fashion = write_archive(folder / "emoji.npz"), write_fashion_archive(folder / "fashion.npz")
    return dict.fromkeys(ARCHITECTURES, emoji) | {"flux-fashion": fashion}


@pytest.fixture
def archive(archives):
    return archives["flux"]


def tiny(name):
    architecture = ARCHITECTURES[name]
    return replace(architecture, config={**architecture.config, **TINY[name]})


def test_the_flux_model_starts_as_it_shipped():
    """Sums of the untouched script's first weights, seed 0: the same draws in the same order."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES["flux"]
    model = architecture.build()
    architecture.initialize(model)
    total = sum(parameter.abs().sum().double() for parameter in model.parameters())
    assert total.item() == pytest.approx(394433.0844, rel=1e-7)


def test_the_flux_loss_is_as_it_shipped(archive):
    """The loss that zoo:flux-emoji was trained with, written out, on the same draws."""

    def shipped_loss(model, x, embeds, pooled):
        batch = len(x)
        slices = (torch.arange(batch) + torch.rand(batch)) / batch
        sigma = torch.special.ndtri(slices.clamp(1e-4, 1 - 1e-4)).sigmoid()
        noise = torch.randn_like(x)
        img_ids, txt_ids = position_ids()
        prediction = model(
            hidden_states=x + sigma[:, None, None] * (noise - x),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]
        return F.mse_loss(prediction.float(), noise - x)

    def shipped_batch(data, size):
        rows = torch.randint(len(data.patches), (size,))
        keep = (torch.rand(size) >= 0.1).float()
        return data.patches[rows], data.embeds[rows] * keep[:, None, None], data.pooled[rows] * keep[:, None]

    data, model = train.Data(archive, torch.device("cpu")), randomize(tiny("flux").build())
    torch.manual_seed(0)
    shipped = shipped_loss(model, *shipped_batch(data, 4))
    torch.manual_seed(0)
    ours = train.flow_matching_loss(ARCHITECTURES["flux"].velocity, model, *data.batch(4))
    assert torch.equal(ours, shipped)
    assert ours > 0.5


def test_z_image_in_batches_is_its_own_forward():
    """The same outputs and gradients, without the loop over pictures."""
    model = randomize(tiny("z-image").build())
    generator = torch.Generator().manual_seed(1)
    state, embeds = (torch.randn(3, *shape, generator=generator) for shape in ((256, 48), (16, 384)))
    sigma, pooled = torch.tensor([0.0, 0.3, 1.0]), torch.zeros(3, 384)
    gradients = {}
    for velocity in (z_image_velocity, z_image_batch_velocity):
        model.zero_grad()
        output = velocity(model, state, sigma, embeds, pooled)
        (output * state).sum().backward()
        gradients[velocity] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        gradients[velocity]["output"] = output.detach()
    own, batched = gradients[z_image_velocity], gradients[z_image_batch_velocity]
    # Sixteen by sixteen patches need no padding: only the loop looks at its token, and for nothing.
    assert not own.pop("x_pad_token").any()
    assert own["output"].std() > 0.1
    torch.testing.assert_close(batched, own, atol=1e-4, rtol=1e-4)


def test_z_image_in_batches_is_its_own_forward_under_autocast():
    model = randomize(tiny("z-image").build())
    state, embeds, pooled = torch.randn(2, 256, 48), torch.randn(2, 16, 384), torch.zeros(2, 384)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        own, batched = (
            velocity(model, state, torch.tensor([0.3, 0.8]), embeds, pooled)
            for velocity in (z_image_velocity, z_image_batch_velocity)
        )
    torch.testing.assert_close(batched.float(), own.float(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_starts_from_nothing_and_learns(name, archives):
    """The output starts at zero; a fixed batch is fitted."""
    architecture = tiny(name)
    torch.manual_seed(0)
    model = architecture.build()
    architecture.initialize(model)
    x, embeds, pooled = train.Data(archives[name], torch.device("cpu")).batch(2)
    assert not architecture.velocity(model, x, torch.tensor([0.2, 0.7]), embeds, pooled).any()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        torch.manual_seed(1)
        loss = train.flow_matching_loss(architecture.velocity, model, x, embeds, pooled)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_ends_in_a_model_that_the_zoo_loads(name, archives, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, name, tiny(name))
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    clock = itertools.count(step=0.3).__next__  # seconds of a step: two until the pause, six or seven in all
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(train, "demo_prompts", lambda: zoo.prompts.demo_prompts(8))
    monkeypatch.setattr(train, "fashion_prompts", lambda _: zoo.prompts.fashion_prompts(10))
    out = tmp_path / ZOO_NAMES[name]
    arguments = f"train --architecture {name} --data {archives[name]} --out {out} --device cpu --no-compile"
    arguments += " --batch 2 --steps 1 --minutes 0.03 --pause-after 0.01"
    monkeypatch.setattr(sys, "argv", arguments.split())
    train.main()
    first = json.loads((out / "loss.json").read_text())
    train.main()
    report = json.loads((out / "loss.json").read_text())
    assert report["architecture"] == name
    assert report["steps"] > first["steps"]  # it went on where it had paused
    assert (out / "samples.png").stat().st_size > 1000

    monkeypatch.setattr(zoo, "_REPOSITORY_MODELS", tmp_path)
    monkeypatch.setattr(zoo, "_BOXED", ())
    pipe = zoo.load(ZOO_NAMES[name], dtype=torch.bfloat16)
    assert type(pipe.transformer) is getattr(diffusers, ARCHITECTURES[name].class_name)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("coat", num_inference_steps=1, generator=seeds(0), output_type="pt").images
    assert picture.shape == (1, 3, *[32 if name == "flux-fashion" else 64] * 2)
    with pytest.raises(CheckpointError, match="solutions"):
        run_full_demo(tmp_path / "demo", images=2, steps=1, progress=False, model=ZOO_NAMES[name])


def fashion_arguments(archive, **changes):
    settings = {
        "architecture": "flux-fashion",
        "data": archive,
        "width": None,
        "pictures": None,
        "minutes": 1,
    }
    return argparse.Namespace(**{**settings, "batch": 2, "lr": 6e-4, "seed": 0, **changes})


def test_each_picture_of_clothing_has_the_text_of_its_class(archives):
    data = train.Data(archives["flux-fashion"], torch.device("cpu"))
    saved = np.load(archives["flux-fashion"])
    embeds, pooled = text.encode([zoo.prompts.FASHION_CLASSES[label] for label in saved["labels"]])
    assert torch.equal(data.embeds[data.captions], embeds)
    assert torch.equal(data.pooled[data.captions], pooled)
    assert data.patches.shape == (8, 64, 16)
    first = torch.from_numpy(saved["pictures"][0, :4, 4:8, 0]).flatten()
    assert torch.allclose((data.patches[0, 1] + 1) * 127.5, first.float(), atol=1e-4)


def test_a_width_is_that_many_heads(archives, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "flux-fashion", tiny("flux-fashion"))
    data = train.Data(archives["flux-fashion"], torch.device("cpu"))
    model = train.Trainer(fashion_arguments("a.npz", width=96), data).model
    assert model.inner_dim == 96
    assert model.config.num_attention_heads == 3
    with pytest.raises(ValueError, match="multiple of 32, the size of a head; got 100"):
        train.Trainer(fashion_arguments("a.npz", width=100), data)
    with pytest.raises(ValueError, match="ZImageTransformer2DModel is not given in heads"):
        ARCHITECTURES["z-image"].of_width(384)


def test_other_data_than_the_architectures_is_one_clear_line(archives):
    data = train.Data(archives["flux"], torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"emoji\.npz has patches of 48 channels, flux-fashion takes 16"
    ) as caught:
        train.Trainer(fashion_arguments("emoji.npz"), data)
    assert "\n" not in str(caught.value)


def test_a_schedule_in_pictures_ends_after_them(archives, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "flux-fashion", tiny("flux-fashion"))
    data = train.Data(archives["flux-fashion"], torch.device("cpu"))
    trainer = train.Trainer(fashion_arguments("a.npz", pictures=9, minutes=1e-9), data)
    trainer.run(math.inf)
    assert (trainer.step, trainer.progress) == (5, 1.0)  # batches of two
