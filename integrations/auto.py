"""Let a script that knows nothing of us train through us: whatever it trains with is stood in for.

Four ways, and the script takes one by what it does: a DistributedDataParallel becomes
`magi_train.DataParallel`; a Lightning Trainer with strategy "auto" or "ddp" gets "magi"; a Trainer
of transformers or an Accelerator gets `attach`; and in a plain loop of one process, the first
module that is called to train and holds all of an optimizer's parameters has its `forward`
captured. Its first call runs as it is: PyTorch looks `forward` up before the hook sees the call.
"""

import functools
import os
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from magi_train.api import DataParallel, PreparedModule
from magi_train.capture import Region
from magi_train.core.config import Config
from magi_train.core.errors import MagiError
from magi_train.integrations import _autoload
from magi_train.integrations.bootstrap import replace_ddp
from magi_train.integrations.huggingface import CapturedForward, attach
from magi_train.integrations.on_import import when_imported
from magi_train.integrations.owner import Owner, before_init
from magi_train.runtime import Runtime

LIGHTNING = ("lightning.pytorch.trainer.trainer", "pytorch_lightning.trainer.trainer")
WAYS = {
    "DistributedDataParallel": "magi run --replace-ddp, or magi_train.DataParallel in its place",
    "Lightning": 'Trainer(strategy="magi")',
    "transformers": "magi_train.integrations.huggingface.attach(trainer)",
    "Accelerate": "magi_train.integrations.huggingface.attach(accelerator)",
    "module": "model, optimizer = magi_train.prepare(model, optimizer)",
}
"""{what a script trains with: the line that does for good what is done here}"""
_REPLACED = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")


class Attachment:
    """Stands in for what scripts train with, in this process, from now on.

    Attributes:
        way: The key of WAYS that the script took; "" while it has taken none.
    """

    def __init__(self) -> None:
        self.way = ""
        self._inside = 0  # a Trainer makes its own Accelerator, which is not to be attached alone
        _autoload.register()
        replace_ddp()
        before_init(DataParallel, lambda *_: self._takes("DistributedDataParallel"))
        self._owner = Owner(self._called)
        when_imported(
            {
                **dict.fromkeys(LIGHTNING, self._lightning),
                "transformers.trainer": self._transformers,
                "accelerate.accelerator": self._accelerate,
            }
        )

    @property
    def how(self) -> str:
        """Return the line that does for good what is done here."""
        return WAYS.get(self.way, "")

    def _takes(self, way: str) -> None:
        self.way = self.way or way
        self._owner.remove()  # no plain loop, and nothing is to be looked at while it is captured

    def _lightning(self, module: ModuleType) -> None:
        def before(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            wanted = options.get("strategy", "auto")
            if wanted not in _REPLACED and not str(wanted).startswith("magi"):
                raise MagiError(
                    f"this Trainer's strategy is {wanted!r}; only {', '.join(_REPLACED)} can be "
                    "tried with magi unasked"
                )
            if wanted in _REPLACED:
                options["strategy"] = "magi"
                if os.environ.get("WORLD_SIZE", "1") == "1":
                    # on one rank Lightning would shuffle otherwise than without a DDP strategy
                    options.setdefault("use_distributed_sampler", False)
            self._takes("Lightning")

        before_init(module.Trainer, before)

    def _transformers(self, module: ModuleType) -> None:
        real = module.Trainer.__init__

        @functools.wraps(real)
        def init(made: Any, *args: Any, **options: Any) -> None:
            self._inside += 1
            try:
                real(made, *args, **options)
            finally:
                self._inside -= 1
            self._takes("transformers")
            attach(made)

        module.Trainer.__init__ = init

    def _accelerate(self, module: ModuleType) -> None:
        real = module.Accelerator.__init__

        @functools.wraps(real)
        def init(made: Any, *args: Any, **options: Any) -> None:
            real(made, *args, **options)
            if not self._inside:
                self._takes("Accelerate")
                attach(made)

        module.Accelerator.__init__ = init

    def _called(self, module: nn.Module, optimizers: list[Optimizer]) -> None:
        """Capture the module of a plain loop from its next call on."""
        if isinstance(module, DataParallel | PreparedModule):
            self._owner.remove()
            return
        if self._is_distributed():
            return
        self._takes("module")
        runtime = Runtime(module, Config())
        region = Region(runtime, module.forward, type(module).__name__)
        module.__dict__["forward"] = CapturedForward(region, module.forward)
        runtime.take_over(optimizers)

    @staticmethod
    def _is_distributed() -> bool:
        """Return whether ranks train together: somebody averages their gradients already."""
        found = torch.distributed
        return found.is_available() and found.is_initialized() and found.get_world_size() > 1
