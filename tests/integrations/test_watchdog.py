"""The launcher's watchdog against ranks that are sleeping processes with files of our making."""

import os
import subprocess
import sys
import time

import pytest

from magi_train.integrations import watchdog as module
from magi_train.integrations.rank_files import ask_file
from magi_train.integrations.watchdog import Watchdog


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Two processes, their files, and their answers."""
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(module, "LOOK_EVERY_SECONDS", 0.1)
    code = [sys.executable, "-S", "-c", "import time; time.sleep(100)"]
    processes = [subprocess.Popen(code) for _ in range(2)]
    for rank, process in enumerate(processes):
        (tmp_path / f"{rank}.alive").write_text(str(process.pid))
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def age(folder, rank, seconds):
    then = time.time() - seconds
    os.utime(folder / f"{rank}.alive", (then, then))


def answer(folder, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not ask_file(folder).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for rank in (0, 1):
        half = folder / f"{rank}.half"
        half.write_text(f"stack of {rank}\n")
        half.replace(folder / f"{rank}.stacks")  # whole at once, as ranks write it


def test_a_job_that_is_stuck_is_shown_and_ended(tmp_path, ranks, capsys):
    for rank in (0, 1):
        age(tmp_path, rank, 100)
    with Watchdog(tmp_path, 50, may_end=True) as watchdog:
        answer(tmp_path)
        assert [p.wait(timeout=10) for p in ranks] == [-9, -9]
    err = capsys.readouterr().err
    assert "every rank has stood still for 50 s; the job is ended" in err
    assert "rank 0 (still for 10" in err
    assert err.index("stack of 0") < err.index("stack of 1")
    assert watchdog.ended
    assert not ask_file(tmp_path).exists()


def test_one_rank_that_waits_is_shown_once(tmp_path, ranks, capsys):
    age(tmp_path, 1, 100)
    with Watchdog(tmp_path, 50, may_end=True) as watchdog:
        answer(tmp_path)
        time.sleep(1.0)
    err = capsys.readouterr().err
    assert err.count("rank 1 has stood still for 50 s; the job goes on") == 1
    assert "rank 0 (moving):\n    stack of 0" in err
    assert not watchdog.ended
    assert [p.poll() for p in ranks] == [None, None]


def test_ranks_elsewhere_are_out_of_sight(tmp_path, ranks, capsys):
    for rank in (0, 1):
        age(tmp_path, rank, 100)
    with Watchdog(tmp_path, 50, may_end=False):
        answer(tmp_path)
        time.sleep(0.8)
    assert "rank 0, 1 has stood still for 50 s; the job goes on" in capsys.readouterr().err
    assert [p.poll() for p in ranks] == [None, None]


def test_a_rank_that_cannot_run_python_gets_a_signal(tmp_path, ranks, capsys):
    (tmp_path / "1.fault").write_text("what faulthandler saw")
    for rank in (0, 1):
        age(tmp_path, rank, 100)
    with Watchdog(tmp_path, 50, may_end=False):
        time.sleep(2.0)
    err = capsys.readouterr().err
    assert "what faulthandler saw" in err
    assert "(no answer)" in err, "rank 0 left nothing"
    assert [p.wait(timeout=10) for p in ranks] == [-10, -10], "SIGUSR1, not handled by these"


def test_a_rank_that_has_ended_is_not_waited_for(tmp_path, ranks, capsys):
    ranks[0].kill()
    ranks[0].wait()
    age(tmp_path, 0, 100)
    (tmp_path / "2.alive").write_text("")  # just being written
    with Watchdog(tmp_path, 50, may_end=True):
        time.sleep(0.8)
    assert not capsys.readouterr().err
