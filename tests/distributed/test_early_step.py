"""The early step: DDP's weights bit for bit; no gradient is read before it arrived; refusals."""

import copy
import os
import signal

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import magi_train
from magi_train import CommConfig, Config
from magi_train.comm.early_step import Arriving, Pending
from tests.ranks import run_ranks, values

STEPS = 5


class Net(nn.Module):
    """An embedding that is the head too, and a branch that not every step uses."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        self.branch = nn.Linear(64, 64)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, branch=True):
        x = self.body(self.embed(tokens))
        return self.head(x + self.branch(x) if branch else x).float().square().mean()


def batch(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(0, 32, (2 + 3 * rank, 7), generator=generator)  # uneven


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2), None


def groups(model):
    of = [{"params": [*model.body.parameters()], "lr": 5e-3}]
    of += [{"params": [model.embed.weight, *model.branch.parameters()], "weight_decay": 0.1}]
    optimizer = torch.optim.SGD(of, lr=2e-3, momentum=0.9, nesterov=True)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.3)


def fused(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2, fused=True), None


def plain(wrapped, model, optimizer, rank, step):
    wrapped(batch(rank, step)).backward()
    arriving = sum(isinstance(p.grad, Arriving) for p in model.parameters())
    optimizer.step()
    return arriving


def clipped(wrapped, model, optimizer, rank, step):
    wrapped(batch(rank, step)).backward()
    arriving = sum(isinstance(p.grad, Arriving) for p in model.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    return arriving


def accumulated(wrapped, model, optimizer, rank, step):
    with wrapped.no_sync():
        wrapped(batch(rank, step)).backward()
    return plain(wrapped, model, optimizer, rank, step + 100)


def unused(wrapped, model, optimizer, rank, step):
    """A branch that rank 1 leaves out in one step, and both in another."""
    wrapped(batch(rank, step), step not in (2, 3) or (step == 3 and rank == 0)).backward()
    arriving = sum(isinstance(p.grad, Arriving) for p in model.parameters())
    optimizer.step()
    return arriving


def twice(wrapped, model, optimizer, rank, step):
    """Two backwards that both send, and gradients that are kept for the next step."""
    plain(wrapped, model, optimizer, rank, step)
    return plain(wrapped, model, optimizer, rank, step + 100)


def closure(wrapped, model, optimizer, rank, step):
    found = []

    def loss():
        optimizer.zero_grad()
        wrapped(batch(rank, step)).backward()
        found.append(sum(isinstance(p.grad, Arriving) for p in model.parameters()))
        return step

    assert optimizer.step(loss) == step
    return found[0]


def scaled(wrapped, model, optimizer, rank, step):
    """With a loss scale, and an inf in one gradient of one rank, which skips a step."""
    if step == 0:
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler, factor = optimizer.scaler, float("inf") if (rank, step) == (1, 3) else 1.0
    (scaler.scale(wrapped(batch(rank, step))) * factor).backward()
    arriving = sum(isinstance(p.grad, Arriving) for p in model.parameters())
    scaler.step(optimizer)
    scaler.update()
    return arriving


def read(wrapped, model, optimizer, rank, step):
    """Gradients are read, copied and replaced by hand in ways that skip torch's dispatcher."""
    wrapped(batch(rank, step)).backward()
    first, second, *_ = model.parameters()
    arriving = sum(isinstance(p.grad, Arriving) for p in model.parameters())
    if step % 2:
        first.grad = torch.zeros_like(first)
    if step % 3 == 1:
        second.grad.numpy()[:] *= 2
    elif step % 3 == 2:
        second.grad[0, 1] = 3.0
    elif step == 3:
        assert second.grad.data_ptr()
    optimizer.step()
    return arriving


CASES = {
    "adamw": (adamw, plain),
    "groups and a scheduler": (groups, plain),
    "fused": (fused, plain),
    "clip": (groups, clipped),
    "accumulation": (adamw, accumulated),
    "unused": (groups, unused),
    "two backwards": (groups, twice),
    "closure": (adamw, closure),
    "scaler": (adamw, scaled),
    "fused and a scaler": (fused, scaled),
    "read by hand": (adamw, read),
}


def train(case, rank, ours):
    make, step_of = CASES[case]
    torch.manual_seed(0)
    model = Net()
    optimizer, scheduler = make(model)
    if ours:
        comm = CommConfig(bucket_mib=0.01, early_step=True)
        wrapped, _ = magi_train.prepare(model, optimizer, config=Config(tier="eager", comm=comm))
    else:
        wrapped = DistributedDataParallel(model, find_unused_parameters=case == "unused")
    calls, arriving = [], []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    for step in range(STEPS):
        arriving.append(step_of(wrapped, model, optimizer, rank, step))
        if scheduler is not None:
            scheduler.step()
        if step_of is not twice:
            optimizer.zero_grad()
    kept = [p.detach().clone() for p in model.parameters()]
    kept += [s[k].clone() for s in optimizer.state_dict()["state"].values() for k in sorted(s)]
    return arriving, calls, kept


def compared(rank, world_size):
    found = {}
    for case in CASES:
        arriving, calls, kept = train(case, rank, True)
        _, ddp_calls, ddp = train(case, rank, False)
        assert all(each.isfinite().all() for each in ddp), case  # else nothing would be equal
        same = len(kept) == len(ddp) and all(map(torch.equal, kept, ddp))
        found[case] = (same, calls == ddp_calls and len(calls) > 0, arriving)
    return found


def test_it_is_ddp_bit_for_bit(two_ranks):
    first, second = values(two_ranks(compared))
    for case in CASES:
        for same, hooks_once, arriving in (first[case], second[case]):
            assert same, case
            assert hooks_once, case
            if case == "two backwards":  # the first step's second one is on its way already
                assert arriving == [7] * STEPS
            elif case != "unused":  # the first backward agrees on how gradients are reduced
                assert arriving == [0, *[7] * (STEPS - 1)], case
    assert first["unused"][2] == [0, 7, 0, 7, 7]
    assert second["unused"][2] == [0, 7, 0, 0, 7]


def others(rank, world_size):
    """An optimizer that was not given to `prepare`, one that is no longer early, and copies."""
    comm = CommConfig(bucket_mib=0.01, early_step=True)
    model, answers = Net(), []
    outside = nn.Parameter(torch.ones(3))
    first = torch.optim.SGD([*model.body.parameters(), outside], lr=0.1)
    second = torch.optim.SGD([model.embed.weight, *model.branch.parameters()], lr=0.1)
    wrapped, _ = magi_train.prepare(model, first, config=Config(tier="eager", comm=comm))
    for step in range(3):
        wrapped(batch(rank, step)).backward()
        outside.grad = torch.ones(3)
        if step == 2:
            answers.append(type(copy.deepcopy(first)) is torch.optim.SGD)
            answers.append(isinstance(model.head.weight.grad, Arriving))
            first.step()
            second.step()
        else:
            second.step()
            first.step()
        wrapped.zero_grad()
    answers.append(torch.allclose(outside, torch.full((3,), 0.7)))
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    params = first.param_groups[0]["params"]
    answers.append(list(map(id, params)) == [*map(id, model.body.parameters()), id(outside)])
    return answers, weights


def test_an_optimizer_that_prepare_did_not_get_waits(two_ranks):
    (answers, mine), (_, theirs) = values(two_ranks(others))
    assert answers == [True] * 4
    assert torch.equal(mine, theirs)


class Own(torch.optim.SGD):
    """Whose step may do anything."""

    def step(self, closure=None):
        """As SGD's."""
        return super().step(closure)


def reasons(rank, world_size):
    found = []
    for kind, module, more in (
        (torch.optim.SGD, nn.Linear(4, 4), {}),
        (Own, nn.Linear(4, 4), {}),
        (torch.optim.SGD, nn.BatchNorm1d(4), {}),
        (torch.optim.SGD, nn.Linear(4, 4), {"check_replicas": 3}),
    ):
        optimizer = kind(module.parameters(), lr=0.1)
        comm = CommConfig(early_step=True, **more)
        config = Config(tier="eager", comm=comm)
        wrapped, optimizer = magi_train.prepare(module, optimizer, config=config)
        rows = [r for r in magi_train.report(wrapped).rows if r.name == "early_step"]
        found.append(rows[-1].plan)
    return found


def test_what_is_not_early_has_a_reason(two_ranks):
    found, _ = values(two_ranks(reasons))
    assert found[0] == {"optimizer": "SGD", "early": True, "because": ""}
    for row, words in zip(
        found[1:], ("not known to update", "broadcast_buffers=False", "check_replicas"), strict=True
    ):
        assert not row["early"]
        assert words in row["because"]


def test_it_needs_the_optimizer():
    config = Config(comm=CommConfig(early_step=True))
    with pytest.raises(ValueError, match="early_step needs the optimizer"):
        magi_train.prepare(nn.Linear(2, 2), config=config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"shard_optimizer": True}, "shard_optimizer"),
        ({"tier": "graph"}, "tier='graph'"),
        ({"engine": "fsdp2"}, "early_step"),
        ({"engine": "deepspeed"}, "early_step"),
    ],
)
def test_what_it_does_not_go_with(config, words):
    with pytest.raises(ValueError, match=words):
        Config(comm=CommConfig(early_step=True), **config)


def test_it_does_not_go_with_an_outer_loop():
    with pytest.raises(ValueError, match="outer_steps"):
        Config(comm=CommConfig(early_step=True, outer_steps=4))


class Broken:
    """A bucket that never arrives."""

    def arrived(self):
        """Return True: it has ended."""
        return True

    def wait(self):
        """Raise."""
        raise RuntimeError("lost")


def test_a_gradient_that_is_lost_is_never_read():
    weight, garbage = nn.Parameter(torch.zeros(3)), torch.full((3,), 7.0)
    pending = Pending(lambda: None, lambda wait: wait())
    pending.add(Broken(), [(weight, garbage)])
    for _ in range(2):  # not at the second time of asking either
        with pytest.raises(RuntimeError, match="lost"):
            weight.grad.tolist()
    pending.drop()
    assert weight.grad is None


class Filling:
    """A bucket whose content comes when it is waited for."""

    def __init__(self, flat):
        self.flat = flat

    def arrived(self):
        """Return False: it has to be waited for."""
        return False

    def wait(self):
        """Fill."""
        self.flat.fill_(1.0)


def test_autograd_adds_to_what_has_arrived():
    weight, plain = nn.Parameter(torch.zeros(3)), torch.zeros(3)
    pending = Pending(lambda: None, lambda wait: wait())
    pending.add(Filling(plain), [(weight, plain)])
    (2 * weight).sum().backward()  # in C++, past __torch_function__
    assert weight.grad.tolist() == [3.0] * 3
    assert not pending.parameters()


def dies(rank, world_size):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    comm = CommConfig(bucket_mib=0.01, early_step=True)
    config = Config(tier="eager", comm=comm, timeout_seconds=30)
    wrapped, _ = magi_train.prepare(model, optimizer, config=config)
    for step in range(4):
        loss = wrapped(batch(rank, step))
        if (rank, step) == (1, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.full
def test_a_rank_that_dies_ends_the_step_of_the_other():
    outcomes = run_ranks(dies)
    assert outcomes[0].error.startswith("RemoteRankError")
    assert "bucket" in outcomes[0].error
