"""What all benchmarks share: two options, and the JSON record with date, commit and versions."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from magi_train.integrations.records import commit, head


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with `--commit` and `--output`; `doc` is its help text."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--commit", default=commit(), help="of the measured code (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def gpus() -> list[str]:
    """Return the GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def command() -> str:
    """Return how this benchmark was started, but for the options of `parser_of`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--commit")
    own.add_argument("--output")
    words = own.parse_known_args()[1]
    return shlex.join(["python", "-m", spec.name if spec else sys.argv[0], *words])


def save(question: str, options: argparse.Namespace, **figures: Any) -> None:
    """Write the record of a run to `options.output`, if there is one."""
    record = {**head(question, options.commit), "command": command(), **figures}
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")
