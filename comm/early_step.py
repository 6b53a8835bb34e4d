"""The early step: the optimizer begins with what has arrived while the rest is on the wire.

A backward that waits for its last bucket leaves the host idle, and the step after it leaves the
wire idle. Where an optimizer updates each parameter from that parameter alone, its step can begin
with the first buckets: on a slow link the step then hides behind the communication. Gradients
travel in the order in which they were launched, so they are stepped in that order, in as many parts
as it takes, each by the optimizer's own code. The result is the same bit for bit.

Method: as torch's optimizer-in-backward, which steps a parameter when its gradient exists. Differs:
the step stays where the user called it, with its hooks and schedulers, and everything between
backward and step is right: until its bucket has arrived, `.grad` is an `Arriving`, a tensor that
any operation waits for. Clipping or a GradScaler reads all gradients, so it waits for all of them
first, and the step has nothing left to hide.

    backward launches -> Pending -> step: take() the arrived -> own step on these -> take() ...

Only where the host waits for collectives and hooks launch them: on the CPU. Beside NCCL, a stream
waits, not the host.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from magi_train.comm.codecs.compressor import Handle
from magi_train.core import compat
from magi_train.core.report import PassRow, Report


class Arriving(torch.Tensor):
    """The gradient of a parameter, still on its way: any operation on it waits for its end."""

    _plain: Tensor
    _arrive: Callable[[], None]

    @staticmethod
    def of(plain: Tensor, arrive: Callable[[], None]) -> "Arriving":
        """Return a stand-in for `plain`; `arrive` returns once that holds its values."""
        made = compat.wrapper_like(Arriving, plain)
        made._plain, made._arrive = plain, arrive
        return made

    def arrived(self) -> Tensor:
        """Wait; return the gradient itself."""
        self._arrive()
        return self._plain

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Wait, and do it with the gradient itself."""
        return func(*map(_arrived, args), **{k: _arrived(v) for k, v in (kwargs or {}).items()})

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Wait, so that `numpy()`, `data_ptr()` and the like see the gradient's own memory."""
        return func(*map(_arrived, args), **{k: _arrived(v) for k, v in (kwargs or {}).items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a copy of the gradient itself."""
        return self.arrived().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the gradient itself."""
        return self.arrived().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return the gradient's own."""
        return repr(self.arrived())


def _arrived(given: Any) -> Any:
    """Return an operator's argument with gradients themselves in the place of stand-ins."""
    if isinstance(given, Arriving):
        return given.arrived()
    if type(given) in (list, tuple):
        return type(given)(map(_arrived, given))
    return given


@dataclass
class _Parcel:
    """A bucket that is on its way: its parameters, what stands for their gradients, and these."""

    handle: Handle
    members: list[tuple[Tensor, Tensor, Tensor]]


class Pending:
    """The buckets of one backward that were not waited for yet, in launch order.

    Args:
        at_end: Called once, when all have arrived.
        wait: Calls what waits, so that somebody may look at the clock, and tell others of errors.
    """

    def __init__(
        self, at_end: Callable[[], None], wait: Callable[[Callable[[], None]], None]
    ) -> None:
        self._parcels: list[_Parcel] = []
        self._at_end, self._wait = at_end, wait
        self._ended = False

    def add(self, handle: Handle, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Leave a bucket on its way, with its parameters and the gradients they will have."""
        members: list[tuple[Tensor, Tensor, Tensor]] = []
        for parameter, plain in gradients:
            parameter.grad = stand_in = Arriving.of(plain, self.arrive)
            members.append((parameter, stand_in, plain))
        self._parcels.append(_Parcel(handle, members))

    def parameters(self) -> set[int]:
        """Return the `id`s of the parameters whose gradients are still on their way."""
        return {id(parameter) for parcel in self._parcels for parameter, *_ in parcel.members}

    def take(self) -> list[Tensor]:
        """Return parameters whose gradients are there, at least those of a bucket; none at the end.

        Waits only if not even the first bucket has arrived.
        """
        taken: list[Tensor] = []
        while self._parcels and (not taken or self._parcels[0].handle.arrived()):
            parcel = self._parcels[0]
            self._wait(parcel.handle.wait)  # raises again for who asks again
            del self._parcels[0]
            for parameter, stand_in, plain in parcel.members:
                if parameter.grad is stand_in:  # else the user has put something in its place
                    parameter.grad = plain
                taken.append(parameter)
        if not self._parcels and not self._ended:
            self._ended = True
            self._at_end()
        return taken

    def arrive(self) -> None:
        """Wait for all."""
        while self.take():
            pass

    def drop(self) -> None:
        """Wait for nothing more: parameters whose gradients never arrived have none."""
        for parcel in self._parcels:
            for parameter, stand_in, _ in parcel.members:
                if parameter.grad is stand_in:
                    parameter.grad = None


class EarlyStep:
    """What `step_early` puts before an optimizer's class."""

    _magi_class: type[Optimizer]  # by this name others ask for the user's class
    _magi_pending: Callable[[], Pending | None]

    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, as the optimizer's own class documents it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own, pending = compat.own_step(self._magi_class), self._magi_pending()
        waiting = set() if pending is None else pending.parameters()
        if pending is None or not waiting:
            own(self)
            return loss
        theirs = {id(p) for group in self.param_groups for p in group["params"]}
        _step_only(self, own, theirs - waiting)  # of other models, or without a gradient
        while taken := pending.take():
            _step_only(self, own, {id(p) for p in taken})
        return loss

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Copy and pickle as the optimizer's own class; a copy steps late."""
        return _plain, (self._magi_class,), self.__getstate__()


def _plain(kind: type[Optimizer]) -> Optimizer:
    return kind.__new__(kind)


def _step_only(optimizer: Optimizer, own: Callable[[Optimizer], Any], ids: set[int]) -> None:
    """Let `own` step these parameters alone."""
    groups = optimizer.param_groups
    whole = [group["params"] for group in groups]
    for group, parameters in zip(groups, whole, strict=True):
        group["params"] = [p for p in parameters if id(p) in ids]
    optimizer.param_groups = [group for group in groups if group["params"]]
    try:
        if optimizer.param_groups:
            own(optimizer)
    finally:
        optimizer.param_groups = groups
        for group, parameters in zip(groups, whole, strict=True):
            group["params"] = parameters


def step_early(
    optimizer: Optimizer, pending: Callable[[], Pending | None], report: Report, refused: str
) -> bool:
    """Let an optimizer's step begin before all gradients have arrived; its class changes.

    Args:
        optimizer: Any.
        pending: Returns what is on its way, None for nothing.
        report: Gets the row "early_step".
        refused: Why the step shall stay as it is, "" if it need not.

    Returns:
        Whether it does.
    """
    kind = type(optimizer)
    if not refused and hasattr(kind, "_magi_class") and not issubclass(kind, EarlyStep):
        refused = "its step is one kernel of ours"
    row = {"optimizer": kind.__name__, "early": not refused, "because": refused}
    report.add(PassRow("early_step", "run_time", row, 0.0))
    if refused:
        return False
    vars(optimizer)["_magi_pending"] = pending
    if not issubclass(kind, EarlyStep):
        compat.change_class(optimizer, compat.subclass_before(kind, EarlyStep, _magi_class=kind))
    return True
