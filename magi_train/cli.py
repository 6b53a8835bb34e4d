"""The command line: `magi run` and `magi explain`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from magi_train.core.errors import MagiError
from magi_train.core.report import Report

EPILOG = "magi run takes every option of torchrun; `magi run --help` lists them"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["run"]:  # its options are torchrun's, not ours to parse
        from magi_train.integrations.launcher import launch

        return launch(given[1:])
    parser = argparse.ArgumentParser(prog="magi", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="start a script on every rank", add_help=False)
    explain = commands.add_parser("explain", help="show the report of a run")
    explain.add_argument("report", nargs="?", default="magi_report.json")
    explain.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(given)
    try:
        report = Report.load(options.report)
    except MagiError as error:
        sys.stderr.write(f"magi explain: {error}\n")
        return 2
    text = json.dumps(asdict(report), indent=2) if options.json else str(report)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
