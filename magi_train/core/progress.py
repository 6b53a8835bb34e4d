"""Progress on a terminal: what is being compiled and how far, and how the steps go.

Only rank 0, only where stderr is a terminal, only with `Config(progress=True)`. A line while a
graph takes longer than PATIENCE to compile, wiped away behind it; while training, the title of the
terminal's window, since a line would run into the bars of the user's own loop. Neither moves the
cursor to another line.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO

from magi_train.core.record import Steps

PATIENCE = 1.0
STAGES = ("passes", "cut", "forward", "backward")
"""Of compiling one graph, in their order."""
_WIPE = "\r\033[2K"
_SAVE_TITLE, _TITLE, _RESTORE_TITLE = "\033[22;0t", "\033]0;%s\007", "\033[23;0t"

_now: "Progress | None" = None


def at_stage(stage: str) -> None:
    """Tell how far compiling is; nothing where nobody looks."""
    if _now is not None and stage in STAGES:
        _now.stage = stage


class Progress:
    """Shows how far one model is.

    Args:
        wanted: The setting, on rank 0.
        stream: Where to; stderr.

    Attributes:
        shown: Whether anything is shown.
        stage: Of the graph that is being compiled.
    """

    def __init__(self, wanted: bool, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        isatty = getattr(self._stream, "isatty", lambda: False)
        self.shown = bool(wanted and isatty())
        self.stage, self.graphs = "", 0
        self._titled = False

    @contextlib.contextmanager
    def compiling(self, name: str) -> Iterator[None]:
        """While this holds, the graph of `name` is compiled."""
        global _now
        self.graphs += 1
        if not self.shown:
            yield
            return
        before, _now = _now, self
        self.stage, done, began = STAGES[0], threading.Event(), time.monotonic()
        thread = threading.Thread(target=self._show, args=(name, began, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            _now = before
            done.set()
            thread.join()

    def _show(self, name: str, began: float, done: threading.Event) -> None:
        if done.wait(PATIENCE):
            return
        while True:
            seconds = time.monotonic() - began
            self._put(f"{_WIPE}{compile_line(name, self.graphs, self.stage, seconds)}")
            if done.wait(1.0):
                self._put(_WIPE)
                return

    def tell(self, steps: Steps) -> None:
        """Show how the steps go, in the window's title."""
        if not self.shown:
            return
        start = "" if self._titled else _SAVE_TITLE
        self._titled = True
        self._put(start + _TITLE % title(steps))

    def close(self) -> None:
        """Give the window its title back."""
        if self._titled:
            self._put(_RESTORE_TITLE)
        self._titled = False

    def _put(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal has gone
            self.shown = False


def compile_line(name: str, graph: int, stage: str, seconds: float) -> str:
    """Return what is shown while a graph is compiled; short enough for one line."""
    at = STAGES.index(stage) + 1
    return (
        f"magi: compiling {name[:30]}, graph {graph}: {stage} ({at}/{len(STAGES)}), {seconds:.0f} s"
    )


def title(steps: Steps) -> str:
    """Return the window's title."""
    parts = [f"step {steps.count}"]
    recent = steps.seconds[-1] if steps.seconds else None
    if recent:
        parts.append(f"{recent:.3g} s/step")
        if steps.samples and steps.timed:
            parts.append(f"{steps.samples / steps.timed / recent:.4g} samples/s")
    if steps.memory_gib:
        parts.append(f"{steps.memory_gib[-1][1]:.3g} GiB")
    return "magi: " + ", ".join(parts)
