"""The examples and the options of docs/launcher.md."""

import re
import shlex
from pathlib import Path

import pytest

from magi_train import Config
from magi_train.cli import main
from magi_train.core import settings
from magi_train.integrations.launcher import option_parser

TEXT = (Path(__file__).parents[2] / "docs" / "launcher.md").read_text()
EXAMPLES = re.findall(r"```console\n\$ (magi .*)\n((?:.*\n)*?)```", TEXT)


@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=[c for c, _ in EXAMPLES])
def test_an_example_prints_what_it_shows(command, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(settings.VARIABLE, raising=False)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "magi.toml").write_text(re.search(r"```toml\n(.*?)```", TEXT, re.DOTALL)[1])
    main(shlex.split(command)[1:])
    printed = capsys.readouterr()
    lines = (printed.out + printed.err).splitlines()
    assert shown, "an example without its output"
    for line in shown.splitlines():
        assert line.split() in [each.split() for each in lines]  # columns are as wide as they must


def test_there_are_examples_and_the_file_is_a_config(tmp_path):
    assert len(EXAMPLES) == 3
    path = tmp_path / "magi.toml"
    path.write_text(re.search(r"```toml\n(.*?)```", TEXT, re.DOTALL)[1])
    assert Config.from_file(path).comm.bucket_mib == 25


def test_every_option_of_ours_is_in_the_table():
    ours = next(g for g in option_parser()._action_groups if g.title == "magi")
    names = [name for action in ours._group_actions for name in action.option_strings]
    assert {"--nproc", "--dry-run", "--hang-timeout"} <= set(names)
    for name in names:
        assert f"| `{name}" in TEXT, name
    for name in re.findall(r"`(--[a-z-]+)", TEXT):
        known = name in option_parser()._option_string_actions
        assert known or name.startswith(("--magi", "--rdzv-", "--ntasks", "--json")), name
