"""The communication plan: which gradients share an all-reduce, in which order and format.

The plan comes from the registered parameters alone, never from a captured graph, so every rank can
make it before anything is compiled, and a compiled rank and an eager one execute the same sequence
of collectives. Order: the reverse of registration, which is about the order in which a backward
produces gradients. Method: Li et al. (2020), PyTorch Distributed, section 3.2.3 (bucketing).
    Differs: bucket size follows the model (a sixteenth of the bytes), and the last bucket is an
    eighth of the others, since nothing is left to hide it behind.

A bucket has one codec (`comm.codecs`). `CommConfig.compression` names it, or a level that stands
for one, and these parameters are exempt from the lossy ones, in buckets of their own:

* those of one dimension (biases, norms), in float32: few bytes, and sensitive;
* the first and the last matrix of the model (embedding and head, as a rule), in bfloat16, where
  both together are below a tenth of the bytes;
* for low rank, matrices whose factors are not less than half their size, in bfloat16.

Only float32 parameters are encoded; others travel as they are.
"""

import math
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
BLOCK = 256
"""Elements that share a scale in int8 and fp8."""
LEVELS = {"balanced": "int8", "aggressive": "powersgd"}
ENDS_FRACTION = 0.1
"""The first and the last matrix are exempt only where they are less than this part of the bytes."""


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

    def numel(self) -> int:
        """Return the elements of the gradient, which lie side by side."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Gradients that travel together in one flat tensor.

    Behind the slots lies one element per slot that says whether any rank used the parameter.

    Attributes:
        slots: The gradients, in launch order.
        dtype: Of the parameters and of the flat tensor, for example "float32".
        codec: How it travels: the name of `dtype` for as it is, a codec's name, or "safe", which
            the reducer decides when it has seen gradients.
        numel: Elements of the flat tensor, flags included.
        flags_offset: First of the flags.
        rank: Columns of the factors, for low rank.
    """

    slots: tuple[Slot, ...]
    dtype: str
    codec: str
    numel: int
    flags_offset: int
    rank: int = 0

    def torch_dtype(self) -> torch.dtype:
        """Return `dtype` as torch's object."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def wire_bytes(self) -> int:
        """Return about how many bytes an all-reduce of as many would have to carry."""
        n = self.flags_offset
        if self.codec in ("int8", "fp8"):
            return n + n // BLOCK * 4
        if self.codec == "powersgd":
            return sum(4 * self.rank * sum(matrix_shape(s.shape)) for s in self.slots)
        return n * (2 if self.codec == "bfloat16" else self.torch_dtype().itemsize)


@dataclass(frozen=True)
class CommPlan(Plan):
    """All buckets, in the order in which every rank launches them."""

    buckets: tuple[Bucket, ...]
    world_size: int

    def wire_bytes(self) -> int:
        """Return the bytes of all gradients of a step as they travel."""
        return sum(b.wire_bytes() for b in self.buckets)

    def codecs(self) -> dict[str, int]:
        """Return how many parameters travel in each codec."""
        counts: dict[str, int] = {}
        for b in self.buckets:
            counts[b.codec] = counts.get(b.codec, 0) + len(b.slots)
        return counts


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a parameter's shape as that of a matrix: the first dimension, and all others."""
    return shape[0], math.prod(shape[1:])


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
    codecs = _codecs(trainable, config)
    open_groups: dict[tuple[torch.dtype, str, bool], _Group] = {}
    groups: list[_Group] = []
    left, tail = total, False
    for position, (name, p) in enumerate(reversed(trainable)):
        num_bytes = p.numel() * p.element_size()
        tail = tail or left <= cap * LAST_BUCKET_FRACTION
        exempt = config.compression is not None and p.dim() < 2
        key = (p.dtype, codecs[name], tail and not exempt)
        if key not in open_groups or open_groups[key].num_bytes + num_bytes > cap:
            open_groups[key] = _Group([])
            groups.append(open_groups[key])
        open_groups[key].add(name, p, position)
        left -= num_bytes
    groups.sort(key=lambda group: group.complete_at)  # a bucket leaves with its last gradient
    return CommPlan(
        tuple(_bucket(g.members, codecs[g.members[0][0]], config, world_size) for g in groups),
        world_size,
    )


@dataclass
class _Group:
    members: list[tuple[str, torch.Tensor]]
    num_bytes: int = 0
    complete_at: int = 0

    def add(self, name: str, parameter: torch.Tensor, position: int) -> None:
        self.members.append((name, parameter))
        self.num_bytes += parameter.numel() * parameter.element_size()
        self.complete_at = position


def _codecs(trainable: list[tuple[str, torch.Tensor]], config: CommConfig) -> dict[str, str]:
    """Return each parameter's codec."""
    wanted: str | None = config.compression
    names = {name: str(p.dtype).removeprefix("torch.") for name, p in trainable}
    if wanted is None:
        return names
    wanted = LEVELS.get(wanted, wanted)
    floats = [(name, p) for name, p in trainable if p.dtype is torch.float32 and p.numel()]
    matrices = [(name, p) for name, p in floats if p.dim() > 1]
    if wanted == "bfloat16":
        return names | {name: wanted for name, _ in floats}
    names |= {name: wanted for name, _ in matrices}
    if wanted == "safe" or not matrices:
        return names
    ends = dict([matrices[0], matrices[-1]])
    total = sum(p.numel() for _, p in floats)
    if sum(p.numel() for p in ends.values()) < ENDS_FRACTION * total:
        names |= dict.fromkeys(ends, "bfloat16")
    for name, p in matrices if wanted == "powersgd" else ():
        rows, columns = matrix_shape(tuple(p.shape))
        if 2 * config.low_rank * (rows + columns) > rows * columns:
            names[name] = "bfloat16"
    return names


def _bucket(
    group: list[tuple[str, torch.Tensor]], codec: str, config: CommConfig, world_size: int
) -> Bucket:
    dtype = group[0][1].dtype
    align = max(ALIGN_BYTES // dtype.itemsize, 1)
    name = str(dtype).removeprefix("torch.")
    end = 1
    if codec != name:
        align, end = BLOCK, BLOCK * world_size  # whole blocks, and as many on every rank
    slots, offset = [], 0
    for parameter_name, p in group:
        dense = compat.is_non_overlapping_and_dense(p)
        strides = p.stride() if dense else torch.empty(p.shape, device="meta").stride()
        slots.append(Slot(parameter_name, offset, tuple(p.shape), strides))
        offset += -(-p.numel() // align) * align
    offset = -(-offset // end) * end
    rank = config.low_rank if codec == "powersgd" else 0
    return Bucket(tuple(slots), name, codec, offset + len(group), offset, rank)
