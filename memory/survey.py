"""Survey: the memory of a step on a GPU that is not there, from a capture on fake tensors.

The tensors lie on the CPU and have no data; what they stand for lies on the GPU that the step is
planned for. So the graphs and the passes are those of a CPU capture, and the rest is put in its
place: the GPU's speed and workspaces, our kernel in the optimizer's step, the state of the
optimizer divided by ranks that are not there. Nothing is limited: the plan lists every budget.
"""

import dataclasses
import sys
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from magi_train.core import compat
from magi_train.core.hardware import HOST, Gpu, cublas_bytes
from magi_train.core.report import Report
from magi_train.core.world import World
from magi_train.memory.sharded_optimizer import why_not_sharded
from magi_train.memory.step import Limit, StepMemory

UNLIMITED_GIB = 2.0**24


class SurveyMemory(StepMemory):
    """What a step of one model holds on a GPU, by a model and a batch of fake tensors on the CPU.

    Args:
        module: The model.
        gpu: What to plan for; None: for this host's CPU.
        ranks: That train together, each with a batch like this one.
        sharded: Whether they divide the optimizer's state, where it can be divided.
        taken: Whether a kernel of ours takes the steps of the optimizers that it knows.
        buffer_bytes: That communication between these ranks needs.
        limits: Whether the passes are those of a step with a budget.
        offload: Whether activations may wait on the host, which has as much memory as they need.
        report: Gets notes.
    """

    def __init__(
        self,
        module: nn.Module,
        gpu: Gpu | None,
        *,
        ranks: int,
        sharded: bool,
        taken: bool,
        buffer_bytes: int,
        limits: bool,
        offload: bool,
        report: Report,
    ) -> None:
        super().__init__(module, UNLIMITED_GIB, "cpu", World(), 0.0, report)
        self.gpu, self._on_cuda = gpu, gpu is not None
        self._ranks, self._sharded, self._taken = ranks, sharded, taken
        self._buffer_bytes = buffer_bytes
        self._speed = gpu.speed if gpu else HOST
        self._room = sys.maxsize if offload and self._speed.host else 0
        self.limits = limits

    def begin(self, batch: Any, shadow_bytes: int, bucket_bytes: int) -> None:
        """See StepMemory.begin; communication is that of the ranks that are planned for."""
        super().begin(batch, shadow_bytes, self._buffer_bytes)

    def limit(self, *, shadow_bytes: int, fused: bool, blocks: int) -> Limit:
        """See StepMemory.limit; without rounding, and with a survey."""
        limit = super().limit(shadow_bytes=shadow_bytes, fused=fused, blocks=blocks)
        held = {name: size for name, size in limit.resident.items() if name != "rounding"}
        return dataclasses.replace(
            limit,
            resident=held,
            device_type="cuda" if self.gpu else "cpu",
            survey=True,
        )

    def _device_bytes(self, known_bytes: int) -> dict[str, int]:
        return {"workspace": cublas_bytes(self.gpu.capability)} if self.gpu else {}

    def _holders(self, optimizer: Optimizer) -> int:
        return self._ranks if self._sharded and not why_not_sharded(optimizer) else 1

    def is_taken(self, optimizer: Optimizer) -> bool:
        """See StepMemory.is_taken; by the optimizer's class alone."""
        known = (torch.optim.Adam, torch.optim.SGD)
        return self._taken and any(compat.steps_like(type(optimizer), k) for k in known)
