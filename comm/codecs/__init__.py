"""Codecs: how the gradients of one bucket travel when fewer bytes than float32's are to.

A codec is written as one straight piece of code, a generator. It yields each collective it needs
and is sent the result, so that what runs between the collectives, and where, is `lanes`' business:
threads beside gloo, a stream beside NCCL.

    encode -> yield Collective -> combine, encode -> yield Collective -> decode

| name | what travels | error feedback |
|---|---|---|
| bfloat16 | halves, summed in float32 (two_shot) | no |
| int8, fp8 | a byte an element and a float32 scale for 256 of them, summed in float32 | yes |
| hierarchical | float32 inside of a node, int8 between nodes (hierarchical) | yes |
| powersgd | two thin factors of each matrix (low_rank) | yes |

Rules for all of them, which the tests hold: the result is the same bit for bit on all ranks, since
everybody decodes the same bytes and sums run in rank order; an infinity or NaN of any rank reaches
all ranks; the state (residuals, bases) of an exchange counts only once it is committed.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from magi_train.comm.host_memory import HostMemory
from magi_train.comm.plan import Bucket

Scale = float | Tensor
Among = Literal["all", "node", "across"]


@dataclass(frozen=True)
class Collective:
    """A collective that a codec asks for.

    Attributes:
        kind: "all_to_all" (row r of the tensor goes to rank r; the result has a row of each rank),
            "all_gather" (the result has a row more of each rank), or "all_reduce" (the sum, in
            place).
        tensor: What this rank gives, contiguous.
        out: Where the result goes, contiguous; None for `tensor` itself, in an all-reduce.
        among: All ranks, those of this rank's node, or one rank of each node: those with the same
            place in it.
    """

    kind: Literal["all_to_all", "all_gather", "all_reduce"]
    tensor: Tensor
    out: Tensor | None = None
    among: Among = "all"


Exchange = Generator[Collective, Tensor, None]


class Codec(ABC):
    """What one bucket's gradients are encoded with, and what that leaves behind.

    Args:
        bucket: Whose gradients.
        rank: This process.
        world_size: Ranks.
        memory: For what an exchange needs; shared by the codecs of a plan.

    Attributes:
        finite: After an exchange: whether every decoded number is finite, a bool tensor `[]`, the
            same on all ranks. None for codecs that keep nothing.
        among: Whom `world_size` counts.
    """

    among: Among = "all"

    def __init__(
        self, bucket: Bucket, rank: int, world_size: int, memory: HostMemory | None = None
    ) -> None:
        self.bucket, self.rank, self.world_size = bucket, rank, world_size
        self._memory = memory or HostMemory()
        self.finite: Tensor | None = None
        self._kept: Any = None  # what counts, and what the last exchange would leave
        self._pending: Any = None
        self._flag_cache: dict[tuple[bool, ...], Tensor] = {}

    def _all_to_all(self, rows: Tensor) -> Collective:
        """Ask for row r `[ranks, n]` of this rank to go to rank r, for a row of each."""
        out = self._memory.empty(*rows.shape, dtype=rows.dtype, device=rows.device)
        return Collective("all_to_all", rows, out, self.among)

    def _all_gather(self, tensor: Tensor) -> Collective:
        """Ask for everybody's `tensor`, one behind the other."""
        numel = self.world_size * tensor.numel()
        out = self._memory.empty(numel, dtype=tensor.dtype, device=tensor.device)
        return Collective("all_gather", tensor, out, self.among)

    def _all_reduce(self, tensor: Tensor) -> Collective:
        """Ask for the sum, in place."""
        return Collective("all_reduce", tensor, None, self.among)

    @abstractmethod
    def exchange(self, flat: Tensor, used: set[str], scale: Scale) -> Exchange:
        """Turn this rank's gradients into the average of all ranks'.

        Args:
            flat: The bucket `[numel]`, zeros between the slots; the averages are written into it,
                and behind them, at `flags_offset`, for each slot a positive number if any rank used
                it.
            used: Parameters that have a gradient on this rank.
            scale: What the loss was multiplied with, so that residuals can be kept without it.
        """

    def commit(self) -> None:
        """Keep the state of the last exchange; without it the state before counts."""
        if self._pending is not None:
            self._kept, self._pending = self._pending, None

    def discard(self) -> None:
        """Forget the state of the last exchange."""
        self._pending = None

    def mean_residual(self) -> Generator[Collective, Tensor, Tensor | None]:
        """Return what was not sent yet, as the mean over ranks `[flags_offset]`; None if nothing.

        The sum over steps of what all ranks got differs from the exact one by this mean alone, so
        it is all that a checkpoint needs, on whatever number of ranks it is loaded.
        """
        return None
        yield

    def load_residual(self, mean: Tensor) -> None:  # noqa: B027
        """Go on from `mean` `[flags_offset]`, of the same layout on every rank."""

    def bases(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what is kept for each parameter besides residuals, the same on all ranks."""
        return iter(())

    def load_basis(self, name: str, basis: Tensor) -> None:  # noqa: B027
        """Go on from what `bases` yielded for `name`."""

    def used_flags(self, used: set[str], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return 1 for each slot with a gradient on this rank, else 0, as `[slots]`."""
        flags = tuple(s.name in used for s in self.bucket.slots)
        if flags not in self._flag_cache:
            self._flag_cache[flags] = torch.tensor(flags, dtype=dtype, device=device)
        return self._flag_cache[flags]


def add_scaled(x: Tensor, residual: Tensor | None, scale: Scale, out: Tensor) -> None:
    """Write `x + residual * scale` to `out`."""
    if residual is None:
        out.copy_(x)
    elif isinstance(scale, Tensor):
        torch.addcmul(x, residual, scale, out=out)
    else:
        torch.add(x, residual, alpha=scale, out=out)


def unscaled(x: Tensor, scale: Scale) -> Tensor:
    """Divide `x` by the loss scale, in place."""
    return x if isinstance(scale, float) and scale == 1.0 else x.div_(scale)
