"""Checkpoints of one process; those of several are in tests/distributed/test_fully_shard.py."""

import pytest
import torch
from torch import nn

from magi_train import load_checkpoint, save_checkpoint


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
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
