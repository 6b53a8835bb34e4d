"""take_over(): torch's AdamW, Adam and SGD step through one Triton kernel, otherwise unchanged.

The optimizer stays the object it is: parameter groups, state (`exp_avg`, `exp_avg_sq`, `step`),
hooks and `state_dict` are torch's. Only its class changes, to a subclass of its own made on the
fly, whose step gives the kernel what the kernel can take and leaves the rest to torch's code.

Which optimizers: those whose class takes its step from torch.optim.Adam (so AdamW too) or SGD.
Which parameters: float32, plain, dense, on a CUDA device, in groups that are neither capturable nor
differentiable. Gradients: float32, bfloat16 or float16 with the parameter's strides. What is left
alone, and why, stands in the report's row "fused_optimizer".

Differs from torch:
- step counts lie on the device for every taken parameter, as torch has them under `fused=True`;
  `state_dict()` and copies hold them where torch's own would (on the CPU unless fused).
- whether GradScaler leaves unscaling to the step stays the user's choice (`fused=True`): Lightning
  refuses to clip gradients for an optimizer that unscales, and a skipped step is one not called.
"""

import importlib.util
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from magi_train.core import compat
from magi_train.core.report import PassRow, Report

if TYPE_CHECKING:
    from magi_train.fusion.fused_step import FusedStep


class TakenOver:
    """What `take_over` puts before an optimizer's own class.

    Attributes:
        clip_factor: None, or a float32 tensor of one element on the device that the next step
            multiplies gradients by; used once.
    """

    clip_factor: Tensor | None = None
    _magi_class: type[Optimizer]
    _magi_step: "FusedStep"

    @torch.no_grad()
    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, as the optimizer's own class documents it."""
        own = compat.own_step(self._magi_class)
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if capturing or torch.compiler.is_compiling():
            return own(self, closure)  # addresses must not end up in a graph
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken, rest = self._magi_step.divide(self)
        if rest:  # first: torch's complaints come before anything is written
            self._magi_rest(own, rest)
        self._magi_step.run(self, taken)
        self.clip_factor = None
        return loss

    def _magi_rest(self: Any, own: Callable[..., Any], rest: list[dict[str, Any]]) -> None:
        """Let torch step what the kernel does not take."""
        for group in rest:
            for p in group["params"]:
                _own_place(group, self.state.get(p, {}))
                if p.grad is not None and self.clip_factor is not None:
                    p.grad.mul_(self.clip_factor.to(p.grad))
        groups, self.param_groups = self.param_groups, rest
        try:
            own(self)
        finally:
            self.param_groups = groups

    def state_dict(self: Any) -> dict[str, Any]:
        """Return the state as the optimizer's own class would."""
        held = super().state_dict()  # type: ignore[misc]
        return {**held, "state": _as_torch_holds(held["state"], held["param_groups"])}

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Copy and pickle as the optimizer's own class; a copy is not taken over."""
        held = self.__getstate__()
        state = defaultdict(dict, _as_torch_holds(self.state, self.param_groups))
        return _plain, (self._magi_class,), {**held, "state": state}


def _plain(kind: type[Optimizer]) -> Optimizer:
    return kind.__new__(kind)


def _as_torch_holds(state: Mapping[Any, Any], groups: Sequence[dict[str, Any]]) -> dict[Any, Any]:
    """Return a copy of an optimizer's state with every step count where torch keeps it."""
    copied = dict(state)
    for group in groups:
        for key in group["params"]:
            if key in copied:
                copied[key] = dict(copied[key])
                _own_place(group, copied[key])
    return copied


def _own_place(group: dict[str, Any], state: dict[str, Any]) -> None:
    """Put the step count of a parameter where torch keeps it for such a group."""
    if isinstance(state.get("step"), Tensor) and not (group["fused"] or group["capturable"]):
        state["step"] = state["step"].cpu()


def _algorithm(optimizer: Optimizer) -> Any:
    """Return the kernel's side for an optimizer, or the reason why there is none."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from magi_train.fusion.fused_step import Adam, Sgd

    if compat.step_is_replaced(optimizer):
        return "somebody put another step on this optimizer"
    if compat.steps_like(type(optimizer), torch.optim.Adam):
        return Adam()
    if compat.steps_like(type(optimizer), torch.optim.SGD):
        return Sgd()
    return f"{type(optimizer).__name__} has a step of its own"


def take_over(
    optimizer: Optimizer,
    report: Report,
    shadow_of: Callable[[Tensor], Tensor | None] = lambda _: None,
    *,
    on_written: Callable[[Sequence[Tensor]], None] | None = None,
    drift: Tensor | None = None,
) -> Optimizer:
    """Make an optimizer's step run in one kernel; return the same object.

    Args:
        optimizer: Any; one that no kernel fits is left as it is.
        report: Gets the row "fused_optimizer", and notes on what is left to torch later.
        shadow_of: Returns the bfloat16 or float16 copy of a parameter that a step shall write too,
            with the parameter's shape and strides, or None. Asked in every step.
        on_written: Called after each step with the parameters whose shadow the kernel was given;
            their versions have moved by then. Under `found_inf` neither was changed. Parameters
            that torch stepped are not among them: their shadow is stale.
        drift: int32 tensor of one element on the device; a step sets it to 1 where a shadow did
            not equal its rounded parameter before the update. None: not looked at.

    Raises:
        ValueError: In a step: a shadow has the wrong dtype, shape or strides.
    """
    if isinstance(optimizer, TakenOver):
        optimizer._magi_step.shadow_of = shadow_of
        optimizer._magi_step.on_written, optimizer._magi_step.drift = on_written, drift
        return optimizer
    name = type(optimizer).__name__
    algorithm = _algorithm(optimizer)
    if isinstance(algorithm, str):
        left = {"optimizer": name, "taken": 0, "left_alone": [algorithm]}
        report.add(PassRow("fused_optimizer", "run_time", left, 0.0))
        return optimizer
    from magi_train.fusion.fused_step import FusedStep

    fused = FusedStep(algorithm, shadow_of, on_written, drift, report.note)
    reasons = [fused.why_never(p, g) for g in optimizer.param_groups for p in g["params"]]
    refused = Counter(reason for reason in reasons if reason is not None)
    taken = len(reasons) - refused.total()
    left_alone = [f"{count} parameters: {reason}" for reason, count in refused.items()]
    plan = {"optimizer": name, "taken": taken, "left_alone": left_alone}
    report.add(PassRow("fused_optimizer", "run_time", plan, 0.0))
    if taken:
        vars(optimizer)["_magi_step"] = fused
        own = type(optimizer)
        compat.change_class(optimizer, compat.subclass_before(own, TakenOver, _magi_class=own))
    return optimizer


def compile_steps(
    optimizer: Optimizer, dtypes: Sequence[tuple[torch.dtype, torch.dtype | None]]
) -> None:
    """Let the kernels of an optimizer that was taken over compile; see FusedStep.compile_ahead."""
    if isinstance(optimizer, TakenOver):
        optimizer._magi_step.compile_ahead(optimizer, dtypes)


def taken_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters whose steps the kernel takes; none of an optimizer left as it is."""
    if not isinstance(optimizer, TakenOver):
        return []
    groups: list[dict[str, Any]] = optimizer.param_groups  # type: ignore[attr-defined]
    never = optimizer._magi_step.why_never
    return [p for group in groups for p in group["params"] if never(p, group) is None]
