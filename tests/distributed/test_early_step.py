"""The early step: the same bits as a late one; no gradient is read before it arrived."""

import pytest
import torch
from torch import nn

import magi_train
from magi_train import CommConfig, Config
from magi_train.comm.early_step import Arriving
from tests.ranks import values


def _train(rank, world_size, early, clip):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    comm = CommConfig(bucket_mib=0.01, early_step=early)
    prepared, _ = magi_train.prepare(model, optimizer, config=Config(tier="eager", comm=comm))
    waiting = []
    for step in range(4):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + rank))
        prepared(x).square().mean().backward()
        waiting.append(sum(isinstance(p.grad, Arriving) for p in model.parameters()))
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return waiting, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("clip", [False, True])
def test_an_early_step_is_the_late_one_bit_for_bit(clip, two_ranks):
    (waiting, first), (_, second) = values(two_ranks(_train, True, clip))
    assert waiting == [0, 6, 6, 6]  # the first backward agrees on how gradients are reduced
    (none, late), _ = values(two_ranks(_train, False, clip))
    assert none == [0] * 4
    for mine, theirs, old in zip(first, second, late, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine, old)


def test_it_needs_the_optimizer():
    with pytest.raises(ValueError, match="early_step needs the optimizer"):
        magi_train.prepare(nn.Linear(2, 2), config=Config(comm=CommConfig(early_step=True)))
