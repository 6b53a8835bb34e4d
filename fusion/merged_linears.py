"""For inference: linears of one input become one linear, with their weights stacked.

Query, key and value, or gate and up: each reads the same activations. One wide product starts one
kernel instead of three and reads its input once, which is what counts for few tokens. Weights are
constants here, so they are stacked once (in training they stay parameters of their own, and
fusion/projections.py does it in place). Weights that something else reads, too, are left alone.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from magi_train.core.graph import (
    aliased,
    attribute,
    example_value,
    insert_attribute,
    insert_computation,
    mutated,
    restrided,
    written_attributes,
)
from magi_train.core.passes import PassContext, Plan, Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class MergePlan(Plan):
    """Which linears become one.

    Attributes:
        groups: Names of linears of one input, in order.
        left_alone: Groups that stay, by their first linear, each with the reason.
    """

    groups: tuple[tuple[str, ...], ...]
    left_alone: tuple[tuple[str, str], ...]


class MergeLinears:
    """See the head of this module."""

    name = "merge_linears"
    stage = Stage.PRE_GRAD

    def plan(self, gm: GraphModule, context: PassContext) -> MergePlan | None:
        """Return the linears that read one value, with weights of their own."""
        if context.training:
            return None
        of_input: dict[Any, list[Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            if node.op == "call_function" and node.target is aten.linear.default:
                of_input[node.args[0]].append(node)
        groups, left = [], []
        changed = written_attributes(gm)
        for nodes in of_input.values():
            if len(nodes) > 1:
                reason = _unmergeable(gm, nodes, changed)
                if reason:
                    left.append((nodes[0].name, reason))
                else:
                    groups.append(tuple(n.name for n in nodes))
        return MergePlan(tuple(groups), tuple(left)) if groups or left else None

    def apply(self, gm: GraphModule, plan: MergePlan, context: PassContext) -> None:
        """Stack the weights; users read parts of one result."""
        by_name = {n.name: n for n in gm.graph.nodes}
        for names in plan.groups:
            nodes = [by_name[n] for n in names]
            rows, biases, weights = [], [], []
            for node in nodes:
                weight, bias = attribute(gm, node.args[1]), attribute(gm, _bias(node))
                assert weight is not None, "planned so"
                weights.append(weight.detach())
                rows.append(weight.shape[0])
                biases.append(weight.new_zeros(rows[-1]) if bias is None else bias.detach())
            given = [
                nodes[0].args[0],
                insert_attribute(gm, nodes[0], "stacked", torch.cat(weights)),
            ]
            if any(_bias(n) is not None for n in nodes):
                given.append(insert_attribute(gm, nodes[0], "stacked_bias", torch.cat(biases)))
            wide = insert_computation(nodes[0], aten.linear.default, given)
            start = 0
            for node, size in zip(nodes, rows, strict=True):
                cut = (wide, -1, start, start + size)
                start += size
                node.replace_all_uses_with(insert_computation(nodes[0], aten.slice.Tensor, cut))
            for node in nodes:
                gm.graph.erase_node(node)


def _bias(node: Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _unmergeable(gm: GraphModule, nodes: list[Node], changed: set[Node]) -> str:
    """Return why these linears stay apart, "" if they can be one."""
    for node in nodes:
        weight = node.args[1]
        if weight in changed or _bias(node) in changed:
            return f"a weight of {node.name} is changed in place"
        if attribute(gm, weight) is None or (_bias(node) and attribute(gm, _bias(node)) is None):
            return f"a weight of {node.name} is not a constant"
        if sum(n.target == weight.target for n in gm.graph.nodes if n.op == "get_attr") > 1 or (  # type: ignore[union-attr]
            len(weight.users) > 1  # type: ignore[union-attr]
        ):
            return f"the weight of {node.name} has other users, and would be kept twice"
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    x = nodes[0].args[0]
    between = [n for n in gm.graph.nodes if order[nodes[0]] < order[n] < order[nodes[-1]]]
    assert isinstance(x, Node), "what linears have in common"
    if any(aliased(m) & aliased(x) for n in between for m in mutated(n)):
        return f"{x} is changed between them"
    total = sum(example_value(n).shape[-1] for n in nodes)
    values = {}
    for node in nodes:
        fake = example_value(node)
        with fake.fake_mode:
            wide = fake.new_empty((*fake.shape[:-1], total))
            values[node] = wide[..., : fake.shape[-1]]
    found = restrided(values)
    if isinstance(found, tuple) and found[0].op != "output":
        return f"{found[0].name} needs a dense tensor: {found[1]}"
    return ""
