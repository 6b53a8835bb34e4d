"""Cross-entropy of rows of logits, and its gradient by them, in one launch.

For the logits x of one token, z = inner x (or outer tanh(inner x), a soft cap), label t, smoothing
e and vocabulary V:

    loss = logsumexp(z) - (1 - e) z[t] - e mean(z)
    dz   = softmax(z) - (1 - e) onehot(t) - e / V

A program has a row. It reads it once for the maximum and the sum, which it corrects whenever the
maximum grows, and once more for the gradient; the rows that all programs work on at a time are
smaller than an H100's L2, so the second read need not reach memory. 2 bytes read, 2 read again and
2 written for an element of bfloat16; the arithmetic is float32.

Wide accesses need rows that start at multiples of 16 bytes, and so do the fast matrix products that
follow. Gradients get such rows, whatever their length: `padded`. Logits should have that many
columns. Those behind the vocabulary count for nothing, and what is written as their gradient says
nothing: it is finite, so that a product with zeros is zero.

Source: online softmax, Milakov and Gimelshein 2018 (arXiv 1805.02867). Differs from Liger Kernel
(arXiv 2410.10989, section 3.2): rows are not overwritten, so the op stays a function.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

BLOCK, WARPS = 4096, 4
UNIT = 8
"""Elements: rows whose stride is a multiple of it are read and written in wide accesses."""
ROW_ALIGNMENT = 64
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _stepped(x, inner, outer, CAPPED: tl.constexpr):
    """Return z; tanh by exp, whose absolute error is that of float32 near 1."""
    z = x.to(tl.float32) * inner
    if CAPPED:
        z = outer * (2.0 * tl.sigmoid(2.0 * z) - 1.0)
    return z


@triton.jit(
    do_not_specialize=[
        "vocabulary", "units_from_row", "units_of_row", "units_to_row", "ignore_index"
    ],
    do_not_specialize_on_alignment=["labels", "losses"],
)  # fmt: skip
def _cross_entropy(
    logits, labels, losses, gradients, vocabulary, units_from_row, units_of_row, units_to_row,
    ignore_index, smoothing, inner, outer, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr,
    UNIT: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: loss and gradient. Strides come in units, so that Triton knows the factor."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    source = logits + row * units_from_row * UNIT
    target = gradients + row * units_to_row * ALIGNMENT
    readable, writable = units_of_row * UNIT, units_to_row * ALIGNMENT
    columns = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        for start in range(0, vocabulary, BLOCK):
            nothing = tl.zeros([BLOCK], dtype=gradients.dtype.element_ty)
            tl.store(target + start + columns, nothing, mask=start + columns < writable)
    else:
        largest, total, plain = float("-inf"), 0.0, 0.0
        for start in range(0, vocabulary, BLOCK):
            inside = start + columns < vocabulary
            x = tl.load(source + start + columns, mask=start + columns < readable, other=0.0)
            z = _stepped(x, inner, outer, CAPPED)
            if SMOOTHED:
                plain += tl.sum(tl.where(inside, z, 0.0))
            z = tl.where(inside, z, float("-inf"))
            before, largest = largest, tl.maximum(largest, tl.max(z))
            base = tl.where(largest == float("-inf"), 0.0, largest)
            total = total * tl.exp2((before - base) * LOG2_E)
            total += tl.sum(tl.exp2((z - base) * LOG2_E))
        log_sum = tl.where(largest == float("-inf"), 0.0, largest) + tl.log2(total) / LOG2_E
        known = (label >= 0) & (label < vocabulary)
        own = tl.load(source + label, mask=known, other=float("nan"))
        loss = log_sum - (1.0 - smoothing) * _stepped(own, inner, outer, CAPPED)
        if SMOOTHED:
            loss -= smoothing * plain / vocabulary
        tl.store(losses + row, loss)
        log_sum = tl.where(known, log_sum, float("nan"))  # and so is all of the gradient
        for start in range(0, vocabulary, BLOCK):
            x = tl.load(source + start + columns, mask=start + columns < readable, other=0.0)
            z = _stepped(x, inner, outer, CAPPED)
            # at most 1, but for columns behind the vocabulary
            exponent = tl.minimum((z - log_sum) * LOG2_E, 0.0, propagate_nan=tl.PropagateNan.ALL)
            dz = tl.exp2(exponent)
            if SMOOTHED:
                dz -= smoothing / vocabulary
            dz = tl.where(start + columns == label, dz - (1.0 - smoothing), dz) * inner
            if CAPPED:
                dz = dz * (outer - z * z / outer)
            dz = dz.to(gradients.dtype.element_ty)
            tl.store(target + start + columns, dz, mask=start + columns < writable)


def padded(columns: int) -> int:
    """Return how many columns rows should have: up to a multiple of 128 bytes of bfloat16."""
    return -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    smoothing: float = 0.0,
    inner: float = 1.0,
    outer: float | None = None,
    vocabulary: int | None = None,
    tile: tuple[int, int] = (BLOCK, WARPS),
) -> tuple[Tensor, Tensor]:
    """Return the losses of all tokens and their gradients by the logits.

    Args:
        logits: `[tokens, columns]`, bfloat16 or float32, each row contiguous.
        labels: int64, `[tokens]`. One that is neither `ignore_index` nor in the vocabulary makes
            the loss and the gradient of its token NaN.
        ignore_index: Label of tokens whose loss and gradient are 0.
        smoothing: Label smoothing, 0 to 1.
        inner: Factor of the logits.
        outer: The soft cap: z = outer tanh(inner x); None for z = inner x.
        vocabulary: How many of the columns count, from the first one on; None for all. The others
            are at most those that `padded(vocabulary)` has more, and are not NaN.
        tile: Elements that a program works on at a time, a power of two, and its warps.

    Returns:
        Losses, float32 `[tokens]`, and gradients in the shape and dtype of `logits`, their rows
        `padded(columns)` apart; behind the vocabulary it is any finite number, for a label that is
        counted and known.

    Raises:
        ValueError: There are fewer or more columns.
    """
    tokens, width = logits.shape
    vocabulary = width if vocabulary is None else vocabulary
    if not vocabulary <= width <= padded(vocabulary):
        raise ValueError(
            f"logits must have {vocabulary} to {padded(vocabulary)} columns for a vocabulary of "
            f"{vocabulary}, got {width}"
        )
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    gradients = torch.empty((tokens, padded(width)), dtype=logits.dtype, device=logits.device)[
        :, :width
    ]
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    stride = logits.stride(0)
    unit = UNIT if stride % UNIT == 0 else 1
    if tokens:
        _cross_entropy[(tokens,)](
            logits, labels.contiguous(), losses, gradients, vocabulary, stride // unit,
            -(-width // unit), gradients.stride(0) // ROW_ALIGNMENT, ignore_index, smoothing,
            inner, 1.0 if outer is None else outer, CAPPED=outer is not None,
            SMOOTHED=smoothing != 0, UNIT=unit, ALIGNMENT=ROW_ALIGNMENT,
            BLOCK=tile[0], num_warps=tile[1],
        )  # fmt: skip
    return losses, gradients


def cross_entropy_reference(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    smoothing: float = 0.0,
    inner: float = 1.0,
    outer: float | None = None,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Do in plain torch what the kernel does, in float32 or, for float64 logits, in that."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    width = logits.shape[1]
    z = logits[:, :vocabulary].to(wide) * inner
    z = z if outer is None else outer * torch.tanh(z)
    counted = labels != ignore_index
    known = (labels >= 0) & (labels < z.shape[1])
    index = torch.where(known, labels, 0).unsqueeze(1)
    loss = torch.logsumexp(z, 1) - (1 - smoothing) * z.gather(1, index).squeeze(1)
    loss = loss - smoothing * z.mean(1) if smoothing else loss
    onehot = torch.zeros_like(z).scatter_(1, index, 1.0)
    dz = (torch.softmax(z, 1) - (1 - smoothing) * onehot - smoothing / z.shape[1]) * inner
    dz = dz if outer is None else dz * (outer - z * z / outer)
    bad = counted & ~known
    loss = torch.where(counted, loss.masked_fill(bad, torch.nan), 0.0)
    dz = torch.where(counted[:, None], dz.masked_fill(bad[:, None], torch.nan), 0.0)
    return loss, F.pad(dz, (0, width - dz.shape[1])).to(logits.dtype)
