"""The pre-flight check's parts: what must be equal, what is worth a warning, a child that fails."""

import copy
import time

import pytest

from magi_train.core.errors import MagiError
from magi_train.integrations import preflight


@pytest.fixture
def answers():
    first = preflight.facts() | {"host": "one", "free_disk_bytes": 2**40}
    second = copy.deepcopy(first) | {"host": "two"}
    return [first, second]


def test_equal_ranks_pass(answers):
    preflight.compare(answers)
    assert preflight.warnings_of(answers) == []


@pytest.mark.parametrize("what", ["torch", "triton", "magi-train", "python", "MAGI_SETTINGS"])
def test_what_differs_is_named_with_rank_and_host(answers, what):
    answers[0]["equal"][what] = "" if what == "MAGI_SETTINGS" else "1.0"
    answers[1]["equal"][what] = "tier=eager"
    words = f"{what} must be the same on every rank: rank 0 on one has (none|1.0), "
    with pytest.raises(MagiError, match=words + "rank 1 on two has tier=eager"):
        preflight.compare(answers)


def test_full_disks_and_busy_devices_are_warned_of(answers):
    gib = 2**30
    answers[1]["free_disk_bytes"] = 2 * gib
    answers[1] |= {"gpus": 1, "ranks_here": 2}
    answers[0] |= {"free_bytes": 20 * gib, "total_bytes": 80 * gib}
    answers[1] |= {"free_bytes": 79 * gib, "total_bytes": 80 * gib}
    assert sorted(preflight.warnings_of(answers)) == [
        "2 ranks share 1 GPU(s) on two: NCCL refuses that; --nproc auto starts one rank a GPU",
        "2.0 GiB of disk are free on two: checkpoints may not fit",
        "others hold 60 of 80 GiB on the device of rank 0 (one)",
    ]


@pytest.fixture
def on_a_rank(monkeypatch):
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_failing_child_names_its_step(on_a_rank):
    def examine(step, _):
        step("meeting")
        step("all-reduce (gloo)")
        raise MagiError("the sum is wrong")

    on_a_rank.setattr(preflight, "_examine", examine)
    words = r"rank 1 failed at all-reduce \(gloo\): the sum is wrong; .*--no-preflight"
    with pytest.raises(MagiError, match=words):
        preflight.check()


def test_a_defect_brings_its_traceback(on_a_rank):
    on_a_rank.setattr(preflight, "_examine", lambda step, _: step("meeting") or {}["key"])
    with pytest.raises(MagiError, match=r"failed at meeting: 'key'\nTraceback"):
        preflight.check()


def test_a_hanging_child_is_killed(on_a_rank):
    on_a_rank.setattr(preflight, "LIMIT_SECONDS", 0.5)
    on_a_rank.setattr(preflight, "_examine", lambda step, _: step("meeting") or time.sleep(60))
    begin = time.monotonic()
    with pytest.raises(MagiError, match="failed at meeting: no end within"):
        preflight.check()
    assert time.monotonic() - begin < 10


def test_it_runs_once_and_only_where_it_can(on_a_rank):
    on_a_rank.setattr(preflight, "_examine", lambda step, _: step("meeting") or 1 / 0)
    with pytest.raises(MagiError):
        preflight.check()
    for name, value in (
        ("WORLD_SIZE", "1"),
        ("TORCHELASTIC_RESTART_COUNT", "1"),
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),
    ):
        with on_a_rank.context() as patch:
            patch.setenv(name, value)
            preflight.check()


def test_a_child_that_succeeds(on_a_rank):
    on_a_rank.setattr(preflight, "_examine", lambda step, _: step("meeting"))
    preflight.check()


def test_ranks_that_the_launcher_shares_no_store_with_meet_in_a_file(on_a_rank, tmp_path, capsys):
    def examine(step, file):
        step(f"meeting in {file}")
        raise MagiError("nobody is there")

    on_a_rank.setattr(preflight, "_examine", examine)
    on_a_rank.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    on_a_rank.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(MagiError, match=f"meeting in {tmp_path}/preflight: nobody"):
        preflight.check(folder=tmp_path)
    on_a_rank.setenv("LOCAL_WORLD_SIZE", "1")
    preflight.check(folder=tmp_path)
    assert capsys.readouterr().err == "", "rank 0 says it"
    on_a_rank.setenv("RANK", "0")
    preflight.check(folder=tmp_path)
    assert "no pre-flight check: restarted ranks need a store" in capsys.readouterr().err
