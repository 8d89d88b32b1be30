"""Train a model of the zoo: a diffusion transformer on pixels, by flow matching, from names.

    cd studies && python -m training.train --architecture flux --data emoji.npz --out out --minutes 16
    cd studies && python -m training.train --architecture flux-fashion --data fashion.npz --out o --minutes 4

Architectures: flux, qwen-image and z-image on emoji, flux-fashion on Fashion-MNIST. They share text, noise,
loss, optimiser and average. The learning rate is a function of the time trained over the time given, so a run
ends cooled down on any machine, or of the pictures seen (`--pictures`). `--pause-after` stops early with a
checkpoint in the output folder; the same command goes on from there. At the end: a diffusers pipeline folder
with the averaged weights (bfloat16), loss.json, a sample grid, and of emoji retrieval.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from rtlynx_zoo.features import FEATURES, FeatureNet
from rtlynx_zoo.patches import patchify
from rtlynx_zoo.pipeline import EmojiPipeline, patch_channels
from rtlynx_zoo.prompts import FASHION_CLASSES, demo_prompts, fashion_prompts
from rtlynx_zoo.text import TEXT_TOKENS, TEXT_WIDTH, encode
from rtlynx_zoo.velocity import Velocity
from torch import Tensor

from training.architectures import ARCHITECTURES

CAPTION_DROPOUT = 0.1
WARMUP_STEPS = 500
LOG_EVERY = 50


class Data:
    """The whole training set on the device: pictures as patches in [-1, 1], caption embeddings, padded.

    Archives are those of training.data, where each picture has a caption of its own, and of
    training.fashion_data, where it has a label.

    names : the captions. captions : of each picture, its row of `names`, `embeds` and `pooled`.
    """

    def __init__(self, file: Path, device: torch.device):
        archive = np.load(file)
        pictures = torch.from_numpy(archive["pictures"]).to(device).permute(0, 3, 1, 2)
        self.patches = patchify(pictures.float() / 127.5 - 1)  # (n, 256, 48) or (n, 64, 16)
        if "labels" in archive:
            self.names = list(FASHION_CLASSES)
            embeds, pooled = encode(self.names)
            captions = torch.from_numpy(archive["labels"])
        else:
            self.names = archive["names"].tolist()
            tokens = torch.from_numpy(archive["tokens"]).float().split(archive["lengths"].tolist())
            embeds = torch.zeros(len(tokens), TEXT_TOKENS, TEXT_WIDTH)
            for row, states in enumerate(tokens):
                embeds[row, : len(states)] = states
            pooled = torch.stack([states.mean(dim=0) for states in tokens])
            captions = torch.arange(len(tokens))
        self.captions, self.embeds, self.pooled = (one.to(device) for one in (captions, embeds, pooled))

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random (patches (B, 256, 48) or (B, 64, 16), prompt_embeds (B, 16, 384), pooled (B, 384)).

        Some captions are null.
        """
        device = self.patches.device
        rows = torch.randint(len(self.patches), (size,), device=device)
        keep = (torch.rand(size, device=device) >= CAPTION_DROPOUT).float()
        captions = self.captions[rows]
        embeds, pooled = self.embeds[captions], self.pooled[captions]
        return self.patches[rows], embeds * keep[:, None, None], pooled * keep[:, None]


def flow_matching_loss(
    velocity: Velocity, model: torch.nn.Module, x: Tensor, embeds: Tensor, pooled: Tensor
) -> Tensor:
    """Mean squared error of the predicted velocity (noise - picture) at logit-normal noise levels."""
    batch, device = len(x), x.device
    # One level from each of `batch` equal slices of the distribution: less variance than independent draws.
    slices = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    sigma = torch.special.ndtri(slices.clamp(1e-4, 1 - 1e-4)).sigmoid()  # (B,)
    noise = torch.randn_like(x)
    prediction = velocity(model, x + sigma[:, None, None] * (noise - x), sigma, embeds, pooled)
    return F.mse_loss(prediction.float(), noise - x)


class Trainer:
    """Model, average, optimizer and clock; `state_dict` is all that a resumed run needs.

    Raises
    ------
    ValueError
        If the architecture has no such width, or draws other pictures than those of `data`.
    """

    def __init__(self, args: argparse.Namespace, data: Data):
        self.args, self.data = args, data
        self.device = data.patches.device
        torch.manual_seed(args.seed)
        self.architecture = ARCHITECTURES[args.architecture]
        if args.width is not None:
            self.architecture = self.architecture.of_width(args.width)
        wanted, found = patch_channels(self.architecture.pipeline), data.patches.shape[2]
        if wanted != found:
            raise ValueError(
                f"{args.data} has patches of {found} channels, {args.architecture} takes {wanted}: give the "
                "archive of training.data for emoji, of training.fashion_data for flux-fashion"
            )
        self.model = self.architecture.build()
        self.architecture.initialize(self.model)
        self.model.to(self.device)
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=self.device.type == "cuda"
        )
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []

    @property
    def progress(self) -> float:
        """Share of the schedule that is done."""
        if self.args.pictures is not None:
            return min(1.0, self.step * self.args.batch / self.args.pictures)
        return self.seconds / (60 * self.args.minutes)

    def train_step(self) -> Tensor:
        lr = (
            self.args.lr
            * min(1.0, (self.step + 1) / WARMUP_STEPS)
            * 0.5
            * (1 + math.cos(math.pi * self.progress))
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = flow_matching_loss(
                self.architecture.velocity, self.model, *self.data.batch(self.args.batch)
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        # A power-law average (Karras et al. 2023): it spans about 5 % of the steps so far.
        decay = (1 - 1 / self.step) ** 18
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.model.parameters()), 1 - decay)
        return loss.detach()

    def run(self, minutes: float) -> None:
        """Train for so many minutes, or to the end of the schedule if that comes first."""
        limit = self.seconds + 60 * minutes
        losses, before = [], time.perf_counter()
        while self.progress < 1 and self.seconds < limit:
            losses.append(self.train_step())
            if self.step % LOG_EVERY == 0:
                loss = torch.stack(losses).mean().item()  # waits for the device: the clock below is honest
                losses.clear()
            now = time.perf_counter()
            self.seconds, before = self.seconds + now - before, now
            if self.step % LOG_EVERY == 0:
                self.history.append(
                    {"step": self.step, "seconds": round(self.seconds, 1), "loss": round(loss, 5)}
                )
                if self.step % (10 * LOG_EVERY) == 0:
                    rate = self.step / self.seconds
                    print(
                        f"step {self.step}  {self.progress:.1%}  loss {loss:.4f}  "
                        f"{rate:.1f} steps/s  {rate * self.args.batch:.0f} pictures/s",
                        flush=True,
                    )

    def compile_if_faster(self) -> None:
        """Compile the repeated blocks; back to eager where that fails or does not pay. Not on the clock."""
        state = self.state_dict()
        eager = self._seconds_per_step()
        try:
            # One block class may see several lengths (Z-Image's does): each gets kernels of its own.
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=False)
            compiled = self._seconds_per_step()
        except Exception as error:  # the compiler's failures have no common type
            print(f"compilation failed: {type(error).__name__}: {str(error)[:500]}", flush=True)
            compiled = math.inf
        if compiled >= eager:
            for module in self.model.modules():
                module._compiled_call_impl = None
        print(f"seconds a step: eager {eager:.4f}, compiled {compiled:.4f}", flush=True)
        self.load_state_dict(state)

    def _seconds_per_step(self) -> float:
        times = []
        for _ in range(12):
            start = time.perf_counter()
            self.train_step().item()
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]

    def state_dict(self) -> dict:
        def copy(tree):
            if isinstance(tree, dict):
                return {key: copy(value) for key, value in tree.items()}
            return tree.clone() if isinstance(tree, Tensor) else tree

        return {
            "model": copy(dict(self.model.state_dict())),
            "ema": copy(self.ema),
            "optimizer": copy(self.optimizer.state_dict()),
            "step": self.step,
            "seconds": self.seconds,
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.ema = {name: value.to(self.device) for name, value in state["ema"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], list(state["history"])
        torch.manual_seed(
            self.args.seed + self.step
        )  # a resumed run does not repeat the batches of its start

    def averaged_model(self) -> Any:
        """A copy with the averaged weights rounded to bfloat16, as they ship, held in float32."""
        model = self.architecture.build()
        model.load_state_dict({name: value.bfloat16().float() for name, value in self.ema.items()})
        return model.eval().to(self.device)


def sample(pipe: EmojiPipeline, prompts: list[str], steps: int, batch: int = 128) -> Tensor:
    """One picture a prompt, seed = its place in the list, guidance 3 -> (n, 3, S, S) in [0, 1], CPU."""
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        drawn = pipe(
            part, num_inference_steps=steps, generator=generators, output_type="pt", return_dict=False
        )
        pictures.append(drawn[0].cpu())
    return torch.cat(pictures)


def save_grid(pictures: Tensor, file: Path, columns: int) -> None:
    rows = pictures[: len(pictures) // columns * columns].unflatten(
        0, (-1, columns)
    )  # (rows, columns, 3, S, S)
    grid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((grid * 255).round().byte().numpy()).save(file)


def retrieval(pictures: Tensor, prompts: list[str], data: Data, features: Path) -> float:
    """The share of pictures whose nearest real one, by the trained feature network, is the prompted one."""
    from safetensors.torch import load_file

    network = FeatureNet().to(data.patches.device).eval()
    network.load_state_dict(
        {k: v.float() for k, v in load_file(features / "feature-network.safetensors").items()}
    )
    real = load_file(features / "features.safetensors")["features"].float().to(data.patches.device)
    assert real.shape == (len(data.names), FEATURES)
    with torch.no_grad():
        nearest = (network(pictures.to(real.device)) @ real.T).argmax(dim=1).tolist()
    return sum(data.names[i] == prompt for i, prompt in zip(nearest, prompts, strict=True)) / len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="archive of training.data or training.fashion_data"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the results")
    parser.add_argument(
        "--features", type=Path, help="folder of the trained feature network, to report retrieval of emoji"
    )
    parser.add_argument(
        "--minutes", type=float, default=16, help="training time over all runs; the schedule's length"
    )
    parser.add_argument("--pictures", type=int, help="the schedule's length in pictures, in place of minutes")
    parser.add_argument("--width", type=int, help="of the model, a multiple of 64; default: the zoo's, 256")
    parser.add_argument("--pause-after", type=float, default=math.inf, help="minutes to train in this run")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=6e-4, help="peak learning rate")
    parser.add_argument("--steps", type=int, default=24, help="sampling steps of the grid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.features and ARCHITECTURES[args.architecture].pipeline is not EmojiPipeline:
        parser.error("--features is the network that tells emoji apart: leave it out")
    args.out.mkdir(parents=True, exist_ok=True)
    # cuDNN's attention backward has faulted (illegal memory access, torch 2.11): flash attention instead.
    torch.backends.cuda.enable_cudnn_sdp(False)

    try:
        data = Data(args.data, torch.device(args.device))
        trainer = Trainer(args, data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load_state_dict(torch.load(checkpoint, map_location=args.device, weights_only=True))
        print(f"resumed at step {trainer.step}, {trainer.seconds / 60:.1f} minutes", flush=True)
    if not args.no_compile:
        trainer.compile_if_faster()
    trainer.run(args.pause_after)
    if not trainer.history:
        raise SystemExit(f"no more than {trainer.step} steps in this time; at least {LOG_EVERY} are needed")

    partial = checkpoint.with_suffix(".partial")
    torch.save(trainer.state_dict(), partial)
    partial.replace(checkpoint)
    model = trainer.averaged_model()
    pipe = trainer.architecture.pipeline(model, FlowMatchEulerDiscreteScheduler())
    model.bfloat16()
    pipe.save_pretrained(args.out)
    model.float()

    emoji = type(pipe) is EmojiPipeline
    names = demo_prompts() if emoji else fashion_prompts(8 * len(FASHION_CLASSES))
    columns = 8 if emoji else len(FASHION_CLASSES)
    save_grid(sample(pipe, names, args.steps), args.out / "samples.png", columns)
    report = {
        "architecture": args.architecture,
        "steps": trainer.step,
        "batch": args.batch,
        "seconds": round(trainer.seconds, 1),
        "pictures_per_second": round(trainer.step * args.batch / trainer.seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "loss": round(float(np.mean([point["loss"] for point in trainer.history[-20:]])), 5),
    }
    if args.features:
        chosen = data.names[:: max(1, len(data.names) // 480)]
        report["retrieval"] = retrieval(sample(pipe, chosen, args.steps), chosen, data, args.features)
        report["retrieval_pictures"] = len(chosen)
    (args.out / "loss.json").write_text(json.dumps({**report, "history": trainer.history}) + "\n")
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
