"""Attention of a few queries over many keys: each head's keys are divided among programs.

    scores = q k^T scale, masked      p = softmax(scores)      result = p v

A decode step has one query for each head, so a kernel that gives its programs rows of queries
leaves most multiprocessors idle. Here a program has one head and a run of its keys: it keeps the
maximum m of its scores, the sum l of exp(scores - m) and the sum of those times the values, in
float32, and a second launch puts the parts together:

    M = max m      result = sum(exp(m - M) part) / sum(exp(m - M) l)

Keys and values are read once for all queries of a head, and not at all where a mask hides a whole
block from them: a cache is mostly empty. Scores, sums and values are float32; the factors of a
value are rounded to its dtype, as every fused attention does.

Source: Dao et al. (2023), Flash-Decoding for long-context inference. Differs: masks, added or
    boolean, and blocks that they hide are skipped.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from magi_train.fusion.kernels.multi_tensor import interpreted

MOST_QUERIES = 16
"""Rows of a tile: tensor cores take no fewer, so fewer cost as much."""
MOST_SIZE = 256
BLOCK = 64
ROW_BYTES = 512
"""Of a key, or a value: wider ones come in half blocks. Both lie in shared memory, where many GPUs
have room for 99 KiB."""
PROGRAMS = 264
"""Two for each multiprocessor of an H200."""
WARPS = 4
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _parts(
    query, key, value, mask, parts, heads, queries, keys, size, run,
    query_batch, query_head, query_row, query_column, key_batch, key_head, key_row, key_column,
    value_batch, value_head, value_row, value_column, mask_batch, mask_head, mask_row, mask_column,
    SCALE: tl.constexpr, HIDES: tl.constexpr, ADDS: tl.constexpr, QUERIES: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    """One head, one run of keys: its sums, then maxima and sums of factors, for each query.

    SCALE is a constant, as generated code may pass numbers in float64.
    """
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    index, part = tl.program_id(0), tl.program_id(1)
    batch, head = (index // heads).to(tl.int64), (index % heads).to(tl.int64)
    i, d, row = tl.arange(0, QUERIES), tl.arange(0, SIZE), tl.arange(0, BLOCK)
    known = (i < queries)[:, None] & (d < size)[None, :]
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    mask += batch * mask_batch + head * mask_head
    q = tl.load(query + i[:, None] * query_row + d[None, :] * query_column, mask=known, other=0.0)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    summed = tl.zeros([QUERIES, SIZE], tl.float32)
    for start in range(part * run, tl.minimum((part + 1) * run, keys), BLOCK):
        j = (start + row).to(tl.int64)
        inside = (i < queries)[:, None] & (j < keys)[None, :]
        at = mask + i[:, None] * mask_row + j[None, :] * mask_column
        seen = inside
        if HIDES:
            seen = tl.load(at, mask=inside, other=0) != 0
        if ADDS:
            added = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
            seen = added != float("-inf")
        if tl.max(seen.to(tl.int32)) != 0:
            held = (j < keys)[:, None] & (d < size)[None, :]
            k = tl.load(key + j[:, None] * key_row + d[None, :] * key_column, mask=held, other=0.0)
            v = tl.load(
                value + j[:, None] * value_row + d[None, :] * value_column, mask=held, other=0.0
            )
            if WIDENED:
                q, k = q.to(tl.float32), k.to(tl.float32)
            scores = tl.dot(q, tl.trans(k), input_precision=precision) * SCALE
            if ADDS:
                scores += added
            scores = tl.where(seen, scores, float("-inf"))
            before, largest = largest, tl.maximum(largest, tl.max(scores, 1))
            base = tl.where(largest == float("-inf"), 0.0, largest)
            factors = tl.exp2((scores - base[:, None]) * LOG2_E)
            shrunk = tl.exp2((before - base) * LOG2_E)
            total = total * shrunk + tl.sum(factors, 1)
            summed = summed * shrunk[:, None]
            factors = factors.to(v.dtype)
            if WIDENED:
                factors, v = factors.to(tl.float32), v.to(tl.float32)
            summed += tl.dot(factors, v, input_precision=precision)
    width = size + 2
    parts += ((index * tl.num_programs(1) + part).to(tl.int64) * queries + i) * width
    tl.store(parts[:, None] + d[None, :], summed, mask=known)
    tl.store(parts + size, largest, mask=i < queries)
    tl.store(parts + size + 1, total, mask=i < queries)


@triton.jit
def _together(
    parts, result, queries, size, count, SIZE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """One query of one head."""
    index, i = tl.program_id(0), tl.program_id(1)
    d, n = tl.arange(0, SIZE), tl.arange(0, COUNT)
    width = size + 2
    parts += ((index * count + n).to(tl.int64) * queries + i) * width
    largest = tl.load(parts + size, mask=n < count, other=float("-inf"))
    totals = tl.load(parts + size + 1, mask=n < count, other=0.0)
    summed = tl.load(
        parts[:, None] + d[None, :], mask=(n < count)[:, None] & (d < size)[None, :], other=0.0
    )
    most = tl.max(largest)
    factors = tl.exp2((largest - tl.where(most == float("-inf"), 0.0, most)) * LOG2_E)
    total = tl.sum(factors * totals)
    value = tl.sum(factors[:, None] * summed, 0) / tl.where(total == 0.0, 1.0, total)
    result += (index.to(tl.int64) * queries + i) * size
    tl.store(result + d, value.to(result.dtype.element_ty), mask=d < size)


def _steps(mask: Tensor) -> list[int]:
    """Return the strides of a mask that is broadcast to four dimensions."""
    own = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    return [0] * (4 - mask.dim()) + own


def block_of(size: int, dtype: torch.dtype) -> int:
    """Return how many keys of `size` elements a program reads at a time."""
    return BLOCK if size * dtype.itemsize <= ROW_BYTES else BLOCK // 2


@triton_op("magi_train::flash_decoding", mutates_args=())
def flash_decoding(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Return the attention of a few queries; a query that sees no key gives zeros.

    Args:
        query: `[batch, heads, queries, size]`, at most MOST_QUERIES, of at most MOST_SIZE elements;
            bfloat16, float16 or float32, any strides.
        key: `[batch, heads, keys, size]`, the same dtype.
        value: As `key`.
        mask: Boolean, true where a key is seen, or added to the scores; broadcast to
            `[batch, heads, queries, keys]`. None for all.
        scale: Of the scores.

    Returns:
        As `query`, contiguous.
    """
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not result.numel() or not keys:
        return result.zero_()
    wide = max(16, triton.next_power_of_2(size))
    block = block_of(wide, query.dtype)
    blocks = triton.cdiv(keys, block)
    run = triton.cdiv(blocks, min(blocks, max(1, PROGRAMS // (batch * heads)))) * block
    count = triton.cdiv(keys, run)
    hides = mask is not None and mask.dtype is torch.bool
    shape = (batch * heads, count, queries, size + 2)
    parts = torch.empty(shape, dtype=torch.float32, device=query.device)
    given = query if mask is None else mask
    steps = [0] * 4 if mask is None else _steps(mask)
    if interpreted():
        sum_parts, put_together = _parts, _together
    else:  # Inductor then sees the kernels
        sum_parts, put_together = wrap_triton(_parts), wrap_triton(_together)
    sum_parts[batch * heads, count](
        query, key, value, given, parts, heads, queries, keys, size, run,
        *query.stride(), *key.stride(), *value.stride(), *steps, SCALE=scale, HIDES=hides,
        ADDS=mask is not None and not hides, QUERIES=MOST_QUERIES, SIZE=wide, BLOCK=block,
        EXACT=query.dtype is torch.float32, WIDENED=interpreted(), num_warps=WARPS,
    )  # fmt: skip
    put_together[batch * heads, queries](
        parts,
        result,
        queries,
        size,
        count,
        SIZE=wide,
        COUNT=triton.next_power_of_2(count),
        num_warps=WARPS,
    )
    return result


@flash_decoding.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def flash_decoding_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Do in plain torch what the kernels do, in float32 or, for float64, in that."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).mT * scale
    if mask is not None:
        boolean = mask.dtype is torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if boolean else scores + mask
    factors = torch.ops.aten._safe_softmax(scores, -1)
    return (factors @ value.to(wide)).to(query.dtype)
