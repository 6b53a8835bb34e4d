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
later. A block that holds an infinity or NaN travels with the scale NaN, so all ranks see NaNs and
skip the step together.

Source: Wang et al. (2023), ZeRO++ (the two-shot quantised collective); Karimireddy et al. (2019),
Error Feedback Fixes SignSGD. Differs: 8 bit instead of 4, feedback in both shots, flags and scales
inside of the same message.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from magi_train.comm.codecs import Codec, Collective, Exchange, Scale
from magi_train.comm.plan import BLOCK, Bucket, Slot

TINY = 1e-30
"""Blocks whose largest magnitude is below count as zeros: their scale would be denormal."""


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

    def encode(self, x: Tensor, out: Tensor) -> None:
        """Write `x` `[rows, elements]` to `out` `[rows, row_bytes or more]` of uint8.

        `x` becomes what the rounding took away, in formats with scales.
        """
        rows, elements = x.shape
        values = out[:, : elements * self.dtype.itemsize].view(self.dtype)
        if self.largest is None:
            values.copy_(x)
            return
        blocks = x.view(rows, -1, BLOCK)
        largest = blocks.abs().amax(2, keepdim=True)
        inverse = torch.where(largest >= TINY, self.largest / largest, 0.0)
        scales = torch.where(largest.isfinite(), largest / self.largest, torch.nan)
        rounded = blocks * inverse
        if self.dtype is torch.int8:
            rounded.round_()
            values.view(blocks.shape).copy_(rounded)
        else:  # the product may exceed the largest number by a rounding, which would be a NaN
            values.view(blocks.shape).copy_(rounded.clamp_(-self.largest, self.largest))
            rounded.copy_(values.view(blocks.shape))
        start = elements * self.dtype.itemsize
        out[:, start : self.row_bytes(elements)].view(torch.float32).copy_(scales.squeeze(2))
        blocks.addcmul_(rounded, scales, value=-1)

    def scales(self, wire: Tensor, elements: int) -> Tensor:
        """Return the scales in `wire`, `[rows, blocks]`."""
        start = elements * self.dtype.itemsize
        return wire[:, start : self.row_bytes(elements)].view(torch.float32)

    def decode(self, wire: Tensor, out: Tensor) -> None:
        """Write the numbers in `wire` `[rows, row_bytes or more]` to `out` `[rows, elements]`."""
        rows, elements = out.shape
        out.copy_(wire[:, : elements * self.dtype.itemsize].view(self.dtype))
        if self.largest is not None:
            out.view(rows, -1, BLOCK).mul_(self.scales(wire, elements).unsqueeze(2))


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

    def __init__(self, bucket: Bucket, rank: int, world_size: int) -> None:
        super().__init__(bucket, rank, world_size)
        self.format = FORMATS[bucket.codec]
        self.feedback = self.format.largest is not None
        self.part = bucket.flags_offset // world_size
        self._kept: tuple[Tensor, Tensor] | None = None
        self._pending: tuple[Tensor, Tensor] | None = None

    def exchange(self, flat: Tensor, used: set[str], scale: Scale) -> Exchange:
        """See Codec.exchange."""
        bucket, n, part = self.bucket, self.world_size, self.part
        body = flat[: bucket.flags_offset]
        flags = self.used_flags(used, torch.uint8, flat.device)
        absent = [s for s in bucket.slots if s.name not in used]
        kept = self._kept
        first = body
        if self.feedback:
            first = body.clone() if kept is None else torch.add(body, kept[0] * scale)
            for slot in absent:
                slot.view(first).zero_()
        row = self.format.row_bytes(part)
        wire = flat.new_empty(n, -(-(row + len(flags)) // 4) * 4, dtype=torch.uint8)
        self.format.encode(first.view(n, part), wire)
        wire[:, row : row + len(flags)] = flags
        received = yield Collective("all_to_all", wire)

        votes = received[:, row : row + len(flags)].sum(0, dtype=torch.int32)
        mean = self._mean(received)
        unused = [s for s in absent if not votes[bucket.slots.index(s)]]
        if kept is not None:
            mean += kept[1] * scale  # where no rank has a gradient, nobody reads the result
        out = flat.new_empty(row, dtype=torch.uint8)
        self.format.encode(mean, out.view(1, row))
        everything = yield Collective("all_gather", out)

        self.format.decode(everything.view(n, row), body.view(n, part))
        flat[bucket.flags_offset :] = votes
        if self.feedback:
            self.finite = self.format.scales(everything.view(n, row), part).isfinite().all()
            self._pending = (first.div_(scale), mean.div_(scale))
            self._spare(absent, unused)

    def _mean(self, received: Tensor) -> Tensor:
        """Return the mean of all rows, `[1, part]`, added in rank order."""
        one = torch.empty(1, self.part, dtype=torch.float32, device=received.device)
        total = torch.zeros_like(one)
        for row in received:
            self.format.decode(row.unsqueeze(0), one)
            total += one
        return total.div_(self.world_size)

    def _in_part(self, slots: list[Slot]) -> list[tuple[int, int]]:
        """Return where the elements of `slots` lie in the part that this rank owns."""
        start = self.rank * self.part
        ranges = []
        for slot in slots:
            low = max(slot.offset - start, 0)
            high = min(slot.offset + slot.numel() - start, self.part)
            if low < high:
                ranges.append((low, high))
        return ranges

    def _spare(self, absent: list[Slot], unused: list[Slot]) -> None:
        """Leave the residuals of parameters as they were that have no gradient."""
        assert self._pending is not None
        first, mean = self._pending
        for slot in absent:
            old = 0.0 if self._kept is None else slot.view(self._kept[0])
            slot.view(first).copy_(torch.as_tensor(old))
        for low, high in self._in_part(unused):
            mean[:, low:high] = 0.0 if self._kept is None else self._kept[1][:, low:high]

    def mean_residual(self) -> Generator[Collective, Tensor, Tensor | None]:
        """See Codec.mean_residual."""
        if not self.feedback or self._kept is None:  # alike on all ranks: they commit together
            return None
        total = yield Collective("all_reduce", self._kept[0].clone())
        owned = yield Collective("all_gather", self._kept[1].flatten())
        return total.div_(self.world_size).add_(owned.flatten())

    def load_residual(self, mean: Tensor) -> None:
        """See Codec.load_residual."""
        if self.feedback:
            owned = mean.view(self.world_size, self.part)[self.rank]
            self._kept = (torch.zeros_like(mean), owned.clone().unsqueeze(0))
