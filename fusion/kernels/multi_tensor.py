"""Many tensors in one launch: a device table of addresses, and a map from blocks to tensors.

A kernel that takes tensors as arguments needs a launch for each of them; the foreach kernels of
torch pass some hundred addresses by value and need a launch for every few. Here a row of int64 for
each tensor holds the addresses of everything that belongs to it, and block `i` of the grid reads
from the map which row is its own and which BLOCK elements of it. The table is uploaded, in one
asynchronous copy from pinned memory, only when an address changed; the map only when a size did.

Source: apex and ATen, `multi_tensor_apply`. Differs: no limit on tensors or blocks, since the table
    lies in memory and not in the kernel's arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ELEMENTS = 8192
BLOCK = tl.constexpr(BLOCK_ELEMENTS)
"""What one program works through: enough to hide its look-ups in map and table."""
WARPS = 8
TILE = tl.constexpr(32 * WARPS * 4)
"""What it does at a time: 4 elements a thread, so that float32 moves in 16-byte accesses and loads
and stores agree on a layout (with 8, Triton sends what it stores through shared memory first)."""

FULL_CHECKS, CHECK_STRIDE = 8, 8
"""Comparing every shadow with its weight takes 1.2 of 10.3 ms at 1.2 billion weights on an H200."""

ADDRESSES = 7
"""Columns that hold addresses; the kernels name those after the first three."""
MASTER, GRAD, SHADOW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NUMEL = tl.constexpr(ADDRESSES)
FLAGS = tl.constexpr(ADDRESSES + 1)
COLUMNS = tl.constexpr(ADDRESSES + 2)

LIVE, ALIGNED, FIRST = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
"""Bits of FLAGS: the row takes part; all addresses are multiples of 16 bytes; no state yet."""

Row = tuple[int, ...]
"""ADDRESSES addresses, 0 where there is none, and 1 if the tensor has no state yet, else 0."""

TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    None: None,
}


@dataclass(frozen=True, kw_only=True)
class StepScalars:
    """What one step applies besides; device tensors of one element, or None.

    Attributes:
        grad_scale: float32; gradients are divided by it, and stored so, as torch does.
        clip: float32; gradients are multiplied by it; what is stored is not.
        found_inf: float32; not 0: the whole step is skipped.
        drift: int32; set to 1 if a shadow did not equal its rounded master before the update.
        number: Of this step: at first every element is compared, from FULL_CHECKS steps on one tile
            in CHECK_STRIDE of whole blocks, in turns. A write to a whole tensor is always seen
            then, one to a slice in its turn.
    """

    grad_scale: Tensor | None = None
    clip: Tensor | None = None
    found_inf: Tensor | None = None
    drift: Tensor | None = None
    number: int = 0

    def looked_at(self) -> tuple[int, int]:
        """Return (stride, phase): tiles whose index plus phase is a multiple are compared."""
        stride = 1 if self.number < FULL_CHECKS else CHECK_STRIDE
        return stride, self.number % CHECK_STRIDE


def interpreted() -> bool:
    """Return whether the kernels were made for the interpreter (TRITON_INTERPRET=1)."""
    return not isinstance(to_nearest, triton.runtime.JITFunction)


@triton.jit
def to_nearest(x, dtype: tl.constexpr):
    """Round float32 `x` to `dtype`, ties to even, as torch does.

    Spelled out for bfloat16 because Triton's interpreter truncates there (3.6 to 3.9).
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def elements(row, column: tl.constexpr, start, dtype: tl.constexpr, wide: tl.constexpr):
    """Return pointers to the first TILE elements from `start` on of the tensor in `column`."""
    first = tl.load(row + column).to(tl.pointer_type(dtype)) + start
    if wide:
        first = tl.multiple_of(first, 16)  # lets the compiler use 16-byte loads and stores
    return first + tl.arange(0, TILE)


@triton.jit
def read_gradient(pointers, mask, grad_scale, clip, dtype: tl.constexpr, maximize: tl.constexpr):
    """Return the gradient in float32, unscaled (and stored so), clipped, with its sign."""
    g = tl.load(pointers, mask=mask).to(tl.float32)
    if grad_scale is not None:
        g = tl.div_rn(g, tl.load(grad_scale))
        tl.store(pointers, to_nearest(g, dtype), mask=mask)
    if clip is not None:
        g = g * tl.load(clip)
    if maximize:
        g = -g
    return g


def read_gradient_reference(
    grad: Tensor, dtype: torch.dtype, scalars: StepScalars, *, maximize: bool
) -> Tensor:
    """Return what `read_gradient` does, in `dtype`; nothing is stored."""
    g = grad.to(dtype)
    if scalars.grad_scale is not None:
        g = g / scalars.grad_scale.to(dtype)
    if scalars.clip is not None:
        g = g * scalars.clip.to(dtype)
    return -g if maximize else g


@triton.jit
def note_drift(pointers, mask, p, drift, dtype: tl.constexpr):
    """Set `drift` if the stored shadow is not `p` rounded: somebody else wrote one of them."""
    held = tl.load(pointers, mask=mask).to(tl.float32)
    rounded = to_nearest(p, dtype).to(tl.float32)
    apart = (rounded != held) & (rounded == rounded)
    if mask is not None:
        apart = apart & mask
    # every element that differs stores the same value: no reduction, nothing where none does
    tl.store(drift + tl.arange(0, TILE) * 0, 1, mask=apart)


class AddressTable:
    """Rows of addresses on a device, and the map from blocks to rows.

    Args:
        numels: Elements of each tensor; a row's length never changes.
        device: Where the kernel runs.

    Attributes:
        numels: As given.
        blocks: int32 `[num_blocks, 2]`: row, and number of the block within the tensor.
        rows: int64 `[num_tensors, COLUMNS]`.
        uploads: How often `rows` was copied.
    """

    def __init__(self, numels: Sequence[int], device: torch.device) -> None:
        self.numels = tuple(numels)
        self.device = device
        counts = torch.tensor([-(-n // BLOCK_ELEMENTS) for n in self.numels], dtype=torch.int64)
        tensor = torch.repeat_interleave(torch.arange(len(self.numels)), counts)
        start = counts.cumsum(0) - counts
        block = torch.arange(len(tensor)) - start[tensor]
        self.blocks = self._upload(torch.stack([tensor, block], 1).to(torch.int32))
        self.rows = torch.empty(0)
        self.uploads = 0
        self._seen: list[Row | None] = []

    def update(self, rows: list[Row | None]) -> None:
        """Make the device see `rows`, in the order of `numels`; None takes no part."""
        if rows == self._seen:
            return
        table = [self._line(row, n) for row, n in zip(rows, self.numels, strict=True)]
        self.rows = self._upload(torch.tensor(table, dtype=torch.int64))
        self.uploads += 1
        self._seen = rows

    @staticmethod
    def _line(row: Row | None, numel: int) -> list[int]:
        if row is None:
            return [0] * COLUMNS.value
        *addresses, first = row
        bits = 0
        for address in addresses:
            bits |= address
        flags = LIVE.value | (0 if bits % 16 else ALIGNED.value) | (FIRST.value if first else 0)
        return [*addresses, numel, flags]

    def _upload(self, data: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return data.to(self.device)
        # a fresh pinned buffer each time: torch keeps it until the copy is done
        return data.pin_memory().to(self.device, non_blocking=True)
