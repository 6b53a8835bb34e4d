"""Clipping in a loop of engine "deepspeed": refused where it would do nothing.

DeepSpeed keeps the gradients until its step and clips them there, by its setting
`gradient_clipping`. At stages 2 and 3 torch's functions find no `.grad` and clip nothing; at stage
1 they find what is not yet averaged over the ranks. A loop that asks for the norm which DeepSpeed
clips to is right as it is, and torch's part is left out; any other norm is an error, and so is
clipping by value, which DeepSpeed does not know.
"""

import functools
import weakref
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from magi_train.core import compat
from magi_train.core.errors import MagiError

_watching: list[Any] = []


def watch(engines: "weakref.WeakSet[Any]") -> None:
    """Ask before torch clips whether the gradients are those of one of `engines`, of class Zero.

    A second call does nothing: there is one set of them. A `clip_grad_value_` that a script has
    imported by name before is not seen.
    """
    if _watching:
        return
    _watching.append(engines)
    compat.before_clipping(functools.partial(_may_scale, engines))
    by_value = nn.utils.clip_grad_value_

    @functools.wraps(by_value)
    def ask_first(parameters: Any, clip_value: float, *args: Any, **kwargs: Any) -> None:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for zero in _whose(engines, parameters):
            must_clip_to(zero, clip_value, "value")
        by_value(parameters, clip_value, *args, **kwargs)

    nn.utils.clip_grad_value_ = nn.utils.clip_grad.clip_grad_value_ = ask_first


def must_clip_to(zero: Any, limit: float, by: Literal["norm", "value"]) -> None:
    """Raise if DeepSpeed does not clip so.

    Args:
        zero: What trains, of class Zero.
        limit: What the loop clips to.
        by: What is limited: the norm of all gradients, or each of their elements.

    Raises:
        MagiError: It clips to another norm or not at all; or clipping is by value.
    """
    clips_to = float(zero.engine.gradient_clipping())
    if by == "norm" and clips_to == limit:
        return
    does = f"whose gradient_clipping, of the norm, is {clips_to:g}"
    setting = f"ShardingConfig(deepspeed={{'gradient_clipping': {limit:g}}})"
    do = f"set {setting} (the call may then stay)" if by == "norm" else "clip by norm"
    raise MagiError(
        f"clipping by {by} to {limit:g} is not possible in a loop under engine 'deepspeed', which "
        f"has the gradients of ZeRO stage {zero.stage} until step(), and {does}; "
        f"{do}, or leave the call out"
    )


def _whose(engines: "weakref.WeakSet[Any]", parameters: Sequence[Tensor]) -> list[Any]:
    asked = {id(p) for p in parameters}
    return [z for z in engines if not asked.isdisjoint(map(id, z.parameters.values()))]


def _may_scale(
    engines: "weakref.WeakSet[Any]", parameters: Sequence[Tensor], max_norm: float
) -> bool:
    """Return whether torch is to scale these gradients."""
    theirs = _whose(engines, parameters)
    for zero in theirs:
        must_clip_to(zero, max_norm, "norm")
    return not theirs
