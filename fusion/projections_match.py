"""What belongs together in a joint graph: products of one input, and what their gradients are.

Only the structure counts. A weight is a two-dimensional view of a part of one flat input
(fusion/shadow.py lays them out), so two weights are one matrix if one part ends where the next
begins. Two nodes hold the same value if the same casts and views lead to both from one node:
under autocast every linear casts its input for itself.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from magi_train.core.graph import CASTS, SAME, example_value, outputs

aten = torch.ops.aten
SHAPES = (aten.view.default, aten._unsafe_view.default)
_ROWS_COLUMNS = {(aten.permute.default, "([1, 0],)"), (aten.t.default, "()")} | {
    (aten.transpose.int, text) for text in ("(0, 1)", "(1, 0)", "(-1, -2)", "(-2, -1)")
}


class Part(NamedTuple):
    """A piece of a flat input, from `start` to before `end`, in elements."""

    flat: Node
    start: int
    end: int


@dataclass(frozen=True)
class Product:
    """One forward product `x @ weight.T + bias`.

    Attributes:
        node: The mm or addmm, `[tokens, rows]`.
        x: `[tokens, columns]`.
        weight: The view `[rows, columns]`.
        part: Where the weight lies.
        bias: `[rows]`, or None.
    """

    node: Node
    x: Node
    weight: Node
    part: Part
    bias: Node | None


@dataclass(frozen=True)
class Gradients:
    """What the backward makes of one product.

    Attributes:
        dy: The gradient of its result, `[tokens, rows]`.
        dx: `dy @ weight`, or None where the input needs no gradient.
        dw: `dy.T @ x`, or None where the weight is frozen.
    """

    dy: Node
    dx: Node | None
    dw: Node | None


def upright(node: Any) -> tuple[Any, bool]:
    """Return what `node` is a transposition of, and whether rows and columns are swapped."""
    swapped = False
    while isinstance(node, Node) and (node.target, str(node.args[1:])) in _ROWS_COLUMNS:
        node, swapped = node.args[0], not swapped
    return node, swapped


def value_key(node: Any) -> object:
    """Return a key that nodes share only if they hold the same value."""
    if isinstance(node, Node) and node.target in (*CASTS, *SHAPES, *SAME):
        return (node.target, value_key(node.args[0]), str(node.args[1:]), str(node.kwargs))
    return node


def part_of(node: Any, dim: int) -> Part | None:
    """Return which part of a flat input `node` is a view of; None if it is none of `dim` dims."""
    if not isinstance(node, Node) or node.target not in SHAPES:
        return None
    piece, value = node.args[0], example_value(node)
    if not isinstance(piece, Node) or piece.target is not aten.slice.Tensor or value.dim() != dim:
        return None
    flat, *where = piece.args
    if not isinstance(flat, Node) or flat.op != "placeholder" or example_value(flat).dim() != 1:
        return None
    if len(where) != 3 or where[0] != 0 or not all(isinstance(n, int) for n in where):
        return None
    return Part(flat, where[1], where[2])  # type: ignore[arg-type]


def products(gm: GraphModule) -> list[list[Product]]:
    """Return the forward products that share their input, at least two each, in graph order."""
    same_input: dict[object, list[Product]] = defaultdict(list)
    for node in gm.graph.nodes:
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, x, transposed = node.args
        weight, swapped = upright(transposed)
        part = part_of(weight, 2)
        if swapped and part is not None:
            found = Product(node, x, weight, part, bias[0] if bias else None)
            same_input[value_key(x)].append(found)
    return [group for group in same_input.values() if len(group) > 1]


def gradients(product: Product) -> Gradients | None:
    """Return the backward of `product`; None where it has none, or more than one fits."""
    dx = [
        user
        for node in _turned(product.weight, swapped=False)
        for user in node.users
        if user.target is aten.mm.default and user.args[1] is node
    ]
    key = value_key(product.x)
    dw = [
        user
        for x in _readers_of_same(product.x, key)
        for user in x.users
        if user.target is aten.mm.default and user.args[1] is x and upright(user.args[0])[1]
    ]
    dw = [m for m in dw if _rows(m) == _rows(product.weight)]
    candidates = [upright(m.args[0])[0] for m in dw]
    if len(dx) > 1 or (not dx and len(dw) > 1):
        return None
    if not dx:
        return Gradients(candidates[0], None, dw[0]) if dw else None
    dy = dx[0].args[0]
    mine = [m for m, other in zip(dw, candidates, strict=True) if other is dy]
    if not isinstance(dy, Node) or len(mine) > 1:
        return None
    return Gradients(dy, dx[0], mine[0] if mine else None)


def _rows(node: Node) -> Any:
    return example_value(node).shape[0]


def _turned(node: Node, *, swapped: bool) -> list[Node]:
    """Return every transposition of `node` that reads as `node`, or as its transpose."""
    found = [] if swapped else [node]
    for user in node.users:
        if (user.target, str(user.args[1:])) in _ROWS_COLUMNS:
            found += _turned(user, swapped=not swapped)
    return found


def _readers_of_same(x: Node, key: object) -> list[Node]:
    """Return the nodes with the value of `x`."""
    root: Node = x
    while root.target in (*CASTS, *SHAPES, *SAME):
        root = root.args[0]  # type: ignore[assignment]
    found, todo = [], [root]
    while todo:
        node = todo.pop()
        found += [node] if value_key(node) == key else []
        todo += [u for u in node.users if u.target in (*CASTS, *SHAPES, *SAME)]
    return found


@dataclass(frozen=True)
class Sum:
    """Partial products that are added up.

    Attributes:
        root: The add behind which all of them are in one tensor.
        wraps: The views and casts between a product and its add, of the first product.
        others: What else is added on the way, in order.
    """

    root: Node
    wraps: tuple[Node, ...]
    others: tuple[Node, ...]


def summed(partials: Sequence[Node]) -> Sum | str:
    """Return how `partials` are added up, or why they cannot be one product."""
    leaves, wraps = [], []
    for node in partials:
        leaf, steps = _unwrap(node)
        leaves.append(leaf)
        wraps.append(steps)
    kinds = {tuple((n.target, str(n.args[1:]), str(n.kwargs)) for n in each) for each in wraps}
    if len(kinds) > 1:
        return "the gradients of the input are cast or shaped differently"
    paths = [_adds_above(leaf) for leaf in leaves]
    shared = [add for add in paths[0] if all(add in path for path in paths)]
    if not shared:
        return "something else reads a part of the input's gradient"
    root = shared[0]
    inside = {add for path in paths for add in path[: path.index(root) + 1]}
    terms = [t for add in inside for t in add.all_input_nodes if t not in inside]
    values = [example_value(n) for n in (*inside, *leaves)]
    if len({(v.dtype, tuple(map(str, v.shape))) for v in values}) > 1:
        return "the input's gradient is added in several shapes or dtypes"
    others = [t for t in root.graph.nodes if t in terms and t not in leaves]
    return Sum(root, tuple(wraps[0]), tuple(others))


def _unwrap(node: Node) -> tuple[Node, list[Node]]:
    """Follow `node` through views and casts that alone read it."""
    steps: list[Node] = []
    while len(node.users) == 1 and next(iter(node.users)).target in (*CASTS, *SHAPES):
        node = next(iter(node.users))
        steps.append(node)
    return node, steps


def _adds_above(leaf: Node) -> list[Node]:
    """Return the chain of plain adds into which `leaf` goes, and nowhere else."""
    found: list[Node] = []
    node = leaf
    while len(node.users) == 1:
        user = next(iter(node.users))
        tensors = [a for a in user.args if isinstance(a, Node)]
        if user.target is not aten.add.Tensor or user.kwargs or len(set(tensors)) != 2:
            break
        if not all(isinstance(example_value(a), Tensor) for a in tensors):
            break
        found.append(user)
        node = user
    return found


def is_returned(graph: Graph, node: Node) -> bool:
    """Return whether `node`, or a view of it, is an output of the graph."""
    results, todo = set(outputs(graph)), [node]
    while todo:
        current = todo.pop()
        if current in results:
            return True
        swaps = [u for u in current.users if (u.target, str(u.args[1:])) in _ROWS_COLUMNS]
        todo += [u for u in current.users if u.target in (*SHAPES, *SAME)] + swaps
    return False


def must_be_copied(dy: Node) -> bool:
    """Return whether `dy` lies in memory already; else its kernel can write it anywhere."""
    node: Any = dy
    while node.target in (*SHAPES, *SAME, aten.permute.default, aten.transpose.int, aten.t.default):
        node = node.args[0]
    if node.op == "placeholder" or not isinstance(node.target, torch._ops.OpOverload):
        return True
    return node.target in (aten.mm.default, aten.addmm.default, aten.bmm.default)
