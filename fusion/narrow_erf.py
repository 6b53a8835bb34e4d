"""Narrow erf: `1 + erf(z)` with the precision of the 16-bit result that it ends in.

GELU in bfloat16 is computed in float32 and rounded. CUDA's `erf` is exact to float32's last bits,
which takes so many instructions that the kernel waits for them and not for memory: 80 us for 52 M
elements whose copy takes 52 us, and 105 us in the backward (H200, torch 2.11). Here, with a = |z|,

    1 - erf(a) = t (c0 + t (c1 + ... + t c5)) exp(-a^2),    t = 1 / (1 + p a)

for a >= 0, and `1 + erf(z)` is that for z < 0, else 2 minus that: 62 and 76 us. The relative error
is below 4e-6, and below 8e-6 in float32, for all a up to 8, where the result is 1e-29: a small part
of half a unit in the last place of bfloat16 (2e-3) and float16 (5e-4). For z below -1 that is
closer than `1 + erf(z)` in float32, which loses digits: 5e-2 at z = -3.5. The derivative has the
same exponential; both are one expression in the kernel, a power of 2.

Left alone, with the reason in the plan: where any reader is not rounded to 16 bits, or may lose
digits before: near z = 0 the value is 1 within 4e-6, so `(1 + erf(z)) - 1` would be wrong in its
first digits, and a comparison with 1 would turn. Products keep a relative error; of sums only the
derivative's is taken, `(1 + erf(z)) / 2 + x exp(-z^2) / sqrt(2 pi)`.

Source: the form of Abramowitz and Stegun 1964, 7.1.26; p and c are fits of our own, for the least
relative error (theirs is for the least absolute one, with five terms).
"""

import math
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from magi_train.core.graph import HALF, insert_computation, is_pointwise, op_name
from magi_train.core.passes import PassContext, Plan, Stage, source_fingerprint

SOURCE = source_fingerprint(sys.modules[__name__])

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default)
LOG2_E = math.log2(math.e)
P = 0.435
COEFFICIENTS = (
    0.24595589381709043, 0.23699717114730373, 0.27484444250930695,
    0.010131762521701192, 0.38380183693659786, -0.15173475981120912,
)  # fmt: skip


@dataclass(frozen=True)
class ErfPlan(Plan):
    """Which `1 + erf(z)` to compute shorter.

    Attributes:
        narrowed: Names of the additions.
        left_alone: The other ones, or erf itself where it is not added to 1; with the reason.
    """

    narrowed: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]


class NarrowErf:
    """See the head of this module."""

    name = "narrow_erf"
    stage = Stage.JOINT

    def uuid(self) -> str:
        """Return what compiled code depends on."""
        return SOURCE

    def plan(self, gm: GraphModule, context: PassContext) -> ErfPlan | None:
        """Return what ends in 16 bits; None in a graph without erf."""
        narrowed, left = [], []
        for erf in gm.graph.find_nodes(op="call_function", target=aten.erf.default):
            for reader in erf.users:
                reason = _why_not(erf, reader)
                if reason:
                    left.append((erf.name, reason))
                else:
                    narrowed.append(reader.name)
        return ErfPlan(tuple(narrowed), tuple(left)) if narrowed or left else None

    def apply(self, gm: GraphModule, plan: ErfPlan, context: PassContext) -> None:
        """Compute them shorter; an erf that nothing reads any more goes."""
        by_name = {n.name: n for n in gm.graph.nodes}
        for node in (by_name[name] for name in plan.narrowed):
            z = _erf_of(node).args[0]
            assert isinstance(z, Node), "a tensor"
            x, factor = _factored(z)
            node.replace_all_uses_with(insert_computation(node, one_plus_erf, (x, factor)))
            gm.graph.erase_node(node)
            for same in _same_exponentials(x, factor):
                new = insert_computation(same, exponential, (x, factor))
                same.replace_all_uses_with(new)
                gm.graph.erase_node(same)
        for erf in gm.graph.find_nodes(op="call_function", target=aten.erf.default):
            if not erf.users:
                gm.graph.erase_node(erf)


def one_plus_erf(x: Any, factor: float) -> Any:
    """Return `1 + erf(factor x)`.

    Args:
        x: A float32 tensor, or the fx.Proxy of one.
        factor: Of x, positive.
    """
    below = aten.add.Tensor(aten.mul.Tensor(aten.abs.default(x), P * factor), 1.0)
    t = aten.reciprocal.default(below)
    series = aten.mul.Tensor(t, COEFFICIENTS[-1])
    for c in reversed(COEFFICIENTS[:-1]):
        series = aten.mul.Tensor(aten.add.Tensor(series, c), t)
    rest = aten.mul.Tensor(series, exponential(x, factor))
    return aten.where.self(
        aten.lt.Scalar(x, 0.0), rest, aten.add.Tensor(aten.neg.default(rest), 2.0)
    )


def exponential(x: Any, factor: float) -> Any:
    """Return `exp(-(factor x)^2)`: the power of 2 is one instruction."""
    return aten.exp2.default(aten.mul.Tensor(aten.mul.Tensor(x, x), -factor * factor * LOG2_E))


def _same_exponentials(x: Node, factor: float) -> list[Node]:
    """Return the nodes `exp(-(factor x)^2)`, which the derivative has, that end in 16 bits too."""
    squares = [n for n in x.users if n.target is aten.mul.Tensor and n.args == (x, x)]
    scaled = [
        n
        for square in squares
        for n in square.users
        if n.target is aten.mul.Tensor and n.args[0] is square and isinstance(n.args[1], float)
        if math.isclose(n.args[1], -factor * factor, rel_tol=1e-12)
    ]
    found = [n for each in scaled for n in each.users if n.target is aten.exp.default]
    return [n for n in found if not _wide_end(n)]


def _why_not(erf: Node, reader: Node) -> str:
    """Return "" if `reader` is `1 + erf` and all that comes of it is rounded to 16 bits."""
    for node in (erf, erf.args[0]):
        value = node.meta.get("val") if isinstance(node, Node) else None
        if not isinstance(value, torch.Tensor) or value.dtype is not torch.float32:
            return f"it is in {getattr(value, 'dtype', None)}, not in float32"
    one = [a for a in reader.args if a is not erf]
    if reader.target is not aten.add.Tensor or one != [1] or reader.kwargs:
        return f"it is not added to 1, but read by {op_name(reader) or reader.op}"
    return _wide_end(reader, keeps=_keeps_digits)


def _wide_end(
    start: Node, keeps: Callable[[Node, Collection[Node]], bool] = lambda node, found: True
) -> str:
    """Return "" if all ways from `start` through element-wise ops end in 16 bits, else why not.

    Args:
        start: What is read.
        keeps: Of an op, and the nodes that come of `start`: whether it loses no digits.
    """
    seen, todo = {start}, [start]
    while todo:
        for user in todo.pop().users:
            value = user.meta.get("val")
            narrow = isinstance(value, torch.Tensor) and value.dtype in HALF
            if user in seen or (narrow and user.target is CONVERT):
                continue
            if user.op == "output" or not is_pointwise(user):
                return f"{op_name(user) or 'the output'} reads it without a rounding to 16 bits"
            if not keeps(user, seen):
                return f"{op_name(user)} reads it, and may lose digits or turn"
            if not narrow:
                seen.add(user)
                todo.append(user)
    return ""


def _keeps_digits(node: Node, found: Collection[Node]) -> bool:
    """Return whether a relative error in some of its arguments, `found`, stays about as small."""
    if node.target is CONVERT:
        return bool(node.args[1].is_floating_point)  # type: ignore[union-attr]
    if node.target is aten.where.self:
        return node.args[0] not in found
    if node.target is aten.add.Tensor:
        other = [a for a in node.args if a not in found]
        return len(other) == 1 and not node.kwargs and _of_exponential(other[0])
    return node.target in PRODUCTS and not node.kwargs


def _of_exponential(value: Any) -> bool:
    """Return whether a value is a product with an exponential: the second part of a derivative."""
    todo, seen = [value], set()
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        if node.target in (aten.exp.default, aten.exp2.default):
            return True
        seen.add(node)
        if node.target in PRODUCTS or node.target is CONVERT:
            todo += node.all_input_nodes
    return False


def _erf_of(addition: Node) -> Node:
    return next(n for n in addition.all_input_nodes if n.target is aten.erf.default)


def _factored(z: Node) -> tuple[Node, float]:
    """Return (x, k) if z is computed as k x with k > 0, else (z, 1)."""
    if z.target is aten.mul.Tensor:
        numbers = [a for a in z.args if isinstance(a, float) and a > 0 and math.isfinite(a)]
        tensors = z.all_input_nodes
        if numbers and tensors and tensors[0].meta["val"].dtype is torch.float32:
            return tensors[0], numbers[0]
    return z, 1.0
