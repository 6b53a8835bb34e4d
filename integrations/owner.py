"""Find a script's model: the first module that is called to train and holds an optimizer's weights.

PyTorch's hook for all modules sees each call before it is made, and every optimizer is seen when it
is made. Nothing is known of the script, and nothing heavy is imported.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer


class Owner:
    """Calls back with a module and the optimizers whose parameters it holds all of, at every call.

    Args:
        found: Called before the module's forward; calls `remove` when it has seen enough.
    """

    def __init__(self, found: Callable[[nn.Module, list[Optimizer]], None]) -> None:
        self._found = found
        self._optimizers: list[weakref.ref[Optimizer]] = []
        before_init(Optimizer, lambda made, *_: self._optimizers.append(weakref.ref(made)))
        self._hook: Any = register_module_forward_pre_hook(self._called)

    def remove(self) -> None:
        """See no more calls."""
        self._hook.remove()

    def _called(self, module: nn.Module, _: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        own = {id(p) for p in module.parameters()}
        made = [each for ref in self._optimizers if (each := ref()) is not None]
        mine = [each for each in made if _parameters(each) and own >= _parameters(each)]
        if mine:
            self._found(module, mine)


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def before_init(kind: type, call: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> None:
    """Make `call(made, args, options)` come before a class's `__init__`; it may change options."""
    real = kind.__init__  # type: ignore[misc]

    @functools.wraps(real)
    def init(made: Any, *args: Any, **options: Any) -> None:
        call(made, args, options)
        real(made, *args, **options)

    kind.__init__ = init  # type: ignore[misc]
