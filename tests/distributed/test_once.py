"""Models that prepare something under a lock, in their first forward: captured from then on."""

import copy
import threading

import pytest
import torch
from torch import nn

import magi_train
from magi_train import Config
from tests.close import difference, tolerance
from tests.models import bert, loss_of
from tests.ranks import run_ranks, values

LOCK = threading.Lock()


class PreparesOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.ready = nn.Linear(8, 8), False

    def forward(self, x):
        if not self.ready:
            with LOCK:
                self.linear.register_forward_hook(lambda module, args, output: output * 2)
                self.ready = True
        return self.linear(x).square().mean()


class AlwaysLocks(PreparesOnce):
    def forward(self, x):
        with LOCK:
            return self.linear(x).square().mean()


def trained(model, call, rank, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for i in range(steps):
        x = torch.randn(4 + rank, 8, generator=torch.Generator().manual_seed(10 * i + rank))
        call(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def once(rank, world_size, kind, tier):
    torch.manual_seed(0)
    plain = kind()
    model = copy.deepcopy(plain)
    ddp = nn.parallel.DistributedDataParallel(plain)
    want = trained(plain, ddp, rank)
    ours = magi_train.prepare(model, config=Config(tier=tier, lowering="aot_eager"))
    step = magi_train.prepare_step(ours, ours)
    got = trained(model, step, rank)
    report = magi_train.report(ours)
    return difference(got, want), report.tier, [note for note in report.notes if "lock" in note]


@pytest.mark.parametrize("tier", ["auto", "graph"])
def test_the_first_step_is_eager_and_the_rest_one_graph(two_ranks, tier):
    for far, reached, notes in values(two_ranks(once, PreparesOnce, tier)):
        assert far <= tolerance(torch.float32, 64)
        assert reached == "graph"
        assert len(notes) == 1


@pytest.mark.full
def test_what_locks_each_time_takes_the_next_tier(two_ranks):
    for far, reached, notes in values(two_ranks(once, AlwaysLocks, "auto")):
        assert far <= tolerance(torch.float32, 64)
        assert reached == "region"
        assert len(notes) == 1


@pytest.mark.full
def test_what_locks_each_time_is_no_graph():
    for outcome in run_ranks(once, AlwaysLocks, "graph"):
        assert "CaptureError" in outcome.error
        assert "lock" in outcome.error


@pytest.mark.full
def test_hidden_states_of_a_library_model_are_captured():
    torch.manual_seed(0)
    model = bert()
    model.config.output_hidden_states = True
    ours = magi_train.prepare(model, config=Config(lowering="aot_eager"))
    ids = torch.randint(0, 32, (2, 8))
    for _ in range(2):
        loss_of(ours(input_ids=ids, labels=ids)).backward()
    assert magi_train.report(ours).tier == "graph"
