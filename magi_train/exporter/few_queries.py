"""Attention of a few queries over a long cache, as sums that generated code divides over the GPU.

A fused attention kernel gives its blocks rows of queries and walks along the keys. A decode step
has one row for each head, so a handful of blocks walk alone while the other multiprocessors wait.
Written out, scores are a sum over the head's size for each key, and the result one over keys for
each element, which Inductor spreads over all multiprocessors and splits where results are few:

    scores = sum over d of q k * scale, masked      p = softmax(scores)      sum over keys of p v

All of it in float32, so it rounds less than the kernel does. Only for graphs that are compiled: op
by op, the products would lie in memory. Method: Dao et al. (2023), Flash-Decoding (keys in
parallel). Differs: no kernel of its own.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from magi_train.core.graph import example_value, insert_computation
from magi_train.fusion.attention import ATTENTION, attention_arguments

MOST_QUERIES = 16
"""Rows of a head: each reads the keys anew."""
LEAST_KEYS = 256
MOST_BLOCKS = 64
"""Heads times sequences: with more, a kernel's blocks keep a GPU busy."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, boolean: bool
) -> Tensor:
    """Return the attention of a few queries.

    Args:
        q: Queries, `[batch, heads, few, size]`.
        k: Keys, `[batch, heads, keys, size]`.
        v: Values, as `k`.
        mask: Broadcast to `[batch, heads, few, keys]`; None for all.
        scale: Of the scores.
        boolean: Whether the mask says what is seen; else it is added to the scores.
    """
    scores = (q.unsqueeze(3).float() * k.unsqueeze(2).float()).sum(-1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if boolean else scores + mask
    parts = torch.ops.aten._safe_softmax(scores, -1)  # a row that sees nothing gives zeros
    return (parts.unsqueeze(-1) * v.unsqueeze(2).float()).sum(3).to(q.dtype)


def spread(gm: GraphModule) -> int:
    """Write such attention of an exported graph out; return how many calls it was.

    Calls whose sizes vary stay: whether it gains is not known.
    """
    found = 0
    for node in list(gm.graph.nodes):
        call = _call(node)
        if call is None:
            continue
        q, mask, scale = example_value(call["query"]), call["attn_mask"], call["scale"]
        boolean = mask is not None and example_value(mask).dtype is torch.bool
        value = insert_computation(
            node,
            partial(attend, boolean=boolean),
            (call["query"], call["key"], call["value"], mask,
             q.shape[-1] ** -0.5 if scale is None else scale),
        )  # fmt: skip
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
        found += 1
    if found:
        gm.recompile()
    return found


def _call(node: Node) -> dict[str, Any] | None:
    """Return the arguments, by name, of attention that gains; None for other nodes."""
    if node.target not in ATTENTION:
        return None
    call = attention_arguments(node)
    if call["dropout_p"] or call["is_causal"] or call["enable_gqa"]:
        return None
    values = [example_value(call[name]) for name in ("query", "key", "value")]
    if any(v.dim() != 4 or v.dtype is torch.float64 for v in values):
        return None
    sizes = [*values[0].shape[:3], values[1].shape[2]]
    if not all(isinstance(s, int) for s in sizes):
        return None
    batch, heads, few, keys = sizes
    gains = few <= MOST_QUERIES and keys >= LEAST_KEYS and batch * heads <= MOST_BLOCKS
    return call if gains else None
