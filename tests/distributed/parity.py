"""Train the same model under DDP and under magi-train on the same ranks, and compare."""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import magi_train
from magi_train import Config
from tests.close import difference, relative_error
from tests.models import MODELS, loss_of

STEPS = 5


@dataclass
class Run:
    """Losses of all steps, gradients after the first, weights and buffers after the last."""

    losses: list[float]
    gradients: dict[str, torch.Tensor | None]
    state: dict[str, torch.Tensor]


def train(
    model: nn.Module, name: str, rank: int, bf16: bool, accumulate: int = 1, steps: int = STEPS
) -> Run:
    """Take `steps` steps; every rank and micro-batch has data of its own."""
    _, make_batch = MODELS[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses, gradients = [], {}
    for step in range(steps):
        for micro in range(accumulate):
            batch = make_batch(1000 * step + 10 * micro + rank)
            last = micro == accumulate - 1
            quiet = contextlib.nullcontext() if last else model.no_sync()
            with quiet, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(model(**batch)) / accumulate
                loss.backward()
            losses.append(float(loss))
        if step == 0:
            gradients = {n: None if p.grad is None else p.grad.clone() for n, p in _named(model)}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    plain = model.module if hasattr(model, "module") else model
    return Run(losses, gradients, {k: v.clone() for k, v in plain.state_dict().items()})


def _named(model: nn.Module) -> Any:
    return [(n.removeprefix("module."), p) for n, p in model.named_parameters()]


def compare(
    rank: int, world_size: int, name: str, config: Config, bf16: bool = False, accumulate: int = 1
) -> dict[str, Any]:
    """Return the largest differences between DDP and magi-train, and magi-train's report."""
    torch.manual_seed(0)
    model = MODELS[name][0]().train()
    twin, exact = copy.deepcopy(model), copy.deepcopy(model)
    want = train(
        DistributedDataParallel(model, find_unused_parameters=True), name, rank, bf16, accumulate
    )
    prepared = magi_train.prepare(twin, config=config)
    got = train(prepared, name, rank, bf16, accumulate)
    assert got.state.keys() == want.state.keys()
    buffers = {
        n for n, _ in twin.named_buffers()
    }  # DDP leaves those of other ranks one step behind
    compared = [n for n in want.state if rank == 0 or n not in buffers]
    report = magi_train.report(prepared)
    errors = None
    if bf16:  # both against DDP in fp32, where a bound on their difference would say nothing
        exact = DistributedDataParallel(exact, find_unused_parameters=True)
        fp32 = train(exact, name, rank, False, accumulate, steps=1).gradients
        errors = (relative_error(got.gradients, fp32), relative_error(want.gradients, fp32))
    return {
        "tier": report.tier,
        "reason": report.reason,
        "loss": max(
            abs(a - b) / max(abs(b), 1e-9) for a, b in zip(got.losses, want.losses, strict=True)
        ),
        "gradient": difference(got.gradients, want.gradients),
        "errors": errors,
        "state": difference(got.state, {n: want.state[n] for n in compared}),
        "buffers": {n: got.state[n] for n in buffers if n in got.state},
        "rows": [(row.name, row.plan) for row in report.rows],
        "notes": report.notes,
    }
