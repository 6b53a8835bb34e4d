"""Let a script train as a peer of magi does: its module is edited and compiled, nothing is spread.

What `magi bench --mine --peers` starts beside the script as it is. The script's own loop, optimizer
and DistributedDataParallel stay. The first call of the module runs before it is compiled: PyTorch
looks the compiled call up before its hooks see the call.
"""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from magi_train.comm.shard_blocks import blocks_to_shard
from magi_train.core.errors import MagiError
from magi_train.integrations.owner import Owner
from magi_train.integrations.parts import Stage, Training
from magi_train.integrations.peers import parse

COMPILE = "compile"


def check_for_scripts(peer: str) -> None:
    """Raise unless a peer only edits and compiles a module.

    Raises:
        MagiError: Names what it does besides.
    """
    for each, _ in parse(peer):
        if each.stage == Stage.SPREAD or (each.stage == Stage.WHOLE and each.name != COMPILE):
            raise MagiError(
                f"{each.name} is no peer for --mine, where the script spreads its module and "
                "calls its loss itself; benchmark the module: magi bench script.py:build"
            )


class ScriptPeer:
    """Makes the script's module that of a peer, when it is called for the first time.

    Attributes:
        applied: Whether there was such a module.
    """

    def __init__(self, peer: str) -> None:
        self.peer, self.applied = peer, False
        self._owner = Owner(self._found)

    def _found(self, module: nn.Module, optimizers: list[Optimizer]) -> None:
        self._owner.remove()
        self.applied = True
        edit(self.peer, module, optimizers[0])


def edit(peer: str, module: nn.Module, optimizer: Optimizer) -> None:
    """Apply a peer's parts to a module that trains already.

    Raises:
        MagiError: A part refuses, or needs another optimizer than the script's.
    """
    inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    device = next(inner.parameters()).device
    blocks = blocks_to_shard(inner)
    training = Training(inner, _no_loss, optimizer, blocks, device, autocast=None, ranks=1)
    for each, _ in parse(peer):
        if each.name == COMPILE:
            module.compile()
        else:
            each.apply(training)
    if training.optimizer is not optimizer or training.model is not inner:
        raise MagiError(f"{peer} replaces the optimizer or the module, which are the script's")


def _no_loss(model: Any, batch: Any) -> Tensor:
    raise MagiError("the script calls its loss itself")
