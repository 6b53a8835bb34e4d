"""The sign that a ReLU's backward asks for, from what a norm's backward reads anyway.

Behind a BatchNorm, `z = relu(p)` with `p = (y - mean) * rstd * weight + bias`. PyTorch's backward
masks the gradient by `z <= 0`, and the norm's backward behind it reads y: two tensors, twice each,
once for the sums over the batch and once for the gradient of y. Here the mask is `p <= 0`, and p is
computed from y where it is read: one tensor less in both kernels. z is kept for the next layer, but
is not read for this.

`relu(p) <= 0` is `p <= 0` for every number, NaN included. p is computed with the same operations as
before; where a compiler contracts them otherwise, a p within rounding of 0 may change its side, as
it does between any two orders of the same sum.

Left alone, with the reason in the plan: activations whose input is no element-wise function of one
tensor of that size (a residual is a second one, and would be read in place of z), or of one that
the backward does not read.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from magi_train.core import compat, graph
from magi_train.core.graph import is_pointwise, is_view
from magi_train.core.passes import PassContext, Plan, Stage, source_fingerprint

SOURCE = source_fingerprint(sys.modules[__name__])
aten = torch.ops.aten

SMALL = 16
"""What has a sixteenth of the elements or fewer counts as free to read: statistics, weights."""


@dataclass(frozen=True)
class ReluPlan(Plan):
    """Which masks are computed from a norm's input.

    Attributes:
        from_input: Names of the comparisons.
        left_alone: The other ones, each with the reason.
    """

    from_input: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]


class ReluMasks:
    """See the head of this module."""

    name = "relu_masks"
    stage = Stage.JOINT

    def uuid(self) -> str:
        """Return what compiled code depends on."""
        return SOURCE

    def plan(self, gm: GraphModule, context: PassContext) -> ReluPlan | None:
        """Return which masks change; None in a graph without a ReLU's backward."""
        masks = [
            n
            for n in gm.graph.find_nodes(op="call_function", target=aten.le.Scalar)
            if _is_relu(n.args[0]) and n.args[1] == 0
        ]
        late = graph.descendants(graph.tangents(gm.graph)) if masks else set()
        found = {mask: _why_not(mask, late) for mask in masks if late}
        changed = tuple(mask.name for mask, reason in found.items() if not reason)
        left = tuple((mask.name, reason) for mask, reason in found.items() if reason)
        return ReluPlan(changed, left) if found else None

    def apply(self, gm: GraphModule, plan: ReluPlan, context: PassContext) -> None:
        """Compare what goes into the ReLU in place of what comes out."""
        by_name = {n.name: n for n in gm.graph.nodes}
        for mask in (by_name[name] for name in plan.from_input):
            relu = mask.args[0]
            assert isinstance(relu, Node), "checked when it was planned"
            mask.update_arg(0, relu.args[0])


def _is_relu(node: Any) -> bool:
    return isinstance(node, Node) and node.target is aten.relu.default


def _why_not(mask: Node, late: set[Node]) -> str:
    """Return "" if the ReLU's input comes of one tensor that the backward reads, else why not."""
    relu = mask.args[0]
    assert isinstance(relu, Node), "a ReLU"
    size = _elements(relu)
    large, todo, seen = set(), [relu.args[0]], set()
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in seen or _elements(node) * SMALL <= size:
            continue
        seen.add(node)
        if is_pointwise(node) or is_view(node):
            todo.extend(node.all_input_nodes)
        else:
            large.add(node)
    if len(large) != 1:
        return f"its input is computed from {len(large)} tensors of its size"
    if not _is_read_late(large.pop(), late, {*seen, relu}):
        return "the backward does not read what its input is computed from"
    return ""


def _is_read_late(source: Node, late: set[Node], but: set[Node]) -> bool:
    """Return whether the backward reads a tensor, element-wise and not through the nodes `but`."""
    todo, seen = list(source.users), set(but)
    while todo:
        node = todo.pop()
        if node in late:
            return True
        if node not in seen and (is_pointwise(node) or is_view(node)):
            seen.add(node)
            todo.extend(node.users)
    return False


def _elements(node: Node) -> int:
    value = node.meta.get("val")
    return (compat.size_hint(value.numel()) or 0) if isinstance(value, torch.Tensor) else 0
