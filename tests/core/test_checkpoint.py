"""Checkpoints of plain modules; of sharded ones: tests/distributed/test_fully_shard.py."""

from pathlib import Path

import pytest
import torch
from torch import nn

from magi_train import MagiError, load_checkpoint, plain_state_dict, save_checkpoint
from tests.ranks import values

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def filled(number):
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, number)
    return module


def number_in(folder):
    return float(plain_state_dict(folder)["weight"].mean())


def test_saving_before_the_first_step_changes_nothing(tmp_path):
    def trained(folder):
        torch.manual_seed(0)
        module = nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        if folder is not None:
            save_checkpoint(folder, module, optimizer)
            assert not optimizer.state
            load_checkpoint(folder, module, optimizer)
        module(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        return module

    want, got = trained(None), trained(tmp_path / "first")
    assert all(map(torch.equal, got.parameters(), want.parameters()))


def test_what_lies_in_the_place_of_the_folder_is_replaced_time_after_time(tmp_path):
    """A file or a link that another way of saving left there, on its own or set aside."""
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("an earlier kind of checkpoint")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("file", "link", "nowhere"):
        for number in (1, 2, 3):
            save_checkpoint(tmp_path / name, filled(number))
            assert number_in(tmp_path / name) == number
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "nowhere", "other"]


def cannot_rename(rank, _, folder):
    save_checkpoint(folder, filled(1))
    own = Path.rename

    def rename(self, target):
        if self.name == ".run.partial":
            raise PermissionError(13, "Permission denied")
        return own(self, target)

    Path.rename = rename
    try:
        save_checkpoint(folder, filled(2))
    except MagiError as error:
        return str(error)
    finally:
        Path.rename = own


def test_a_rename_that_fails_on_rank_0_is_raised_on_all_ranks(tmp_path, two_ranks):
    folder = tmp_path / "run"
    for said in values(two_ranks(cannot_rename, folder)):
        assert f"could not be renamed to {folder}: on rank 0, PermissionError: [Errno 13]" in said
    assert number_in(folder) == 1, "what was there before"
    assert number_in(tmp_path / ".run.partial") == 2
