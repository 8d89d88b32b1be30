"""Train the classifier that judges flux-fashion's pictures: a minute on a GPU, some ten on two cores.

    cd studies && python -m training.fashion_classifier --data fashion.npz --out out

Cross-entropy on the 60,000 training pictures, moved by up to two pixels and mirrored. Writes
classifier.safetensors (float16), test-features.safetensors (float16, of the 10,000 test pictures) and
classifier.json (accuracy on them).
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rtlynx_zoo.fashion import CLASSIFIER, TEST_FEATURES, FashionClassifier
from safetensors.torch import save_file
from torch import Tensor

SHIFT = 2  # pixels
WARMUP_STEPS = 100
LABEL_SMOOTHING = 0.05


def moved(pictures: Tensor) -> Tensor:
    """(B, 1, H, W), each moved by up to `SHIFT` pixels and half of them mirrored; black comes in."""
    batch, _, height, width = pictures.shape
    device = pictures.device
    rows = torch.arange(height, device=device) + torch.randint(2 * SHIFT + 1, (batch, 1), device=device)
    columns = torch.arange(width, device=device) + torch.randint(2 * SHIFT + 1, (batch, 1), device=device)
    flip = torch.rand(batch, 1, device=device) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    padded = F.pad(pictures, (SHIFT,) * 4)[:, 0]
    each = torch.arange(batch, device=device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


@torch.no_grad()
def embed(network: FashionClassifier, pictures: Tensor) -> Tensor:
    return torch.cat([network(part) for part in pictures.split(500)])


def train(network: FashionClassifier, pictures: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """AdamW over `args.epochs`, cosine to 0."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.05)
    steps_each = max(1, len(pictures) // args.batch)
    total = args.epochs * steps_each
    for epoch in range(args.epochs):
        losses = []
        order = torch.randperm(len(pictures), device=pictures.device)
        for number, rows in enumerate(order.split(args.batch)):
            step = min(epoch * steps_each + number, total)
            lr = args.lr * min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(pictures.device.type, torch.bfloat16, enabled=pictures.is_cuda):
                logits = network.classify(network(moved(pictures[rows])))
                loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        print(f"epoch {epoch + 1} of {args.epochs}  loss {torch.stack(losses).mean():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the archive of training.fashion_data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and features")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = False  # features as a CPU computes them

    archive = np.load(args.data)

    def read(prefix: str) -> tuple[Tensor, Tensor]:
        pictures = torch.from_numpy(archive[f"{prefix}pictures"]).to(args.device)
        labels = torch.from_numpy(archive[f"{prefix}labels"]).to(args.device)
        return pictures.permute(0, 3, 1, 2).float() / 255, labels

    network = FashionClassifier().to(args.device)
    train(network, *read(""), args)

    network.eval().half().float()  # what ships is float16: measure what ships
    test, labels = read("test_")
    features = embed(network, test).half()
    right = network.classify(features.float()).argmax(1) == labels
    report = {
        "epochs": args.epochs,
        "accuracy": float(right.float().mean()),
        "test_pictures": len(test),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    weights = {name: weight.half().contiguous().cpu() for name, weight in network.state_dict().items()}
    save_file(weights, args.out / CLASSIFIER)
    save_file({"features": features.contiguous().cpu()}, args.out / TEST_FEATURES)
    (args.out / "classifier.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
