"""What MagiStrategy adds to the DDPStrategy of Lightning Fabric.

Fabric puts the strategy's wrapper around the user's module and calls its `forward`. Other methods
that count as a forward (a LightningModule's `training_step`, whatever `mark_forward_method` names)
come in through the same door: Fabric replaces the `forward` of the user's module for the length of
one call. Dynamo looks through that and guards on it, so one region holds a graph for each method; a
`training_step` has its loss in the graph, as under Trainer.
"""

import contextlib
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from magi_train.capture import Region
from magi_train.core.config import Config
from magi_train.core.report import Report
from magi_train.integrations import options as opt
from magi_train.runtime import Runtime


class FabricModule(nn.Module):
    """The user's module behind its captured forms; `.module` is the user's own.

    Args:
        module: On its device.
        config: What to do.
    """

    def __init__(self, module: nn.Module, config: Config) -> None:
        super().__init__()
        self.module = module
        opt.refuse_outer_steps(config, "Fabric's saving")
        self.runtime = Runtime(module, config)
        self._region = Region(self.runtime, module, type(module).__name__)
        self.optimizers: list[Optimizer] = []

    # a torch.compile that Fabric puts around us again shall compile nothing
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the captured form of the method that Fabric asks for."""
        return self._region(*args, **kwargs)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which forwards accumulate gradients without sending anything."""
        return self.runtime.no_sync()


class _BackwardSync:
    """Fabric's `no_backward_sync` for our wrapper."""

    def no_backward_sync(
        self, module: nn.Module, enabled: bool
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context that accumulates without sending anything if `enabled`."""
        if not enabled:
            return contextlib.nullcontext()
        if not isinstance(module, FabricModule):
            raise TypeError(
                "no_backward_sync takes a module from fabric.setup(), got "
                f"{type(module).__name__}: set the model up first"
            )
        return module.no_sync()


class MagiFabricMixin:
    """Train as under DDP, with the forward captured and optimized.

    Args:
        config: What to do; `magi_train.Config()` by default.
        **options: Those of Fabric's DDPStrategy. `find_unused_parameters`,
            `gradient_as_bucket_view` and `static_graph` are accepted and not needed.

    Raises:
        ValueError: An option that only a DistributedDataParallel could honour.
    """

    def __init__(self, *args: Any, config: Config | None = None, **options: Any) -> None:
        self.magi_config = opt.take_options(config, options)
        super().__init__(*args, **options)
        opt.refuse_unknown(self)
        self._backward_sync_control = _BackwardSync()
        self._modules_set_up: list[FabricModule] = []

    @property
    def reports(self) -> list[Report]:
        """What was done, for each module that was set up."""
        return [module.runtime.report for module in self._modules_set_up]

    def _setup_distributed(self) -> None:
        if opt.is_alone(self):
            self._set_world_ranks()  # type: ignore[attr-defined]
        else:
            super()._setup_distributed()  # type: ignore[misc]

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Return the module behind its captured forms."""
        wrapped = FabricModule(module, self.magi_config)
        self._modules_set_up.append(wrapped)
        return wrapped

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Let one kernel take the steps of an optimizer, with the others of the same module."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for wrapped in self._modules_set_up:
            if any(id(p) in mine for p in wrapped.parameters()):
                wrapped.optimizers.append(optimizer)
                wrapped.runtime.take_over(wrapped.optimizers)
        return super().setup_optimizer(optimizer)  # type: ignore[misc]

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return the state of the user's own module: no key has a prefix."""
        return super().get_module_state_dict(_own(module))  # type: ignore[misc]

    def load_module_state_dict(
        self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True
    ) -> None:
        """Load a state of the user's own module."""
        super().load_module_state_dict(_own(module), state_dict, strict=strict)  # type: ignore[misc]


def _own(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, FabricModule) else module
