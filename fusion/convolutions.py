"""For inference: BatchNorm goes into the weights before it, convolutions get channels_last.

`FoldBatchNorm`: in evaluation BatchNorm is `a * x + b` for each channel, so the convolution or
linear before it can carry it: torch.nn.utils.fusion computes the weights, here in float64. The ReLU
and the residual addition behind are then neighbours of the convolution, for code generation.

`ChannelsLast` stores the weights of convolutions with the channels innermost, the layout that
vector and tensor-core kernels read; values follow, as torch's convolutions return the layout of
their weight. It runs where most of the work is in dense convolutions of many channels, and where no
view behind them needs the old layout (tried on fake values).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from magi_train.core.graph import (
    HALF,
    attribute,
    example_value,
    insert_attribute,
    op_name,
    restrided,
    written_attributes,
)
from magi_train.core.passes import PassContext, Plan, Stage
from magi_train.fusion.constants import NamesPlan

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
MANY_CHANNELS = 16
"""Channels, in and out, from which a convolution counts as one of many."""


@dataclass(frozen=True)
class FoldPlan(Plan):
    """BatchNorm nodes, each with the convolution or linear that takes it in.

    Attributes:
        folded: Pairs of names.
        left_alone: BatchNorm nodes that stay, each with the reason.
    """

    folded: tuple[tuple[str, str], ...]
    left_alone: tuple[tuple[str, str], ...]


class FoldBatchNorm:
    """See the head of this module."""

    name = "fold_batch_norm"
    stage = Stage.PRE_GRAD

    def plan(self, gm: GraphModule, context: PassContext) -> FoldPlan | None:
        """Return which BatchNorms stand alone behind a convolution or linear."""
        folded, left = [], []
        changed = written_attributes(gm)
        for node in gm.graph.nodes:
            if op_name(node) == "batch_norm" and not context.training:
                reason = _unfoldable(gm, node, changed)
                if reason:
                    left.append((node.name, reason))
                else:
                    folded.append((node.name, node.args[0].name))
        return FoldPlan(tuple(folded), tuple(left)) if folded or left else None

    def apply(self, gm: GraphModule, plan: FoldPlan, context: PassContext) -> None:
        """Give the convolutions new weights, and let users of the BatchNorm read them."""
        by_name = {n.name: n for n in gm.graph.nodes}
        for norm, source in ((by_name[a], by_name[b]) for a, b in plan.folded):
            weight, bias = _new_weights(gm, source, norm)
            new = [insert_attribute(gm, source, f"{source.name}_{n}", t)
                   for n, t in (("weight", weight), ("bias", bias))]  # fmt: skip
            source.args = (source.args[0], *new, *source.args[3:])
            source.kwargs = {k: v for k, v in source.kwargs.items() if k != "bias"}
            norm.replace_all_uses_with(source)
            gm.graph.erase_node(norm)


class ChannelsLast:
    """See the head of this module.

    Args:
        always: Do not ask whether it gains.
    """

    name = "channels_last"
    stage = Stage.PRE_GRAD

    def __init__(self, always: bool = False) -> None:
        self.always = always

    def plan(self, gm: GraphModule, context: PassContext) -> NamesPlan | None:
        """Return the convolutions whose weights change their layout."""
        nodes = [n for n in gm.graph.nodes if op_name(n) == "conv2d"]
        changed = written_attributes(gm)
        nodes = [
            n
            for n in nodes
            if attribute(gm, n.args[1]) is not None
            and n.args[1] not in changed
            and example_value(n).dim() == 4
        ]
        if not nodes or context.training:
            return None
        reason = "" if self.always else _no_gain(nodes, context)
        reason = reason or _needs_rows(nodes)
        if reason:
            return NamesPlan((), tuple((n.name, reason) for n in nodes))
        return NamesPlan(tuple(n.name for n in nodes))

    def apply(self, gm: GraphModule, plan: NamesPlan, context: PassContext) -> None:
        """Store the weights with their channels innermost."""
        chosen = set(plan.nodes)
        for node in [n for n in gm.graph.nodes if n.name in chosen]:
            weight = attribute(gm, node.args[1])
            assert weight is not None, "planned so"
            dense = weight.detach().contiguous(memory_format=torch.channels_last)
            new = insert_attribute(gm, node, f"{node.name}_weight", dense)
            node.args = (node.args[0], new, *node.args[2:])


def _unfoldable(gm: GraphModule, norm: Node, changed: set[Node]) -> str:
    """Return why a BatchNorm stays, "" if it can go."""
    source = norm.args[0]
    if norm.args[5] is not False:
        return "it uses the statistics of the batch"
    if not isinstance(source, Node) or op_name(source) not in (*CONVOLUTIONS, "linear"):
        return "what it reads is no convolution or linear"
    if len(source.users) != 1:
        return f"{source.name} has other users"
    if op_name(source) == "linear" and example_value(source).dim() != 2:
        return "its channels are not the features of the linear"
    bias = source.args[2] if len(source.args) > 2 else source.kwargs.get("bias")
    for each in (*norm.args[1:5], source.args[1], bias):
        if each is not None and attribute(gm, each) is None:
            return f"{each} is not a constant"
        if each in changed:
            return f"{each} is changed in place"
    if norm.args[3] is None or norm.args[4] is None:
        return "it has no running statistics"
    return ""


def _new_weights(gm: GraphModule, source: Node, norm: Node) -> tuple[Tensor, Tensor]:
    def wide(node: object) -> Tensor | None:
        found = attribute(gm, node)
        return None if found is None else found.detach().double()

    weight, scale, shift, mean, var = (wide(n) for n in (source.args[1], *norm.args[1:5]))
    bias = wide(source.args[2] if len(source.args) > 2 else source.kwargs.get("bias"))
    assert weight is not None, "planned so"
    assert mean is not None, "planned so"
    assert var is not None, "planned so"
    dtype = example_value(norm).dtype
    if op_name(source) == "linear":
        ones = torch.ones_like(mean) if scale is None else scale
        zeros = torch.zeros_like(mean) if shift is None else shift
        new = fuse_linear_bn_weights(weight, bias, mean, var, norm.args[7], ones, zeros)  # type: ignore[arg-type]
    else:
        new = fuse_conv_bn_weights(weight, bias, mean, var, norm.args[7], scale, shift)  # type: ignore[arg-type]
    return new[0].detach().to(dtype), new[1].detach().to(dtype)


def _no_gain(nodes: list[Node], context: PassContext) -> str:
    """Return why another layout would gain nothing, "" if it would."""
    half = example_value(nodes[0]).dtype in HALF
    if context.device_type != "cpu" and not half:
        return "float32 convolutions gain nothing on this device"
    shapes = [example_value(n.args[1]).shape for n in nodes]  # type: ignore[arg-type]
    dense = sum(s.numel() for s in shapes if min(s[0], s[1]) >= MANY_CHANNELS)
    if 2 * dense < sum(s.numel() for s in shapes):
        return f"most weights are in convolutions of fewer than {MANY_CHANNELS} channels"
    return ""


def _needs_rows(nodes: list[Node]) -> str:
    """Return which op behind `nodes` cannot take the new layout, "" if all can."""
    values = {}
    for node in nodes:
        fake = example_value(node)
        with fake.fake_mode:
            values[node] = fake.contiguous(memory_format=torch.channels_last)
    found = restrided(values)
    if isinstance(found, tuple) and found[0].op != "output":
        return f"{found[0].name} needs the old layout: {found[1]}"
    return ""
