"""Which rank is the root cause: records of the ranks against what torch's launcher saw."""

import json
import os
import signal
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from magi_train.core.errors import RemoteRankError
from magi_train.integrations import rank_files
from magi_train.integrations.failures import explain_failure
from magi_train.integrations.rank_files import RankFiles, read_errors


def ended(rank, code):
    """What torch knows of a process: with a negative code, the signal."""
    return ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="<N/A>")


def raised(folder, rank, error):
    def training_code():
        raise error

    try:
        training_code()
    except type(error) as caught:
        RankFiles(folder, rank).record(caught)


def explain(folder, failures, **more):
    return explain_failure(ChildFailedError("script", failures), folder, **more)


def test_a_symptom_that_torch_saw_first_is_no_root_cause(tmp_path):
    raised(tmp_path, 1, RemoteRankError("rank 0 failed: boom"))
    raised(tmp_path, 2, RuntimeError("[...] Connection closed by peer [127.0.0.1]:1"))
    try:
        try:
            raise RemoteRankError("gone")
        except RemoteRankError as first:
            raise ValueError("wrapped") from first
    except ValueError as error:
        RankFiles(tmp_path, 3).record(error)
    raised(tmp_path, 0, ValueError("boom\nand more"))
    text = explain(tmp_path, {r: ended(r, 1) for r in (1, 2, 3)})
    head, *others = text.split("\n  then ")
    assert "rank 0 failed first (stopped by the launcher after it raised):" in head
    assert "in training_code" in head
    assert "ValueError: boom\n  and more" in head
    assert [line.split(":")[0] for line in others] == ["rank 1", "rank 2", "rank 3"]
    assert all("\n" not in line.strip() for line in others)


def test_the_earlier_of_two_causes_comes_first(tmp_path):
    raised(tmp_path, 1, ValueError("first"))
    raised(tmp_path, 0, ValueError("second"))
    assert "rank 1 failed first" in explain(tmp_path, {0: ended(0, 1), 1: ended(1, 1)})


def test_a_killed_rank_comes_before_those_that_notice(tmp_path):
    raised(tmp_path, 0, RuntimeError("Connection reset by peer"))
    time.sleep(0.01)
    (tmp_path / "1.fault").write_text("Fatal Python error: Segmentation fault\n")
    text = explain(tmp_path, {0: ended(0, 1), 1: ended(1, -signal.SIGSEGV), 2: ended(2, -15)})
    assert "rank 1 failed first (ended by SIGSEGV):\n\n  a crash in native code\n" in text
    assert "Fatal Python error: Segmentation fault" in text
    assert text.index("then rank 0") < text.index("then rank 2"), "the launcher sends SIGTERM"


def test_a_rank_without_an_exception_shows_the_end_of_its_log(tmp_path):
    log = tmp_path / "logs" / "job" / "attempt_0" / "0" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text("\n".join(f"line {i}" for i in range(100)))
    text = explain(tmp_path, {0: ended(0, 3)}, log_dir=str(tmp_path / "logs"))
    assert "rank 0 failed first (exit status 3):" in text
    assert "no exception reached the end of its script" in text
    assert f"the end of {log}:\n  line 80\n" in text


def test_a_record_starts_at_the_users_code(tmp_path):
    code = compile("def step():\n    raise ValueError('x')\nstep()", "script.py", "exec")
    namespace = {"__name__": "torch.distributed.elastic.fake"}
    exec("def launch(code):\n    exec(code, {'__name__': '__main__'})", namespace)
    try:
        namespace["launch"](code)
    except ValueError as error:
        error.__traceback__ = error.__traceback__.tb_next  # this test's own frame
        RankFiles(tmp_path, 0).record(error)
    text = read_errors(tmp_path)[0].text
    assert text.splitlines()[1] == '  File "script.py", line 3, in <module>'
    assert json.loads((tmp_path / "0.error").read_text())["summary"] == "ValueError: x"
    RankFiles(tmp_path, 0)
    assert not read_errors(tmp_path), "a restart forgets"


def test_one_line_stands_for_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    rank_files.print_one_line(ValueError, ValueError("a\nb"), None)
    assert capsys.readouterr().err == "rank 3 fails: ValueError: a\n"


@pytest.fixture
def files(tmp_path):
    files = RankFiles(tmp_path, 0)
    files.start()
    yield files
    files.close()
    rank_files.faulthandler.unregister(signal.SIGUSR1)
    rank_files.faulthandler.enable()


def wait_for(condition, seconds=15):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_rank_that_stands_still_ages_and_answers(files, tmp_path):
    alive = tmp_path / "0.alive"
    assert int(alive.read_text()) == os.getpid()
    wait_for(lambda: time.time() - alive.stat().st_mtime < 0.4)  # the loop moves
    begin = time.time()
    time.sleep(1.6)  # one instruction
    assert alive.stat().st_mtime < begin + 1.1
    rank_files.ask_file(tmp_path).touch()
    wait_for((tmp_path / "0.stacks").exists)
    text = (tmp_path / "0.stacks").read_text()
    assert text.startswith("last collective: ")
    assert "in test_a_rank_that_stands_still_ages_and_answers" in text
    os.kill(os.getpid(), signal.SIGUSR1)
    assert "test_failures.py" in (tmp_path / "0.fault").read_text()
    files.close()
    assert not alive.exists()


def test_our_waiting_loops_count_as_standing_still():
    code = "def wait(look):\n    first = look()\n    second = look()\n    return first, second"
    for name, equal in (("magi_train.core.world", True), ("users.module", False)):
        namespace = {"__name__": name}
        exec(code, namespace)
        first, second = namespace["wait"](lambda: rank_files._position(rank_files.sys._getframe(0)))
        assert first, "the frames below are looked at"
        assert (first == second) == equal, name
