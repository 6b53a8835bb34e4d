"""Repeated heads: the tensor that a key or value repeats for grouped-query attention, proven.

Libraries repeat keys and values so that every query head has one of its own. The movement of data,
from a candidate tensor to the attention op, is run on a tensor of its own element numbers, and must
yield each head repeated in place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from magi_train.core import compat
from magi_train.core.graph import ancestors, changed_behind, example_value
from magi_train.fusion.verified import execute

MAX_MOVEMENT_NODES = 8
"""How far back from the attention op a repeat of heads is looked for."""

_PROVEN: dict[tuple[Any, ...], bool] = {}
"""Movements that were run: {shape, heads and operations: whether they repeat heads}. The layers of
a model have the same ones, and at 32768 tokens a run takes a second."""
_MOVES = {
    "expand", "reshape", "view", "unsqueeze", "getitem", "contiguous", "repeat_interleave",
    "expand_as", "repeat", "flatten", "_unsafe_view", "clone", "slice", "transpose", "permute",
    "alias", "squeeze", "unflatten",
}  # fmt: skip


def sources(gm: GraphModule, query: Node, key: Node, value: Node) -> tuple[Node, Node] | str | None:
    """Return what key and value repeat; None if they repeat nothing; or why it is of no use."""
    like = example_value(query)
    if like is None or like.dim() != 4:
        return None
    first, second = (_unrepeated(gm, node, like.shape[1]) for node in (key, value))
    if first is None or second is None:
        return None
    if example_value(first).shape[1] != example_value(second).shape[1]:
        return "keys and values are repeated differently"
    return first, second


def _unrepeated(gm: GraphModule, node: Any, heads: int) -> Node | None:
    """Return the tensor whose heads `node` repeats `heads / its heads` times each, or None."""
    value = example_value(node) if isinstance(node, Node) else None
    if value is None or value.dim() != 4 or any(not isinstance(s, int) for s in value.shape):
        return None
    path: list[Node] = []
    current: Any = node
    best: Node | None = None
    while isinstance(current, Node) and len(path) < MAX_MOVEMENT_NODES and _moves_data(current):
        path.append(current)
        current = current.args[0]
        if not isinstance(current, Node):
            break
        source = example_value(current)
        if _may_be_grouped(source, value, heads) and _is_repeat(gm, current, path, node, heads):
            best = current
    return best


def _moves_data(node: Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
    single = [n for n in node.all_input_nodes if isinstance(example_value(n), Tensor)]
    return node.op in ("call_function", "call_method") and name in _MOVES and len(single) == 1


def _may_be_grouped(source: Any, repeated: Tensor, heads: int) -> bool:
    return (
        isinstance(source, Tensor)
        and source.dim() == 4
        and all(isinstance(s, int) for s in source.shape)
        and source.shape[0] == repeated.shape[0]
        and source.shape[2:] == repeated.shape[2:]
        and source.shape[1] < heads
        and heads % source.shape[1] == 0
        and repeated.shape[1] == heads
    )


def _is_repeat(
    gm: GraphModule, source: Node, path: Sequence[Node], target: Node, heads: int
) -> bool:
    """Return whether `path` turns element numbers of `source` into each head repeated in place."""
    if changed_behind(gm, set(path)) is not None:
        return False
    shape = example_value(source).shape
    other = ancestors(target) - ancestors(source)
    key = (tuple(shape), heads, *(f"{n.target} {n.args[1:]} {n.kwargs}" for n in path))
    alone = other == set(path) and all(n.all_input_nodes == [n.args[0]] for n in path)
    if alone and key in _PROVEN:
        return _PROVEN[key]
    numbers = torch.arange(shape.numel(), dtype=torch.int64).reshape(shape)
    moved = execute(gm, other | set(path), {source: numbers}, target)
    wanted = numbers.repeat_interleave(heads // shape[1], dim=1)
    found = isinstance(moved, Tensor) and torch.equal(moved, wanted)
    if alone:
        _PROVEN[key] = found
    return found


def grouping_pays(query: Node, key: Node, device_type: str) -> bool:
    """Return whether the attention kernel of this device takes grouped heads without a detour."""
    if device_type != "cpu":
        return True
    choose: Callable[..., int] = compat.fused_attention_choice
    with compat.unset_fake_temporarily():
        q, k = (
            torch.zeros(1, t.shape[1], 8, t.shape[-1], requires_grad=True)
            for t in (example_value(query), example_value(key))
        )
        return choose(q, k, k, is_causal=True, enable_gqa=True) != 0
