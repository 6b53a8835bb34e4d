"""Which rank failed first, and why: the text that `magi run` ends with.

torch's launcher reports the ranks whose end it saw first, which need not be the one that failed
first: a rank that raises still tells the others, waits and unwinds, and their complaints can reach
the launcher earlier. So every rank leaves a record with its time (rank_files.py), and an error that
only says that another rank has gone counts after all others, as does SIGTERM, which the launcher
itself sends.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from magi_train.integrations.rank_files import read_errors

TAIL_LINES = 20
HINTS = {
    "SIGKILL": "nothing in the program does that: often the out-of-memory killer (see dmesg), or "
    "the batch system",
    "SIGBUS": "often a full /dev/shm: give the container more (docker --shm-size)",
    "SIGSEGV": "a crash in native code",
    "SIGABRT": "native code gave up: NCCL's watchdog does so when a collective takes too long",
}


@dataclass(frozen=True)
class Failure:
    """How one rank ended.

    Attributes:
        rank: The rank.
        how: "exit status 1", "ended by SIGKILL".
        text: All that is known: a traceback, stacks, or the end of its log.
        line: The same in a line.
        order: Sorts root causes first, then by time.
    """

    rank: int
    how: str
    text: str
    line: str
    order: tuple[int, float]


def explain_failure(error: ChildFailedError, folder: Path, log_dir: str | None = None) -> str:
    """Return the root cause in full, then a line for each of the other ranks that failed.

    Args:
        error: What torch's launcher raised.
        folder: Where the ranks' files lie.
        log_dir: Where their output is kept, if it is.
    """
    failures = sorted(collect(error.failures, folder, log_dir), key=lambda f: f.order)
    first, *others = failures
    lines = [f"\nmagi run: rank {first.rank} failed first ({first.how}):", ""]
    lines += [f"  {line}" for line in first.text.splitlines()]
    lines += [f"  then rank {f.rank}: {f.how}, {f.line}" for f in others]
    return "\n".join(lines) + "\n"


def collect(
    failures: Mapping[int, ProcessFailure], folder: Path, log_dir: str | None
) -> list[Failure]:
    """Return one Failure a rank, of those that torch names or that left a record."""
    records = read_errors(folder)
    collected = []
    for rank in sorted({*failures, *records}):
        seen, record = failures.get(rank), records.get(rank)
        how, signal = _how(seen)
        if record is not None:
            order = (1 if record.secondary else 0, record.when)
            collected.append(Failure(rank, how, record.text, record.summary, order))
        elif seen is not None:
            hint = HINTS.get(signal, "no exception reached the end of its script")
            text = "\n".join(filter(None, (hint, _fault(folder, rank), _tail(log_dir, seen))))
            order = (2 if signal == "SIGTERM" else 0, float(seen.timestamp))
            collected.append(Failure(rank, how, text, hint, order))
    return collected


def _how(failure: ProcessFailure | None) -> tuple[str, str]:
    """Return how a process ended, and the signal's name or ""."""
    if failure is None:
        return "stopped by the launcher after it raised", ""
    name = failure.signal_name()
    if name == "<N/A>":
        return f"exit status {failure.exitcode}", ""
    return f"ended by {name}", name


def _fault(folder: Path, rank: int) -> str:
    path = folder / f"{rank}.fault"
    return path.read_text().strip() if path.exists() else ""


def _tail(log_dir: str | None, failure: ProcessFailure) -> str:
    if log_dir is None:
        return ""
    logs = Path(log_dir).glob(f"*/attempt_*/{failure.local_rank}/stderr.log")
    newest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return ""
    lines = newest.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join([f"the end of {newest}:", *lines])
