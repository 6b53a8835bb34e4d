"""The communication plan: which gradients share an all-reduce, in which order and format.

The plan comes from the registered parameters alone, never from a captured graph, so every rank can
make it before anything is compiled, and a compiled rank and an eager one execute the same sequence
of collectives. Order: the reverse of registration, which is about the order in which a backward
produces gradients. Method: Li et al. (2020), PyTorch Distributed, section 3.2.3 (bucketing).
    Differs: bucket size follows the model (a sixteenth of the bytes), and the last bucket is an
    eighth of the others, since nothing is left to hide it behind.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from magi_train.core import compat
from magi_train.core.config import CommConfig
from magi_train.core.passes import Plan

MIB = 2**20
ALIGN_BYTES = 256
"""Each gradient starts at a multiple of this, so that kernels may use wide loads on it."""
AUTO_BUCKETS = 16
AUTO_LEAST_BYTES, AUTO_MOST_BYTES = 8 * MIB, 128 * MIB
"""Below, latency counts more than an early start; above, nothing is gained."""
LAST_BUCKET_FRACTION = 0.125


@dataclass(frozen=True)
class Slot:
    """Where one gradient lies in its bucket.

    Attributes:
        name: The parameter, as in `named_parameters()`.
        offset: First element in the bucket.
        shape: Of the parameter.
        strides: In which its gradient lies in the bucket: those of the parameter, or contiguous
            ones where it has gaps (a slice of a larger tensor).
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the part of the bucket `flat` that is this gradient."""
        return flat.as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class Bucket:
    """Gradients that travel together in one flat tensor.

    Behind the slots lies one element per slot that says whether any rank used the parameter.

    Attributes:
        slots: The gradients, in launch order.
        dtype: Of the parameters and of the flat tensor, for example "float32".
        wire_dtype: What travels.
        numel: Elements of the flat tensor, flags included.
        flags_offset: First of the flags.
    """

    slots: tuple[Slot, ...]
    dtype: str
    wire_dtype: str
    numel: int
    flags_offset: int

    def torch_dtype(self) -> torch.dtype:
        """Return `dtype` as torch's object."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CommPlan(Plan):
    """All buckets, in the order in which every rank launches them."""

    buckets: tuple[Bucket, ...]
    world_size: int

    def wire_bytes(self) -> int:
        """Return the bytes that one rank hands to the all-reduces of a step."""
        return sum(b.numel * getattr(torch, b.wire_dtype).itemsize for b in self.buckets)


def plan_buckets(
    parameters: Iterable[tuple[str, torch.Tensor]], config: CommConfig, world_size: int
) -> CommPlan:
    """Return the buckets of `parameters`, given in registration order, frozen ones left out."""
    trainable = [(name, p) for name, p in parameters if p.requires_grad]
    total = sum(p.numel() * p.element_size() for _, p in trainable)
    if config.bucket_mib is not None:
        cap = int(config.bucket_mib * MIB)
    else:
        cap = min(max(total // AUTO_BUCKETS, AUTO_LEAST_BYTES), AUTO_MOST_BYTES)
    groups: list[list[tuple[str, torch.Tensor]]] = []
    size, left, in_tail = 0, total, False
    for name, p in reversed(trainable):
        num_bytes = p.numel() * p.element_size()
        tail_starts = left <= cap * LAST_BUCKET_FRACTION and not in_tail
        in_tail = in_tail or tail_starts
        full = size + num_bytes > cap
        if not groups or full or tail_starts or groups[-1][-1][1].dtype != p.dtype:
            groups.append([])
            size = 0
        groups[-1].append((name, p))
        size += num_bytes
        left -= num_bytes
    return CommPlan(tuple(_bucket(group, config) for group in groups), world_size)


def _bucket(group: list[tuple[str, torch.Tensor]], config: CommConfig) -> Bucket:
    dtype = group[0][1].dtype
    align = max(ALIGN_BYTES // dtype.itemsize, 1)
    slots, offset = [], 0
    for name, p in group:
        dense = compat.is_non_overlapping_and_dense(p)
        strides = p.stride() if dense else torch.empty(p.shape, device="meta").stride()
        slots.append(Slot(name, offset, tuple(p.shape), strides))
        offset += -(-p.numel() // align) * align
    name = str(dtype).removeprefix("torch.")
    wire = config.wire_dtype if dtype is torch.float32 else name
    return Bucket(tuple(slots), name, wire, offset + len(group), offset)
