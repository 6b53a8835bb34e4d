"""`clip_grad_norm_` in a loop of engine "deepspeed": refused where it would do nothing.

DeepSpeed keeps the gradients until its step and clips them there, by its setting
`gradient_clipping`. At stages 2 and 3 torch's function finds no `.grad` and clips nothing; at stage
1 it finds what is not yet averaged over the ranks. A loop that asks for the norm which DeepSpeed
clips to is right as it is, and torch's part is left out; any other norm is an error.
"""

import functools
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from magi_train.core import compat
from magi_train.core.errors import MagiError

_watching: list[Any] = []


def watch(engines: "weakref.WeakSet[Any]") -> None:
    """Ask before torch clips whether the gradients are those of one of `engines`, of class Zero.

    A second call does nothing: there is one set of them.
    """
    if not _watching:
        _watching.append(engines)
        compat.before_clipping(functools.partial(_may_scale, engines))


def _may_scale(
    engines: "weakref.WeakSet[Any]", parameters: Sequence[Tensor], max_norm: float
) -> bool:
    """Return whether torch is to scale these gradients.

    Raises:
        MagiError: They are DeepSpeed's, which clips to another norm or not at all.
    """
    asked = {id(p) for p in parameters}
    for zero in engines:
        if asked.isdisjoint(map(id, zero.parameters.values())):
            continue
        clips_to = float(zero.engine.gradient_clipping())
        if clips_to == max_norm:
            return False
        raise MagiError(
            f"clip_grad_norm_() to {max_norm:g} cannot clip under engine 'deepspeed', which has "
            f"the gradients of ZeRO stage {zero.stage} until step(), and whose gradient_clipping "
            f"is {clips_to:g}; set ShardingConfig(deepspeed={{'gradient_clipping': {max_norm:g}}}) "
            "(the call may then stay), or leave the call out"
        )
    return True
