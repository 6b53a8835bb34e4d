"""Cast a matrix to fp8, as it is and transposed, in one read.

fp8 matrix products want the dimension they sum over to be the contiguous one, in both operands. A
tensor that is summed over its columns in one product and over its rows in another is therefore
needed twice: as it lies, and transposed. For x `[rows, columns]` and a scale s > 0:

    q = x / s, clamped to the format's largest value, rounded to the nearest, ties to even

and both q and its transpose are written: 2 bytes read and 2 written for an element of bfloat16. A
tile is read once, and turned in registers and shared memory, so that both writes are of whole rows.

Source: the method of torchao's and Transformer Engine's cast-transpose kernels. Differs: the scale
    comes from a whole-tensor maximum made outside (generated code fuses it into the producer); a
    maximum that is no finite number makes the *scale* so, which every product carries on. What is
    written then does not matter, so the clamp may ignore NaN: Triton turns fp8 stores of transposed
    tiles next to NaN-propagating minima into garbage (triton issue 11111). Bytes, not fp8 values,
    are transposed for the same reason.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from magi_train.fusion.kernels.multi_tensor import interpreted

TILE_ROWS, TILE_COLUMNS, WARPS = 128, 128, 8
TRITON_FP8 = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


@triton.jit
def _representable(x, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr):
    """Round float32 `x` to what fp8 holds, ties to even; Triton's interpreter truncates (3.6-3.9).

    Adding and subtracting 1.5 * 2**23 steps leaves a multiple of the step. SMALLEST is the smallest
    normal number: below it the step does not shrink further.
    """
    binade = (x.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(binade, SMALLEST) * 2.0**-MANTISSA
    shift = step * 12582912.0
    return (x + shift) - shift


@triton.jit
def _fp8_cast(
    source, scale, rows, columns, height, width, row_stride, column_stride,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, MANTISSA: tl.constexpr, FP8: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, SPELLED_OUT: tl.constexpr,
):  # fmt: skip
    """One tile: read, scale, clamp, round, write it and its transpose."""
    across = (width + TILE_COLUMNS - 1) // TILE_COLUMNS
    i = (tl.program_id(0) // across).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    j = (tl.program_id(0) % across).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = (i < height)[:, None] & (j < width)[None, :]
    x = tl.load(source + i[:, None] * row_stride + j[None, :] * column_stride, mask=inside)
    x = x.to(tl.float32) * (1.0 / tl.load(scale))
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    if SPELLED_OUT:
        x = _representable(x, MANTISSA, SMALLEST)
    q = x.to(FP8).to(tl.uint8, bitcast=True)
    tl.store(rows + i[:, None] * width + j[None, :], q, mask=inside)
    turned = (j < width)[:, None] & (i < height)[None, :]
    tl.store(columns + j[:, None] * height + i[None, :], tl.trans(q), mask=turned)


def fp8_cast(
    x: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    tile: tuple[int, int, int] = (TILE_ROWS, TILE_COLUMNS, WARPS),
) -> tuple[Tensor, Tensor]:
    """Return `x / scale` in fp8, and its transpose, both contiguous.

    Args:
        x: `[rows, columns]`, bfloat16, any strides.
        scale: float32, one element.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        tile: Rows and columns of a tile, powers of two, and warps for each; for benchmarks.

    Raises:
        TypeError: `x` has another dtype. Triton 3.6 writes garbage to the transpose of tiles that
            were read as float32 (seen on an H200).
    """
    if x.dtype is not torch.bfloat16:
        raise TypeError(f"fp8_cast takes bfloat16, got {x.dtype}; cast it first")
    if x.stride(0) == 1 and x.stride(1) != 1:  # reads along rows
        rows, columns = fp8_cast(x.t(), scale, dtype, tile)
        return columns, rows
    x = x if x.stride(1) == 1 else x.contiguous()
    height, width = x.shape
    rows = torch.empty((height, width), dtype=dtype, device=x.device)
    columns = torch.empty((width, height), dtype=dtype, device=x.device)
    if x.numel():
        info = torch.finfo(dtype)
        tiles = triton.cdiv(height, tile[0]) * triton.cdiv(width, tile[1])
        _fp8_cast[(tiles,)](
            x, scale, rows.view(torch.uint8), columns.view(torch.uint8), height, width, *x.stride(),
            LARGEST=info.max, SMALLEST=info.tiny, MANTISSA=3 if info.max == 448 else 2,
            FP8=TRITON_FP8[dtype], TILE_ROWS=tile[0], TILE_COLUMNS=tile[1],
            SPELLED_OUT=interpreted(), num_warps=tile[2],
        )  # fmt: skip
    return rows, columns


def fp8_cast_reference(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Do in plain torch what the kernel does; the bits are the same where `scale` is finite."""
    largest = torch.finfo(dtype).max
    rows = (x.float() * (1.0 / scale)).clamp(-largest, largest).to(dtype)
    return rows, rows.t().contiguous()
