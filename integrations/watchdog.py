"""Notices ranks that stand still, prints every rank's Python stack, and ends a job that is stuck.

A rank stands still while its main thread stays at one instruction (rank_files.py). One rank alone
may have a reason, such as writing a large checkpoint while the others wait, so its stacks are
printed and the job goes on; where all ranks of the node stand still for as long, nothing is left to
wait for. On several nodes the ranks elsewhere are out of sight, and nothing is ended. The default
is below the ten minutes after which NCCL aborts without saying where anybody was.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from magi_train.integrations.rank_files import ask_file

DEFAULT_SECONDS = 540.0
LOOK_EVERY_SECONDS = 1.0
ANSWER_SECONDS = 20.0
"""How long ranks may take to answer: the first answer imports much."""


class Watchdog:
    """The launcher's side. Use as a context manager around the job.

    Args:
        folder: Where the ranks' files lie.
        seconds: How long a rank may stand still; 0 for ever.
        may_end: Whether to end a job whose ranks all stand still.

    Attributes:
        ended: Whether it has ended the job.
    """

    def __init__(self, folder: Path, seconds: float, may_end: bool) -> None:
        self.folder, self.seconds, self.may_end, self.ended = folder, seconds, may_end, False
        self._told: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="magi-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=ANSWER_SECONDS + 2)

    def _watch(self) -> None:
        while not self._stop.wait(min(LOOK_EVERY_SECONDS, self.seconds / 4)):
            alive = self._alive()
            still = {rank: s for rank, (_, s) in alive.items() if s >= self.seconds}
            self._told &= still.keys()
            stuck = bool(still) and still.keys() == alive.keys() and self.may_end
            if stuck or still.keys() - self._told:
                self._told |= still.keys()
                self._show(alive, still, stuck)
            if stuck:
                self.ended = True
                for pid, _ in alive.values():
                    _kill(pid, signal.SIGKILL)  # stuck in native code, it would not see SIGTERM

    def _alive(self) -> dict[int, tuple[int, float]]:
        """Return process id and seconds of standstill of each rank that runs."""
        ranks: dict[int, tuple[int, float]] = {}
        for path in self.folder.glob("*.alive"):
            try:
                pid, since = int(path.read_text()), path.stat().st_mtime
            except (FileNotFoundError, ValueError):
                continue
            if Path(f"/proc/{pid}").exists() or not Path("/proc").exists():
                ranks[int(path.stem)] = (pid, time.time() - since)
        return ranks

    def _show(
        self, alive: dict[int, tuple[int, float]], still: dict[int, float], stuck: bool
    ) -> None:
        stacks = self._ask(alive)
        who = "every rank" if stuck else f"rank {', '.join(map(str, sorted(still)))}"
        end = "the job is ended" if stuck else "the job goes on"
        lines = [f"\nmagi run: {who} has stood still for {self.seconds:g} s; {end}"]
        for rank in sorted(alive):
            seconds = alive[rank][1]
            moves = f"still for {seconds:.0f} s" if rank in still else "moving"
            lines += [f"  rank {rank} ({moves}):"]
            lines += [f"    {line}" for line in stacks[rank].splitlines()]
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()

    def _ask(self, alive: dict[int, tuple[int, float]]) -> dict[int, str]:
        """Return each rank's stacks; of one that cannot run Python, what faulthandler sees."""
        for rank in alive:
            (self.folder / f"{rank}.stacks").unlink(missing_ok=True)
        ask_file(self.folder).touch()
        deadline = time.monotonic() + ANSWER_SECONDS
        paths = {rank: self.folder / f"{rank}.stacks" for rank in alive}
        while time.monotonic() < deadline and not all(path.exists() for path in paths.values()):
            time.sleep(0.1)
        silent = [rank for rank, path in paths.items() if not path.exists()]
        for rank in silent:
            _kill(alive[rank][0], signal.SIGUSR1)
            paths[rank] = self.folder / f"{rank}.fault"
        if silent:
            time.sleep(1)
        ask_file(self.folder).unlink(missing_ok=True)
        return {r: p.read_text() if p.exists() else "(no answer)" for r, p in paths.items()}


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has just ended
        return
