"""Shards: the pieces of an optimizer's parameters on this rank, and the gathering of pieces.

A piece is a view, `[elements]`, of the memory of its parameter. While the optimizer's own step runs
(`as_pieces`), its groups hold pieces instead of parameters, with the same pieces of the gradients,
and its state is that of the pieces: no update knows that it is one of a part. Afterwards
`gather_weights` writes what other ranks updated.
"""

import contextlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from magi_train.core.errors import MagiError
from magi_train.core.world import World
from magi_train.memory.shard_plan import Segment, ShardBucket, ShardPlan

IN_FLIGHT = 2
"""Collectives that run at a time: one travels while what another brought is put in its place."""


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return a dense tensor's elements as `[numel]`, a view, in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def ordered_as(p: Tensor, value: Tensor) -> Tensor:
    """Return a tensor of the parameter's shape as `[numel]`, in the order of `p`'s memory."""
    if _strides(value) != _strides(p):
        value = torch.empty_like(p, dtype=value.dtype, device=value.device).copy_(value)
    return in_memory_order(value)


def _strides(tensor: Tensor) -> list[int]:
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


class ShadowsOf(Protocol):
    """What is asked of low-precision copies, see fusion/shadow.py."""

    def of(self, parameter: Tensor) -> Tensor | None:
        """Return the copy of a parameter, or None."""
        ...

    def before_step(self, parameter: Tensor) -> Tensor | None:
        """Return the copy of a parameter, true to it as it is now, or None."""
        ...

    def after_step(self, parameters: Iterable[Tensor]) -> None:
        """Note that the copies of these parameters are true to them."""
        ...


class NoShadows:
    """Nobody keeps copies."""

    def of(self, parameter: Tensor) -> Tensor | None:
        """Return None."""
        return None

    before_step = of

    def after_step(self, parameters: Iterable[Tensor]) -> None:
        """Do nothing."""


class Slot:
    """One parameter that is cut.

    Attributes:
        name: For messages.
        parameter: The user's tensor.
        start: First element, in the order of memory, that this rank owns.
        end: Last + 1; equal to `start` where it owns none.
    """

    def __init__(self, name: str, parameter: Tensor, start: int, end: int) -> None:
        self.name, self.parameter, self.start, self.end = name, parameter, start, end
        self._made_for = (parameter.dtype, parameter.device, parameter.shape)
        self._known: tuple[int, tuple[int, ...]] | None = None
        self._flat = self._piece = parameter

    def flat(self) -> Tensor:
        """Return all elements as `[numel]`; a write moves the parameter's version counter.

        Raises:
            MagiError: The parameter has another type, device or shape now.
        """
        p = self.parameter
        known = (p.data_ptr(), p.stride())  # an assignment to p.data changes it
        if known != self._known:
            if (p.dtype, p.device, p.shape) != self._made_for:
                raise MagiError(
                    f"{self.name} is {p.dtype} on {p.device} now, but its optimizer state was "
                    f"sharded for {self._made_for[0]} on {self._made_for[1]}; move or convert a "
                    "model before it is prepared"
                )
            self._flat, self._known = in_memory_order(p.detach()), known
            self._piece = self._flat[self.start : self.end]
        return self._flat

    def piece(self) -> Tensor:
        """Return this rank's elements as a view; its `.grad` is that part of the gradient."""
        self.flat()
        g = self.parameter.grad
        if g is None:
            self._piece.grad = None
            return self._piece
        if g.layout is not torch.strided or type(g) is not Tensor:
            raise MagiError(
                f"the gradient of {self.name} is sparse or a tensor subclass; sharded optimizer "
                "state takes dense ones: use Embedding(sparse=False)"
            )
        if g.dtype is not self._piece.dtype:
            self._piece.grad_dtype = None
        self._piece.grad = ordered_as(self.parameter, g)[self.start : self.end]
        return self._piece


class Bucket:
    """A bucket of the plan and its parameters.

    Attributes:
        plan: Where everything lies.
        slots: One for each parameter.
        device: Of the parameters when they were cut; pieces travel from there.
        rounds: For each collective, first and last + 1 of the elements of a chunk, and for each
            rank what lies there.
    """

    def __init__(self, plan: ShardBucket, parameters: Sequence[Tensor], world: World) -> None:
        self.plan, self.device = plan, parameters[0].device
        self.slots = [
            Slot(plan.names[i], p, *plan.piece(i, world.rank)) for i, p in enumerate(parameters)
        ]
        starts = [rank * plan.chunk for rank in range(world.size)]
        self.rounds: list[tuple[int, int, list[list[Segment]]]] = [
            (low, high, [list(plan.segments(s + low, s + high)) for s in starts])
            for low, high in plan.rounds(world.size, parameters[0].element_size())
        ]


@dataclass
class _Flying:
    """A collective that runs, and what it reads and writes."""

    work: Any
    sent: Tensor
    received: Tensor
    segments: list[list[Segment]]


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor to the first."""
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [value for _, value in pairs])


class Shards:
    """Everything that one optimizer's parameters were cut into.

    Args:
        world: The ranks.
        timeout_seconds: For agreements between ranks.

    Attributes:
        slots: By the parameter's `id`.
        shadows: The low-precision copies of parameters that the optimizer's kernel keeps.
    """

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self.world, self.timeout_seconds = world, timeout_seconds
        self.buckets: list[Bucket] = []
        self.slots: dict[int, Slot] = {}
        self.shadows: ShadowsOf = NoShadows()
        self._slot_of_piece: dict[int, Slot] = {}
        self._shadow_written: set[int] = set()

    def add(self, plan: ShardPlan, parameters: Sequence[Tensor]) -> None:
        """Cut more parameters, given in the order of the plan's buckets."""
        left = iter(parameters)
        for bucket in plan.buckets:
            made = Bucket(bucket, [next(left) for _ in bucket.names], self.world)
            self.buckets.append(made)
            self.slots |= {id(slot.parameter): slot for slot in made.slots}

    # -- a step ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def as_pieces(self, optimizer: Optimizer) -> Iterator[None]:
        """While this holds, groups and state of the optimizer are those of this rank's pieces."""
        whole, state = [g["params"] for g in optimizer.param_groups], optimizer.state
        pieces = {key: s.piece() for key, s in self.slots.items() if s.start < s.end}
        own: defaultdict[Tensor, Any] = defaultdict(dict)
        own |= {pieces.get(id(p), p): held for p, held in state.items()}
        self._slot_of_piece = {id(piece): self.slots[key] for key, piece in pieces.items()}
        for group, parameters in zip(optimizer.param_groups, whole, strict=True):
            group["params"] = [
                pieces.get(id(p), p) for p in parameters if id(p) in pieces or not self._cut(p)
            ]
        optimizer.state = own
        try:
            yield
        finally:
            for group, parameters in zip(optimizer.param_groups, whole, strict=True):
                group["params"] = parameters
            optimizer.state = state
            for key, held in own.items():
                slot = self._slot_of_piece.get(id(key))
                state[key if slot is None else slot.parameter] = held
            for piece in pieces.values():
                piece.grad = None  # the user's zero_grad must free the memory

    def _cut(self, p: Tensor) -> bool:
        return id(p) in self.slots

    def gather_weights(self) -> None:
        """Give every rank the parameters that others have updated.

        A bucket travels unless all of it is frozen. Parameters without a gradient did not change.
        """
        for bucket in self.buckets:
            stepped = [s.parameter.grad is not None for s in bucket.slots]
            if not any(stepped) and not any(s.parameter.requires_grad for s in bucket.slots):
                continue
            self._gather_bucket(bucket, stepped)

    def _gather_bucket(self, bucket: Bucket, stepped: list[bool]) -> None:
        def mine(part: Segment) -> Tensor:
            return bucket.slots[part.slot].flat().narrow(0, part.start, part.length)

        def place(rank: int, part: Segment) -> Tensor | None:
            return mine(part) if rank != self.world.rank and stepped[part.slot] else None

        self.exchange(bucket, getattr(torch, bucket.plan.dtype), mine, place, "updated weights")

    # -- collectives -----------------------------------------------------------------------------

    def exchange(
        self,
        bucket: Bucket,
        dtype: torch.dtype,
        mine: Callable[[Segment], Tensor | None],
        place: Callable[[int, Segment], Tensor | None],
        what: str,
    ) -> None:
        """Send this rank's chunk of a bucket to all ranks, and put down what they sent.

        Args:
            bucket: Whose elements travel.
            dtype: In which.
            mine: Returns the elements of a segment of this rank, `[length]`; None for zeros.
            place: Returns where to a rank's segment is copied, `[length]`; None for nowhere.
            what: For messages.
        """
        what = f"the {what} of {bucket.plan.names[0]} .. {bucket.plan.names[-1]}"
        pending: deque[_Flying] = deque()
        for low, high, segments in bucket.rounds:
            if len(pending) == IN_FLIGHT:
                self._land(pending.popleft(), place, what)
            sent = torch.zeros(high - low, dtype=dtype, device=bucket.device)
            parts = [(part, mine(part)) for part in segments[self.world.rank]]
            _copy([(sent.narrow(0, p.at, p.length), v) for p, v in parts if v is not None])
            received = torch.empty(len(sent) * self.world.size, dtype=dtype, device=bucket.device)
            raw = (received.view(torch.uint8), sent.view(torch.uint8))  # any dtype
            work = dist.all_gather_into_tensor(*raw, async_op=True)
            pending.append(_Flying(work, sent, received, segments))
        while pending:
            self._land(pending.popleft(), place, what)

    def _land(
        self, flying: "_Flying", place: Callable[[int, Segment], Tensor | None], what: str
    ) -> None:
        received, length = flying.received, len(flying.sent)
        self.world.wait(flying.work, received.device, what)
        pairs = []
        for rank, parts in enumerate(flying.segments):
            for part in parts:
                target = place(rank, part)
                if target is not None:
                    pairs.append((target, received.narrow(0, rank * length + part.at, part.length)))
        _copy(pairs)

    # -- shadows ---------------------------------------------------------------------------------

    def shadow_of_piece(self, piece: Tensor) -> Tensor | None:
        """Return the part of a parameter's low-precision copy that a kernel shall write."""
        slot = self._slot_of_piece.get(id(piece))
        if slot is None:
            return self.shadows.before_step(piece)
        shadow = self.shadows.before_step(slot.parameter)
        return None if shadow is None else in_memory_order(shadow)[slot.start : slot.end]

    def on_pieces_written(self, pieces: Sequence[Tensor]) -> None:
        """Note whose copies a kernel has written."""
        slots = [self._slot_of_piece.get(id(piece)) for piece in pieces]
        self.shadows.after_step([p for p, s in zip(pieces, slots, strict=True) if s is None])
        self._shadow_written |= {id(s.parameter) for s in slots if s is not None}

    def cast_gathered(self) -> None:
        """Bring the low-precision copies up to what other ranks have written.

        Where a piece of this rank was not written by the kernel, all of the copy is stale, and its
        owner casts it anew before it is read.
        """
        pairs, done = [], []
        for key, slot in self.slots.items():
            skipped = slot.start < slot.end and key not in self._shadow_written
            shadow = self.shadows.of(slot.parameter)
            if slot.parameter.grad is None or skipped or shadow is None:
                continue
            done.append(slot.parameter)
            low, flat = in_memory_order(shadow), slot.flat()
            for start, end in ((0, slot.start), (slot.end, flat.numel())):
                if start < end:
                    pairs.append((low[start:end], flat[start:end]))
        _copy(pairs)
        self._shadow_written.clear()
        self.shadows.after_step(done)
