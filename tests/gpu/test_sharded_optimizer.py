"""Optimizer state sharded over two GPUs, beside the unsharded kernel and torch. Needs both."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import magi_train
from magi_train import Config, FusionConfig
from magi_train.memory import shard_plan
from tests.close import difference
from tests.models import MODELS, llama

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

DEVICE = "cuda"
STEPS = 4
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 96}


def _two(rank, fn, out, args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29537")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2, device_id=torch.device("cuda", rank))
    out[rank] = fn(rank, *args)
    dist.barrier(device_ids=[rank])
    dist.destroy_process_group()


def on_two_gpus(fn, *args):
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(_two, args=(fn, out, args), nprocs=2)
        return [out[0], out[1]]


class Weights(nn.Module):
    """Parameters of awkward sizes; the last spans several rounds of a bucket."""

    def __init__(self):
        super().__init__()
        sizes = [(1,), (7, 3), (1024,), (512, 1030), (0,), (), (8192 * 3 + 5,), (1031, 515)]
        self.kept = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in sizes)
        self.kept[3] = nn.Parameter(self.kept[3].detach().t())


def same_gradients(parameters, step, scale):
    g = torch.Generator().manual_seed(step)
    for i, p in enumerate(parameters):
        # strides as the parameter's: torch's fused step reads a gradient as if it had them
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g) * scale)
        if i == 0 and step == 1:
            p.grad = None


def on_cpu(value):
    if isinstance(value, dict):
        return {k: on_cpu(v) for k, v in value.items()}
    return value.cpu() if isinstance(value, torch.Tensor) else value


def unequal(got, want, path=""):
    """Return where two nested dicts are not bit for bit the same."""
    if isinstance(want, dict):
        if got.keys() != want.keys():
            return [f"{path}: {list(got)} and {list(want)}"]
        return [w for k in want for w in unequal(got[k], want[k], f"{path}.{k}")]
    same = torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want
    return [] if same else [path]


def steps(rank, on, kind, options, kernel):
    """Give the same gradients to all; return weights, state, shadows that are wrong, bytes."""
    torch.manual_seed(0)
    model = Weights().to(DEVICE)
    config = Config(tier="eager", fusion=FusionConfig(optimizer=kernel), shard_optimizer=on)
    model, optimizer = magi_train.prepare(
        model, kind(model.parameters(), lr=0.01, **options), config=config
    )
    parameters, shadows = list(model.parameters()), model._magi_runtime.shadows
    if kernel and shadows.allocate(torch.bfloat16):
        shadows.use(parameters)
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    for step in range(STEPS):
        scale = 8.0 if options.get("fused") else 1.0
        same_gradients(parameters, step, scale)
        if options.get("fused"):
            optimizer.grad_scale = torch.tensor(scale, device=DEVICE)
            optimizer.found_inf = torch.tensor(float(step == 2), device=DEVICE)
        optimizer.step()
    wrong = [
        i
        for i, p in enumerate(parameters)
        if (s := shadows.of(p)) is not None and not torch.equal(s, p.bfloat16())
    ]
    shadowed = sum(shadows.of(p) is not None for p in parameters)
    gradients = {i: p.grad.cpu() for i, p in enumerate(parameters) if p.grad is not None}
    for p in parameters:  # the memory that is measured shall hold none
        p.grad = None
    used = torch.cuda.memory_allocated() - before if DEVICE == "cuda" else 0
    found = {
        "weights": {i: p.detach() for i, p in enumerate(parameters)},
        "gradients": gradients,
        "state": optimizer.state_dict()["state"],
    }
    return on_cpu(found), wrong, shadowed, used


def all_ways(rank, kind, options):
    """Return for a kernel of ours or torch's, and for one bucket or many, what `steps` found."""
    found = {}
    for kernel, small in itertools.product((True, False), repeat=2):
        shard_plan.BUCKET_BYTES = 2**18 if small else 2**27
        want, _, shadowed, whole = steps(rank, False, kind, options, kernel)
        got, wrong, _, part = steps(rank, True, kind, options, kernel)
        found[kernel, small] = unequal(got, want), wrong, shadowed, part, whole
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": False}),
    ],
    ids=["AdamW", "fused AMSGrad", "SGD"],
)
def test_steps_equal_unsharded_ones(kind, options):
    for ways in on_two_gpus(all_ways, kind, options):
        for (kernel, small), (different, wrong, shadowed, part, whole) in ways.items():
            assert different == [], (kernel, small)
            assert wrong == [], "a shadow is not its rounded weight"
            assert (shadowed > 4) is kernel
            assert 0 < part < 0.6 * whole


def train(rank, on, steps):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = llama(**SIZES).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = Config(tier="graph", shard_optimizer=on)
    prepared, optimizer = magi_train.prepare(model, optimizer, config=config)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    losses = []
    for step in range(steps):
        batch = {k: v.to(DEVICE) for k, v in MODELS["llama"][1](2 * step + rank).items()}
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = prepared(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    held = [v for s in optimizer.state.values() for v in s.values() if v.dim() > 0]
    weights = {n: p.detach().cpu() for n, p in model.named_parameters()}
    rows = {row.name: row.plan for row in magi_train.report(prepared).rows}
    return losses, weights, sum(v.untyped_storage().nbytes() for v in held), rows


def train_both(rank):
    want, weights, whole, _ = train(rank, False, 12)
    got, sharded, part, rows = train(rank, True, 12)
    return got, want, difference(sharded, weights), part / whole, rows


def test_training_under_autocast_with_shadows():
    for got, want, apart, part, rows in on_two_gpus(train_both):
        assert rows["use_weight_shadows"]["casts"] >= 7
        assert rows["sharded_optimizer"]["kept_whole"] == []
        assert part == pytest.approx(0.5, rel=0.01)
        assert got == pytest.approx(want, rel=1e-3)
        assert apart <= 1e-3


def without_waiting(rank):
    model = Weights().to(DEVICE)
    config = Config(tier="eager", shard_optimizer=True)
    model, optimizer = magi_train.prepare(
        model, torch.optim.AdamW(model.parameters()), config=config
    )
    parameters = list(model.parameters())
    for step in range(2):
        same_gradients(parameters, step, 1.0)
        optimizer.step()
    same_gradients(parameters, 2, 1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def test_no_step_waits_for_the_device():
    assert on_two_gpus(without_waiting) == [True, True]
