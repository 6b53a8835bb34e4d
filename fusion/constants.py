"""For inference: drop what does nothing, and compute once what never changes.

`RemoveNoOps` takes out dropout (which does nothing in evaluation), conversions to the dtype and
layout that a tensor has, and assertions about metadata. `FoldConstants` runs every part of the
graph that depends on weights alone, and keeps the result instead, if it is not much larger than
what it was computed from. Both work on a module that torch.export returned; weights are its
attributes. Random ops, and what is changed in place, stay.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from magi_train.core.graph import (
    aliasing,
    ancestors,
    attribute,
    erase_unused,
    example_value,
    insert_attribute,
    mutated,
    op_name,
    run_nodes,
)
from magi_train.core.passes import PassContext, Plan, Stage
from magi_train.fusion.verified import Reproducible

GROWTH = 2**20
"""Bytes that a folded constant may take beyond the weights that it was computed from; none where
some of them are quantised to a byte."""
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_CONVERSIONS = {"to", "_to_copy", "contiguous", "detach", "lift_fresh_copy", "clone", "type_as"}


@dataclass(frozen=True)
class NamesPlan(Plan):
    """Names of the nodes that a pass works on.

    Attributes:
        nodes: See the pass.
        left_alone: Nodes that it looked at and left, each with the reason.
    """

    nodes: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...] = ()


class RemoveNoOps:
    """See the head of this module."""

    name = "remove_no_ops"
    stage = Stage.PRE_GRAD

    def plan(self, gm: GraphModule, context: PassContext) -> NamesPlan | None:
        """Return the nodes whose result is their first argument, or nothing."""
        touched = _changed(gm)
        found = [
            n.name
            for n in gm.graph.nodes
            if n.op == "call_function" and (_asserts(n) or (n not in touched and _same(n, touched)))
        ]
        return NamesPlan(tuple(found)) if found and not context.training else None

    def apply(self, gm: GraphModule, plan: NamesPlan, context: PassContext) -> None:
        """Let users read the first argument."""
        chosen = set(plan.nodes)
        for node in [n for n in gm.graph.nodes if n.name in chosen]:
            if node.users:
                node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


class FoldConstants:
    """See the head of this module."""

    name = "fold_constants"
    stage = Stage.PRE_GRAD

    def plan(self, gm: GraphModule, context: PassContext) -> NamesPlan | None:
        """Return the last constant nodes: their users depend on inputs."""
        if context.training:
            return None
        constant = _constant_nodes(gm)
        left: list[tuple[str, str]] = []
        found: list[str] = []
        for node in constant:
            if node.op == "get_attr" or all(u in constant for u in node.users):
                continue
            value = example_value(node)
            if not isinstance(value, Tensor):
                continue
            read = [n for n in ancestors(node) if n.op == "get_attr"]
            sources = [a for a in (attribute(gm, n) for n in read) if a is not None]
            narrow = any(a.dtype.itemsize == 1 and a.dtype != torch.bool for a in sources)
            if value.nbytes > (0 if narrow else GROWTH) + sum(a.nbytes for a in sources):
                left.append((node.name, f"it would take {value.nbytes / 2**20:.2g} MiB"))
            else:
                found.append(node.name)
        return NamesPlan(tuple(found), tuple(left)) if found or left else None

    def apply(self, gm: GraphModule, plan: NamesPlan, context: PassContext) -> None:
        """Compute the nodes, and read the results instead."""
        chosen = [n for n in gm.graph.nodes if n.name in set(plan.nodes)]
        needed = set().union(*(ancestors(n) for n in chosen)) if chosen else set()
        known = {n: a for n in needed if (a := attribute(gm, n)) is not None}
        with torch.no_grad(), Reproducible():
            values = run_nodes([n for n in gm.graph.nodes if n in needed], dict(known))
        for node in chosen:
            new = insert_attribute(gm, node, "constant", values[node].clone())
            node.replace_all_uses_with(new)
        erase_unused(gm, set(chosen))


def _changed(gm: GraphModule) -> set[Node]:
    """Return what some op changes in place, with all it may share memory with."""
    found = set().union(*(ancestors(m) for n in gm.graph.nodes for m in mutated(n)), set())
    return found | aliasing(gm.graph.nodes, found)


def _asserts(node: Node) -> bool:
    return op_name(node) == "_assert_tensor_metadata" and not node.users


def _same(node: Node, touched: set[Node]) -> bool:
    """Return whether a node hands its first argument on, as it is."""
    name, source = op_name(node), node.args[0] if node.args else None
    if not isinstance(source, Node) or source in touched:
        return False
    if name in _DROPOUTS:
        return len(node.args) > 2 and bool(node.args[2] is False or node.args[1] == 0)
    before, after = example_value(source), example_value(node)
    if name not in _CONVERSIONS or not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if any(u.op == "output" for u in node.users):
        return False  # a copy that the caller gets stays a copy
    kinds = [(t.dtype, t.device, t.shape, t.stride()) for t in (before, after)]
    return kinds[0] == kinds[1]


def _constant_nodes(gm: GraphModule) -> dict[Node, None]:
    """Return the nodes that no input reaches, in order."""
    touched = _changed(gm)
    found: dict[Node, None] = {}
    for node in gm.graph.nodes:
        if node in touched or mutated(node):
            continue
        if node.op == "get_attr" and attribute(gm, node) is not None:
            found[node] = None
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            random = torch.Tag.nondeterministic_seeded in node.target.tags
            known = all(n in found for n in node.all_input_nodes)
            if known and not random and not op_name(node).startswith(("empty", "_assert", "sym_")):
                found[node] = None
    return found
