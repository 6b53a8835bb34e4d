"""One command for all tables: GPUs are shared out, and time that is over cuts nothing silently."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import all as everything
from benchmarks.all import CPU_TASKS, TASKS, Task
from magi_train.integrations.ranks import stop

SCRIPT = """
import json, os, sys, time
record = sys.argv[sys.argv.index("--output") + 1]
start = time.time()
time.sleep(float(sys.argv[1]))
assert len(sys.argv) < 7, "told to fail"
gpus, times = os.environ["CUDA_VISIBLE_DEVICES"], [start, time.time()]
json.dump({"gpus": gpus, "times": times}, open(record, "w"))
"""


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Run some tasks on two GPUs that nobody looks at; return status, records and printed lines."""
    (tmp_path / "fake_task.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")

    def call(tasks, *arguments):
        monkeypatch.setattr(everything, "TASKS", tasks)
        monkeypatch.setattr(everything, "CPU_TASKS", tasks)
        folder = tmp_path / "records"
        words = ["all", "--folder", str(folder), "--commit", "abc", *arguments]
        monkeypatch.setattr("sys.argv", words)
        status = None
        try:
            everything.main()
        except SystemExit as error:
            status = error.code
        found = {
            f.stem[11:].rpartition("_")[0]: json.loads(f.read_text()) for f in folder.glob("*.json")
        }
        return status, found

    return call


def test_tasks_run_side_by_side_on_gpus_of_their_own(called):
    small = [Task(f"small{i}", "fake_task 2", 1, 10) for i in range(2)]
    status, found = called([*small, Task("large", "fake_task 0", 2, 10)])
    assert status is None
    assert {found["small0"]["gpus"], found["small1"]["gpus"]} == {"4", "7"}
    assert found["large"]["gpus"] == "4,7"
    (begin, end), (other_begin, other_end) = found["small0"]["times"], found["small1"]["times"]
    assert begin < other_end
    assert other_begin < end
    assert found["large"]["times"][0] >= max(end, other_end)


def test_a_cpu_runs_one_task_at_a_time_and_shows_it_no_gpu(called):
    tasks = [Task(f"small{i}", "fake_task 1", 0, 10) for i in range(2)]
    status, found = called(tasks, "--cpu")
    assert status is None
    assert {found["small0"]["gpus"], found["small1"]["gpus"]} == {""}
    assert found["small1"]["times"][0] >= found["small0"]["times"][1]


def test_what_fails_is_cut_or_comes_too_late_is_said(called, capsys):
    tasks = [
        Task("fails", "fake_task 0 more", 1, 10),
        Task("hangs", "fake_task 600", 1, 1),
        Task("wide", "fake_task 0", 3, 1),
        Task("long", "fake_task 0", 1, 600),
    ]
    start = time.monotonic()
    status, found = called(tasks, "--minutes", "1")
    assert time.monotonic() - start < 50
    assert "'fails': 'status 1'" in status
    assert "'hangs': 'cut after 2 s'" in status
    assert not found
    printed = capsys.readouterr().out
    assert "wide: not started, needs 3 GPU(s)" in printed
    assert "long: not started, needs 1 GPU(s) for 600 s" in printed


def test_what_is_cut_leaves_nothing_on_its_gpu(called, tmp_path):
    child = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; x = b'x' * (1 << 30); time.sleep(600)"]  # dies slowly
ranks = subprocess.Popen(sleep, start_new_session=True)
open({!r}, "w").write(str(ranks.pid))
time.sleep(600)
"""
    told = tmp_path / "pid"
    (tmp_path / "fake_ranks.py").write_text(child.format(str(told)))
    status, _ = called([Task("ranks", "fake_ranks", 1, 5)])
    assert "cut after 10 s" in status
    assert has_ended(told.read_text())


def has_ended(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().split()[2]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"  # gone, unless nobody has asked how it ended


def test_what_a_process_that_has_failed_left_behind_ends_too():
    child = """
import subprocess, sys
code = "import time; x = b'x' * (1 << 30); print(flush=True); time.sleep(600)"
sleep = [sys.executable, "-c", code]
left = subprocess.Popen(sleep, stdout=subprocess.PIPE)
left.stdout.readline()
print(left.pid, flush=True)
sys.exit(1)
"""
    words = [sys.executable, "-c", child]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
    pid = process.stdout.readline().decode().strip()
    assert process.wait() == 1
    assert not has_ended(pid)
    stop(process)
    assert has_ended(pid)


def test_tests_share_a_record(called, tmp_path):
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert False\n")
    command = f"{everything.TESTS} {tmp_path / 'test_it.py'}"
    status, found = called([Task("gpu_tests_it", command, 1, 60)])
    assert "status 1" in status
    (row,) = found["gpu_tests"]["cases"]
    assert row["outcome"].startswith("1 failed, 1 passed")
    assert found["gpu_tests"]["commit"] == "abc"


@pytest.mark.parametrize(
    ("tasks", "words"), [(TASKS, ["--list"]), (CPU_TASKS, ["--list", "--cpu"])]
)
def test_the_list_names_real_commands(tasks, words, called, capsys):
    status, _ = called(tasks, *words)
    lines = capsys.readouterr().out.splitlines()
    assert status is None
    assert len(lines) == len(tasks) == len({task.name for task in tasks})
    root = Path(everything.__file__).parent.parent
    for task in tasks:
        module, *rest = task.command.split()
        assert importlib.util.find_spec(module), task.name
        assert all((root / word).exists() for word in rest if word.endswith(".py")), task.name
    status, _ = called(tasks, "no_such_task", *words[1:])
    assert status == 2
