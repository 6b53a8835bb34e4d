"""Two shots: an all-to-all of encoded parts, a sum in float32, an all-gather of the encoded sums.

Rank r gets part r of the bucket from everybody, decodes, adds in rank order in float32, encodes the
mean, and gives it to everybody. Each number is rounded twice, however many ranks there are, and no
sum is ever made in the format of the wire. What travels, for N ranks, against a float32 ring: the
same number of elements, in half (bfloat16) or a quarter (int8, fp8) of the bytes.

Blocks: 256 elements share a float32 scale, their largest magnitude over the format's largest
number. The plan starts every parameter on a block of its own, so a small parameter never shares a
scale with a large one.

Error feedback: what rounding took away is added to the next step's gradient, in float32: on each
rank for the first shot, on the owner of a part for the second. Residuals are kept without the loss
scale, so that a GradScaler may change it. A parameter that has no gradient keeps its residual for
later. A block that holds an infinity or NaN travels with a scale that is one, so all ranks see it
and skip the step together.

Source: Wang et al. (2023), ZeRO++ (the two-shot quantised collective); Karimireddy et al. (2019),
Error Feedback Fixes SignSGD. Differs: 8 bit instead of 4, feedback in both shots, flags and scales
inside of the same message.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from magi_train.comm.codecs import Codec, Collective, Exchange, Scale, add_scaled, unscaled
from magi_train.comm.codecs.host_kernels import Kernels, kernels
from magi_train.comm.host_memory import HostMemory
from magi_train.comm.plan import BLOCK, Bucket, Slot

TINY = 1e-30
"""Taken for the largest magnitude of a block where that is less: a scale is never denormal."""
CHUNK = 2**18
"""Elements that are encoded at once on a CPU."""


@dataclass(frozen=True)
class Format:
    """An element on the wire.

    Attributes:
        dtype: Its type.
        largest: Its largest number, which the largest of a block becomes; None for no scales.
    """

    dtype: torch.dtype
    largest: float | None = None

    def row_bytes(self, elements: int) -> int:
        """Return the bytes that `elements` take, a multiple of BLOCK, with their scales."""
        scales = 0 if self.largest is None else elements // BLOCK * 4
        return elements * self.dtype.itemsize + scales

    def encode(
        self,
        x: Tensor,
        out: Tensor,
        memory: HostMemory,
        residual: Tensor | None = None,
        scale: Scale = 1.0,
        rest: Tensor | None = None,
    ) -> None:
        """Write `x + residual * scale`, `[rows, elements]`, to `out` of uint8.

        Args:
            x: Numbers in float32.
            out: `[rows, row_bytes or more]`.
            memory: For what is needed meanwhile.
            residual: As `x`; in formats with scales.
            scale: Of `residual`.
            rest: Gets what the rounding took away, in formats with scales; None for `x` itself.
        """
        rows, elements = x.shape
        start = elements * self.dtype.itemsize
        values = out[:, :start].view(self.dtype)
        if self.largest is None:
            values.copy_(x)
            return
        rest, scales = x if rest is None else rest, self.scales(out, elements)
        if (kernel := self._kernel(x.device)) is not None:
            for r in range(rows):
                left = None if residual is None else residual[r]
                kernel.encode(x[r], left, float(scale), rest[r], values[r], scales[r], TINY)
            return
        given, blocks, shorts = (t.view(rows, -1, BLOCK) for t in (x, rest, values))
        old = None if residual is None else residual.view(rows, -1, BLOCK)
        step = _step(blocks)
        scratch = memory.empty(rows, step, BLOCK, device=x.device)
        for i in range(0, blocks.shape[1], step):
            part = blocks[:, i : i + step]
            if old is not None or rest is not x:
                add_scaled(
                    given[:, i : i + step],
                    None if old is None else old[:, i : i + step],
                    scale,
                    part,
                )
            factors = scales[:, i : i + step].unsqueeze(2)
            self._encode(part, shorts[:, i : i + step], factors, scratch)

    def _encode(self, blocks: Tensor, values: Tensor, scales: Tensor, scratch: Tensor) -> None:
        """Encode `blocks`, and leave in them what the rounding takes away."""
        assert self.largest is not None
        rounded = scratch[:, : blocks.shape[1]]
        largest = torch.abs(blocks, out=rounded).amax(
            2, keepdim=True
        )  # infinite or NaN: so are scales
        torch.div(largest.clamp_(min=TINY), self.largest, out=scales)
        torch.mul(blocks, scales.reciprocal(), out=rounded)
        if self.dtype is torch.int8:
            values.copy_(rounded.round_())
        else:  # the product may exceed the largest number by a rounding, which would be a NaN
            values.copy_(rounded.clamp_(-self.largest, self.largest))
            rounded.copy_(values)
        blocks.addcmul_(rounded, scales, value=-1)

    def scales(self, wire: Tensor, elements: int) -> Tensor:
        """Return the scales in `wire`, `[rows, blocks]`."""
        start = elements * self.dtype.itemsize
        return wire[:, start : self.row_bytes(elements)].view(torch.float32)

    def _kernel(self, device: torch.device) -> Kernels | None:
        return kernels() if device.type == "cpu" and self.dtype is torch.int8 else None

    def decode(self, wire: Tensor, out: Tensor) -> None:
        """Write the numbers in `wire` `[rows, row_bytes or more]` to `out` `[rows, elements]`."""
        rows, elements = out.shape
        values = wire[:, : elements * self.dtype.itemsize].view(self.dtype)
        if self.largest is None:
            out.copy_(values)
            return
        scales = self.scales(wire, elements)
        if (kernel := self._kernel(out.device)) is not None:
            for r in range(rows):
                kernel.decode(values[r], scales[r], out[r], add=False)
            return
        blocks, shorts = out.view(rows, -1, BLOCK), values.view(rows, -1, BLOCK)
        step = _step(blocks)
        for i in range(0, blocks.shape[1], step):
            part = shorts[:, i : i + step]
            blocks[:, i : i + step].copy_(part).mul_(scales[:, i : i + step].unsqueeze(2))

    def add(self, wire: Tensor, out: Tensor, memory: HostMemory) -> None:
        """Add the numbers in `wire` `[1, row_bytes or more]` to `out` `[1, elements]`."""
        elements = out.shape[1]
        if (kernel := self._kernel(out.device)) is not None:
            values = wire[0, :elements].view(self.dtype)
            kernel.decode(values, self.scales(wire, elements)[0], out[0], add=True)
            return
        if self.largest is None:
            out += wire[:, : elements * self.dtype.itemsize].view(self.dtype)
            return
        one = memory.empty(1, elements, device=out.device)
        self.decode(wire, one)
        out += one


def _step(blocks: Tensor) -> int:
    """Return how many of `[rows, blocks, BLOCK]` a CPU's cache keeps for all passes; else all."""
    rows, count, _ = blocks.shape
    return min(count, max(CHUNK // (rows * BLOCK), 1)) if blocks.device.type == "cpu" else count


FORMATS = {
    "bfloat16": Format(torch.bfloat16),
    "int8": Format(torch.int8, 127.0),
    "fp8": Format(torch.float8_e4m3fn, 448.0),
}


class TwoShot(Codec):
    """Exchange a bucket in the format that its codec names.

    Residuals, float32: `[flags_offset]` on each rank and `[flags_offset / N]` of the owned part;
    as much again while an exchange is not committed.
    """

    def __init__(
        self, bucket: Bucket, rank: int, world_size: int, memory: HostMemory | None = None
    ) -> None:
        super().__init__(bucket, rank, world_size, memory)
        self.format = FORMATS[self.wire_format]
        self.feedback = self.format.largest is not None
        self.start, self.length = 0, bucket.flags_offset
        self.part = self.length // world_size
        self._device = torch.device("cpu")  # until an exchange
        self._kept: tuple[Tensor, Tensor] | None = None
        self._pending: tuple[Tensor, Tensor] | None = None

    @property
    def wire_format(self) -> str:
        """Return the name of what travels, in FORMATS."""
        return self.bucket.codec

    def exchange(self, flat: Tensor, used: set[str], scale: Scale) -> Exchange:
        """See Codec.exchange."""
        self._device = flat.device
        votes = yield from self._shots(flat[: self.length], used, scale)
        flat[self.bucket.flags_offset :] = votes

    def _shots(
        self, body: Tensor, used: set[str], scale: Scale
    ) -> Generator[Collective, Tensor, Tensor]:
        """Average `body` `[length]` over the ranks; return how many of them used each slot."""
        bucket, n, part = self.bucket, self.world_size, self.part
        flags = self.used_flags(used, torch.uint8, body.device)
        absent = [s for s in bucket.slots if s.name not in used]
        kept = self._kept
        first, residual = body, None if kept is None else kept[0].view(n, part)
        if self.feedback:
            first = self._empty(self.length)
        if absent and kept is not None:  # these parameters keep theirs
            residual = kept[0].clone().view(n, part)
            for low, high in self._ranges(absent, self.start, self.length):
                residual.view(-1)[low:high] = 0
        row = self.format.row_bytes(part)
        width = -(-(row + len(flags)) // 4) * 4
        wire = self._empty(n, width, dtype=torch.uint8)
        x, rest = body.view(n, part), first.view(n, part)
        self.format.encode(x, wire, self._memory, residual, scale, rest)
        wire[:, row : row + len(flags)] = flags
        received = yield self._all_to_all(wire)

        votes = received[:, row : row + len(flags)].sum(0, dtype=torch.int32)
        mean = self._mean(received)
        unused = [s for s in absent if not votes[bucket.slots.index(s)]]
        owned = None if kept is None else kept[1]  # where no rank has a gradient, nobody reads it
        out = self._empty(row, dtype=torch.uint8)
        self.format.encode(mean, out.view(1, row), self._memory, owned, scale)
        everything = yield self._all_gather(out)

        self.format.decode(everything.view(n, row), body.view(n, part))
        if self.feedback:
            self.finite = self.format.scales(everything.view(n, row), part).isfinite().all()
            self._pending = (unscaled(first, scale), unscaled(mean, scale))
            self._spare(absent, unused)
        return votes

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._memory.empty(*shape, dtype=dtype, device=self._device)

    def _mean(self, received: Tensor) -> Tensor:
        """Return the mean of all rows, `[1, part]`, added in rank order."""
        total = self._empty(1, self.part)
        self.format.decode(received[:1], total)
        for row in received[1:]:
            self.format.add(row.unsqueeze(0), total, self._memory)
        return total.div_(self.world_size)

    def _ranges(self, slots: list[Slot], start: int, length: int) -> list[tuple[int, int]]:
        """Return where the elements of `slots` lie in a part of the bucket, from `start` on."""
        ranges = []
        for slot in slots:
            low = max(slot.offset - start, 0)
            high = min(slot.offset + slot.numel() - start, length)
            if low < high:
                ranges.append((low, high))
        return ranges

    def _spare(self, absent: list[Slot], unused: list[Slot]) -> None:
        """Leave the residuals of parameters as they were that have no gradient."""
        assert self._pending is not None
        first, mean = self._pending
        for low, high in self._ranges(absent, self.start, self.length):
            first[low:high] = 0.0 if self._kept is None else self._kept[0][low:high]
        for low, high in self._ranges(unused, self.start + self.rank * self.part, self.part):
            mean[:, low:high] = 0.0 if self._kept is None else self._kept[1][:, low:high]

    def mean_residual(self) -> Generator[Collective, Tensor, Tensor | None]:
        """See Codec.mean_residual."""
        if not self.feedback or self._kept is None:  # alike on all ranks: they commit together
            return None
        total = yield self._all_reduce(self._kept[0].clone())
        owned = yield self._all_gather(self._kept[1].flatten())
        return total.div_(self.world_size).add_(owned.flatten())

    def load_residual(self, mean: Tensor) -> None:
        """See Codec.load_residual."""
        if self.feedback:
            mine = mean[self.start : self.start + self.length]
            owned = mine.view(self.world_size, self.part)[self.rank]
            self._kept = (torch.zeros_like(mine), owned.clone().unsqueeze(0))
