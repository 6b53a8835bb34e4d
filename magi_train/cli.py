"""The command line: `magi run`, `config`, `doctor`, `explain`, `export`, `bench` and `generate`."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from magi_train.core import settings
from magi_train.core.errors import MagiError

EXPORTING = ("export", "bench", "generate")
EPILOG = "magi run takes every option of torchrun; `magi run --help` lists them"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["run"]:  # its options are torchrun's, not ours to parse
            from magi_train.integrations.launcher import launch

            return launch(given[1:])
        if given[:1] == ["bench"] and ("--mine" in given or "--inference" not in given):
            return _bench_training(given[1:])
        options = _parse(given)
        if options.command == "config":
            return _show_config(options) if options.what == "show" else _show_keys()
        if options.command == "doctor":
            from magi_train.integrations.doctor import examine

            return examine(as_json=options.json)
        if options.command in EXPORTING:
            from magi_train.exporter import commands

            return commands.run(options)
        return _explain_link(options) if options.link else _explain(options)
    except MagiError as error:
        sys.stderr.write(f"magi {given[0]}: {error}\n")
        return 2


def _bench_training(given: list[str]) -> int:
    """Compare a script with itself, or a module's step with its peers."""
    if "--mine" in given:  # what follows the script is the script's
        from magi_train.integrations import mine

        return mine.command(given)
    from magi_train.integrations import bench

    return bench.command(given)


def _parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="magi", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="start a script on every rank", add_help=False)
    explain = commands.add_parser("explain", help="show the report of a run, or ask if it will fit")
    explain.add_argument(
        "report", nargs="?", default=".", help="a report, or the folder of a run (default: here)"
    )
    explain.add_argument(
        "--html",
        nargs="?",
        const="",
        metavar="PATH",
        help="write one HTML page instead (default: magi_report.html beside the report)",
    )
    _add_fits(explain)
    explain.add_argument(
        "--link",
        action="store_true",
        help="measure the link between ranks instead: magi run --nproc 2 -m magi_train.cli explain "
        "--link",
    )
    doctor = commands.add_parser("doctor", help="examine this machine and what is installed")
    config = commands.add_parser("config", help="show settings and where they come from")
    if given[:1] and given[0] in (*EXPORTING, "-h", "--help"):  # torch is loaded for these alone
        from magi_train.exporter.commands import add_parsers

        add_parsers(commands)
    what = config.add_subparsers(dest="what", required=True)
    what.add_parser("keys", help="every setting: key, type, default and meaning")
    show = what.add_parser(
        "show",
        help="the effective values and their sources; takes --magi.KEY=VALUE as `magi run` does",
    )
    show.add_argument("file", nargs="?", help="a TOML or YAML file of settings")
    for command in (explain, doctor, show):
        command.add_argument("--json", action="store_true", help="print JSON")
    options, others = parser.parse_known_args(given)
    takes_settings = options.command == "config" or getattr(options, "fits", None) is not None
    wrong = [o for o in others if not o.startswith("--magi.") or not takes_settings]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    options.words = [o.removeprefix("--magi.") for o in others]
    return options


def _add_fits(explain: argparse.ArgumentParser) -> None:
    fits = explain.add_argument_group(
        "does it fit?", "predict a step's memory without a GPU; takes --magi.KEY=VALUE too"
    )
    fits.add_argument("--fits", metavar="SCRIPT.py:BUILD", help="returns (module, batch, ...)")
    fits.add_argument("--gpu", help="h200, h100, a100-80, ...")
    fits.add_argument("--gib", type=float, help="memory of the GPU")
    fits.add_argument("--ranks", type=int, default=1, help="GPUs that train together")
    fits.add_argument("--batch", type=int, help="dimension 0 of the batch")
    fits.add_argument("--autocast", choices=("none", "bfloat16", "float16"), default="none")
    fits.add_argument("--no-search", action="store_true", help="do not look for the largest batch")


def _show_config(options: argparse.Namespace) -> int:
    found = settings.gather(options.words, options.file)
    effective = {
        key: found.get(key, settings.Sourced(each.default, "default"))
        for key, each in settings.known_settings().items()
        if key in found or not settings.is_part(key)
    }
    if options.json:
        text = json.dumps({key: asdict(each) for key, each in effective.items()}, indent=2)
    else:
        width = max(map(len, effective))
        text = "\n".join(
            f"{key:{width}}  {settings.as_text(each.value):12} {each.source}"
            for key, each in effective.items()
        )
    sys.stdout.write(text + "\n")
    return 0


def _show_keys() -> int:
    for key, each in settings.known_settings().items():
        default = "" if settings.is_part(key) else f", default {settings.as_text(each.default)}"
        sys.stdout.write(f"{key}: {each.wanted}{default}\n    {each.help}\n")
    return 0


def _explain(options: argparse.Namespace) -> int:
    if options.fits is not None:
        from magi_train.fits_command import command

        return command(
            options.fits,
            gpu=options.gpu,
            gib=options.gib,
            ranks=options.ranks,
            autocast=options.autocast,
            batch=options.batch,
            search=not options.no_search,
            words=options.words,
            as_json=options.json,
        )
    from magi_train.integrations.explain import explain

    return explain(options.report, options.html, as_json=options.json)


def _explain_link(options: argparse.Namespace) -> int:
    import torch

    from magi_train.comm.link import find
    from magi_train.core.world import join_from_environment

    world = join_from_environment()
    if world.size == 1:
        raise MagiError(
            "--link needs more than one rank; use `magi run --nproc 2 -m magi_train.cli explain "
            "--link`"
        )
    on_gpu = torch.cuda.is_available() and world.backend != "gloo"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    row = find(world, device, timeout_seconds=60, remember=False).row()
    if world.rank == 0:
        sys.stdout.write(json.dumps(row, indent=2) + "\n" if options.json else _link_text(row))
    world.close()
    torch.distributed.destroy_process_group()
    return 0


def _link_text(row: Mapping[str, Any]) -> str:
    lines = [f"all-reduce: {row['latency_us']} us and {row['gbit_per_second']} Gbit/s of tensor"]
    lines += [f"{b:>10} bytes {ms:10} ms" for b, ms in row["milliseconds_by_bytes"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
