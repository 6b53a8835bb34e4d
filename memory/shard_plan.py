"""Which rank keeps the optimizer's state for which elements: buckets, cut into one chunk a rank.

The elements of a bucket's parameters stand one behind the other, each parameter in the order of its
memory. Rank r owns the r-th of `world_size` equal chunks, so ranks differ by a few elements at
most, and a rank owns mostly whole parameters: few rows for a fused kernel. A parameter has at most
one piece on a rank.

    bucket   | weight 0 | w 1 |     weight 2     |
    chunks   |    rank 0    |    rank 1    |

The plan comes from the optimizer's parameters alone, in their order, so that every rank can make
it. Buckets are about as large as one collective that gathers them; one that is larger, because of a
large parameter, is gathered in rounds.
Source: Rajbhandari et al. (2020), ZeRO, section 5.1 (P_os).
    Differs: gradients are not partitioned; they are averaged in full before the step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from magi_train.core.passes import Plan

BUCKET_BYTES = 128 * 2**20
"""At which a bucket is full, and what one collective gathers at most."""
ALIGN = 16
"""Elements: parameters and chunks start at multiples, so that kernels may use wide loads."""


@dataclass(frozen=True)
class Segment:
    """A run of elements of one parameter that lies in one chunk.

    Attributes:
        slot: Position of the parameter in its bucket.
        start: First element, counted in the order of the parameter's memory.
        length: Elements.
        at: Where it starts in the part of the chunk that was asked for.
    """

    slot: int
    start: int
    length: int
    at: int


@dataclass(frozen=True)
class ShardBucket:
    """Parameters that are cut together.

    Attributes:
        names: For messages, one for each parameter.
        numels: Elements of each parameter.
        offsets: Where each one starts.
        dtype: Of the parameters, for example "float32".
        chunk: Elements of one rank.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    dtype: str
    chunk: int

    def segments(self, low: int, high: int) -> Iterator[Segment]:
        """Return what lies between two elements of the bucket."""
        for slot, (offset, numel) in enumerate(zip(self.offsets, self.numels, strict=True)):
            start, end = max(low, offset), min(high, offset + numel)
            if start < end:
                yield Segment(slot, start - offset, end - start, start - low)

    def piece(self, slot: int, rank: int) -> tuple[int, int]:
        """Return first and last + 1 of the elements of a parameter that `rank` owns."""
        first, low = self.offsets[slot], rank * self.chunk
        start = min(max(low - first, 0), self.numels[slot])
        return start, max(start, min(low + self.chunk - first, self.numels[slot]))

    def rounds(self, world_size: int, itemsize: int) -> Iterator[tuple[int, int]]:
        """Return the parts of a chunk that all ranks gather at a time: first and last + 1."""
        most = max(BUCKET_BYTES // (itemsize * world_size) // ALIGN, 1) * ALIGN
        for low in range(0, self.chunk, most):
            yield low, min(low + most, self.chunk)


@dataclass(frozen=True)
class ShardPlan(Plan):
    """All buckets, in the order in which every rank gathers them."""

    buckets: tuple[ShardBucket, ...]
    world_size: int

    def owned(self, rank: int) -> int:
        """Return how many elements a rank keeps state for."""
        pieces = [b.piece(s, rank) for b in self.buckets for s in range(len(b.numels))]
        return sum(end - start for start, end in pieces)


def plan_shards(parameters: Sequence[tuple[str, Tensor]], world_size: int) -> ShardPlan:
    """Return the buckets of `parameters`, given with a name for each, in the optimizer's order."""
    groups: list[list[tuple[str, Tensor]]] = []
    open_groups: dict[torch.dtype, tuple[list[tuple[str, Tensor]], int]] = {}
    for name, p in parameters:
        group, size = open_groups.get(p.dtype, ([], 0))
        if not group or size + p.nbytes > BUCKET_BYTES:
            group, size = [], 0
            groups.append(group)
        group.append((name, p))
        open_groups[p.dtype] = (group, size + p.nbytes)
    return ShardPlan(tuple(_bucket(group, world_size) for group in groups), world_size)


def _bucket(group: list[tuple[str, Tensor]], world_size: int) -> ShardBucket:
    offsets, end = [], 0
    for _, p in group:
        offsets.append(end)
        end += -(-p.numel() // ALIGN) * ALIGN
    chunk = -(-end // (world_size * ALIGN)) * ALIGN
    dtype = str(group[0][1].dtype).removeprefix("torch.")
    names, numels = tuple(name for name, _ in group), tuple(p.numel() for _, p in group)
    return ShardBucket(names, numels, tuple(offsets), dtype, chunk)
