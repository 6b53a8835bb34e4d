"""The communication plan: which gradients share an all-reduce, in which order and format.

The plan comes from the registered parameters alone, never from a captured graph, so every rank can
make it before anything is compiled, and a compiled rank and an eager one execute the same sequence
of collectives. Order: the reverse of registration, which is about the order in which a backward
produces gradients. Method: Li et al. (2020), PyTorch Distributed, section 3.2.3 (bucketing).
    Differs: with a measured link, sizes are those that `comm.schedule` predicts to be best for it;
    without, a sixteenth of the bytes. The last bucket is an eighth of the others, since nothing is
    left to hide it behind. Once it was seen when gradients appear, that is the order.

A bucket has one codec (`comm.codecs`). `CommConfig.compression` names it, or a level that stands
for one, and these parameters are exempt from the lossy ones, in buckets of their own:

* those of one dimension (biases, norms), in float32: few bytes, and sensitive;
* the first and the last matrix of the model (embedding and head, as a rule), in bfloat16, where
  both together are below a tenth of the bytes;
* for low rank, matrices whose factors are not less than half their size, in bfloat16.

Only float32 parameters are encoded; others travel as they are. "hierarchical" needs nodes: where
every rank is one it is int8; where all ranks are one, gradients travel as they are. "balanced" is
hierarchical where there are several nodes of several ranks.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from magi_train.comm.link import Link
from magi_train.comm.schedule import SMALL, Message, Sizes, choose, exposed
from magi_train.core import compat
from magi_train.core.config import CommConfig
from magi_train.core.passes import Plan

MIB = 2**20
ALIGN_BYTES = 256
"""Each gradient starts at a multiple of this, so that kernels may use wide loads on it."""
AUTO_BUCKETS = 16
AUTO_LEAST_BYTES, AUTO_MOST_BYTES = 8 * MIB, 128 * MIB
"""Below, latency counts more than an early start; above, nothing is gained."""
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
        node_size: Ranks in a node, for "hierarchical".
    """

    slots: tuple[Slot, ...]
    dtype: str
    codec: str
    numel: int
    flags_offset: int
    rank: int
    node_size: int = 1

    def torch_dtype(self) -> torch.dtype:
        """Return `dtype` as torch's object."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def wire_bytes(self) -> int:
        """Return about how many bytes an all-reduce of as many would have to carry."""
        n = self.flags_offset
        if self.codec in ("int8", "fp8"):
            return n + n // BLOCK * 4
        if self.codec == "hierarchical":  # what crosses between nodes
            return (n + n // BLOCK * 4) // self.node_size
        if self.codec == "powersgd":
            return sum(4 * self.rank * sum(matrix_shape(s.shape)) for s in self.slots)
        return n * (2 if self.codec == "bfloat16" else self.torch_dtype().itemsize)

    def collectives(self) -> int:
        """Return how many collectives follow each other."""
        if self.codec == "hierarchical":
            return 4
        return 2 if self.codec in ("bfloat16", "int8", "fp8", "powersgd") else 1


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


Named = list[tuple[str, torch.Tensor]]


def plan_buckets(
    parameters: Iterable[tuple[str, torch.Tensor]],
    config: CommConfig,
    world_size: int,
    link: Link | None = None,
    ready: Mapping[str, float] | None = None,
    node_size: int = 1,
) -> CommPlan:
    """Return the buckets of `parameters`, given in registration order, frozen ones left out.

    Args:
        parameters: By name.
        config: A fixed size, codecs.
        world_size: Ranks.
        link: What sizes are to be best for; None for sizes by rule.
        ready: Seconds from the first gradient to that of each parameter; those it does not name
            have none until the end of the backward. None: not known.
        node_size: Ranks in a node; divides `world_size`.
    """
    trainable = [(name, p) for name, p in parameters if p.requires_grad]
    codecs = _codecs(trainable, config, world_size, node_size)
    ordered = trainable[::-1]
    if ready is not None:
        ordered.sort(key=lambda member: ready.get(member[0], math.inf))
    total = sum(num_bytes(p) for _, p in trainable)

    def buckets(sizes: Sizes) -> tuple[Bucket, ...]:
        groups = _grouped(ordered, codecs, config, sizes)
        made = (_bucket(g, codecs[g[0][0]], config, world_size) for g in groups)
        return tuple(
            replace(b, node_size=node_size) if b.codec == "hierarchical" else b for b in made
        )

    if config.bucket_mib is not None or link is None or not trainable:
        automatic = min(max(total // AUTO_BUCKETS, AUTO_LEAST_BYTES), AUTO_MOST_BYTES)
        cap = automatic if config.bucket_mib is None else int(config.bucket_mib * MIB)
        sizes = Sizes(cap, cap, int(cap * SMALL))
    else:
        known = link
        sizes = choose(total, lambda each: predict(buckets(each), known, ready))
    return CommPlan(buckets(sizes), world_size)


def predict(
    buckets: tuple[Bucket, ...], link: Link, ready: Mapping[str, float] | None = None
) -> float:
    """Return for how many seconds the all-reduces of `buckets` are expected to hold a step up."""
    if ready is not None:
        end = max(ready.values(), default=0.0)
        at = [max(ready.get(s.name, end) for s in b.slots) for b in buckets]
        return exposed(_messages(buckets, at), link, end)
    total = sum(s.numel() for b in buckets for s in b.slots) or 1
    parts, done = [], 0
    for b in buckets:
        done += sum(s.numel() for s in b.slots)
        parts.append(done / total)
    return exposed(_messages(buckets, parts), link)


def _messages(buckets: tuple[Bucket, ...], ready: list[float]) -> list[Message]:
    return [
        Message(b.wire_bytes(), b.collectives(), at) for b, at in zip(buckets, ready, strict=True)
    ]


def num_bytes(parameter: torch.Tensor) -> int:
    """Return the bytes of a parameter's gradient."""
    return parameter.numel() * parameter.element_size()


def _grouped(
    ordered: Named, codecs: dict[str, str], config: CommConfig, sizes: Sizes
) -> list[Named]:
    """Divide parameters, in the order of their gradients, into buckets, in launch order."""
    left, tail = sum(num_bytes(p) for _, p in ordered), False
    filling: dict[tuple[torch.dtype, str, bool], _Group] = {}
    groups: list[_Group] = []
    for position, (name, p) in enumerate(ordered):
        tail = tail or left <= sizes.last
        exempt = config.compression is not None and p.dim() < 2
        key = (p.dtype, codecs[name], tail and not exempt)
        if key not in filling:
            filling[key] = _Group([], sizes.cap if groups else sizes.first)
            groups.append(filling[key])
        group = filling[key]
        group.add(name, p, position)
        if group.num_bytes >= group.cap:  # full; a bias behind a large weight goes with the next
            del filling[key]
        left -= num_bytes(p)
    groups.sort(key=lambda group: group.complete_at)  # a bucket leaves with its last gradient
    return [group.members for group in groups]


@dataclass
class _Group:
    members: Named
    cap: int
    num_bytes: int = 0
    complete_at: int = 0

    def add(self, name: str, parameter: torch.Tensor, position: int) -> None:
        self.members.append((name, parameter))
        self.num_bytes += num_bytes(parameter)
        self.complete_at = position


def _codecs(
    trainable: Named, config: CommConfig, world_size: int, node_size: int
) -> dict[str, str]:
    """Return each parameter's codec."""
    wanted: str | None = config.compression
    names = {name: str(p.dtype).removeprefix("torch.") for name, p in trainable}
    if wanted is None:
        return names
    wanted = LEVELS.get(wanted, wanted)
    if config.compression in ("hierarchical", "balanced"):
        if 1 < node_size < world_size:
            wanted = "hierarchical"
        elif config.compression == "hierarchical":  # every rank a node, or one node of all
            wanted = "int8" if node_size == 1 else None
    if wanted is None:
        return names
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


def _bucket(group: Named, codec: str, config: CommConfig, world_size: int) -> Bucket:
    dtype = group[0][1].dtype
    align = ALIGN_BYTES // dtype.itemsize
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
