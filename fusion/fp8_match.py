"""Which linears of a joint graph can be computed in fp8, and for which it pays.

A linear is a forward product of an activation with a weight, and the products of the backward:

    y = x @ w'        dx = dy @ w'.T        dw' = x.T @ dy   (or its transpose, dy.T @ x)

where w' is a parameter as it lies (`[k, n]`) or transposed, after any casts and views. Only the
structure counts: two operands are one tensor if the same casts and views lead to both from one
node, and dy is what both products of the backward share.

What it costs (`Machine`, and `profitable`): three products run at the fp8 rate instead of the bf16
rate; for that x, w and dy are each read for their maximum (unless generated code produces them,
which then takes the maximum as it writes) and read and written twice for the cast. x is shared by
all linears that read it. A linear that would lose is left in bf16, and so is the one that makes the
logits: its errors go into the loss without a layer between. Convolutions that became products stay
in bf16 as well: they read pixels, and precision "fp8" is about linears.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from magi_train.core import compat
from magi_train.core.graph import CASTS, SAME, example_value, outputs
from magi_train.core.hardware import FP8_H200, Machine
from magi_train.fusion.projections_match import SHAPES, must_be_copied, upright, value_key

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default)
MULTIPLE = 16
"""Every dimension of an fp8 product is one of these many elements: 16 bytes."""
MACHINE = FP8_H200


class Operand(NamedTuple):
    """A matrix that a product reads, as it lies in `base` or transposed."""

    base: Node
    swapped: bool
    key: object


@dataclass(frozen=True)
class Linear:
    """One linear and its backward.

    Attributes:
        forward: `y [m, n]`.
        dx: `[m, k]`; None where the input needs no gradient.
        dw: `[k, n]` or `[n, k]`; None where the weight is frozen.
        x: Operand of `forward`.
        weight: Operand of `forward`.
        dy: Operand of `dx`, or as it would be.
        shape: m, k, n.
    """

    forward: Node
    dx: Node | None
    dw: Node | None
    x: Operand
    weight: Operand
    dy: Operand
    shape: tuple[int, int, int]

    @property
    def products(self) -> list[Node]:
        """The nodes that run in fp8."""
        return [node for node in (self.forward, self.dx, self.dw) if node is not None]


class Left(NamedTuple):
    """A product that stays as it is."""

    product: str
    shape: tuple[str, ...]
    reason: str


def operands(product: Node) -> tuple[Operand, Operand]:
    """Return what an mm or addmm multiplies."""
    left, right = (upright(node) for node in product.args[-2:])
    return Operand(*left, value_key(left[0])), Operand(*right, value_key(right[0]))


def linears(gm: GraphModule) -> tuple[list[Linear], list[Left]]:
    """Return the linears that could be computed in fp8, and the others with their reasons."""
    late = after_tangents(gm.graph)
    backward = [n for n in gm.graph.nodes if n.target is aten.mm.default and n in late]
    readers: dict[object, list[Node]] = {}
    for node in backward:
        for key in {o.key for o in operands(node)}:
            readers.setdefault(key, []).append(node)
    found, left = [], []
    for node in gm.graph.nodes:
        if node.target not in PRODUCTS or node in late or not _is_weight(operands(node)[1].base):
            continue
        one = _convolution(node) or _unfit(node) or _logits(node, late) or _linear(node, readers)
        if isinstance(one, Linear):
            found.append(one)
        else:
            left.append(Left(node.name, _shape(node), one))
    return found, left


def after_tangents(graph: Graph) -> set[Node]:
    """Return everything that is computed from the gradients of the graph's results."""
    late: set[Node] = set()
    for node in graph.nodes:
        tangent = node.op == "placeholder" and isinstance(
            node.meta.get("desc"), compat.TangentAOTInput
        )
        if tangent or any(n in late for n in node.all_input_nodes):
            late.add(node)
    return late


def _is_weight(node: Any) -> bool:
    """Return whether a matrix is an input of the graph, or a part of one, cast or not."""
    way = _way_from_input(node)
    return isinstance(way[-1], Node) and way[-1].op == "placeholder"


def _way_from_input(node: Any) -> list[Any]:
    """Return a matrix and what it is a part, a view or a cast of, up to where it comes from."""
    way = [node]
    while isinstance(way[-1], Node) and way[-1].target in (
        *CASTS, *SHAPES, *SAME, aten.slice.Tensor, aten.permute.default,
    ):  # fmt: skip
        way.append(way[-1].args[0])
    return way


def _convolution(product: Node) -> str:
    """Return why a product stays that stands for a convolution (fusion/patches.py), "" if none."""
    dims = max(example_value(node).dim() for node in _way_from_input(operands(product)[1].base))
    if dims > 3:  # of three are also the weights of linears by heads
        return f"its weight has {dims} dimensions: a convolution, no linear"
    return ""


def _shape(product: Node) -> tuple[str, ...]:
    (m, k), n = example_value(product.args[-2]).shape, example_value(product).shape[1]  # type: ignore[arg-type]
    return str(m), str(k), str(n)


def _unfit(product: Node) -> str:
    values = [example_value(a) for a in product.args if isinstance(a, Node)]
    dtypes = {v.dtype for v in values} | {example_value(product).dtype}
    if dtypes != {torch.bfloat16}:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        return f"its operands are {names}; fp8 replaces bfloat16 products only"
    if product.kwargs or (len(product.args) == 3 and values[0].dim() != 1):
        return "it is more than a product and a bias"
    sizes = [*values[-2].shape, values[-1].shape[1]]
    if not all(isinstance(size, int) for size in sizes):
        return "a size is dynamic"
    if any(size % MULTIPLE for size in sizes):
        return f"a size is no multiple of {MULTIPLE}"
    return ""


def _logits(product: Node, late: set[Node]) -> str:
    """Return why `product` is taken for the one that makes the logits, "" if it is not.

    It is the last product of its way, and wider than its input or followed by the loss.
    """
    results, scalar = set(outputs(product.graph)), False
    seen, todo = {product}, [product]
    while todo:
        node = todo.pop()
        value = example_value(node)
        scalar |= node in results and isinstance(value, torch.Tensor) and value.dim() == 0
        for user in node.users:
            if user in late or user in seen or user.op == "output":
                continue
            if _is_heavy(user):
                return ""
            seen.add(user)
            todo.append(user)
    _, k, n = _shape(product)
    if scalar or int(n) > int(k):
        return "no product follows: it makes the logits"
    return ""


def _is_heavy(node: Node) -> bool:
    name = str(node.target)
    words = ("mm.", "bmm", "convolution", "attention")
    return node.op == "call_function" and any(word in name for word in words)


def _linear(product: Node, readers: Mapping[object, Sequence[Node]]) -> Linear | str:
    """Find the backward of a forward product, or say why it cannot be told."""
    x, weight = operands(product)
    dxs = [n for n in readers.get(weight.key, ()) if _is_dx(n, weight)]
    of_x = [(n, dy) for n in readers.get(x.key, ()) if (dy := _dy_of(n, x)) is not None]
    n = example_value(product).shape[1]
    pairs: list[tuple[Node | None, Node | None, Operand]] = []
    for dx in dxs:
        dy = operands(dx)[0]
        mine = [d for d, other in of_x if (other.key, other.swapped) == (dy.key, dy.swapped)]
        pairs.append((dx, mine[0] if mine else None, dy))
    if len(pairs) > 1:
        pairs = [pair for pair in pairs if pair[1] is not None]
    if not dxs:
        pairs = [(None, d, dy) for d, dy in of_x if _width(dy) == n]
    if not pairs:
        return "its gradients are no products of the backward"
    if len(pairs) > 1:
        return "its gradients cannot be told from another product's"
    into, of_weight, dy = pairs[0]
    m, k = example_value(product.args[-2]).shape  # type: ignore[arg-type]
    return Linear(product, into, of_weight, x, weight, dy, (m, k, n))


def _width(operand: Operand) -> Any:
    return example_value(operand.base).shape[0 if operand.swapped else 1]


def _is_dx(node: Node, weight: Operand) -> bool:
    right = operands(node)[1]
    return right.key == weight.key and right.swapped != weight.swapped


def _dy_of(node: Node, x: Operand) -> Operand | None:
    """Return dy, upright as x is, if `node` is dy.T @ x or x.T @ dy."""
    left, right = operands(node)
    if (right.key, right.swapped) == (x.key, x.swapped) and left.key != x.key:
        return Operand(left.base, not left.swapped, left.key)
    if (left.key, left.swapped) == (x.key, not x.swapped) and right.key != x.key:
        return right
    return None


def gain_us(linear: Linear, machine: Machine) -> float:
    """Return the microseconds that the products of a linear save, casts apart."""
    m, k, n = linear.shape
    mega_flop = 2 * m * k * n * len(linear.products) / 1e6
    return mega_flop * (1 / machine.bf16_tflops - 1 / machine.fp8_tflops)


def cast_us(operand: Operand, machine: Machine) -> float:
    """Return the microseconds that the maximum and the cast of a tensor take."""
    in_memory = _is_weight(operand.base) or must_be_copied(operand.base)
    moved = example_value(operand.base).numel() * (6 if in_memory else 4)
    return moved / machine.gb_per_second / 1e3 + (3 if in_memory else 2) * machine.launch_us


def profitable(found: Sequence[Linear], machine: Machine) -> tuple[dict[Node, float], list[Left]]:
    """Choose the linears that gain.

    Returns:
        Microseconds that each chosen one gains, by its forward product, the cast of its input
        paid by all its readers in proportion to their gains; and the others with their reasons.
    """
    chosen, left = list(found), []
    while chosen:
        worst = min(_losers(chosen, machine), key=lambda pair: pair[1], default=None)
        if worst is None:
            break
        one, microseconds = worst
        chosen.remove(one)
        shape = tuple(map(str, one.shape))
        reason = f"fp8 would cost {-microseconds:.0f} us more than it saves"
        left.append(Left(one.forward.name, shape, reason))
    users = _users(chosen)
    gains = {}
    for one in chosen:
        group = [_own_gain(other, users, machine) for other in users[one.x.key]]
        share = 1 - cast_us(one.x, machine) / sum(group)
        gains[one.forward] = _own_gain(one, users, machine) * share
    return gains, left


def _tensors(one: Linear) -> tuple[Operand, Operand, Operand]:
    return one.x, one.weight, one.dy


def _users(chosen: Sequence[Linear]) -> dict[object, list[Linear]]:
    users: dict[object, list[Linear]] = {}
    for one in chosen:
        for operand in _tensors(one):
            users.setdefault(operand.key, []).append(one)
    return users


def _own_gain(one: Linear, users: Mapping[object, Sequence[Linear]], machine: Machine) -> float:
    """Return the microseconds that a linear gains, the cast of its input apart."""
    own = sum(cast_us(o, machine) / len(users[o.key]) for o in (one.weight, one.dy))
    return gain_us(one, machine) - own


def _losers(chosen: Sequence[Linear], machine: Machine) -> Iterator[tuple[Linear, float]]:
    """Yield linears without which the step is faster, with what they gain (less than nothing).

    One alone loses if it does not pay for what only it reads; those of one input if they do not pay
    for that together, and then the one that gives least has to go.
    """
    users = _users(chosen)
    for group in {id(g): g for g in (users[one.x.key] for one in chosen)}.values():
        alone = [_own_gain(one, users, machine) for one in group]
        least, total = min(alone), sum(alone) - cast_us(group[0].x, machine)
        if least < 0 or total < 0:
            yield group[alone.index(least)], min(least, total)
