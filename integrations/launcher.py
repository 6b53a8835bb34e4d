"""`magi run`: torch's own elastic launcher, with the root cause of a failure printed first.

All options of torchrun are its options. Defaults differ where torchrun's do not suit one machine:
one process per GPU (one without GPUs), and a free port of its own. Each rank starts through
`magi_train.integrations.bootstrap`, which records the script's real exception; torchrun alone
prints the traceback only of scripts that are decorated by hand.
"""

import sys
from typing import Any

import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

BOOTSTRAP = "magi_train.integrations.bootstrap"


def launch(arguments: list[str]) -> int:
    """Run `[--replace-ddp] [torchrun options] script args`; return the exit status."""
    replace_ddp = False
    if arguments and arguments[0] == "--replace-ddp":
        replace_ddp, arguments = True, arguments[1:]
    parser = run.get_args_parser()
    parser.prog = "magi run [--replace-ddp]"
    options = parser.parse_args(arguments)
    _set_defaults(options, arguments)
    mine = (["--replace-ddp"] if replace_ddp else []) + (["--module"] if options.module else [])
    script = [options.training_script, *options.training_script_args]
    options.module, options.no_python = True, False
    options.training_script = BOOTSTRAP
    options.training_script_args = [*mine, "--", *script]
    try:
        run.run(options)
    except ChildFailedError as error:
        sys.stderr.write(explain_failure(error))
        return 1
    return 0


def _set_defaults(options: Any, arguments: list[str]) -> None:
    if not any(a.startswith(("--nproc-per-node", "--nproc_per_node")) for a in arguments):
        options.nproc_per_node = str(max(torch.cuda.device_count(), 1))
    one_node = str(options.nnodes) in ("1", "1:1")
    rendezvous = ("--rdzv", "--master", "--standalone", "--node")
    if one_node and not any(a.startswith(rendezvous) for a in arguments):
        options.standalone = True


def explain_failure(error: ChildFailedError) -> str:
    """Return the first failing rank's traceback, then one line for each of the others."""
    rank, first = error.get_first_failure()
    lines = [f"\nmagi run: rank {rank} failed first ({_how(first)}):", ""]
    lines += [f"  {line}" for line in _traceback(first).splitlines()]
    others = {r: f for r, f in error.failures.items() if r != rank}
    lines += [f"  then rank {r}: {_how(f)}, {_last_line(f)}" for r, f in sorted(others.items())]
    return "\n".join(lines) + "\n"


def _how(failure: ProcessFailure) -> str:
    name = failure.signal_name()
    return f"ended by {name}" if name != "<N/A>" else f"exit status {failure.exitcode}"


def _traceback(failure: ProcessFailure) -> str:
    message = failure.error_file_data.get("message") if failure.error_file_data else None
    if isinstance(message, dict):
        return str(message.get("extraInfo", {}).get("py_callstack") or message.get("message"))
    return str(message or failure.message)


def _last_line(failure: ProcessFailure) -> str:
    lines = [line for line in _traceback(failure).splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""
