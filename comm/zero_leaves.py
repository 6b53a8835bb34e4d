"""What a block must be given to be one of DeepSpeed's leaves at ZeRO stage 3.

DeepSpeed sums a leaf's gradients in a full backward hook, which torch runs when the gradients of
the positional inputs are there. Where no such input needs a gradient (the first block behind frozen
embeddings, or fed with the batch itself) the hook runs before the gradients of the weights; where a
block runs twice in one forward, it runs twice. Both end in errors deep inside of DeepSpeed. So the
first is cured, by asking for a gradient that nobody reads, and the rest is refused by name.
"""

from typing import Any

import torch
from torch import Tensor, nn

from magi_train.core.errors import MagiError

_WAY_OUT = "; use Config(tier='eager'), which leaves DeepSpeed's own hooks alone, or zero_stage=2"


class Leaves:
    """Looks at the inputs of the leaves, in front of DeepSpeed's hooks.

    Args:
        module: The model; for the names of its blocks.
        blocks: Those that will be leaves; DeepSpeed has not seen them yet.
    """

    def __init__(self, module: nn.Module, blocks: list[nn.Module]) -> None:
        self._names = {id(m): name for name, m in module.named_modules()}
        self._seen: set[int] | None = None
        self._handles = [b.register_forward_pre_hook(self._look, with_kwargs=True) for b in blocks]

    def begin(self) -> None:
        """A forward begins."""
        self._seen = set()

    def end(self) -> None:
        """It has ended: blocks that run now are run again for a backward (checkpointing)."""
        self._seen = None

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _look(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not torch.is_grad_enabled():
            return None
        name = f"{self._names.get(id(block), '')} ({type(block).__name__})"
        if self._seen is not None:
            if id(block) in self._seen:
                raise MagiError(
                    f"{name} runs twice in one forward, which DeepSpeed's stage 3 cannot sum for a "
                    f"block that is gathered as one{_WAY_OUT}"
                )
            self._seen.add(id(block))
        places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
        if not places:
            raise MagiError(
                f"{name} is called without a positional input of floating point, which DeepSpeed's "
                f"stage 3 needs to know when a block's backward has ended{_WAY_OUT}"
            )
        if any(args[i].requires_grad for i in places):
            return None
        first = args[places[0]].detach().requires_grad_()
        return (*args[: places[0]], first, *args[places[0] + 1 :]), kwargs
