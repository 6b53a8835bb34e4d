"""Attention of a few queries over a long cache, by a kernel that divides the keys over the GPU.

A fused attention kernel gives its blocks rows of queries and walks along the keys. A decode step
has one row for each head, so a handful of blocks walk alone while the other multiprocessors wait.
`fusion/kernels/flash_decoding.py` divides the keys, too. Only for graphs that become code for one
kind of device: a file that runs op by op anywhere holds no kernels of ours.
"""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from magi_train.core.graph import example_value, insert_call
from magi_train.fusion.attention import ATTENTION, attention_arguments

LEAST_KEYS = 256
MOST_BLOCKS = 64
"""Heads times sequences: with more, a kernel's blocks keep a GPU busy."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def spread(gm: GraphModule) -> int:
    """Let the kernel compute such attention of an exported graph; return how many calls it was.

    Calls whose sizes vary stay: whether it gains is not known. Without triton all do.
    """
    try:
        from magi_train.fusion.kernels import flash_decoding as kernel
    except ImportError:
        return 0
    found = 0
    for node in list(gm.graph.nodes):
        call = _call(node, kernel.MOST_QUERIES, kernel.MOST_SIZE)
        if call is None:
            continue
        names = ("query", "key", "value", "attn_mask", "scale")
        op = torch.ops.magi_train.flash_decoding.default
        node.replace_all_uses_with(insert_call(node, op, tuple(call[n] for n in names), {}))
        gm.graph.erase_node(node)
        found += 1
    if found:
        gm.recompile()
    return found


def _call(node: Node, most_queries: int, most_size: int) -> dict[str, Any] | None:
    """Return the arguments, by name, of attention that gains; None for other nodes."""
    if node.target not in ATTENTION:
        return None
    call = attention_arguments(node)
    if call["dropout_p"] or call["is_causal"] or call["enable_gqa"]:
        return None
    if isinstance(call["scale"], Node):
        return None
    q, k, v = (example_value(call[name]) for name in ("query", "key", "value"))
    if any(t.dim() != 4 or t.dtype not in DTYPES for t in (q, k, v)):
        return None
    if not all(isinstance(s, int) for t in (q, k, v) for s in t.shape):
        return None
    (batch, heads, few, size), keys = q.shape, k.shape[2]
    if not k.shape == v.shape == (batch, heads, keys, size):
        return None
    gains = few <= most_queries and keys >= LEAST_KEYS and batch * heads <= MOST_BLOCKS
    if not gains or size > most_size:
        return None
    call["scale"] = size**-0.5 if call["scale"] is None else call["scale"]
    return call
