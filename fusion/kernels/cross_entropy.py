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
columns; those behind the vocabulary are read by nobody, and their gradient is 0.

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


@triton.jit
def _loaded(source, at, readable, REST: tl.constexpr):
    """Return what lies there: all of it, or in the rest of a row what is `readable`."""
    if REST:
        return tl.load(source + at, mask=at < readable, other=0.0)
    return tl.load(source + at)


@triton.jit
def _more(
    before, total, plain, source, at, readable, vocabulary, inner, outer, CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Take more elements into the maximum, the sum of exponentials relative to it, the sum."""
    z = _stepped(_loaded(source, at, readable, REST), inner, outer, CAPPED)
    if SMOOTHED:
        plain += tl.sum(tl.where(at < vocabulary, z, 0.0) if REST else z)
    if REST:
        z = tl.where(at < vocabulary, z, float("-inf"))
    largest = tl.maximum(before, tl.max(z))
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = total * tl.exp2((before - base) * LOG2_E)
    total += tl.sum(tl.exp2((z - base) * LOG2_E))
    return largest, total, plain


@triton.jit
def _derivative(
    source, target, at, readable, writable, vocabulary, label, log_sum, smoothing, inner, outer,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Write the gradient by some elements; of those behind the vocabulary it is 0."""
    z = _stepped(_loaded(source, at, readable, REST), inner, outer, CAPPED)
    dz = tl.exp2((z - log_sum) * LOG2_E)
    if SMOOTHED:
        dz -= smoothing / vocabulary
    dz = tl.where(at == label, dz - (1.0 - smoothing), dz) * inner
    if CAPPED:
        dz = dz * (outer - z * z / outer)
    if REST:
        dz = tl.where(at < vocabulary, dz, 0.0).to(target.dtype.element_ty)
        tl.store(target + at, dz, mask=at < writable)
    else:
        tl.store(target + at, dz.to(target.dtype.element_ty))


@triton.jit
def _cross_entropy(
    logits, labels, losses, gradients, vocabulary, units_from_row, units_of_row, units_to_row,
    ignore_index, smoothing, inner, outer, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr,
    UNIT: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: loss and gradient. Strides come in units, so that Triton knows the factor.

    Whole blocks of the vocabulary need no masks; the rest of the row and its padding do.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    source = logits + row * units_from_row * UNIT
    target = gradients + row * units_to_row * ALIGNMENT
    readable, writable = units_of_row * UNIT, units_to_row * ALIGNMENT
    whole = vocabulary // BLOCK * BLOCK
    columns = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        for start in range(0, writable, BLOCK):
            nothing = tl.zeros([BLOCK], dtype=gradients.dtype.element_ty)
            tl.store(target + start + columns, nothing, mask=start + columns < writable)
    else:
        largest, total, plain = float("-inf"), 0.0, 0.0
        for start in range(0, whole, BLOCK):
            largest, total, plain = _more(
                largest, total, plain, source, start + columns, readable, vocabulary, inner, outer,
                CAPPED, SMOOTHED, False,
            )  # fmt: skip
        for start in range(whole, vocabulary, BLOCK):
            largest, total, plain = _more(
                largest, total, plain, source, start + columns, readable, vocabulary, inner, outer,
                CAPPED, SMOOTHED, True,
            )  # fmt: skip
        log_sum = tl.where(largest == float("-inf"), 0.0, largest) + tl.log2(total) / LOG2_E
        known = (label >= 0) & (label < vocabulary)
        own = tl.load(source + label, mask=known, other=float("nan"))
        loss = log_sum - (1.0 - smoothing) * _stepped(own, inner, outer, CAPPED)
        if SMOOTHED:
            loss -= smoothing * plain / vocabulary
        tl.store(losses + row, loss)
        log_sum = tl.where(known, log_sum, float("nan"))  # and so is all of the gradient
        for start in range(0, whole, BLOCK):
            _derivative(
                source, target, start + columns, readable, writable, vocabulary, label, log_sum,
                smoothing, inner, outer, CAPPED, SMOOTHED, False,
            )  # fmt: skip
        for start in range(whole, writable, BLOCK):
            _derivative(
                source, target, start + columns, readable, writable, vocabulary, label, log_sum,
                smoothing, inner, outer, CAPPED, SMOOTHED, True,
            )  # fmt: skip


def padded(columns: int) -> int:
    """Return the stride of gradients' rows in elements: a multiple of 128 bytes of bfloat16."""
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
        vocabulary: How many of the columns count, from the first one on; None for all.
        tile: Elements that a program works on at a time, a power of two, and its warps.

    Returns:
        Losses, float32 `[tokens]`, and gradients in the shape and dtype of `logits`, their rows
        `padded(columns)` apart.
    """
    tokens, width = logits.shape
    vocabulary = width if vocabulary is None else vocabulary
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
            BLOCK=min(tile[0], triton.next_power_of_2(vocabulary)), num_warps=tile[1],
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
