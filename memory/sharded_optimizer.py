"""shard(): an optimizer keeps the state of this rank's part only; otherwise it stays torch's.

Method: ZeRO stage 1 (Rajbhandari et al., 2020). Gradients are averaged in full, as always, so
`.grad`, clipping and GradScaler are DistributedDataParallel's. Then each rank updates its piece of
the parameters with the optimizer's own step (torch's, or the fused kernel), and the pieces are
gathered before `step()` returns: what anybody reads afterwards is never stale.

The optimizer stays the object it is, with its groups and hooks; its class becomes a subclass of its
own. `state_dict()` is whole and in torch's format, and every rank must call it.
`optimizer.state[p]` holds the piece of this rank, `[elements]` in the order of the parameter's
memory, and nothing where it has none.

Which optimizers: those whose step is, number for number, that of one of ELEMENTWISE: the update of
an element depends on no other element, so the step of a slice is the slice of the step.
Which parameters: dense, of the prepared model. Those that are frozen are cut when they are first
trained, and so are those of groups that are added later. The others are kept whole on every rank;
the report's row "sharded_optimizer" says why.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from magi_train.core import compat
from magi_train.core.errors import MagiError
from magi_train.core.report import PassRow, Report
from magi_train.core.world import World
from magi_train.memory.shard_plan import plan_shards
from magi_train.memory.shard_state import cut_loaded, keep_pieces, whole_state
from magi_train.memory.shards import Shards

ELEMENTWISE: tuple[type[Optimizer], ...] = (
    torch.optim.Adam,  # AdamW takes its step from it
    torch.optim.SGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.Rprop,
)
"""Held by a test: their step of a slice is bit for bit the slice of their step."""

_ordinals = itertools.count()


class ShardedOptimizer:
    """What `shard` puts before an optimizer's class."""

    _magi_unsharded: type[Optimizer]
    _magi_sharding: "Sharding"

    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, as the optimizer's own class documents it. All ranks must call it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._magi_sharding.step(self, compat.own_step(self._magi_unsharded))
        return loss

    def state_dict(self: Any) -> dict[str, Any]:
        """Return the whole state in torch's format, on the CPU. All ranks must call it."""
        handle = self.register_state_dict_post_hook(self._magi_sharding.complete, prepend=True)
        try:
            return super().state_dict()  # type: ignore[misc]
        finally:
            handle.remove()

    def load_state_dict(self: Any, state_dict: Mapping[str, Any]) -> None:
        """Load a whole state, of any number of ranks or of a plain optimizer."""
        cut = self._magi_sharding.cut
        handle = self.register_load_state_dict_pre_hook(cut)  # behind the user's own hooks
        try:
            super().load_state_dict(state_dict)  # type: ignore[misc]
        finally:
            handle.remove()

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Refuse.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "an optimizer with sharded state cannot be copied or pickled: it holds a part; build a "
            "new one and load_state_dict() what state_dict() returns when all ranks call it"
        )


class Sharding:
    """The rules by which one optimizer is sharded, and its shards.

    Args:
        world: The ranks; more than one.
        names: Of the parameters whose gradients are averaged over ranks, by `id`.
        timeout_seconds: For agreements between ranks.
    """

    def __init__(self, world: World, names: Mapping[int, str], timeout_seconds: float) -> None:
        self.shards = Shards(world, timeout_seconds)
        self.kept_whole: dict[int, str] = {}
        self.whole: list[Tensor] = []  # keeps the ids of `kept_whole` from being used again
        self._names, self._ordinal = names, next(_ordinals)
        self._timeout_seconds = timeout_seconds

    def step(self, optimizer: Optimizer, own: Callable[[Optimizer], Any]) -> None:
        """Update this rank's pieces with `own`, then gather."""
        world = self.shards.world
        try:
            world.check()
            self._check_group()
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise MagiError(
                    "a step with sharded optimizer state cannot be captured in a CUDA graph; "
                    "capture forward and backward only, or use Config(shard_optimizer=False)"
                )
            self.grow(optimizer)
            _unscale(optimizer)
            with self.shards.as_pieces(optimizer):
                own(optimizer)
            self.shards.gather_weights()
            self.shards.cast_gathered()
        except BaseException as error:
            world.fail(error)
            raise

    def grow(self, optimizer: Optimizer) -> bool:
        """Cut the parameters that are trained and were not cut before; return whether any were."""
        new: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                known = id(p) in self.shards.slots or id(p) in self.kept_whole
                if known or not (p.requires_grad or p.grad is not None):
                    continue
                reason = self._why_whole(p, group)
                if reason is None:
                    new[self._names[id(p)]] = p
                else:
                    self.kept_whole[id(p)] = reason
                    self.whole.append(p)
        if not new:
            return False
        plan = plan_shards(list(new.items()), self.shards.world.size)
        what = f"shards of optimizer {self._ordinal}"
        answer = {"fingerprint": plan.fingerprint(), "parameters": list(new)}
        self.shards.world.agree(what, answer, self._timeout_seconds)
        self.shards.add(plan, [new[n] for b in plan.buckets for n in b.names])
        keep_pieces(self.shards, optimizer, new.values())
        return True

    def _why_whole(self, p: Tensor, group: Mapping[str, Any]) -> str | None:
        for setting in ("capturable", "differentiable"):
            if group.get(setting):
                return f"{setting}=True"
        if id(p) not in self._names:
            return "it is no parameter of the prepared model: its gradients are not averaged"
        if type(p) not in (Tensor, torch.nn.Parameter) or p.layout is not torch.strided:
            return "it is a tensor subclass, or not strided"
        if p.dim() == 0 or p.numel() == 0:
            return "it is a single number, or none"
        if not compat.is_non_overlapping_and_dense(p):
            return "its memory has gaps or overlaps"
        return None

    def prepared_again(self, names: Mapping[int, str]) -> None:
        """Go on with the same shards under another preparation of the model."""
        self._check_group()
        self._names = names

    def _check_group(self) -> None:
        if World.current() is not self.shards.world:
            raise MagiError(
                "the process group that this optimizer's state was sharded for is gone; build a "
                "new optimizer, prepare it and load a checkpoint"
            )

    def complete(self, optimizer: Optimizer, held: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict with the pieces of all ranks put together."""
        self._check_group()
        question = f"state_dict() of sharded optimizer {self._ordinal}, which every rank must call"
        states = whole_state(self.shards, optimizer, question)
        numbers = itertools.chain.from_iterable(g["params"] for g in held["param_groups"])
        params = itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups)
        state = dict(held["state"])
        for number, p in zip(numbers, params, strict=True):
            found = states.get(id(p))
            if found is None and id(p) in self.shards.slots:
                state.pop(number, None)
            elif found is not None:
                state[number] = found
        ours = sorted(key for key in state if isinstance(key, int))
        rest = [key for key in state if not isinstance(key, int)]
        return {**held, "state": {key: state[key] for key in [*ours, *rest]}}

    def cut(self, optimizer: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
        """Return what this rank keeps of a whole state dict."""
        return cut_loaded(self.shards, optimizer, loaded)


def _unscale(optimizer: Any) -> None:
    """Take GradScaler's factor off here, if it left that to the step: off whole gradients.

    As torch's fused steps do, leave gradients alone where one of them is infinite.
    """
    scale, infinite = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
    if scale is None:
        return
    if infinite is not None:
        scale = torch.where(infinite > 0, torch.ones_like(scale), scale)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.div_(scale.to(p.grad.device))
    optimizer.grad_scale = None


def is_sharded(optimizer: Optimizer) -> bool:
    """Return whether an optimizer holds the state of a part only."""
    return isinstance(optimizer, ShardedOptimizer)


def why_not_sharded(optimizer: Optimizer) -> str:
    """Return why an optimizer's state cannot be sharded, "" if it can.

    To be asked before another class is put on it.
    """
    if is_sharded(optimizer):
        return ""
    if compat.step_is_replaced(optimizer):
        return "somebody put another step on this optimizer"
    kind = getattr(type(optimizer), "_magi_class", type(optimizer))
    if not any(compat.steps_like(kind, base) for base in ELEMENTWISE):
        return f"{kind.__name__} is not known to update each element from that element alone"
    return ""


def shard(
    optimizer: Optimizer,
    world: World,
    names: Mapping[int, str],
    timeout_seconds: float,
    report: Report,
    refused: str = "",
) -> Shards | None:
    """Let each rank keep the state of a part of an optimizer's parameters.

    Args:
        optimizer: Any; its class changes, see the head of this module.
        world: The ranks.
        names: Of the parameters whose gradients are averaged over these ranks, by `id`.
        timeout_seconds: For agreements between ranks.
        report: Gets the row "sharded_optimizer".
        refused: Why it shall stay whole, as `why_not_sharded` says.

    Returns:
        Its shards; None where it stays whole, on one rank too.

    Raises:
        MagiError: It is sharded for a process group that is gone.
        PlanMismatchError: Ranks hold different optimizers.
    """
    name = type(optimizer).__name__
    if world.size == 1:
        report.note("shard_optimizer changes nothing: there is one rank")
        return None
    ask = {"optimizer": name, "stays whole because": refused}
    world.agree("optimizer to shard", ask, timeout_seconds)
    if refused:
        plan: dict[str, Any] = {"optimizer": name, "cut": 0, "kept_whole": [refused]}
        report.add(PassRow("sharded_optimizer", "run_time", plan, 0.0))
        return None
    if isinstance(optimizer, ShardedOptimizer):
        sharding = optimizer._magi_sharding
        sharding.prepared_again(names)
    else:
        sharding = Sharding(world, names, timeout_seconds)
        sharding.grow(optimizer)
        vars(optimizer)["_magi_sharding"] = sharding
        own = type(optimizer)
        kind = compat.subclass_before(own, ShardedOptimizer, _magi_unsharded=own)
        compat.change_class(optimizer, kind)
    report.add(PassRow("sharded_optimizer", "run_time", _summary(name, sharding), 0.0))
    return sharding.shards


def _summary(name: str, sharding: Sharding) -> dict[str, Any]:
    reasons = Counter(sharding.kept_whole.values())
    numels = [s.parameter.numel() for s in sharding.shards.slots.values()]
    ranks = range(sharding.shards.world.size)
    owned = [
        sum(b.plan.piece(i, r)[1] - b.plan.piece(i, r)[0]
            for b in sharding.shards.buckets for i in range(len(b.slots)))
        for r in ranks
    ]  # fmt: skip
    return {
        "optimizer": name,
        "cut": len(numels),
        "elements": sum(numels),
        "of_each_rank": owned,
        "buckets": len(sharding.shards.buckets),
        "kept_whole": [f"{count} parameters: {reason}" for reason, count in reasons.items()],
    }
