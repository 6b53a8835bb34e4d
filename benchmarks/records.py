"""What all benchmarks share: two options, and the JSON record with date, commit and versions."""

import argparse
import importlib.metadata
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("triton", "transformers", "timm", "torchao", "lightning")


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with `--commit` and `--output`; `doc` is its help text."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--commit", default="unknown", help="of the measured code")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def versions() -> dict[str, str]:
    """Return the device and the versions of the libraries that are installed."""
    found = {"torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save(question: str, options: argparse.Namespace, **figures: Any) -> None:
    """Write the record of a run to `options.output`, if there is one."""
    record = {
        "question": question,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": options.commit,
        "versions": versions(),
        **figures,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")
