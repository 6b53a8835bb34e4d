"""Small modules for the exporter's tests, and how a file is compared with its module."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
CHECK = """
import sys, torch, magi_train
run = magi_train.load(sys.argv[1])
worst = 0.0
for inputs, wanted in torch.load(sys.argv[2]):
    got = run(**inputs)
    got = got if isinstance(got, torch.Tensor) else list(got.values())[0]
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
print(worst, "transformers.models" in sys.modules, "magi_train.capture" in sys.modules)
"""


class Block(nn.Module):
    """Convolutions with BatchNorm, a residual, dropout and a head; `[batch, 3, h, w]` to 5."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second, self.other = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(width, 5)
        for norm in (self.norm, self.other):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.other(self.second(x)) + x)
        return self.head(self.drop(x.mean((2, 3))))


class Heads(nn.Module):
    """Three linears of one input; results by name, one of which is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> dict:
        """Return two tensors by name."""
        q = self.q(x) * self.table.cos().exp()
        out = self.v(x) if mask is None else self.v(x) * mask
        return {"scores": q * self.k(x) * scale, "values": out, "cache": object()}


def in_a_new_process(path, pairs, folder):
    """Return the largest relative error of a file on `pairs`, and which modules it loaded."""
    torch.save(pairs, folder / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(path), str(folder / "expected.pt")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    error, *loaded = done.stdout.split()
    return float(error), [word == "True" for word in loaded]
