"""What all benchmarks share: two options, and the JSON record with date, commit and versions."""

import argparse
import json
from pathlib import Path
from typing import Any

from magi_train.integrations.records import commit, head


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with `--commit` and `--output`; `doc` is its help text."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--commit", default=commit(), help="of the measured code (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def save(question: str, options: argparse.Namespace, **figures: Any) -> None:
    """Write the record of a run to `options.output`, if there is one."""
    record = {**head(question, options.commit), **figures}
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")
