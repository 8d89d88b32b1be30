"""How the zoo's models are trained: the shipped model's recipe unchanged, and a run of each architecture."""

import json
import sys
from dataclasses import replace

import diffusers
import pytest
import rtlynx_zoo as zoo
import torch
import torch.nn.functional as F
from rtlynx_zoo.velocity import position_ids, z_image_velocity
from training import emoji
from training.architectures import ARCHITECTURES, z_image_batch_velocity
from zoo_helpers import TINY, randomize, seeds, write_archive

from rtlynx.evaluate.full_demo import run_full_demo
from rtlynx.storage.files import CheckpointError

ZOO_NAMES = {"flux": "flux-emoji", "qwen-image": "qwen-emoji", "z-image": "z-image-emoji"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("data") / "emoji.npz")


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

    data, model = emoji.Data(archive, torch.device("cpu")), randomize(tiny("flux").build())
    torch.manual_seed(0)
    shipped = shipped_loss(model, *shipped_batch(data, 4))
    torch.manual_seed(0)
    ours = emoji.flow_matching_loss(ARCHITECTURES["flux"].velocity, model, *data.batch(4))
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
def test_training_starts_from_nothing_and_learns(name, archive):
    """The output starts at zero; a fixed batch is fitted."""
    architecture = tiny(name)
    torch.manual_seed(0)
    model = architecture.build()
    architecture.initialize(model)
    x, embeds, pooled = emoji.Data(archive, torch.device("cpu")).batch(2)
    assert not architecture.velocity(model, x, torch.tensor([0.2, 0.7]), embeds, pooled).any()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        torch.manual_seed(1)
        loss = emoji.flow_matching_loss(architecture.velocity, model, x, embeds, pooled)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_ends_in_a_model_that_the_zoo_loads(name, archive, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, name, tiny(name))
    monkeypatch.setattr(emoji, "LOG_EVERY", 2)
    monkeypatch.setattr(emoji, "demo_prompts", lambda: zoo.prompts.demo_prompts(8))
    out = tmp_path / ZOO_NAMES[name]
    arguments = f"emoji --architecture {name} --data {archive} --out {out} --device cpu --no-compile"
    arguments += " --batch 2 --steps 1 --minutes 0.03 --pause-after 0.01"
    monkeypatch.setattr(sys, "argv", arguments.split())
    emoji.main()
    first = json.loads((out / "loss.json").read_text())
    emoji.main()
    report = json.loads((out / "loss.json").read_text())
    assert report["architecture"] == name
    assert report["steps"] > first["steps"]  # it went on where it had paused
    assert (out / "samples.png").stat().st_size > 1000

    monkeypatch.setattr(zoo, "_REPOSITORY_MODELS", tmp_path)
    monkeypatch.setattr(zoo, "_BOXED", ())
    pipe = zoo.load(ZOO_NAMES[name], dtype=torch.bfloat16)
    assert type(pipe.transformer) is getattr(diffusers, ARCHITECTURES[name].class_name)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("fox", num_inference_steps=1, generator=seeds(0), output_type="pt").images
    assert picture.shape == (1, 3, 64, 64)
    with pytest.raises(CheckpointError, match="solutions"):
        run_full_demo(tmp_path / "demo", images=2, steps=1, progress=False, model=ZOO_NAMES[name])
