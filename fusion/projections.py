"""Merged projections: linears of one input (query, key, value; gate, up) become one product.

Weight shadows (fusion/shadow.py) lie one behind the other in registration order, so the weights
`[n_i, k]` of such linears are one matrix `W = [n, k]` already, without a copy, and parameters and
`state_dict` stay as they are. On the joint graph, where `x` is `[tokens, k]`:

    forward     y_i = x @ w_i.T             ->  y = x @ W.T, and y_i are columns of it
    backward    dx = sum of dy_i @ w_i      ->  dy = cat(dy_i), dx = dy @ W
                dw_i = dy_i.T @ x           ->  dW = dy.T @ x, and dw_i are rows of it

What it costs, in elements per token (the model behind every decision; see `_backward_pays`):

* Forward: nothing. `x` is read once, and one wide product fills a device better than narrow ones.
  The `y_i` are strided. A view that would need a copy for that, or an output whose layout is
  promised, is a reason to leave the group alone.
* Backward: `cat` reads and writes each `dy_i` that lies in memory already (2 n_i); one that comes
  out of generated code is written into its columns right away. Each partial `dx` that is gone saves
  a write and a read (2 k), each `dw_i` beyond the first saves a read of `x` (k). So gate/up and
  grouped queries gain; three projections as wide as their input, straight from an attention kernel,
  do not.

The numbers: `y_i` and `dw_i` are the same sums. `dx` is rounded once instead of once a term, and
what else is added to it is added afterwards. Gradients of parameters are never views of each other:
a `dw_i` that would be returned as it is, instead of being cast first, is not merged.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from magi_train.core import compat
from magi_train.core import graph as graph_helpers
from magi_train.core.graph import (
    call_with_metadata,
    erase_unused,
    example_value,
    restore_order,
    restrided,
)
from magi_train.core.passes import PassContext, Plan, Stage, source_fingerprint
from magi_train.fusion import projections_match
from magi_train.fusion.projections_match import (
    Gradients,
    Part,
    Product,
    Sum,
    gradients,
    is_returned,
    must_be_copied,
    part_of,
    products,
    summed,
)

SOURCE = source_fingerprint(sys.modules[__name__], projections_match, graph_helpers)
aten = torch.ops.aten


@dataclass(frozen=True)
class MergedProducts:
    """Products that become one.

    Attributes:
        products: Their nodes, in the order of their weights.
        input_gradient: Whether the products of the input's gradient become one.
        weight_gradient: Whether the products of the weights' gradients become one.
        because: Why the backward, or a part of it, stays as it is; "" if it does not.
    """

    products: tuple[str, ...]
    input_gradient: bool
    weight_gradient: bool
    because: str


@dataclass(frozen=True)
class ProjectionsPlan(Plan):
    """Which products become one.

    Attributes:
        merged: Groups of products.
        left_alone: Products that share an input but stay, each group with the reason.
    """

    merged: tuple[MergedProducts, ...]
    left_alone: tuple[tuple[tuple[str, ...], str], ...]


@dataclass(frozen=True)
class _Backward:
    """What of the backward is merged, and `because`, why the rest is not."""

    dy: tuple[Node, ...] = ()
    total: Sum | None = None
    dw: tuple[Node, ...] = ()
    because: str = ""


class MergeProjections:
    """See the head of this module.

    Args:
        whole: Merge the forward only where all of the backward is merged as well, as passes that
            look for linears with their gradients need it.
    """

    name = "merge_projections"
    stage = Stage.JOINT

    def __init__(self, *, whole: bool = False) -> None:
        self.whole = whole

    def uuid(self) -> str:
        """Return what compiled code depends on."""
        return f"{SOURCE}-{self.whole}"

    def plan(self, gm: GraphModule, context: PassContext) -> ProjectionsPlan | None:
        """Return what to merge; None where no two products share an input."""
        merged, left = [], []
        layouts: dict[Node, Tensor] = {}
        for group in products(gm):
            runs, reasons = _adjacent(group)
            left += reasons
            for run in runs:
                names = tuple(p.node.name for p in run)
                new = {**layouts, **_columns(run)}
                outcome = restrided(new)
                if isinstance(outcome, tuple):
                    left.append((names, f"{outcome[0].name} needs another layout: {outcome[1]}"))
                    continue
                back = _backward(gm, run)
                if self.whole and back.because:
                    left.append((names, f"the backward would stay apart: {back.because}"))
                else:
                    layouts = new
                    flags = back.total is not None, bool(back.dw)
                    merged.append(MergedProducts(names, *flags, back.because))
        return ProjectionsPlan(tuple(merged), tuple(left)) if merged or left else None

    def apply(self, gm: GraphModule, plan: ProjectionsPlan, context: PassContext) -> None:
        """Merge what `plan` names."""
        by_name = {p.node.name: p for group in products(gm) for p in group}
        work = []
        for each in plan.merged:  # all of it is looked up before anything moves
            run = [by_name[name] for name in each.products]
            work.append((run, _backward(gm, run)))
        columns: dict[Node, Tensor] = {}
        gone: set[Node] = set()
        for run, back in work:
            weight, slices = _merge_forward(gm, run)
            columns |= {node: node.meta["val"] for node in slices}
            if back.dy:
                gone |= _merge_backward(run, back, weight)
            gone |= {p.node for p in run}
        restore_order(gm.graph)
        erase_unused(gm, gone)
        if columns:
            _set_layouts(columns)


def _adjacent(
    group: Sequence[Product],
) -> tuple[list[list[Product]], list[tuple[tuple[str, ...], str]]]:
    """Cut a group into runs of at least two neighbours; return what stays alone, with reasons."""
    ordered = sorted(group, key=lambda p: (p.part.flat.name, p.part.start))
    runs = [[ordered[0]]]
    reasons: list[tuple[tuple[str, ...], str]] = []
    for before, after in pairwise(ordered):
        why = _apart(before, after)
        if why:
            runs.append([after])
            reasons.append(((before.node.name, after.node.name), why))
        else:
            runs[-1].append(after)
    return [run for run in runs if len(run) > 1], reasons


def _apart(before: Product, after: Product) -> str:
    if before.part.flat is not after.part.flat or before.part.end != after.part.start:
        return "the weights are not adjacent"
    if (before.bias is None) != (after.bias is None):
        return "only one of them has a bias"
    if before.bias is not None:
        one, two = part_of(before.bias, 1), part_of(after.bias, 1)
        if one is None or two is None or one.flat is not two.flat or one.end != two.start:
            return "the biases are not adjacent"
    return ""


def _widths(run: Sequence[Product]) -> list[int]:
    return [example_value(p.weight).shape[0] for p in run]


def _columns(run: Sequence[Product]) -> dict[Node, Tensor]:
    """Return the fake results of the products, were they columns of one tensor."""
    first = example_value(run[0].node)
    with first.fake_mode:
        whole = first.new_empty((first.shape[0], sum(_widths(run))))
        parts = whole.split(_widths(run), dim=1)
    return {p.node: part for p, part in zip(run, parts, strict=True)}


def _backward(gm: GraphModule, run: Sequence[Product]) -> _Backward:
    """Decide what of the backward of `run` is merged."""
    found = [gradients(p) for p in run]
    grads = [g for g in found if g is not None]
    if len(grads) < len(run):
        return _Backward(because="a weight has no gradient of its own to merge")
    dx, dw = _every([g.dx for g in grads]), _every([g.dw for g in grads])
    total = summed(dx) if dx else "the input needs no gradient"
    reasons = [] if isinstance(total, Sum) else [total]
    if not dw:
        reasons.append("a weight is frozen")
    elif any(is_returned(gm.graph, n) for n in dw):
        dw = ()
        reasons.append("the gradients of the weights are returned as they are")
    summed_up = total if isinstance(total, Sum) else None
    if (summed_up or dw) and not _backward_pays(run, grads, summed_up is not None, bool(dw)):
        return _Backward(because="cat(dy) would move more bytes than it saves")
    dy = tuple(g.dy for g in grads) if summed_up or dw else ()
    return _Backward(dy, summed_up, dw, "; ".join(reasons))


def _every(nodes: Sequence[Node | None]) -> tuple[Node, ...]:
    there = tuple(n for n in nodes if n is not None)
    return there if len(there) == len(nodes) else ()


def _backward_pays(run: Sequence[Product], grads: Sequence[Gradients], dx: bool, dw: bool) -> bool:
    """Compare what `cat` moves with what it saves, in elements per token."""
    width = example_value(run[0].weight).shape[1]
    copied = [n for n, g in zip(_widths(run), grads, strict=True) if must_be_copied(g.dy)]
    saved = (len(run) - 1) * width * (2 * dx + dw)
    return bool(saved > 2 * sum(copied))


def _call(like: Node, target: Any, *args: Any) -> Node:
    """Insert a call that AOTAutograd's partitioner takes for what `like` was."""
    node = call_with_metadata(like.graph, target, args)
    node.meta = {**like.meta, "val": node.meta["val"], "tensor_meta": node.meta["tensor_meta"]}
    return node


def _whole(graph: Graph, parts: Sequence[Part], shape: list[int]) -> Node:
    """Insert a view of all `parts` of a flat tensor."""
    flat, start, _ = parts[0]
    piece = call_with_metadata(graph, aten.slice.Tensor, (flat, 0, start, parts[-1].end))
    return call_with_metadata(graph, aten.view.default, (piece, shape))


def _merge_forward(gm: GraphModule, run: Sequence[Product]) -> tuple[Node, list[Node]]:
    """Return the merged weight, and the columns that replace the products of `run`."""
    widths, rows = _widths(run), sum(_widths(run))
    columns = example_value(run[0].weight).shape[1]
    first = next(n for n in gm.graph.nodes if n in {p.node for p in run})
    x = next(p.x for p in run if p.node is first)
    with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op != "placeholder")):
        weight = _whole(gm.graph, [p.part for p in run], [rows, columns])
        biases = [part for p in run if (part := part_of(p.bias, 1)) is not None]
        bias = [_whole(gm.graph, biases, [rows])] if biases else []
    slices = []
    with gm.graph.inserting_before(first):
        turned = _call(first, aten.permute.default, weight, [1, 0])
        y = _call(first, aten.addmm.default if bias else aten.mm.default, *bias, x, turned)
        for p, start, end in _ranges(run, widths):
            column = _call(p.node, aten.slice.Tensor, y, 1, start, end)
            p.node.replace_all_uses_with(column)
            slices.append(column)
    return weight, slices


def _ranges(of: Sequence[Any], widths: Sequence[int]) -> list[tuple[Any, int, int]]:
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return [(o, end - n, end) for o, n, end in zip(of, widths, ends, strict=True)]


def _merge_backward(run: Sequence[Product], back: _Backward, weight: Node) -> set[Node]:
    """Rewrite the backward; return the nodes that nobody needs any more."""
    like = back.total.root if back.total else back.dw[0]
    gone: set[Node] = set(back.dw)
    with like.graph.inserting_before(like):
        dy = _call(like, aten.cat.default, list(back.dy), 1)
        if back.dw:
            turned = _call(like, aten.permute.default, dy, [1, 0])
            whole = _call(like, aten.mm.default, turned, run[0].x)
            for node, start, end in _ranges(back.dw, _widths(run)):
                node.replace_all_uses_with(_call(node, aten.slice.Tensor, whole, 0, start, end))
        if back.total:
            value = _call(like, aten.mm.default, dy, weight)
            for wrap in back.total.wraps:
                value = _wrapped(wrap, value)
            for other in back.total.others:
                value = _call(like, aten.add.Tensor, value, other)
            like.replace_all_uses_with(value)
            gone.add(like)
    return gone


def _wrapped(wrap: Node, value: Node) -> Node:
    """Insert `wrap` once more, over `value`; its result looks the same."""
    node = wrap.graph.node_copy(wrap, lambda n: value if n is wrap.args[0] else n)
    node.meta = dict(wrap.meta)
    return node


def _set_layouts(columns: dict[Node, Tensor]) -> None:
    """Note the layout that everything computed from `columns` has now."""
    found = restrided(columns)
    if isinstance(found, tuple):
        raise AssertionError(f"{found[0].name}: {found[1]}")  # the plan has asked this before
    for node, value in found.items():
        node.meta["val"] = value
        if isinstance(value, Tensor):
            node.meta["tensor_meta"] = compat.extract_tensor_metadata(value)
