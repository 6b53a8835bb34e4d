"""The compressor: the codecs of a plan's buckets, what they leave behind, and when it counts.

A step counts for the codecs if every number that came out of it is finite, in all buckets: a
GradScaler, or a user's check, skips a step with infinities or NaNs, so what its exchanges left in
residuals and bases is forgotten, and training goes on as if the step had not been. All ranks decode
the same bytes, hence decide alike without asking each other.

On a GPU the decision is a bool that is copied to the host at the end of the backward and read at
the start of the next one: nothing waits for it.

A state that a checkpoint may hold is by parameter name: what was not sent yet, as the mean over
ranks, and each basis. It loads on any number of ranks, buckets or other codecs.
"""

import weakref
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from magi_train.comm.codecs import Codec, Scale
from magi_train.comm.codecs.exact import Autocast, ExactBuckets
from magi_train.comm.codecs.hierarchical import Hierarchical
from magi_train.comm.codecs.lanes import Lanes, StreamExchange, ThreadExchange, run
from magi_train.comm.codecs.low_rank import LowRank
from magi_train.comm.codecs.two_shot import FORMATS, TwoShot
from magi_train.comm.copy_engines import CopyEngines
from magi_train.comm.host_memory import HostMemory
from magi_train.comm.nodes import Groups
from magi_train.comm.plan import CommPlan
from magi_train.core.errors import MagiError
from magi_train.core.world import World

STATEFUL = ("int8", "fp8", "hierarchical", "powersgd")
KINDS: dict[str, type[Codec]] = {"powersgd": LowRank, "hierarchical": Hierarchical}
"""Codecs that are not two shots of what their name says."""
RESIDUAL, BASIS = "residual", "basis"


class Handle(Protocol):
    """Something that is on its way."""

    def wait(self) -> None:
        """Return, or order the current stream, after its end."""

    def arrived(self) -> bool:
        """Return whether `wait` would return at once."""


@dataclass
class AllReduce:
    """An all-reduce that is on its way, perhaps of a copy in another format."""

    work: "dist.Work"
    wire: Tensor
    flat: Tensor
    world: World
    what: str

    def wait(self) -> None:
        """Wait for the end; see World.wait."""
        self.world.wait(self.work, self.flat.device, self.what)
        if self.wire is not self.flat:
            self.flat.copy_(self.wire)

    def arrived(self) -> bool:
        """See Handle.arrived."""
        return self.work.is_completed()


class Compressor:
    """Sends the buckets of one plan, each in its codec.

    Args:
        plan: The agreed buckets.
        world: The ranks.
        device: Of the gradients.
        engines: Average what is not encoded, in NCCL's place.

    Attributes:
        exact: Which "safe" buckets travel in bfloat16.
        instead: What lossy buckets travel in for now, "" for as they are; None for their codec.
        stateful: Whether a codec in use keeps anything from step to step.

    Raises:
        MagiError: The process group cannot carry the codec on this device.
    """

    def __init__(
        self,
        plan: CommPlan,
        world: World,
        device: torch.device,
        engines: CopyEngines | None = None,
    ) -> None:
        self.plan, self.world, self.device, self._engines = plan, world, device, engines
        encoded = {b.codec for b in plan.buckets} & {*FORMATS, *STATEFUL}
        self.stateful = any(b.codec in STATEFUL for b in plan.buckets)
        self.on_stream = world.uses_nccl(device)
        if encoded and device.type != "cpu" and not self.on_stream:
            raise MagiError(
                f"CommConfig.compression needs NCCL for gradients on {device.type}, got the "
                f"{world.backend} backend; use init_process_group('nccl')"
            )
        # NCCL rounds the partial sums of more than two ranks; halving is exact
        once = world.size == 2 or engines is not None if self.on_stream else device.type == "cpu"
        self.exact = ExactBuckets(plan, possible=once)
        self.instead: str | None = None
        self._memory = HostMemory()
        self._codecs: dict[tuple[int, str], Codec] = {}
        self._node_size = max((b.node_size for b in plan.buckets), default=1)
        self._groups = _groups(world, self._node_size)
        self._lanes: Lanes | None = None
        if encoded:
            self.open_lanes()
        self._verdict: tuple[Tensor, Any] | None = None
        self._plain: list[Tensor] = []

    def know(self, exact: ExactBuckets) -> None:
        """Go on with what ranks have agreed on for a plan that was left and is taken up again."""
        self.exact = exact
        if exact.shortens:
            self.open_lanes()

    def open_lanes(self) -> None:
        """Make what exchanges beside gloo run in, once; a collective."""
        if self._lanes is None and not self.on_stream:
            self._lanes = Lanes.of(self.world, self._node_size)

    def codec(self, index: int, name: str) -> Codec:
        """Return bucket `index`'s codec called `name`."""
        if (index, name) not in self._codecs:
            kind = KINDS.get(name, TwoShot)
            bucket = replace(self.plan.buckets[index], codec=name)  # "safe" was decided
            codec = kind(bucket, self.world.rank, self.world.size, self._memory)
            self._codecs[index, name] = codec
        return self._codecs[index, name]

    def _name(self, index: int, autocast: Autocast) -> str:
        """Return what bucket `index` travels in now."""
        name = self.exact.codec(autocast, index)
        if self.instead is not None and name in STATEFUL:
            return self.instead or self.plan.buckets[index].dtype
        return name

    def factor(self, index: int, autocast: Autocast) -> float:
        """Return what the gradients of bucket `index` are to be multiplied with while packing.

        gloo knows sums only; dividing on the way into the bucket costs no pass of its own.
        """
        plain = self._name(index, autocast) == self.plan.buckets[index].dtype
        return 1.0 / self.world.size if plain and not self.on_stream else 1.0

    def wire_dtype(self, index: int, autocast: Autocast) -> torch.dtype:
        """Return the dtype in which one all-reduce sends bucket `index`; its own for codecs.

        NCCL's own kernels are faster than two shots of halves.
        """
        halves = self.on_stream and self._name(index, autocast) == "bfloat16"
        return torch.bfloat16 if halves else self.plan.buckets[index].torch_dtype()

    def start(
        self,
        index: int,
        flat: Tensor,
        used: set[str],
        scale: Scale,
        autocast: Autocast,
        packed: Tensor | None = None,
    ) -> Handle:
        """Send bucket `index` on its way, as it is or encoded.

        Args:
            index: Bucket in the plan.
            flat: Its gradients `[numel]`, times `factor`; the averages once the result was waited
                for.
            used: Parameters that have a gradient on this rank.
            scale: What the loss was multiplied with.
            autocast: State of autocast in the forward, for `exact`.
            packed: Where the gradients are, in `wire_dtype` or that of `flat`; None for `flat`,
                which gets the averages in any case. `flat` for codecs.
        """
        self._decide()
        bucket = self.plan.buckets[index]
        name = self._name(index, autocast)
        what = f"bucket {index} ({bucket.slots[0].name} .. {bucket.slots[-1].name}) in {name}"
        wire_dtype = self.wire_dtype(index, autocast)
        if name == bucket.dtype or wire_dtype is not bucket.torch_dtype():
            self._plain.append(flat)
            wire = (flat if packed is None else packed).to(wire_dtype)  # itself, or a copy
            return self._all_reduce(flat, wire, what)
        exchange = self.codec(index, name).exchange(flat, used, scale)
        if self._lanes is None:
            world, groups = self.world, self._groups
            return StreamExchange(lambda: run(exchange, world, flat.device, groups), flat)
        handle = ThreadExchange(exchange, self.world, what)
        self._lanes.start(handle)
        return handle

    def _all_reduce(self, flat: Tensor, wire: Tensor, what: str) -> Handle:
        if self._engines is not None and wire.is_floating_point():
            return self._engines.start(wire, flat, what)
        # gloo knows sums only, see `factor`
        op = dist.ReduceOp.AVG if self.on_stream else dist.ReduceOp.SUM
        return AllReduce(dist.all_reduce(wire, op, async_op=True), wire, flat, self.world, what)

    def settle(self) -> None:
        """End a backward: keep what its exchanges left, if all gradients are finite."""
        plain, self._plain = self._plain, []
        self._memory.end_round()
        if not self.stateful:
            return
        found = [c.finite for c in self._codecs.values() if c.finite is not None]
        found += [flat.isfinite().all() for flat in plain]
        if not found:
            return
        finite = torch.stack(found).all()
        if finite.is_cuda:
            copy = torch.empty((), dtype=torch.bool, pin_memory=True)
            copy.copy_(finite, non_blocking=True)
            self._verdict = (copy, torch.cuda.current_stream(finite.device).record_event())
        else:
            self._verdict = (finite, None)

    def forget(self) -> None:
        """Drop what the exchanges of a backward left that counts for nothing."""
        self._verdict, self._plain = None, []
        for codec in self._codecs.values():
            codec.discard()

    def drop(self, instead: str) -> None:
        """Give lossy codecs up for good, with all that they keep.

        Args:
            instead: As the attribute; not None.
        """
        self.forget()
        self.instead, self.stateful = instead, False
        self._codecs = {k: codec for k, codec in self._codecs.items() if k[1] not in STATEFUL}
        self._memory.forget()

    def _decide(self) -> None:
        if self._verdict is None:
            return
        finite, event = self._verdict
        self._verdict = None
        if event is not None:
            event.synchronize()
        for codec in self._codecs.values():
            if finite:
                codec.commit()
            else:
                codec.discard()

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return residuals and bases by parameter, on the CPU; a collective where there are any."""
        self._decide()
        found: dict[str, dict[str, Tensor]] = {}
        for (index, _), codec in sorted(self._codecs.items()):
            mean = run(codec.mean_residual(), self.world, self.device, self._groups)
            if mean is not None:
                for slot in self.plan.buckets[index].slots:
                    part = slot.view(mean).cpu().clone(memory_format=torch.contiguous_format)
                    found.setdefault(slot.name, {})[RESIDUAL] = part
            for name, basis in codec.bases():
                plain = basis.detach().cpu().clone(memory_format=torch.contiguous_format)
                found.setdefault(name, {})[BASIS] = plain
        return found

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Go on from what `state` returned; parameters it does not name start afresh.

        Does nothing once the codecs were dropped: their residuals would never be sent.

        Raises:
            ValueError: A residual does not have its parameter's shape; names it.
        """
        if not self.stateful:
            return
        self.forget()
        for index, bucket in enumerate(self.plan.buckets):
            if bucket.codec not in STATEFUL:
                continue
            codec = self.codec(index, bucket.codec)
            mean = torch.zeros(bucket.flags_offset, device=self.device)
            for slot in bucket.slots:
                mine = state.get(slot.name, {})
                _fill(slot.view(mean), mine.get(RESIDUAL), slot.name)
                if BASIS in mine:
                    codec.load_basis(slot.name, mine[BASIS].to(self.device))
            codec.load_residual(mean)


_known: "weakref.WeakKeyDictionary[World, dict[int, Groups]]" = weakref.WeakKeyDictionary()


def _groups(world: World, node_size: int) -> Groups:
    """Return groups beside the default one; the first call for nodes is a collective."""
    known = _known.setdefault(world, {})
    if node_size not in known:
        known[node_size] = Groups(world, node_size, None)
    return known[node_size]


def _fill(view: Tensor, residual: Tensor | None, name: str) -> None:
    if residual is None:
        return
    if residual.shape != view.shape:
        raise ValueError(
            f"the compression state of {name} has shape {list(residual.shape)}, the parameter "
            f"{list(view.shape)}; load a state that was saved for this model"
        )
    view.copy_(residual)
