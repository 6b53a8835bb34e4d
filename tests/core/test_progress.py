"""Progress: on a terminal only, and nothing of it stays there."""

import io
import time

from magi_train.core import progress
from magi_train.core.progress import Progress, at_stage, compile_line, title
from magi_train.core.record import Steps


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_nothing_is_shown_without_a_terminal_or_against_the_wish(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    for shown in (Progress(True, io.StringIO()), Progress(False, Terminal())):
        with shown.compiling("step"):
            time.sleep(0.05)
        shown.tell(Steps(count=3))
        shown.close()
        assert shown._stream.getvalue() == ""


def test_a_long_compilation_is_told_and_wiped_away(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    terminal = Terminal()
    shown = Progress(True, terminal)
    with shown.compiling("training_step"):
        at_stage("backward")
        deadline = time.monotonic() + 20
        while "compiling" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    text = terminal.getvalue()
    assert "compiling training_step, graph 1: " in text
    assert text.endswith("\r\033[2K")
    assert "\n" not in text
    at_stage("forward")  # nobody looks any more
    assert shown.stage == "backward"


def test_a_short_compilation_is_silent(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 60.0)
    terminal = Terminal()
    with Progress(True, terminal).compiling("step"):
        pass
    assert terminal.getvalue() == ""


def test_the_title_is_put_back():
    terminal = Terminal()
    shown = Progress(True, terminal)
    for count in (1, 2):
        shown.tell(Steps(count=count))
    shown.close()
    shown.close()
    text = terminal.getvalue()
    assert text.count("\033[22;0t") == text.count("\033[23;0t") == 1
    assert "step 2" in text
    assert "\n" not in text
    assert "\r" not in text


def test_a_terminal_that_has_gone_is_no_error():
    terminal = Terminal()
    shown = Progress(True, terminal)
    terminal.close()
    shown.tell(Steps(count=1))
    assert not shown.shown


def test_the_words():
    steps = Steps(count=5, seconds=[0.5], longest=[0.5], samples=16, memory_gib=[[4, 1.5]])
    assert title(steps) == "magi: step 5, 0.5 s/step, 8 samples/s, 1.5 GiB"
    assert title(Steps(count=1)) == "magi: step 1"
    line = compile_line("x" * 99, 3, "cut", 61.2)
    assert line == f"magi: compiling {'x' * 30}, graph 3: cut (2/4), 61 s"
