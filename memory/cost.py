"""Cost: predicted seconds of a node, from a roofline.

    seconds = max(flops / device flops, bytes read and written / device bandwidth)

Attention counts at its true flops, whatever kernel computes it: PyTorch's own solver does not know
every attention op as expensive and recomputes those as if they were free. Where code is generated,
element-wise work costs no bytes of its own: it is fused into what reads it. Copies from and to the
host run beside all that (memory/offload.py).

Source: Williams et al. 2009, Roofline. FLOPs from torch.utils.flop_counter; it does not know
    attention with fewer heads of keys, so for all attention 4 x batch x heads x queries x keys x
    head size, half of it if causal, and 2.5 times that backward (five products instead of two).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from magi_train.core import compat
from magi_train.core.graph import is_pointwise, is_view, num_bytes
from magi_train.core.hardware import Speed
from magi_train.memory.copies import OPS

FUSED_SHARE = 0.25
"""Part of its traffic that recomputing an element-wise node costs in generated code [estimated]."""


def seconds(node: Node, speed: Speed, *, fused: bool) -> float:
    """Return the predicted time of a node on a device.

    Args:
        node: Of a graph from AOTAutograd.
        speed: Of the device.
        fused: Whether generated code computes what is element-wise.
    """
    value = node.meta.get("val")
    if not isinstance(node.target, torch._ops.OpOverload) or is_view(node) or node.target in OPS:
        return 0.0
    read = sum(num_bytes(source.meta.get("val")) for source in node.all_input_nodes)
    written = sum(num_bytes(leaf) for leaf in pytree.tree_leaves(value))
    share = FUSED_SHARE if fused and is_pointwise(node) else 1.0
    return max(flops(node) / speed.flops, share * (read + written) / speed.bytes)


def flops(node: Node) -> float:
    """Return the floating-point operations of a node; 0 for what no formula is known for."""
    name = str(node.target)
    if "attention" in name and "backward" in name:
        return 2.5 * _attention_flops(node, node.args[1:4])
    if is_attention(node):
        return _attention_flops(node, node.args[:3])
    packet = getattr(node.target, "_overloadpacket", None)
    formula: Callable[..., Any] | None = flop_registry.get(packet)
    if formula is None:
        return 0.0
    args, kwargs = pytree.tree_map(_static, (node.args, node.kwargs))
    return float(formula(*args, **kwargs, out_val=_static(node)))


def _static(argument: Any) -> Any:
    """Return an argument without symbols: sizes as they are while compiling."""
    value = argument.meta.get("val") if isinstance(argument, Node) else argument
    if isinstance(value, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in value.shape):
        shape = [compat.size_hint(s) or 1 for s in value.shape]
        return torch.empty(shape, dtype=value.dtype, device="meta")
    return (compat.size_hint(value) or 1) if isinstance(value, torch.SymInt) else value


def is_attention(node: Node) -> bool:
    """Return whether a node is the forward of a fused attention, of whichever kernel."""
    name = str(node.target)
    return node.op == "call_function" and "attention" in name and "backward" not in name


def _attention_flops(node: Node, operands: Sequence[Any]) -> float:
    tensors = [_static(a) for a in operands if isinstance(a, Node)]
    if len(tensors) < 3 or any(not isinstance(t, torch.Tensor) for t in tensors):
        return 0.0
    query, key = tensors[:2]
    causal = 0.5 if argument(node, "is_causal") else 1.0
    return 4.0 * causal * math.prod(query.shape) * key.shape[-2]


def argument(node: Node, name: str) -> Any:
    """Return the argument `name` of an op, its default where it is not given; None without it."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    for i, parameter in enumerate(node.target._schema.arguments):
        if parameter.name == name:
            return (
                node.args[i]
                if i < len(node.args)
                else node.kwargs.get(name, parameter.default_value)
            )
    return None


def is_repeatable(node: Node) -> bool:
    """Return whether running a node again gives the same value: it draws no random numbers."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.op == "get_attr" or not compat.is_higher_order(target)
    if target.namespace == "_c10d_functional":
        return False
    dropout = argument(node, "dropout_p")
    if is_attention(node) and dropout is not None:
        return dropout == 0
    return torch.Tag.nondeterministic_seeded not in target.tags
