"""What a training step holds besides the activations, and whether the plan was right.

Resident, all the time: parameters, buffers, the state of the optimizers (predicted from their class
until it exists), bf16 shadows of the weights, buckets on their way, the batch, the workspace of
cuBLAS; on a CUDA device also everything else that is allocated when the first step begins. Ranks
take the largest sum of all, so equal graphs are cut equally. Gradients belong to the backward, and
are there, whole, during the optimizer's step, with its temporaries.

From the second step on the real peak is compared with the plan, by the same figures on all ranks. A
step ends with a step of an optimizer: before the first one its state is not there. If the peak is
beyond, what was found is added to the resident bytes, and the step is planned anew, once. So it is
if the peak is so far below that a faster plan may fit; as plans err by different amounts, that one
is watched like the first. For this the peak statistics of the device are reset at the second step
under a plan. They are read when an optimizer's step ends, and again when the next step begins:
training code may reset them in between.
"""

import dataclasses
import logging
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from magi_train.core import compat
from magi_train.core.errors import MagiError
from magi_train.core.hardware import (
    Speed,
    cublas_bytes,
    device_memory_bytes,
    host_room_bytes,
    measured_link,
    speed_of,
)
from magi_train.core.report import Report
from magi_train.core.world import World
from magi_train.memory.sharded_optimizer import is_sharded

logger = logging.getLogger(__name__)

_bytes = compat.bytes_of

GIB, MIB = 2**30, 2**20
MARGIN_SHARE, MARGIN_BYTES = 0.04, GIB
""""auto" leaves this much of a device's memory: its context, NCCL, fragmentation [estimated]."""
STEPS_WATCHED, STEPS_UNTIL_WASTE = 10, 5
"""How long a peak beyond the budget is looked for; after how many one is judged as too low."""
TOLERANCE = 0.03
"""A peak so far below the plan is a reason to plan anew."""
QUANTUM = 512
"""Resident bytes are rounded up to this part of the budget, so that caches find the same plan."""


@dataclass(frozen=True)
class Limit:
    """A budget, and what of it is taken before any activation.

    Attributes:
        budget_bytes: For the whole step.
        resident: {what: bytes}.
        gradient_bytes: Of all parameters.
        update_bytes: Temporaries of the optimizer's step.
        device_type: Where it runs.
        speed: Of that device.
        fused: Whether generated code runs the graphs.
        blocks: How often the captured graph runs in a forward.
        strict: Whether a budget that cannot be kept is an error; else the least is taken.
        survey: Whether the plan shall say what each other budget would give.
        room_bytes: Of the host, for activations that wait there; 0: none do.
        two_variants: Whether some blocks may follow another plan than the others.
    """

    budget_bytes: int
    resident: dict[str, int]
    gradient_bytes: int
    update_bytes: int
    device_type: str
    speed: Speed
    fused: bool
    blocks: int = 1
    strict: bool = True
    survey: bool = False
    room_bytes: int = 0
    two_variants: bool = False

    @property
    def resident_bytes(self) -> int:
        """Everything that is there all the time."""
        return sum(self.resident.values())

    def step_bytes(self, *runs: tuple[int, int, int]) -> int:
        """Return the peak of the step.

        Args:
            runs: Of equal blocks, in the order of the forward: how many, the peak of one and its
                backward, and what its forward leaves until that backward.
        """
        most = self.gradient_bytes + self.update_bytes
        before = waiting = 0
        for count, peak, left in runs:
            for i in (0, count - 1):  # in between, one grows as steadily as the other falls
                behind = self.blocks - before - i - 1
                gradients = behind * self.gradient_bytes // self.blocks
                most = max(most, peak + waiting + i * left + gradients)
            before, waiting = before + count, waiting + count * left
        return self.resident_bytes + most


class StepMemory:
    """The memory budget of one model, and what is known about its step.

    Args:
        module: The model.
        budget_gib: GiB, or "auto".
        device_type: Where it lies.
        world: The ranks that train it.
        timeout_seconds: How long they wait for each other.
        report: Gets measured peaks and what follows from them.
        offload: Whether activations may wait on the host.

    Attributes:
        limits: Whether the step has to keep to the budget.

    Raises:
        ValueError: "auto" without a CUDA device.
    """

    limits = True

    def __init__(
        self,
        module: nn.Module,
        budget_gib: float | Literal["auto"],
        device_type: str,
        world: World,
        timeout_seconds: float,
        report: Report,
        *,
        offload: bool = False,
    ) -> None:
        self.budget_bytes = _budget(budget_gib, device_type)
        self._module, self._device_type = weakref.ref(module), device_type
        self._on_cuda = device_type == "cuda"
        self._world, self._timeout, self._report = world, timeout_seconds, report
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._offload, self._speed, self._room = offload, speed_of(device_type), 0
        self._resident: dict[str, int] | None = None
        self._planned_bytes = 0
        self._told = False
        self._bounded = False
        self._correction = 0
        self._plans, self._calls, self._done = 1, 0, False
        self._stepped = False
        self._peak: int | None = None
        self._hooks: list[RemovableHandle] = []

    def know(self, optimizers: Iterable[Optimizer]) -> None:
        """Take note of the optimizers of the model, all of them; those before are forgotten."""
        for hook in self._hooks:
            hook.remove()
        mine = weakref.ref(self)

        def stepped(*_: Any) -> None:
            memory = mine()
            if memory is not None:
                memory._stepped = True
                memory._look_at_peak()

        every = list(optimizers)
        self._optimizers = [weakref.ref(each) for each in every]
        self._hooks = [each.register_step_post_hook(stepped) for each in every]

    def begin(self, batch: Any, shadow_bytes: int, bucket_bytes: int) -> None:
        """Look at what is there when the first step begins; all ranks take the largest sum.

        Args:
            batch: Arguments of the captured function.
            shadow_bytes: Of the weights' shadows that exist.
            bucket_bytes: That communication will need besides the gradients.
        """
        if self._resident is not None:
            return
        module = self._module()
        assert module is not None, "a model is alive while its step runs"
        parameters = list(module.parameters())
        present = self._state_tensors()
        gradients = [p.grad for p in parameters if p.grad is not None]
        leaves = [x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)]
        leaves = [x for x in leaves if x.device.type == self._device_type]
        held = {
            "parameters": _bytes(parameters),
            "buffers": _bytes(module.buffers()),
            "optimizer": max(_bytes(present), self._state_bytes(parameters)),
            "batch": _bytes(leaves),
            "buckets": bucket_bytes,
        }
        known = _bytes([*parameters, *module.buffers(), *present, *gradients, *leaves])
        held |= self._device_bytes(known + shadow_bytes)
        most = max(self._gather("resident bytes", sum(held.values())))
        held["other"] = held.get("other", 0) + most - sum(held.values())
        self._resident = {name: size for name, size in held.items() if size}
        if self._offload:
            self._meet_host()

    def _meet_host(self) -> None:
        """Find out how fast the host's memory is reached, and how much of it there is."""
        expected = self._speed.host
        if not expected:
            self._report.note(
                f"no activation waits on the host: a {self._device_type!r} device has no engine "
                "that copies beside its kernels"
            )
            return
        link = measured_link(expected) if self._device_type == "cuda" else expected
        mine = [link, host_room_bytes(self._world.size)]
        answers = self._world.gather("memory: host", mine, self._timeout)
        slowest, self._room = (min(each) for each in zip(*answers, strict=True))
        self._speed = dataclasses.replace(self._speed, host=slowest)

    def limit(self, *, shadow_bytes: int, fused: bool, blocks: int) -> Limit:
        """Return what a graph that is about to be lowered has to keep to.

        Args:
            shadow_bytes: Of the weights' shadows.
            fused: Whether generated code will run it.
            blocks: How often it runs in a forward.

        Raises:
            MagiError: What is there besides activations is more than the budget.
        """
        module, resident = self._module(), dict(self._resident or {})
        assert module is not None, "a model is alive while it is compiled"
        trained = [p for p in module.parameters() if p.requires_grad]
        resident |= {"shadows": shadow_bytes} if shadow_bytes else {}
        resident |= {"correction": self._correction} if self._correction else {}
        part = max(1, self.budget_bytes // QUANTUM)
        resident["rounding"] = -sum(resident.values()) % part
        limit = Limit(
            self.budget_bytes,
            resident,
            _bytes(trained),
            self._update_bytes(trained),
            self._device_type,
            self._speed,
            fused,
            blocks,
            strict=self._plans == 1,
            room_bytes=self._room // blocks,
        )
        least = limit.step_bytes((blocks, 0, 0))
        if limit.strict and least > limit.budget_bytes:
            raise MagiError(
                f"Config.memory_budget_gib is {self.budget_bytes / GIB:.6g}, but without a single "
                f"activation a step takes {least / GIB:.6g} GiB: {shares(limit)}; give a larger "
                "budget, or train fewer parameters, or in a smaller dtype"
            )
        return limit

    @property
    def planned_bytes(self) -> int:
        """The planned peak of the step; 0 before there is a plan."""
        return self._planned_bytes

    def planned(self, planned_gib: float, bounded: bool) -> None:
        """Take note of a graph's predicted peak, and whether something is recomputed for it."""
        self._planned_bytes = max(self._planned_bytes, int(planned_gib * GIB))
        self._bounded |= bounded
        if self._plans > 1 and self._planned_bytes > self.budget_bytes and not self._told:
            self._told = True
            warning = (
                f"Config.memory_budget_gib is {self.budget_bytes / GIB:.6g}, and is not kept: with "
                f"what the first plan could not know, {self._correction / GIB:.4g} GiB, a step "
                f"takes at least {planned_gib:.6g} GiB. Training goes on; give a budget of as "
                "much, or a smaller batch or sequence"
            )
            self._report.note(warning)
            logger.warning("magi-train: %s", warning)

    def plan_anew(self) -> bool:
        """Return whether the step that begins has to be planned anew; call it in every forward."""
        if self._done or (self._alive() and not self._stepped):
            return False
        self._stepped = False
        self._calls += 1
        if self._calls == 1:
            start_measuring()
            self._peak = None
            return False
        self._look_at_peak()
        self._done = self._calls >= STEPS_WATCHED
        mine = self._peak
        if mine is None:
            self._done = True
            return False
        question = f"memory: peak {self._plans}.{self._calls}"
        answer = (mine, self._planned_bytes, self._bounded)
        peaks, plans, bounded = zip(
            *self._world.gather(question, answer, self._timeout), strict=True
        )
        peak, planned = max(peaks), max(plans)
        self._report.measured["step_peak_gib"] = peak / GIB
        if not min(plans):  # from a cache that lost it, on some rank
            return False
        beyond = peak > self.budget_bytes
        below = any(bounded) and peak < planned * (1 - TOLERANCE)
        wasteful = below and self._plans == 1 and self._calls == STEPS_UNTIL_WASTE
        if not beyond and not wasteful:
            return False
        self._done = beyond
        self._plans, self._calls, self._bounded = self._plans + 1, 0, False
        self._correction, self._planned_bytes = self._correction + peak - planned, 0
        self._report.note(
            f"the step was planned anew: its peak was {peak / GIB:.3f} GiB, the plan "
            f"{planned / GIB:.3f} GiB"
        )
        return True

    def _look_at_peak(self) -> None:
        """Take note of the peak so far; after it, training code may reset the statistics."""
        peak = None if self._done else measured_peak()
        if peak is not None:
            self._peak = max(peak, self._peak or 0)

    def _device_bytes(self, known_bytes: int) -> dict[str, int]:
        """Return what libraries and others hold on the device, beside what is known."""
        if self._device_type != "cuda":
            return {}
        others = max(0, torch.cuda.memory_allocated() - known_bytes)
        return {"workspace": cublas_bytes(torch.cuda.get_device_capability()), "other": others}

    def _gather(self, question: str, answer: int) -> list[int]:
        return self._world.gather(f"memory: {question}", answer, self._timeout)

    def _alive(self) -> list[Optimizer]:
        return [o for ref in self._optimizers if (o := ref()) is not None]

    def _state_tensors(self) -> list[torch.Tensor]:
        found = [pytree.tree_leaves(list(o.state.values())) for o in self._alive()]
        mine = [x for leaves in found for x in leaves if isinstance(x, torch.Tensor)]
        return [x for x in mine if x.device.type == self._device_type]

    def _state_bytes(self, parameters: Sequence[nn.Parameter]) -> int:
        """Return the bytes of the optimizers' state once it exists."""
        groups = [(o, group) for o in self._alive() for group in o.param_groups]
        if not groups:
            self._report.note(
                "no optimizer was given: the memory plan assumes two numbers a parameter"
            )
            return 2 * _bytes(p for p in parameters if p.requires_grad)
        whole = [(o, state_copies(o, g) * _bytes(p for p in g["params"])) for o, g in groups]
        return sum(-(-size // self._holders(o)) for o, size in whole)

    def _holders(self, optimizer: Optimizer) -> int:
        """Return how many ranks share the state of an optimizer."""
        return self._world.size if is_sharded(optimizer) else 1

    def is_taken(self, optimizer: Optimizer) -> bool:
        """Return whether one kernel of ours takes an optimizer's steps, without temporaries."""
        return hasattr(optimizer, "_magi_step")

    def _update_bytes(self, parameters: Sequence[nn.Parameter]) -> int:
        """Return the temporaries of the optimizers' step: for-each forms copy what they update."""
        total = 0
        for optimizer in self._alive():
            for group in optimizer.param_groups:
                each = [p for p in group["params"] if p.requires_grad]
                whole = group.get("foreach") is not False and self._on_cuda
                if not group.get("fused") and not self.is_taken(optimizer) and each:
                    total += _bytes(each) if whole else max(_bytes([p]) for p in each)
        return total


def state_copies(optimizer: Optimizer, group: dict[str, Any]) -> int:
    """Return how many tensors of a parameter's size an optimizer keeps for it."""
    if compat.steps_like(type(optimizer), torch.optim.Adam):
        return 3 if group.get("amsgrad") else 2
    if compat.steps_like(type(optimizer), torch.optim.SGD):
        return 1 if group.get("momentum") else 0
    return 2


def _budget(budget_gib: float | Literal["auto"], device_type: str) -> int:
    if budget_gib != "auto":
        return int(budget_gib * GIB)
    if device_type != "cuda":
        raise ValueError(
            "Config.memory_budget_gib is 'auto', which is the memory of a CUDA device, but the "
            f"model lies on {device_type!r}; name a number of GiB, or None for no limit"
        )
    return usable_bytes(device_memory_bytes())


def usable_bytes(device_bytes: int) -> int:
    """Return what "auto" lets a step take of a device's memory."""
    return int(device_bytes * (1 - MARGIN_SHARE)) - MARGIN_BYTES


def shares(limit: Limit) -> str:
    """Return what a step holds besides activations, the largest first."""
    parts = {**limit.resident, "gradients": limit.gradient_bytes, "update": limit.update_bytes}
    by_size = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {size / GIB:.3g}" for name, size in by_size if size)


def start_measuring() -> None:
    """Forget the peak of the device so far."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def measured_peak() -> int | None:
    """Return the peak of what was allocated on the device; None without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
