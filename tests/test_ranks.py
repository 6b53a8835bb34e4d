"""The ranks that tests start: which environment they have."""

import os

from tests.ranks import run_ranks, values

NAME = "MAGI_TEST_OF_RANKS"


def changes(rank, world_size):
    os.environ[NAME] = "changed"


def reads(rank, world_size):
    return os.environ.get(NAME), os.environ["RANK"]


def test_what_work_changes_is_gone_for_the_next(two_ranks):
    values(two_ranks(changes))
    assert values(two_ranks(reads)) == [(None, "0"), (None, "1")]


def test_ranks_have_the_environment_of_the_test(monkeypatch):
    values(run_ranks(reads))  # there is a server to fork off
    monkeypatch.setenv(NAME, "set")
    assert values(run_ranks(reads)) == [("set", "0"), ("set", "1")]
