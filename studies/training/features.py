"""Train the feature network: contrastive learning across two designs of every emoji and across distortions.

    cd studies && python -m training.features --data emoji.npz --out out --minutes 1.5

Each step takes a batch of emoji and two views of each: a distorted Twemoji picture, and a distorted Twemoji
or Noto picture of the same emoji. The views of one emoji attract, the rest of the batch repels (InfoNCE, both
ways). Distortions are what a model's imperfect samples look like: these, too, land beside their emoji.

Writes feature-network.safetensors (float16), features.safetensors (float16, all real pictures) and
feature-network.json (steps, loss, retrieval of unseen distortions).
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rtlynx_zoo.features import FeatureNet
from safetensors.torch import save_file
from torch import Tensor

TEMPERATURE = 0.07


def distort(x: Tensor, strength: float = 1.0) -> Tensor:
    """(B, 3, 64, 64) in [0, 1] -> the same, each picture distorted in its own way; 0 changes nothing."""
    batch, device = len(x), x.device

    def uniform(*shape: int) -> Tensor:
        """In [-strength, strength]."""
        return strength * (2 * torch.rand(batch, *shape, device=device) - 1)

    # Move, turn, scale (a crop where it grows) and bend: one sampling grid. White comes in from outside.
    angle, scale = 0.15 * uniform(), 1 + 0.15 * uniform()
    cos, sin, shift = scale * angle.cos(), scale * angle.sin(), 0.12 * uniform(2)
    rows = [torch.stack([cos, -sin, shift[:, 0]], dim=1), torch.stack([sin, cos, shift[:, 1]], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
    bend = F.interpolate(0.08 * uniform(2, 6, 6), size=64, mode="bicubic", align_corners=False)
    x = 1 - F.grid_sample(1 - x, grid + bend.permute(0, 2, 3, 1), mode="bilinear", align_corners=False)

    # Colour: a gain and an offset for each channel, and saturation.
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (1 + 0.4 * uniform(1, 1, 1))
    x = x * (1 + 0.12 * uniform(3, 1, 1)) + 0.08 * uniform(3, 1, 1)

    # Blur by a mix with the twice-averaged picture, then noise, fine and coarse.
    blurred = F.avg_pool2d(
        F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), 3, 1, 1, count_include_pad=False
    )
    x = x + (blurred - x) * uniform(1, 1, 1).abs()
    coarse = F.interpolate(torch.randn(batch, 3, 16, 16, device=device), size=64, mode="bilinear")
    noise = 0.08 * uniform(1, 1, 1) * torch.randn_like(x) + 0.1 * uniform(1, 1, 1) * coarse
    return (x + noise).clamp(0, 1)


def contrastive_loss(a: Tensor, b: Tensor) -> Tensor:
    """InfoNCE between two views (B, D) of unit length, both ways."""
    logits = a @ b.T / TEMPERATURE
    labels = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@torch.no_grad()
def embed(network: FeatureNet, pictures: Tensor) -> Tensor:
    return torch.cat([network(part) for part in pictures.split(256)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the archive written by training.data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and features")
    parser.add_argument("--minutes", type=float, default=1.5, help="training time")
    parser.add_argument("--batch", type=int, default=512, help="emoji a step, two views each")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)

    data = np.load(args.data)

    def as_tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device).permute(0, 3, 1, 2).float() / 255  # (n, 3, 64, 64)

    real, noto = as_tensor(data["pictures"]), as_tensor(data["noto_pictures"])
    second = torch.arange(len(real), device=device)  # row of the second design in `designs`; its own if none
    second[torch.from_numpy(data["noto_rows"]).to(device)] = len(real) + torch.arange(
        len(noto), device=device
    )
    designs = torch.cat([real, noto])

    network = FeatureNet().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.05)
    step, losses, start = 0, [], time.perf_counter()
    while (progress := (time.perf_counter() - start) / (60 * args.minutes)) < 1:
        # One cosine over the time given, after a short warm-up: the schedule fits any machine.
        lr = args.lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = torch.randperm(len(real), device=device)[: args.batch]
        other = torch.where(torch.rand(len(rows), device=device) < 0.5, second[rows], rows)
        views = distort(torch.cat([designs[rows], designs[other]]))  # (2 * batch, 3, 64, 64)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            views = network(views)
        loss = contrastive_loss(*views.float().chunk(2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 20 == 0:
            losses.append(loss.item())
            if step % 500 == 0:
                print(f"step {step}  {progress:.0%}  loss {np.mean(losses[-25:]):.4f}", flush=True)

    if not losses:
        raise SystemExit(f"no more than {step} steps in this time; at least 20 are needed")

    # What ships is float16: measure what ships.
    network.eval().half().float()
    features = embed(network, real)
    hits = {}
    for name, pictures in {
        "undistorted": real,
        "distorted": distort(real),
        "distorted twice over": distort(real, 2),
    }.items():
        nearest = (embed(network, pictures) @ features.T).argmax(dim=1)
        hits[name] = (nearest == torch.arange(len(real), device=device)).float().mean().item()
    noto_rows = torch.from_numpy(data["noto_rows"]).to(device)
    hits["Noto's drawing"] = (
        ((embed(network, noto) @ features.T).argmax(dim=1) == noto_rows).float().mean().item()
    )
    report = {"steps": step, "batch": args.batch, "loss": float(np.mean(losses[-25:])), "retrieval": hits}
    print(json.dumps(report), flush=True)

    weights = {name: weight.half().contiguous().cpu() for name, weight in network.state_dict().items()}
    save_file(weights, args.out / "feature-network.safetensors")
    save_file({"features": features.half().contiguous().cpu()}, args.out / "features.safetensors")
    (args.out / "feature-network.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
