"""What `magi bench` starts on each rank: one peer, measured; or the FLOPs of the step, counted.

Usage: python -m magi_train.integrations.bench_rank SPEC.json PEER

A rank writes `row_RANK.json` into the spec's folder and ends at once, whatever threads of its
libraries still run. One that fails leaves a traceback and a status; the rest is ranks.py's.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from magi_train.comm.shard_blocks import blocks_to_shard
from magi_train.core import compat
from magi_train.core.world import join_from_environment
from magi_train.fits import built
from magi_train.fits_command import load_build
from magi_train.integrations import figures, peers
from magi_train.integrations.cases import case_of
from magi_train.integrations.parts import Training

FLOPS = "count-flops"
"""In place of a peer's name."""
WITHOUT_SYNC = 3
"""Steps of warm-up without communication."""
BATCHES = 4
"""That a case draws; steps take turns with them."""
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Spec:
    """What is to be measured.

    Attributes:
        what: Name of a case, or `path/to/script.py:function`, `package.module:function`.
        is_case: Which of the two.
        ranks: How many train together.
        steps: Steps that are waited for, and again as many back to back.
        warm_up: Steps before.
        autocast: Name of a dtype, or "none".
        kernels: Whether the longest kernels are listed (one GPU).
        memory_gib: Of a GPU that a rank may take; None for all of it.
        folder: Where rows go.
    """

    what: str
    is_case: bool
    ranks: int = 1
    steps: int = 20
    warm_up: int = 20
    autocast: str = "none"
    kernels: bool = False
    memory_gib: float | None = None
    folder: str = "."

    @property
    def dtype(self) -> torch.dtype | None:
        """Return what autocast computes in."""
        return None if self.autocast == "none" else getattr(torch, self.autocast)


@dataclass(frozen=True)
class Task:
    """A case, or what a build() returned.

    Attributes:
        module: In training mode.
        batches: This rank's, on the host.
        loss: loss(module, batch) is a scalar.
        optimizer: Over the module's parameters.
        samples: Of `unit` in one batch.
        unit: "tokens", "images" or "rows".
        blocks: Repeated blocks of the module.
    """

    module: nn.Module
    batches: list[Any]
    loss: Callable[[Any, Any], Tensor]
    optimizer: Optimizer
    samples: int
    unit: str
    blocks: list[nn.Module]


def load(spec: Spec, device: torch.device, rank: int) -> Task:
    """Make what is trained; the same weights on every rank.

    Args:
        spec: Says what.
        device: Where the module goes. A case is made there, which is faster.
        rank: Cases draw other batches on each.

    Raises:
        MagiError: There is no such case or function, or it returns something else.
    """
    torch.manual_seed(0)
    if not spec.is_case:
        module, batch, loss, optimizer = built(load_build(spec.what))
        samples, unit = _counted(batch)
        blocks = blocks_to_shard(module)
        return Task(_at(module, device), [batch], loss, optimizer, samples, unit, blocks)
    case = case_of(spec.what)
    with device:
        module = case.build().train()
    generator = torch.Generator().manual_seed(100 + rank)
    return Task(
        _at(module, device),  # some libraries make buffers on the host
        [case.batch(generator) for _ in range(BATCHES)],
        case.loss,
        torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, fused=True),
        case.samples,
        case.unit,
        case.repeated(module) or blocks_to_shard(module),
    )


def _at(module: nn.Module, device: torch.device) -> nn.Module:
    """Return the module on a device; tensors without data cannot be moved, not even nowhere."""
    return module if device.type == "cpu" else module.to(device)


def _counted(batch: Any) -> tuple[int, str]:
    """Return how much is in a batch, and of what: tokens if its first tensor is a table of numbers.

    That is: of whole numbers, with rows and columns.
    """
    leaf = next(t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor))
    if leaf.dim() == 2 and not leaf.is_floating_point():
        return leaf.numel(), "tokens"
    return (leaf.shape[0] if leaf.dim() else 1), "rows"


def count(spec: Spec) -> dict[str, Any]:
    """Return the FLOPs of a step on one rank, without a device and without arithmetic."""
    host = torch.device("cpu")
    task = None
    with contextlib.suppress(Exception), compat.without_data():
        task = load(spec, host, 0)
    # timm's models, for one, look at values while they are built: those are built for real
    task = task or load(spec, host, 0)
    with compat.without_data():
        flops = figures.model_flops(task.module, task.loss, task.batches[0])
    return {"model_flops": flops, "samples": task.samples, "unit": task.unit}


def work(spec: Spec, peer: str) -> dict[str, Any]:
    """Measure one peer on this rank.

    Raises:
        MagiError: The peer refuses.
    """
    from magi_train import report, to_device

    world = join_from_environment()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if spec.memory_gib is not None:
            share = spec.memory_gib * 2**30 / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(share, device)
    task = load(spec, device, world.rank)
    batches = [to_device(batch, device) for batch in task.batches]  # ours looks at it on the host
    began = time.perf_counter()
    training = Training(
        task.module, task.loss, task.optimizer, task.blocks, device, spec.dtype, world.size
    )
    peers.apply(peer, training)

    def step(number: int) -> Tensor:
        return training.step(batches[number % len(batches)])

    found = figures.measure(step, device, spec.warm_up, spec.steps, began)
    found["samples_per_second_per_gpu"] = task.samples / found["back_to_back_ms"] * 1e3
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        if world.size > 1:
            found |= figures.communication(step)
        elif spec.kernels:
            found |= figures.kernels(step)
    ours = peers.is_ours(peer)
    if world.size > 1 and (ours or isinstance(training.model, DistributedDataParallel)):
        with training.model.no_sync():  # the last figure: weights of ranks differ from here on
            for number in range(WITHOUT_SYNC):
                step(number)
            _, seconds, _ = figures.back_to_back(step, device, 0, spec.steps)
        found["without_sync_ms"] = seconds * 1e3
    if ours:
        found["report"] = str(report(training.model)).splitlines()
    figures.wait(device)
    return found


def main() -> None:
    """Write this rank's row, and end."""
    path, peer = sys.argv[1:]
    spec, status = Spec(**json.loads(Path(path).read_text())), 0
    try:
        found = count(spec) if peer == FLOPS else work(spec, peer)
        rank = os.environ.get("RANK", "0")
        (Path(spec.folder) / f"row_{rank}.json").write_text(json.dumps(found))
    except BaseException:  # noqa: BLE001  it is the row's text
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
