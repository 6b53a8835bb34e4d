"""The files by which a rank of `magi run` tells its launcher how it fares, in one folder per job.

| file | written by the rank | read by the launcher |
|---|---|---|
| N.alive | the process id; touched while the main thread moves; gone after the end | hang? |
| N.error | the exception that ended the script, as JSON, with its time | root cause |
| N.stacks | Python stack and last collective, when the file `ask` appears | hang report |
| N.fault | stacks by faulthandler, at a fatal signal or SIGUSR1 | a crash in native code |

Whether the main thread moves: a thread looks at its frames twice a second, and a rank stands still
while every frame is at the same instruction. Frames inside of our own waiting loops
(core/world.py) are left out, since they wake to look around. Files rather than a socket: they work
when the rank is stuck in native code, and outlive it.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

from magi_train.core.errors import RemoteRankError
from magi_train.core.report import write_atomically

LOOK_SECONDS = 0.5
WAITING_LOOPS = ("magi_train.core.world",)
LAUNCHING = ("runpy", "magi_train.integrations.bootstrap", "torch.distributed.elastic")
SYMPTOMS = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""What the back ends say when another rank has gone."""


def ask_file(folder: Path) -> Path:
    """Return the file whose existence asks every rank for its stacks."""
    return folder / "ask"


@dataclass(frozen=True)
class ErrorRecord:
    """What ended a rank's script.

    Attributes:
        rank: The rank.
        when: Seconds since the epoch.
        summary: Type and first line of the message.
        text: Traceback of the user's code, without the launching frames.
        secondary: It only says that another rank has gone.
    """

    rank: int
    when: float
    summary: str
    text: str
    secondary: bool


def read_errors(folder: Path) -> dict[int, ErrorRecord]:
    """Return the records of the ranks that have one, by rank."""
    found = [ErrorRecord(**json.loads(path.read_text())) for path in folder.glob("*.error")]
    return {record.rank: record for record in found}


class RankFiles:
    """A rank's side.

    Args:
        folder: The job's folder, on this node.
        rank: This rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        for kind in ("error", "stacks"):  # of an attempt before a restart
            self._path(kind).unlink(missing_ok=True)

    def _path(self, kind: str) -> Path:
        return self.folder / f"{self.rank}.{kind}"

    def start(self) -> None:
        """Begin to tell; once, from the main thread."""
        self._fault = self._path("fault").open("w")
        faulthandler.enable(self._fault)
        faulthandler.register(signal.SIGUSR1, self._fault)  # a script may take the signal over
        write_atomically(self._path("alive"), str(os.getpid()))
        main = threading.get_ident()
        self._thread = threading.Thread(
            target=self._tell, args=(main,), name="magi-tell", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Leave cleanly: from now on this rank is not waited for."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._path("alive").unlink(missing_ok=True)

    def record(self, error: BaseException) -> None:
        """Keep what ended the script."""
        trace = error.__traceback__
        while trace is not None and _is_launching(trace.tb_frame) and trace.tb_next is not None:
            trace = trace.tb_next
        record = ErrorRecord(
            rank=self.rank,
            when=time.time(),
            summary=_summary(error),
            text="".join(traceback.format_exception(type(error), error, trace)),
            secondary=_is_secondary(error),
        )
        write_atomically(self._path("error"), json.dumps(record.__dict__))

    def _tell(self, main: int) -> None:
        before: Any = None
        told = False
        while not self._stop.wait(LOOK_SECONDS):
            # A frame keeps its locals: autograd copies gradients that somebody else holds, and
            # process groups must be gone when Python ends. So none is held for longer than a look.
            now = _position(sys._current_frames().get(main))
            if now != before and not self._stop.is_set():
                before = now
                try:
                    os.utime(self._path("alive"))
                except FileNotFoundError:  # the launcher has gone and taken the folder along
                    return
            asked = ask_file(self.folder).exists()
            if asked and not told:
                write_atomically(self._path("stacks"), _stacks(sys._current_frames().get(main)))
            told = asked


def _position(frame: FrameType | None) -> tuple[tuple[CodeType, int], ...]:
    """Return where each frame is, outermost first, up to one of our waiting loops."""
    positions: list[tuple[CodeType, int]] = []
    while frame is not None:
        if frame.f_globals.get("__name__") in WAITING_LOOPS:
            positions.clear()  # what it calls comes and goes
        else:
            positions.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(reversed(positions))


def _stacks(frame: FrameType | None) -> str:
    from magi_train.core import compat  # seconds to import, which a script of others need not pay

    limit, inner = 0, frame
    while inner is not None and not _is_launching(inner):
        limit, inner = limit + 1, inner.f_back
    main = "".join(traceback.format_stack(frame, limit))
    others = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    names = ", ".join(sorted(others))
    return f"last collective: {compat.last_collective()}\n{main}other threads: {names}\n"


def _is_launching(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    if name == "__main__":  # the bootstrap itself runs under this name, and so does the script
        return frame.f_code.co_filename.endswith(os.path.join("integrations", "bootstrap.py"))
    return name.startswith(LAUNCHING) or frame.f_code.co_filename == "<frozen runpy>"


def _summary(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _is_secondary(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RemoteRankError) or any(words in str(seen) for words in SYMPTOMS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def print_one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Stand in for sys.excepthook where the launcher prints the traceback of the root cause."""
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"rank {rank} fails: {_summary(error)}\n")
