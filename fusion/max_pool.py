"""The backward of max-pooling as a kernel of its own, which reads offsets and no input.

PyTorch's backward takes the pooled input for its size only, so that it is kept for nothing, and
generated code looks up the winners of each element one by one. The op here takes the offsets in
windows that the forward keeps anyway, 1 byte each, and the size:

    max_pool2d_with_indices_backward(dy, x, ..., indices(offsets))
    -> max_pool_backward(dy, offsets, x.shape[2:], ...)

Its kernel wants the channels innermost, as convolutions do: it is used where Inductor lays out the
graph so. What it is given comes in that layout then, whatever strides this graph says.

Left alone, with the reason in the plan: other layouts, dilated windows, float64, images that are
small or of sizes that are not known. In a graph that pools no other ones, all is PyTorch's.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from magi_train.core import compat
from magi_train.core.graph import nested_nodes, op_name
from magi_train.core.passes import PassContext, Plan, Stage, source_fingerprint
from magi_train.fusion.kernel_ops import define
from magi_train.fusion.quantize import call_like

SOURCE = source_fingerprint(sys.modules[__name__])
OPERATOR = torch.ops.aten.max_pool2d_with_indices_backward
"""From torch 2.13 on, Inductor decomposes it to atomic additions, unless it is told not to."""
SMALLEST = 2**19
"""Elements of an input from which the kernel gains."""


def _fake(dy: Tensor, offsets: Tensor, size: list[int], *window: list[int]) -> Tensor:
    shape, last = (*dy.shape[:2], *size), torch.channels_last
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=last)


max_pool_backward = define(
    "max_pool_backward(Tensor dy, Tensor offsets, SymInt[] size, int[] kernel, int[] stride, "
    "int[] padding) -> Tensor",
    _fake,
)
"""`(dy, offsets, size, kernel, stride, padding) -> dx`, see kernels/max_pool_backward.py."""


@dataclass(frozen=True)
class MaxPoolPlan(Plan):
    """Whose backward the kernel takes.

    Attributes:
        taken: Names of the backward's nodes.
        left_alone: The other ones, each with the reason.
    """

    taken: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]


def may_take(gm: GraphModule) -> bool:
    """Return whether a graph of Dynamo's pools images of a known size that the kernel is for.

    Only then is PyTorch's backward lowered whole: where it is not taken, it keeps its input.
    """
    pooled = [
        n.args[0] if n.args else n.kwargs.get("input")
        for n in nested_nodes(gm)
        if op_name(n) in ("max_pool2d", "max_pool2d_with_indices")
    ]
    values = [x.meta.get("example_value") for x in pooled if isinstance(x, Node)]
    return any(isinstance(v, Tensor) and not _unfit(v) for v in values)


def _unfit(pooled: Tensor) -> str:
    """Return why the kernel does not take what is pooled, "" if it does."""
    if pooled.dim() != 4:
        return f"it has {pooled.dim()} dimensions, not 4"
    if pooled.dtype is torch.float64:
        return "it is in float64, and the kernel adds up in float32"
    if not isinstance(pooled.numel(), int):
        return "its size is not known when it is compiled"
    if pooled.numel() < SMALLEST:
        return f"it has {pooled.numel()} elements; from {SMALLEST} on it gains"
    return ""


class MaxPoolBackward:
    """See the head of this module."""

    name = "max_pool_backward"
    stage = Stage.JOINT

    def uuid(self) -> str:
        """Return what compiled code depends on."""
        return SOURCE

    def plan(self, gm: GraphModule, context: PassContext) -> MaxPoolPlan | None:
        """Return what the kernel takes; None in a graph that pools nothing."""
        pools = gm.graph.find_nodes(op="call_function", target=OPERATOR.default)
        if not pools:
            return None
        last = compat.wants_channels_last(gm)
        found = {n: self._why_not(n, last) for n in pools}
        taken = tuple(n.name for n, reason in found.items() if not reason)
        return MaxPoolPlan(taken, tuple((n.name, r) for n, r in found.items() if r))

    def apply(self, gm: GraphModule, plan: MaxPoolPlan, context: PassContext) -> None:
        """Call the op in place of PyTorch's."""
        by_name = {n.name: n for n in gm.graph.nodes}
        for name in (*plan.taken, *(name for name, _ in plan.left_alone)):
            _spell_out(by_name[name])
        for pool in (by_name[name] for name in plan.taken):
            dy, _, kernel, stride, padding = pool.args[:5]
            offsets, _, size = _indices_of(pool).args[:3]
            arguments = (dy, offsets, size, kernel, stride, padding)
            with gm.graph.inserting_before(pool):
                new = call_like(pool, max_pool_backward, *arguments)
            values, keywords = new.meta[compat.STRIDES_OF_ARGUMENTS]
            inner = [_channels_last(v) for v in values]
            new.meta[compat.STRIDES_OF_ARGUMENTS] = (tuple(inner), keywords)
            pool.replace_all_uses_with(new)
            gm.graph.erase_node(pool)
        gm.graph.eliminate_dead_code()

    def _why_not(self, pool: Node, last: bool) -> str:
        dilation: Any = pool.args[5]
        if op_name(_indices_of(pool)) != "_low_memory_max_pool_offsets_to_indices":
            return "its forward keeps no offsets"
        if not last:
            return "the graph is not laid out with the channels innermost"
        if any(d != 1 for d in dilation):
            return "its windows are dilated"
        return _unfit(pool.meta["val"])


def _spell_out(pool: Node) -> None:
    """Give a window's height and width where one number is for both, or none for its stride.

    PyTorch's decomposition takes these forms, Inductor's lowering of the op as it is does not.
    """
    kernel: Any = pool.args[2]
    for place, given in enumerate((kernel, pool.args[3] or kernel, *pool.args[4:6]), start=2):
        assert isinstance(given, list | tuple), "by the op's schema"
        pool.update_arg(place, [*given] * (2 // len(given)))


def _indices_of(pool: Node) -> Node:
    indices = pool.args[7]
    assert isinstance(indices, Node), "by the op's schema"
    return indices


def _channels_last(value: Any) -> Any:
    """Return a fake tensor of four dimensions with the channels innermost, others as they are."""
    if not isinstance(value, Tensor):
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return value.contiguous(memory_format=torch.channels_last)
