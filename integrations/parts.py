"""What peers of `magi bench` are made of: a training step in the making, and parts that change it.

A part is a decorated function, in peers.py or in any module that the benchmarked file imports:

    from magi_train.integrations.parts import Stage, Training, part

    @part("lion", Stage.EDIT, package="lion_pytorch")
    def lion(training: Training) -> None:
        '''Another optimizer.'''
        training.optimizer = lion_pytorch.Lion(training.module.parameters())

What it cannot do it refuses with a MagiError, which becomes its row.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass
class Training:
    """A training step in the making.

    Attributes:
        module: The user's, on the device; parts may change it in place.
        loss: loss(model, batch) is a scalar.
        optimizer: Over the module's parameters.
        blocks: Its repeated blocks.
        device: Where.
        autocast: What autocast computes in; None without.
        ranks: How many train together.
        model: What `loss` is called with: the module, or what a part wraps it with.
        loss_of: From a batch to its loss; None: `loss` with `model`.
        backward: From a loss to gradients.
        update: Takes the optimizer's step and zeroes the gradients; None: the optimizer's own.
    """

    module: nn.Module
    loss: Callable[[Any, Any], Tensor]
    optimizer: Optimizer
    blocks: list[nn.Module]
    device: torch.device
    autocast: torch.dtype | None
    ranks: int
    model: Any = field(init=False)
    loss_of: Callable[[Any], Tensor] | None = None
    backward: Callable[[Tensor], Any] = Tensor.backward
    update: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        self.model = self.module

    def step(self, batch: Any) -> Tensor:
        """Take a step; return its loss, detached."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = self.loss_of(batch) if self.loss_of else self.loss(self.model, batch)
        self.backward(loss)
        if self.update is not None:
            self.update()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


class Stage(enum.IntEnum):
    """When a part has its turn; of SPREAD there is at most one."""

    EDIT = 1
    BLOCKS = 2
    SPREAD = 3
    WHOLE = 4


@dataclass(frozen=True)
class Part:
    """An entry of the registry.

    Attributes:
        name: In the names of peers.
        stage: When it has its turn.
        apply: Changes a Training; takes the text behind ":" where `takes` says what that is.
        package: What must be importable, "" for nothing.
        gpu: Whether it needs a GPU.
        ranks: How many it needs at least.
        takes: What may follow the name and ":", "" for nothing.
    """

    name: str
    stage: Stage
    apply: Callable[..., None]
    package: str = ""
    gpu: bool = False
    ranks: int = 1
    takes: str = ""

    @property
    def what(self) -> str:
        """Return what it does, in a line."""
        return (self.apply.__doc__ or "").partition("\n")[0].rstrip(".")


PARTS: dict[str, Part] = {}


def part(name: str, stage: Stage, **needs: Any) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator that registers a part; `needs` are the further fields of Part."""

    def register(apply: Callable[..., None]) -> Callable[..., None]:
        PARTS[name] = Part(name, stage, apply, **needs)
        return apply

    return register
