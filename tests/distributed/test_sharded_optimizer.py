"""Optimizer state sharded over ranks: numbers, gradients and checkpoints are the unsharded ones."""

import contextlib
import copy
import time

import pytest
import torch
from torch import nn

import magi_train
from magi_train import Config
from magi_train.core.world import World
from magi_train.memory import shard_plan
from magi_train.memory.sharded_optimizer import ELEMENTWISE, why_not_sharded
from tests.models import WIDTH, UnusedFrozenTied, tokens
from tests.ranks import run_ranks, values

EAGER = {"tier": "eager", "timeout_seconds": 20.0}
STEPS = 4


class Mixed(UnusedFrozenTied):
    """Parameters of every kind: unused, frozen, tied, permuted, with gaps, a number, none."""

    def __init__(self):
        super().__init__()
        self.a.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).t())
        self.b.weight = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH)[:, :WIDTH] / 8)
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.zeros(0))
        self.one = nn.Parameter(torch.ones(1))
        self.wide = nn.Parameter(torch.ones(70, dtype=torch.float64))

    def hidden(self, x):
        return super().hidden(x) * self.scale * self.one * self.wide.mean().float()


def two_groups(kind, **options):
    """Weight decay for matrices only, as everybody writes it."""

    def build(model):
        ps = [p for n, p in model.named_parameters() if n != "frozen.bias"]
        groups = [
            {"params": [p for p in ps if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in ps if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.02},
        ]
        return kind(groups, **{"lr": 0.01, **options})

    return build


BUILDERS = {
    "AdamW": two_groups(torch.optim.AdamW),
    "AMSGrad": two_groups(torch.optim.Adam, amsgrad=True),
    "fused AdamW": two_groups(torch.optim.AdamW, fused=True),
    "foreach SGD": two_groups(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True),
    "SGD without state": two_groups(torch.optim.SGD),
    "Adagrad": two_groups(torch.optim.Adagrad),
    "NAdam": two_groups(torch.optim.NAdam),
}


def pair(name, rank, model=Mixed, small_buckets=True):
    """Return (model, optimizer) twice: as it is, and sharded."""
    if small_buckets:  # several buckets, several rounds
        shard_plan.BUCKET_BYTES = 8192
    torch.manual_seed(0)
    plain = model().train()
    made = []
    for module, on in ((plain, False), (copy.deepcopy(plain), True)):
        config = Config(**EAGER, shard_optimizer=on)
        optimizer = BUILDERS[name](module)
        made.append(magi_train.prepare(module, optimizer, config=config))
    return made


def unequal(a, b, path=""):
    """Return the first place where two nested values are not bit for bit the same, or None."""
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return f"{path}: keys {list(a)} and {list(b)}"
        return next((w for k in a if (w := unequal(a[k], b[k], f"{path}.{k}"))), None)
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{path}: lengths {len(a)} and {len(b)}"
        return next((w for i, k in enumerate(a) if (w := unequal(k, b[i], f"{path}[{i}]"))), None)
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        return None if same and torch.equal(a, b) else f"{path}: {a} and {b}"
    return None if a == b else f"{path}: {a} and {b}"


def seen(model, optimizer, state=True):
    """Return all that a user can read; the optimizer's state only if asked for."""
    held = optimizer.state_dict() if state else {"state": {}}
    return {
        "weights": {n: p.detach() for n, p in model.named_parameters()},
        "gradients": model.__dict__["gradients"],
        "optimizer": {**held, "state": dict(sorted(held["state"].items()))},
    }


def state_bytes(optimizer):
    held = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    return sum(v.untyped_storage().nbytes() for v in held if v.dim() > 0)


def backward(model, rank, step, scale=None):
    loss = model(tokens(10 * step + rank), tokens(1))
    (loss if scale is None else scale.scale(loss)).backward()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.__dict__["gradients"] = gradients  # torch's step may write into .grad (foreach SGD does)


# What a step does to its model and optimizer; run on both of a pair


def clip_by_norm(model, optimizer, rank, step):
    backward(model, rank, step)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    optimizer.zero_grad()


def clip_by_value_and_keep_zeros(model, optimizer, rank, step):
    backward(model, rank, step)
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def accumulate_with_a_closure(model, optimizer, rank, step):
    def closure():
        optimizer.zero_grad()
        with model.no_sync():
            backward(model, rank, 2 * step)
        backward(model, rank, 2 * step + 1)
        return 3.0

    assert optimizer.step(closure) == 3.0


def freeze_and_thaw(model, optimizer, rank, step):
    """One parameter is frozen later; others are trained, or belong to a new group, later."""
    model.head.weight.requires_grad_(step < 2)
    model.frozen.weight.requires_grad_(step >= 1)
    if step == 2:
        optimizer.add_param_group({"params": [model.frozen.bias.requires_grad_()], "lr": 0.5})
    clip_by_norm(model, optimizer, rank, step)


def other_layouts(model, optimizer, rank, step):
    """A gradient with other strides, and a weight that is moved elsewhere."""
    backward(model, rank, step)
    w = model.a.weight
    w.grad = w.grad.contiguous()
    if step == 1:
        w.data = w.data.clone()
    optimizer.step()
    optimizer.zero_grad()


def schedule(model, optimizer, rank, step):
    if not hasattr(optimizer, "scheduler"):
        optimizer.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
        optimizer.register_step_post_hook(lambda o, *_: o.counted.append(len(o.param_groups)))
        optimizer.counted = []
    clip_by_norm(model, optimizer, rank, step)
    optimizer.scheduler.step()
    assert len(optimizer.counted) == step + 1, "hooks run once a step"


def scale_the_loss(model, optimizer, rank, step):
    if not hasattr(optimizer, "scaler"):
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    scaler = optimizer.scaler
    backward(model, rank, step, scaler)
    if step == 1 and rank == 0:
        model.a.bias.grad[0] = torch.inf
    if step == 1:
        torch.distributed.broadcast(model.a.bias.grad, 0)
    scaler.step(optimizer)
    scaler.update()


def compare(rank, world_size, name, work):
    """Return the first difference between sharded and not, and the state's bytes in both."""
    (plain, reference), (ours, optimizer) = pair(name, rank)
    assert type(optimizer) is not type(reference)
    for step in range(STEPS):
        for model, each in ((plain, reference), (ours, optimizer)):
            if work is scale_the_loss:
                each.zero_grad()
            work(model, each, rank, step)
        last = step == STEPS - 1
        different = unequal(seen(plain, reference, last), seen(ours, optimizer, last))
        if different:
            return f"step {step}{different[:600]}", 0, 0
    return None, state_bytes(optimizer), state_bytes(reference)


WORK = [
    ("AdamW", clip_by_norm),
    ("AMSGrad", clip_by_value_and_keep_zeros),
    ("foreach SGD", accumulate_with_a_closure),
    ("AdamW", freeze_and_thaw),
    ("Adagrad", freeze_and_thaw),
    ("AdamW", other_layouts),
    ("NAdam", schedule),
    ("AdamW", scale_the_loss),
    ("fused AdamW", scale_the_loss),
    ("SGD without state", clip_by_norm),
]


def compare_all(rank, world_size):
    return [compare(rank, world_size, name, work) for name, work in WORK]


@pytest.fixture(scope="module")
def compared(two_ranks):
    return values(two_ranks(compare_all))


@pytest.mark.parametrize("number", range(len(WORK)), ids=[f"{n}, {w.__name__}" for n, w in WORK])
def test_training_is_bit_for_bit_the_same(number, compared):
    for outcomes in compared:
        assert outcomes[number][0] is None
    mine, whole = (sum(o[number][k] for o in compared) for k in (1, 2))
    if WORK[number][0] != "SGD without state":
        assert 0 < mine < whole


@pytest.mark.full
def test_on_three_ranks():
    for outcomes in values(run_ranks(compare_all, world_size=3)):
        for different, _, _ in outcomes:
            assert different is None
