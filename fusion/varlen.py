"""varlen_attention: attention over sequences that lie one behind the other, and over windows.

Rows of all sequences are packed into one dimension, without padding. Sequence i is the rows
`offsets[i]` to `offsets[i + 1]`; a row sees the rows of its own sequence, at most `back` before and
`ahead` behind it. FlashAttention (Dao, FlashAttention-2, 2023) reads offsets and window in its
kernel, and skips every block of scores outside: the work is the sum of the squared lengths, or
length times window, where a dense mask costs the square of the whole. Repeated offsets are empty
sequences, so a graph can be compiled once for any number of sequences up to a bound.

The public `torch.nn.attention.varlen` calls the same kernel; its op has no window in torch 2.11, so
this one calls the kernel itself. The plain-torch form in this file is what runs on the CPU: it is
the reference, and as slow as a dense mask.
"""

import math
from typing import Any

import torch
from torch import Tensor

from magi_train.core import compat

SUPPORTED: dict[str, tuple[torch.dtype, ...]] = {"cuda": (torch.bfloat16, torch.float16)}
"""Where the op is faster than a mask, and for which dtypes. Tests add the CPU."""
MAX_HEAD_SIZE = 256
HEAD_SIZE_STEP = 8


def refusal(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype, dropout: Any) -> str:
    """Return why `[batch, heads, length, size]` tensors cannot go through the op, "" if they can.

    Args:
        query: Fake or real.
        key: May have fewer heads.
        value: As `key`.
        dtype: That attention computes in, after autocast.
        dropout: Probability with which attention drops scores.
    """
    if any(t.dim() != 4 or any(not isinstance(s, int) for s in t.shape) for t in (query, key)):
        return "the sizes of query and key are not four known numbers"
    if query.device.type not in SUPPORTED:
        return f"on {query.device.type} variable-length attention is no faster than a mask"
    if dtype not in SUPPORTED[query.device.type]:
        names = ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED[query.device.type])
        return f"variable-length attention takes {names}, and not {dtype}"
    if dropout != 0:
        return "variable-length attention here has no dropout"
    same = query.shape[::2] == key.shape[::2] and query.shape[-1] == key.shape[-1]
    if not same or key.shape != value.shape or query.shape[1] % key.shape[1]:
        return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)} differ"
    size = query.shape[-1]
    if size % HEAD_SIZE_STEP or size > MAX_HEAD_SIZE:
        return f"the kernel takes head sizes in eights up to {MAX_HEAD_SIZE}, and not {size}"
    return "" if query.device.type == "cpu" else _missing_kernel(query.device)


def _missing_kernel(device: torch.device) -> str:
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no FlashAttention"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "FlashAttention is switched off (torch.backends.cuda.enable_flash_sdp)"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"FlashAttention needs sm_80 or newer, this is sm_{major}{minor}"


@torch.library.custom_op("magi_train::varlen_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    back: int,
    ahead: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if query.is_cuda:
        found = compat.flash_forward(query, key, value, offsets, longest, back, ahead, scale)
    else:
        found = reference(query, key, value, offsets, back, ahead, scale)
    out, logsumexp = (t.contiguous() for t in found)  # the kernel's output lies as the query does
    return out, logsumexp


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    exponents = torch.float64 if query.dtype is torch.float64 else torch.float32
    logsumexp = query.new_empty((query.shape[1], query.shape[0]), dtype=exponents)
    return query.new_empty(query.shape), logsumexp


@torch.library.custom_op("magi_train::varlen_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    offsets: Tensor,
    longest: int,
    back: int,
    ahead: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    saved = (query, key, value, output, logsumexp, offsets)
    if query.is_cuda:
        found = compat.flash_backward(gradient.contiguous(), *saved, longest, back, ahead, scale)
    else:
        found = reference_backward(gradient, *saved, back, ahead, scale)
    dq, dk, dv = (t.contiguous() for t in found)
    return dq, dk, dv


@_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])
    ctx.numbers = inputs[4:]


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return (*_backward(gradient, *ctx.saved_tensors, *ctx.numbers), *([None] * 5))


_forward.register_autograd(_differentiate, setup_context=_keep)

varlen_attention = torch.ops.magi_train.varlen_attention.default
"""`(query [rows, heads, size], key and value [rows, groups, size], offsets [n + 1] int32, longest,
back, ahead, scale) -> (output like query, logsumexp [heads, rows])`.

`heads` is a multiple of `groups`. `offsets` rises from 0 to `rows`; no sequence is longer than
`longest` rows. `back` and `ahead` of -1 mean no limit. Differentiable in query, key and value.
"""


def attend(
    query: Any,
    key: Any,
    value: Any,
    offsets: Any,
    back: int,
    ahead: int,
    scale: float | None,
    shape: tuple[int, int, int, int],
) -> Any:
    """Apply the op to `[batch, heads, length, size]` tensors, or to fx proxies of them.

    Args:
        query: Of `shape`.
        key: May have fewer heads.
        value: As `key`.
        offsets: Where sequences begin in the rows of the whole batch.
        back: See `varlen_attention`.
        ahead: See `varlen_attention`.
        scale: Factor on the scores; None for one over the root of the head size.
        shape: Of the query and of the result.
    """
    batch, _, length, size = shape
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
    factor = 1 / math.sqrt(size) if scale is None else scale
    out = varlen_attention(*rows, offsets, length, back, ahead, factor)[0]
    return out.unflatten(0, (batch, length)).transpose(1, 2)


def offsets_of(positions: Any, numbers: Any, shape: tuple[int, int]) -> Any:
    """Return where sequences begin, in all rows of a batch, from positions that begin at 0.

    The n-th sequence begins at the first row up to which n zeros are counted. Beyond the last
    sequence that is the number of rows, again and again.

    Args:
        positions: `[batch or 1, length]`, or an fx proxy of it.
        numbers: 1 to the largest number of sequences, plus 1.
        shape: Batch and length.
    """
    begun = positions.eq(0).expand(*shape).flatten().cumsum(0)
    return torch.searchsorted(begun, numbers, out_int32=True)


def visible(offsets: Tensor, rows: int, back: int, ahead: int) -> Tensor:
    """Return which rows see which, `[rows, rows]`."""
    number = torch.arange(rows, device=offsets.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), number.to(offsets.dtype), right=True)
    distance = number[:, None] - number
    seen = sequence[:, None] == sequence
    seen = seen & (distance <= back) if back >= 0 else seen
    return seen & (-distance <= ahead) if ahead >= 0 else seen


def _probabilities(
    query: Tensor, key: Tensor, offsets: Tensor, back: int, ahead: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return softmax of the scores, `[groups, heads per group, rows, rows]`, and its logarithm."""
    q = query.unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("rgid,sgd->girs", q, key) * scale
    shut = ~visible(offsets, query.shape[0], back, ahead)
    scores = scores.masked_fill(shut, -torch.inf)
    logsumexp = scores.logsumexp(-1)
    return (scores - logsumexp[..., None]).exp(), logsumexp


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    back: int,
    ahead: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute `varlen_attention` with a dense mask, in float32 at least."""
    q, k, v = (_wide(t) for t in (query, key, value))
    weights, logsumexp = _probabilities(q, k, offsets, back, ahead, scale)
    out = torch.einsum("girs,sgd->rgid", weights, v).flatten(1, 2)
    return out.to(query.dtype), logsumexp.flatten(0, 1)


def reference_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    offsets: Tensor,
    back: int,
    ahead: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `reference`: those of a softmax, written out."""
    q, k, v, g, out = (_wide(t) for t in (query, key, value, gradient, output))
    weights, _ = _probabilities(q, k, offsets, back, ahead, scale)
    groups = (key.shape[1], -1)
    g, out, grouped = (t.unflatten(1, groups) for t in (g, out, q))
    dv = torch.einsum("girs,rgid->sgd", weights, g)
    inner = (g * out).sum(-1).permute(1, 2, 0)[..., None]
    ds = weights * (torch.einsum("rgid,sgd->girs", g, v) - inner) * scale
    dq = torch.einsum("girs,sgd->rgid", ds, k).flatten(1, 2)
    dk = torch.einsum("girs,rgid->sgd", ds, grouped)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()
