"""Backward of max-pooling over images with the channels innermost.

Generated code asks of each element of the input, by itself, which windows it may have won, and
loads from there one by one: 1.5 ms for ResNet-50's, whose bytes take 0.13 (H200, batch 256). A
program here takes some tiles of `stride x stride` places and a block of channels: which place of a
window an element is at is known when the kernel is compiled, and loads are wide.

Source: our own. Sums over windows in float32, as generated code's, in the order of the windows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS, WARPS = 1024, 4
"""Of the input at one place of a tile, of a program."""


@triton.jit
def _add_window(
    total, dy, offsets, image, y, x, channel, inside, OH, OW, C,
    h: tl.constexpr, w: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """Add what one window each gives to the elements at its place (h, w)."""
    if h >= 0 and h < KH and w >= 0 and w < KW:
        there = (y >= 0) & (y < OH) & (x >= 0) & (x < OW)
        at = ((image * OH + y) * OW + x)[:, None] * C + channel[None, :]
        mask = inside & there[:, None]
        won = tl.load(offsets + at, mask=mask, other=-1) == h * KW + w
        gradient = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(won, gradient, 0.0)
    return total


@triton.jit
def _max_pool_backward(
    dy, offsets, dx, tiles, H, W, OH, OW, C,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some tiles of the input, and of these all places."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    across = tl.cdiv(W, SW)
    down = tl.cdiv(H, SH)
    column = tile % across
    row = (tile // across) % down
    image = tile // (across * down)
    inside = (tile < tiles)[:, None] & (channel < C)[None, :]
    image = image.to(tl.int64)
    for a in tl.static_range(SH):
        for b in tl.static_range(SW):
            total = tl.zeros([TILES, CHANNELS], tl.float32)
            # Window o reaches from o S - P to o S - P + K: here it is tile + step.
            for i in tl.static_range(-((KH - 1) // SH) - 1, (PH + SH - 1) // SH + 1):
                for j in tl.static_range(-((KW - 1) // SW) - 1, (PW + SW - 1) // SW + 1):
                    total = _add_window(
                        total, dy, offsets, image, row + i, column + j, channel, inside, OH, OW, C,
                        a + PH - i * SH, b + PW - j * SW, KH, KW,
                    )  # fmt: skip
            y, x = row * SH + a, column * SW + b
            at = ((image * H + y) * W + x)[:, None] * C + channel[None, :]
            mask = inside & ((y < H) & (x < W))[:, None]
            tl.store(dx + at, total.to(dx.dtype.element_ty), mask=mask)


def max_pool_backward(
    dy: Tensor,
    offsets: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """Return the gradient of what was pooled, `[N, C, H, W]` with the channels innermost.

    Args:
        dy: Gradient of the result, `[N, C, h, w]`.
        offsets: int8, like `dy`: the place in its window, `row * width + column`, of the maximum.
        size: H and W.
        kernel: Height and width of a window.
        stride: Between windows.
        padding: In front of the first row and column.
    """
    n, c, oh, ow = dy.shape
    last = torch.channels_last
    dy, offsets = dy.contiguous(memory_format=last), offsets.contiguous(memory_format=last)
    dx = torch.empty((n, c, *size), dtype=dy.dtype, device=dy.device, memory_format=last)
    channels = min(triton.next_power_of_2(max(c, 1)), 128)
    tiles = n * triton.cdiv(size[0], stride[0]) * triton.cdiv(size[1], stride[1])
    if dx.numel():
        grid = (triton.cdiv(tiles, ELEMENTS // channels), triton.cdiv(c, channels))
        _max_pool_backward[grid](
            dy, offsets, dx, tiles, *size, oh, ow, c, *kernel, *stride, *padding,
            ELEMENTS // channels, channels, num_warps=WARPS,
        )  # fmt: skip
    return dx


def max_pool_backward_reference(
    dy: Tensor,
    offsets: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """Do it in plain torch: each place of the windows by itself."""
    n, c, *windows = dy.shape
    reach = [(o - 1) * s + 1 for o, s in zip(windows, stride, strict=True)]
    ends = [max(e + p, r + k) for e, p, r, k in zip(size, padding, reach, kernel, strict=True)]
    padded = torch.zeros((n, c, *ends), device=dy.device)
    for place in range(kernel[0] * kernel[1]):
        h, w = divmod(place, kernel[1])
        won = torch.where(offsets == place, dy.float(), 0.0)
        padded[:, :, h : h + reach[0] : stride[0], w : w + reach[1] : stride[1]] += won
    rows, columns = (slice(p, p + e) for p, e in zip(padding, size, strict=True))
    return padded[:, :, rows, columns].to(dy.dtype).contiguous(memory_format=torch.channels_last)
