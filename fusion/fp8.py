"""FP8 matrix products: linears of a joint graph, forward and backward, in 8-bit floating point.

For each linear that pays (fusion/fp8_match.py), with one scale for each whole tensor
(fusion/quantize.py), activations and weights in e4m3 and gradients in e5m2:

    y  = s_x s_w (x8 @ w8.T) + bias           fast accumulation
    dx = s_dy s_w (dy8 @ w8)                  full accumulation, as gradients need it
    dw = s_dy s_x (dy8.T @ x8)

One cast for each distinct tensor, whoever reads it: query, key and value share x, both products of
the backward share dy. Between forward and backward the transposed fp8 copies of x and w are kept
and not x itself: half the bytes. Results, biases and everything between products stay in bf16,
parameters, their gradients and the optimizer in what they are.

Source: torchao's float8 training, recipe "tensorwise" (scales, formats, accumulation). Differs: a
    pass on the graph instead of another linear module, so tensors shared by linears are cast once,
    and only linears that gain are converted, judged by their shapes; weights are quantised once a
    forward (so once each micro-batch), not once an optimizer step.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from magi_train.core import graph as graph_helpers
from magi_train.core.graph import erase_unused, example_value
from magi_train.core.passes import PassContext, Plan, Stage, source_fingerprint
from magi_train.fusion import fp8_match, projections_match, quantize
from magi_train.fusion.fp8_match import Left, Linear, linears, operands, profitable
from magi_train.fusion.quantize import (
    OF_GRADIENTS,
    OF_VALUES,
    call_like,
    insert_cast,
    insert_scale,
)

SOURCE = source_fingerprint(
    sys.modules[__name__], fp8_match, projections_match, quantize, graph_helpers
)
aten = torch.ops.aten
RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


@dataclass(frozen=True)
class Fp8Linear:
    """A linear in fp8.

    Attributes:
        product: Its forward product.
        shape: Rows, input width, output width.
        gains_us: Microseconds, by the model of fusion/fp8_match.py.
    """

    product: str
    shape: tuple[int, int, int]
    gains_us: float


@dataclass(frozen=True)
class Fp8Plan(Plan):
    """Which linears are computed in fp8.

    Attributes:
        linears: Those.
        products: How many products that is, the backward's included.
        tensors: How many distinct tensors are cast.
        left_alone: The others: product, shape and reason.
    """

    linears: tuple[Fp8Linear, ...]
    products: int
    tensors: int
    left_alone: tuple[Left, ...]


class Fp8Linears:
    """See the head of this module."""

    name = "fp8_linears"
    stage = Stage.JOINT

    def uuid(self) -> str:
        """Return what compiled code depends on."""
        return f"{SOURCE}-{fp8_match.MACHINE}"

    def plan(self, gm: GraphModule, context: PassContext) -> Fp8Plan | None:
        """Choose; None where the graph has no linears."""
        found, unfit = linears(gm)
        gains, slow = profitable(found, fp8_match.MACHINE)
        chosen = [one for one in found if one.forward in gains]
        if not chosen and not unfit and not slow:
            return None
        each = [Fp8Linear(c.forward.name, c.shape, round(gains[c.forward], 1)) for c in chosen]
        keys = {o.key for one in chosen for o in (one.x, one.weight, one.dy)}
        products = sum(len(one.products) for one in chosen)
        return Fp8Plan(tuple(each), products, len(keys), (*unfit, *slow))

    def apply(self, gm: GraphModule, plan: Fp8Plan, context: PassContext) -> None:
        """Convert the linears that `plan` names."""
        wanted = {each.product for each in plan.linears}
        chosen = [one for one in linears(gm)[0] if one.forward.name in wanted]
        casts = _Casts(chosen)
        forward = {one.forward for one in chosen}
        mine = {node for one in chosen for node in one.products}
        for node in [n for n in gm.graph.nodes if n in mine]:
            with gm.graph.inserting_before(node):
                new = casts.product(node, fast=node in forward)
            node.replace_all_uses_with(new)
        erase_unused(gm, mine)


class _Cast:
    """A tensor in fp8: what is needed of it, and the nodes once they are there."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.transposed = dtype, False
        self.scale: Node | None = None
        self.layouts: list[Node] = []


class _Casts:
    """Casts each distinct tensor in front of the first product that reads it."""

    def __init__(self, chosen: list[Linear]) -> None:
        self._casts: dict[object, _Cast] = {}
        # keys hold nodes, and a product may read another one, which is replaced before it
        self._operands = {node: operands(node) for one in chosen for node in one.products}
        for one in chosen:
            for operand, dtype in (
                (one.x, OF_VALUES),
                (one.weight, OF_VALUES),
                (one.dy, OF_GRADIENTS),
            ):
                self._casts.setdefault(operand.key, _Cast(dtype))
            for node in one.products:
                for operand, across in zip(self._operands[node], (False, True), strict=True):
                    self._casts[operand.key].transposed |= operand.swapped != across

    def product(self, node: Node, *, fast: bool) -> Node:
        """Insert `node` in fp8 at the insertion point."""
        left, right = self._operands[node]
        now = operands(node)
        a, scale_a = self._operand(left.key, now[0].base, node, transposed=left.swapped)
        b, scale_b = self._operand(right.key, now[1].base, node, transposed=not right.swapped)
        b = call_like(node, aten.permute.default, b, [1, 0])
        bias = node.args[0] if node.target is aten.addmm.default else None
        dtype = example_value(node).dtype
        new = call_like(
            node, aten._scaled_mm.default, a, b, scale_a, scale_b, bias, None, dtype, fast
        )
        assert example_value(new).stride() == example_value(node).stride()
        return new

    def _operand(
        self, key: object, base: Node, like: Node, *, transposed: bool
    ) -> tuple[Node, Node]:
        """Return a tensor's fp8 copy and its scale."""
        cast = self._casts[key]
        if cast.scale is None:
            cast.scale = insert_scale(base, like, cast.dtype)
            cast.layouts = insert_cast(base, cast.scale, like, cast.dtype, both=cast.transposed)
            _keep(cast)
        return cast.layouts[transposed], cast.scale


def _keep(cast: _Cast) -> None:
    """Save what the backward needs of a tensor; a checkpointed region's own marks stay.

    Without this the partitioner may keep the wide tensor and cast it again.
    """
    assert cast.scale is not None
    cast.scale.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    for node in cast.layouts:
        if node.meta.get("recompute") not in RECOMPUTED and isinstance(node.meta["val"], Tensor):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
