"""The sign that a ReLU's backward asks for, from what a norm's backward reads anyway.

Behind a BatchNorm, `z = relu(p)` with `p = (y - mean) * rstd * weight + bias`. PyTorch's backward
masks the gradient by `z <= 0`, and the norm's backward behind it reads y: two tensors, twice each,
once for the sums over the batch and once for the gradient of y. Here

    p = y * scale + shift    with    scale = rstd * weight, shift = bias - mean * scale

of each channel, which the forward keeps, and the mask is `p <= 0`, computed where it is read: one
tensor less in both kernels, and no more reads in all than Inductor computes twice in place of
storing the result. z is kept for the next layer, but is not read for this.

`relu(p) <= 0` is `p <= 0` for every number, NaN included. The other order of operations costs some
roundings of float32, of `y * scale`; y itself, whose values are 16 bits, has been rounded by 2^15
times that.

Left alone, with the reason in the plan: a y that is not in 16 bits; activations whose input is no
multiple of one tensor plus a constant of each channel (a residual is a second tensor, and would be
read in place of z), of a tensor that the backward does not read, or of one that no kernel is known
to write: forward and backward would see it rounded and not.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from magi_train.core import compat, graph
from magi_train.core.graph import HALF, insert_computation, is_pointwise, is_view
from magi_train.core.passes import PassContext, Plan, Stage, source_fingerprint

SOURCE = source_fingerprint(sys.modules[__name__])
aten, prims = torch.ops.aten, torch.ops.prims
STEPS = {aten.mul.Tensor: "mul", aten.add.Tensor: "add", aten.sub.Tensor: "sub"}

SMALL = 16
"""What has a sixteenth of the elements or fewer counts as free to read: statistics, weights."""


class _Affine(NamedTuple):
    """What a ReLU gets: a source, by steps ("mul", "add", "sub", and by what) through nodes."""

    source: Node
    steps: tuple[tuple[str, Node], ...]
    through: frozenset[Node]


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
            if getattr(n.args[0], "target", None) is aten.relu.default and n.args[1] == 0
        ]
        late = graph.descendants(graph.tangents(gm.graph)) if masks else set()
        found = {mask: _why_not(mask, late) for mask in masks if mask.users.keys() & late}
        changed = tuple(mask.name for mask, reason in found.items() if not reason)
        left = tuple((mask.name, reason) for mask, reason in found.items() if reason)
        return ReluPlan(changed, left) if found else None

    def apply(self, gm: GraphModule, plan: ReluPlan, context: PassContext) -> None:
        """Compare what goes into the ReLU in place of what comes out."""
        by_name = {n.name: n for n in gm.graph.nodes}
        for mask in (by_name[name] for name in plan.from_input):
            relu = _relu_of(mask)
            old, affine = relu.args[0], _affine(relu.args[0])
            assert isinstance(old, Node), "a tensor"
            assert affine is not None, "checked when it was planned"
            factors = [by for _, by in affine.steps]
            scale, shift = insert_computation(relu, partial(_folded, affine.steps), factors)
            for kept in (scale, shift):
                kept.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            dtype = old.meta["val"].dtype
            new = insert_computation(relu, _applied, (affine.source, scale, shift, dtype))
            relu.update_arg(0, new)
            mask.update_arg(0, new)
        gm.graph.eliminate_dead_code()


def _relu_of(mask: Node) -> Node:
    relu = mask.args[0]
    assert isinstance(relu, Node), "a tensor"
    return relu


def _why_not(mask: Node, late: set[Node]) -> str:
    """Return "" if the ReLU's input comes of one tensor that the backward reads, else why not."""
    relu = _relu_of(mask)
    affine = _affine(relu.args[0])
    if affine is None:
        return "its input is no multiple of one tensor plus a constant of each channel"
    if affine.source.meta["val"].dtype not in HALF:
        return f"its input is computed from {affine.source.meta['val'].dtype}, not from 16 bits"
    if is_pointwise(affine.source):
        return "its input is computed element by element, where code may not round to 16 bits"
    if not _is_read_late(affine.source, late, {*affine.through, relu}):
        return "the backward does not read what its input is computed from"
    return ""


def _affine(node: Any) -> _Affine | None:
    """Return how a node comes of one tensor of its size in float32; None if not so."""
    size = _elements(node)
    steps: list[tuple[str, Node]] = []
    through = []
    while node.target in STEPS or node.target in graph.CASTS:
        dtype = node.meta["val"].dtype
        step = STEPS.get(node.target)
        if step is not None and dtype is not torch.float32:
            break
        # What is rounded to 16 bits and multiplied keeps its sign, what is added to may not.
        if dtype is not torch.float32 and any(name != "mul" for name, _ in steps):
            return None
        large = [a for a in node.all_input_nodes if _elements(a) == size]
        if len(large) != 1 or node.kwargs.get("alpha", 1) != 1:
            return None
        if step is not None:
            by = node.args[0] if node.args[1] is large[0] else node.args[1]
            if not _is_wide(by) or (step == "sub" and by is node.args[0]):
                return None
            steps.insert(0, (step, by))
        through.append(node)
        node = large[0]
    kinds = {name for name, _ in steps}
    # Constants of each row times constants of each column, a LayerNorm's, are a full tensor.
    small = _elements(*(by for _, by in steps)) * SMALL <= size
    enough = "mul" in kinds and kinds != {"mul"} and small
    return _Affine(node, tuple(steps), frozenset(through)) if enough else None


def _is_wide(node: Any) -> bool:
    """Return whether something is a float32 tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32


def _folded(steps: Sequence[tuple[str, Node]], *factors: Any) -> tuple[Any, Any]:
    """Return scale and shift of a chain of steps; `factors` are proxies of theirs."""
    scale: Any = None
    shift: Any = None
    for (step, _), by in zip(steps, factors, strict=True):
        if step == "mul":
            scale = by if scale is None else aten.mul.Tensor(scale, by)
            shift = None if shift is None else aten.mul.Tensor(shift, by)
        elif shift is None:
            shift = by if step == "add" else aten.neg.default(by)
        else:
            shift = (aten.add if step == "add" else aten.sub).Tensor(shift, by)
    return scale, shift


def _applied(source: Any, scale: Any, shift: Any, dtype: torch.dtype) -> Any:
    """Return `source * scale + shift`."""
    wide = prims.convert_element_type.default(source, torch.float32)
    result = aten.add.Tensor(aten.mul.Tensor(wide, scale), shift)
    return prims.convert_element_type.default(result, dtype)


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


def _elements(*nodes: Node) -> int:
    """Return the elements of what tensors are broadcast to; 0 if not known, or of no tensor."""
    values: list[Any] = [n.meta.get("val") for n in nodes]
    if not all(isinstance(v, torch.Tensor) for v in values):
        return 0
    shapes = [[compat.size_hint(s) or 0 for s in reversed(v.shape)] for v in values]
    return math.prod(max(sizes) for sizes in itertools.zip_longest(*shapes, fillvalue=1))
