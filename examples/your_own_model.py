"""`SparseLinear` in a model of your own, and calibration of any tree of `nn.Linear` from calls of it.

python examples/your_own_model.py
"""

import torch
from torch import nn

import rtlynx


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        for block in self.blocks:
            x = block(x)
        return (x,)


def main() -> None:
    torch.manual_seed(0)
    # One layer: it takes over the parameters of a linear and is one itself.
    dense = nn.Linear(64, 32)
    sparse = rtlynx.SparseLinear.from_linear(dense, pattern=rtlynx.Pattern(2, 4))
    x = torch.randn(10, 64)
    kept = x * rtlynx.nm_mask(x)
    by_hand = rtlynx.norm_scale(x, rtlynx.nm_mask(x)) * (kept @ dense.weight.T) + dense.bias
    print("one layer, largest difference from the formula:", f"{(sparse(x) - by_hand).abs().max():.1e}")

    # A whole model: calls of it take the place of prompts.
    model = Model().eval()
    calls = [{"x": torch.randn(1, 32, 64)} for _ in range(16)]
    report = rtlynx.calibrate(model, calls=calls, recipe=rtlynx.Recipe(rank=8), progress=False)
    for name, one in report.solutions.items():
        print(f"{name}: error {one.error_before:.3f}, {one.error:.3f} with compensation")


if __name__ == "__main__":
    main()
