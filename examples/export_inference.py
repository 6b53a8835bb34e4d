"""Export a trained module, load it, compare: python -m examples.export_inference."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import magi_train


def main() -> float:
    """Return the largest difference between the module and its file."""
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 10, 32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        print(magi_train.export(model, (x,), path, dynamic="batch"))
        run = magi_train.load(path)
        print("exported with torch", run.manifest["versions"]["torch"])
        with torch.no_grad():
            return float((run(x) - model(x)).abs().max())


if __name__ == "__main__":
    print(f"largest difference {main():.1e}")
