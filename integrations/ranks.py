"""Start the ranks of a measurement, and see to it that all of them end.

A rank that fails, or that hangs, must leave nothing behind: what runs next would share its GPU. So
each rank is a session of its own, and ends with all its children; the store that they meet in is
this process's, so that no port can be taken between the choice and the use. `magi run` is for
training, where ranks are restarted and examined; here a failure is a row in a table.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

GRACE_SECONDS = 10.0
"""How long other ranks may take to end by themselves once one has failed."""
GONE_SECONDS = 10.0
"""How long is waited for what was killed."""
TAIL = 600


def run_ranks(
    command: Sequence[str],
    ranks: int,
    folder: Path,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run `python command` as the ranks of one job on this host, until all have ended.

    Args:
        command: What follows `python`.
        ranks: How many.
        folder: Gets `RANK.log`.
        seconds: Limit for all of it.
        environment: Of the ranks, besides what says which rank they are.

    Returns:
        Why it failed: the end of the log of the first rank that did. "" if all ended well.
    """
    shared = {**os.environ, **(environment or {}), "WORLD_SIZE": str(ranks)}
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    store = None
    if ranks > 1:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            mine = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (folder / f"{rank}.log").open("wb") as log:
                process = subprocess.Popen([sys.executable, *command], env=mine, stdout=log,
                                           stderr=log, start_new_session=True)  # fmt: skip
            running.append(process)
        failed = _watch(running, time.monotonic() + seconds)
    finally:
        for process in running:
            stop(process)
        del store
    if failed is None:
        return f"did not finish in {seconds:g} s"
    if failed < 0:
        return ""
    text = (folder / f"{failed}.log").read_text(errors="replace").strip()
    return text[-TAIL:] or f"rank {failed} ended with status {running[failed].returncode}"


def _watch(running: Sequence["subprocess.Popen[bytes]"], deadline: float) -> int | None:
    """Return the first rank that failed, -1 if none did; None at the deadline."""
    failed = -1
    while any(process.poll() is None for process in running):
        bad = [rank for rank, process in enumerate(running) if process.poll()]
        if bad and failed < 0:
            failed, deadline = bad[0], min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            return failed if failed >= 0 else None
        time.sleep(0.05)
    return failed if failed >= 0 else next((r for r, p in enumerate(running) if p.returncode), -1)


def stop(process: "subprocess.Popen[bytes]", after_seconds: float = 0.0) -> None:
    """End a process that leads a session, and what it started, in sessions of their own, too.

    Args:
        process: Made with start_new_session=True; it may have ended.
        after_seconds: How long it may take to end its children by itself, at a SIGTERM.
    """
    if after_seconds and process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after_seconds)
    tree = _tree(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + GONE_SECONDS
    while any(map(_runs, tree)) and time.monotonic() < deadline:  # it holds its GPU until the end
        time.sleep(0.01)


def _tree(leader: int) -> list[int]:
    """Return a session's processes, and what they have started elsewhere, where /proc tells."""
    names = os.listdir("/proc") if os.path.isdir("/proc") else []
    found = [
        pid for pid in map(int, filter(str.isdigit, names)) if _stat(pid)[3:4] == [str(leader)]
    ]
    for each in found:  # grows
        for file in Path(f"/proc/{each}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended
                found += {*map(int, file.read_text().split())} - {*found}
    return found


def _runs(pid: int) -> bool:
    """Return whether a process is neither gone nor a zombie, whose memory is given back."""
    return _stat(pid)[:1] not in ([], ["Z"], ["X"])


def _stat(pid: int) -> list[str]:
    """Return state, parent, group, session, ... of a process; [] if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
