"""`magi run`: torch's own elastic launcher, with what a user has to find out by hand otherwise.

All options of torchrun are its options, and defaults differ only where torchrun's do not suit one
machine: a process per GPU (one without GPUs), a free port of its own, a share of the cores. Around
it: settings for the ranks, a check before the start, the root cause of a failure printed first, and
stacks of ranks that hang. Each rank starts through `bootstrap.py`. Source of the form: torchrun's
parser and `run`, which are used as they are; accelerate's and torchtitan's launchers for defaults.
"""

import argparse
import difflib
import logging
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from magi_train.core import settings
from magi_train.core.errors import SettingError
from magi_train.integrations.failures import explain_failure
from magi_train.integrations.slurm import Allocation, allocation
from magi_train.integrations.watchdog import DEFAULT_SECONDS, Watchdog

BOOTSTRAP = "magi_train.integrations.bootstrap"
USAGE_ERROR = 2
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""torchrun's variable: ranks get a store of their own at every start.

Without it (torch 2.13) restarted ranks find the addresses of those that ended in the agent's store,
which outlives them: a rank that reads before the new ones are written fails.
"""


def launch(arguments: list[str]) -> int:
    """Run `[options] script args`; return the exit status.

    Raises:
        SettingError: A `--magi.KEY=VALUE` is wrong, or MAGI_SETTINGS or a file is.
    """
    parser = option_parser()
    options, unknown = parser.parse_known_args(arguments)
    words = [each.removeprefix("--magi.") for each in unknown if each.startswith("--magi.")]
    for each in unknown:
        if not each.startswith("--magi."):
            _refuse(parser, each)
    if not (options.module or options.no_python or Path(options.training_script).is_file()):
        raise SettingError(f"there is no script {options.training_script!r} in {os.getcwd()}")
    environment: dict[str, str] = {}
    found = settings.gather(words)
    if found:
        environment[settings.VARIABLE] = settings.to_words(found)
    slurm = allocation(os.environ)
    if slurm is not None and slurm.makes_ranks:
        return _become_rank(options, slurm, environment)
    notes = _set_defaults(options, arguments, slurm)
    environment |= _thread_defaults(int(options.nproc_per_node), os.environ)
    if int(options.max_restarts) > 0 and OWN_STORE not in os.environ:
        environment[OWN_STORE] = "1"
    for note in [*notes, *(f"{k}={shlex.quote(v)}" for k, v in environment.items())]:
        sys.stderr.write(f"magi run: {note}\n")
    if options.dry_run:
        sys.stdout.write(_describe(options))
        return 0
    os.environ.update(environment)
    with tempfile.TemporaryDirectory(prefix="magi_run_") as folder:
        return _run(options, Path(folder))


def option_parser() -> argparse.ArgumentParser:
    """Return torchrun's parser with our options added."""
    parser = run.get_args_parser()
    parser.prog = "magi run"
    parser.allow_abbrev = False  # half an option would be taken, and our defaults would overrule it
    ours = parser.add_argument_group(
        "magi",
        "Anywhere before the script. --magi.KEY=VALUE, as --magi.fusion.loss=false, is a setting "
        "of Config (`magi config keys` lists them); --magi.config=FILE reads a TOML file.",
    )
    add = ours.add_argument
    add("--nproc", metavar="N", help="short for --nproc-per-node; auto: the GPUs, else 1")
    add(
        "--replace-ddp",
        action="store_true",
        help="make DistributedDataParallel in the script mean magi_train.DataParallel",
    )
    add("--dry-run", action="store_true", help="print what would be started, and start nothing")
    add("--no-preflight", action="store_true", help="skip the check before the script starts")
    add(
        "--hang-timeout",
        type=float,
        default=DEFAULT_SECONDS,
        metavar="SECONDS",
        help="how long a rank may stand still before every rank's stack is printed, and before the "
        "job is ended if all stand still; 0: for ever (default: %(default)g)",
    )
    return parser


def _refuse(parser: argparse.ArgumentParser, option: str) -> NoReturn:
    name = option.partition("=")[0]
    known = sorted(set(re.findall(r"--[a-z][a-z0-9_-]+", parser.format_help())))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; `magi run --help` lists them"
    raise SettingError(
        f"there is no option {name!r}{hint} (what the script takes goes behind the script)"
    )


# -- defaults ----------------------------------------------------------------------------------


def _set_defaults(options: Any, arguments: list[str], slurm: Allocation | None) -> list[str]:
    """Fill in what is not given; return sentences on it."""
    notes = []

    def given(*names: str) -> bool:
        before = arguments[: len(arguments) - len(options.training_script_args) - 1]
        variables = [f"PET_{n.upper()}" for n in names]  # as torchrun reads them
        flags = tuple(f"--{form}" for n in names for form in (n, n.replace("_", "-")))
        return any(a.startswith(flags) for a in before) or any(v in os.environ for v in variables)

    wanted = options.nproc or (options.nproc_per_node if given("nproc_per_node") else "auto")
    if wanted == "auto":
        count = torch.cuda.device_count()
        notes.append(f"{count} GPU(s), so {count} rank(s)" if count else "no GPU, so 1 rank")
        options.nproc_per_node = str(max(count, 1))
    else:
        try:
            options.nproc_per_node = str(run.determine_local_world_size(wanted))
        except ValueError as error:
            raise SettingError(f"--nproc-per-node {wanted}: {error}") from error
    meeting = given("rdzv", "rdzv_endpoint", "rdzv_backend", "master_addr", "standalone", "node")
    if slurm is not None and slurm.tasks == slurm.nodes > 1 and not given("nnodes"):
        options.nnodes = str(slurm.nodes)
        if not meeting:
            options.rdzv_backend, options.rdzv_id = "c10d", str(slurm.job)
            options.rdzv_endpoint = f"{slurm.head}:{slurm.port}"
        notes.append(f"SLURM job {slurm.job}: {slurm.nodes} nodes, which meet at {slurm.head}")
    elif slurm is not None and slurm.nodes > 1 and not given("nnodes"):
        notes.append(
            f"SLURM job {slurm.job} has {slurm.nodes} nodes, and this starts ranks on one; "
            "for all of them: srun --ntasks-per-node=1 magi run ..."
        )
    if str(options.nnodes) in ("1", "1:1") and not meeting:
        options.standalone = True
    if options.log_dir and options.redirects == "0" and options.tee == "0":
        options.tee = "3"  # a folder for logs is given to have logs in it
        notes.append(f"each rank's output is kept in {options.log_dir}")
    return notes


def _thread_defaults(ranks: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return a share of the cores for each rank, where the user has not said."""
    if ranks == 1 or "OMP_NUM_THREADS" in environment:
        return {}
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // ranks))}


# -- the start ---------------------------------------------------------------------------------


def _become_rank(options: Any, slurm: Allocation, environment: dict[str, str]) -> int:
    environment |= slurm.environment()
    sys.stderr.write(
        f"magi run: SLURM job {slurm.job}: srun has made {slurm.tasks} ranks, this is rank "
        f"{slurm.rank}; no launcher is started\n"
    )
    mine = _bootstrap_options(options)
    script = [options.training_script, *options.training_script_args]
    command = [sys.executable, "-u", "-m", BOOTSTRAP, *mine, "--", *script]
    if options.dry_run:
        variables = [f"{k}={shlex.quote(v)}" for k, v in environment.items()]
        sys.stdout.write(" ".join([*variables, shlex.join(command)]) + "\n")
        return 0
    sys.stderr.flush()
    os.execve(sys.executable, command, {**os.environ, **environment})


def _bootstrap_options(options: Any) -> list[str]:
    flags = {"--replace-ddp": options.replace_ddp, "--module": options.module}
    return [flag for flag, wanted in flags.items() if wanted]


def _through_bootstrap(options: Any, folder: Path) -> None:
    """Make torchrun start the bootstrap with the script behind it."""
    if options.no_python:
        return
    mine = [*_bootstrap_options(options), f"--folder={folder}"]
    if not options.no_preflight:
        own_view = getattr(options, "virtual_local_rank", False)  # newer than torch 2.9
        mine += ["--preflight", *(["--own-view"] if own_view else [])]
    if options.redirects == "0" and options.tee == "0":  # else the rank's log shall have it
        mine.append("--fold")
    script = [options.training_script, *options.training_script_args]
    options.module, options.run_path = True, False
    options.training_script = BOOTSTRAP
    options.training_script_args = [*mine, "--", *script]


def _run(options: Any, folder: Path) -> int:
    _through_bootstrap(options, folder)
    if "LOGLEVEL" not in os.environ:  # torch's own variable for this logger
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    one_node = str(options.nnodes) in ("1", "1:1")
    seconds = options.hang_timeout if int(options.nproc_per_node) > 1 else 0.0
    watchdog = Watchdog(folder, seconds, may_end=one_node)
    try:
        with watchdog:
            run.run(options)
    except ChildFailedError as error:
        if watchdog.ended:
            sys.stderr.write("magi run: the job was ended because it hung; see the stacks above\n")
        else:
            sys.stderr.write(explain_failure(error, folder, options.log_dir))
        return 1
    except SignalException as signal:
        sys.stderr.write(f"magi run: ended by {signal.sigval.name}\n")
        return 128 + signal.sigval.value
    return 0


def _describe(options: Any) -> str:
    defaults = vars(run.get_args_parser().parse_args([options.training_script]))
    chosen = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in vars(options).items()
        if name == "nproc_per_node" or (name in defaults and value != defaults[name])
        if not name.startswith("training_script")
    ]
    script = [options.training_script, *options.training_script_args]
    return shlex.join(["torchrun", *chosen, *script]) + "\n"
