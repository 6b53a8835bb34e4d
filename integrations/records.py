"""The head of every record of a measurement: when, of which code, on what, with which versions."""

import importlib.metadata
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

LIBRARIES = (
    "triton", "transformers", "timm", "torchvision", "torchao", "liger-kernel", "deepspeed",
    "lightning", "onnxruntime",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the device and the versions of the libraries that are installed."""
    found: dict[str, str] = {"torch": str(torch.__version__)}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return which state of this package runs: the checkout's commit, or the release."""
    folder = Path(__file__).resolve().parents[1]
    if (folder / ".git").exists():
        ask = ["git", "-C", str(folder), "describe", "--always", "--dirty=+changes", "--exclude=*"]
        try:
            done = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=True)
            return done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return "unknown"
    try:
        return f"release {importlib.metadata.version('magi-train')}"
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def head(question: str, of_commit: str | None = None) -> dict[str, Any]:
    """Return the record's head; `of_commit` is of the measured code, if the caller knows better."""
    return {
        "question": question,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": of_commit or commit(),
        "versions": versions(),
    }
