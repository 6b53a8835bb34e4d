"""Narrow gradients: a weight's gradient stays in the dtype in which the matrix product made it.

Under autocast the backward of a float32 weight ends with a cast: the product wrote bfloat16, the
cast reads that and writes float32, the optimizer reads float32. The cast adds no information, and
the optimizer's kernel can read bfloat16: without it a weight costs 8 bytes of traffic a step less,
and its gradient half the memory. The values in `.grad` are the same, its dtype is not, so this is
for users who ask for it:

* `.grad` of such a weight is bfloat16 after a backward; hooks on the parameter see that.
* Accumulation is float32 as before: the second backward of a step first widens what the first one
  left. A model that is called twice under *one* backward has its two gradients added in bfloat16.
* What the user's own code does in place to `.grad`, such as clipping, rounds to bfloat16.

Two parts: the pass on the backward graph that takes the cast away, and `NarrowGradients`, which
lets the parameters take such gradients.
"""

import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from magi_train.core.graph import before_widening, input_gradients, op_name, outputs
from magi_train.core.passes import PassContext, Plan, Stage, source_fingerprint

SOURCE = source_fingerprint(sys.modules[__name__])

PRODUCTS = {"mm", "addmm", "bmm", "_scaled_mm", "convolution_backward"}
VIEWS = {"view", "permute", "t", "transpose", "getitem", "squeeze", "unsqueeze", "_unsafe_view"}


@dataclass(frozen=True)
class NarrowPlan(Plan):
    """Which gradients leave a backward graph without their cast.

    Attributes:
        gradients: How many.
        mib_not_written: What the casts wrote.
    """

    gradients: int
    mib_not_written: float


class SkipGradientCasts:
    """See the head of this module.

    Args:
        positions: Of the parameters among the captured graph's inputs that take such gradients.
    """

    name = "skip_gradient_casts"
    stage = Stage.BACKWARD

    def __init__(self, positions: Iterable[int]) -> None:
        self.positions = tuple(sorted(positions))

    def uuid(self) -> str:
        """Return what compiled code depends on."""
        return f"{SOURCE}-{self.positions}"

    def plan(self, gm: GraphModule, context: PassContext) -> NarrowPlan | None:
        """Count the casts; None where there are none."""
        wide = [gm_output for gm_output, _ in self._casts(gm).values()]
        mib = sum(n.meta["val"].numel() * n.meta["val"].element_size() for n in wide) / 2**20
        return NarrowPlan(len(wide), round(mib, 3)) if wide else None

    def apply(self, gm: GraphModule, plan: NarrowPlan, context: PassContext) -> None:
        """Return what the casts read."""
        results = outputs(gm.graph)
        for position, (_, source) in self._casts(gm).items():
            results[position] = source
        gm.graph.output_node().args = (tuple(results),)
        gm.graph.eliminate_dead_code()

    def _casts(self, gm: GraphModule) -> dict[int, tuple[Node, Node]]:
        """Return {position in the output: (the cast, what it reads)}."""
        found = {}
        for index, (position, node) in input_gradients(gm.graph).items():
            source = before_widening(node)
            if index in self.positions and source is not node and _by_product(source, node):
                found[position] = (node, source)
        return found


def _by_product(source: Node, cast: Node) -> bool:
    """Return whether bfloat16 is what is stored: a kernel of its own made it, not generated code.

    What Inductor generates (the sum of a bias) has float32 in registers and skips the rounding.
    """
    narrow, wide = source.meta["val"], cast.meta["val"]
    if narrow.dtype is not torch.bfloat16 or narrow.stride() != wide.stride():
        return False
    while op_name(source) in VIEWS:
        source = source.all_input_nodes[0]
    return op_name(source) in PRODUCTS


class NarrowGradients:
    """Lets float32 parameters take bfloat16 gradients, and keeps their sums in float32.

    Args:
        parameters: Leaves whose optimizer reads both dtypes.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._hooks: dict[int, tuple[weakref.ref[nn.Parameter], Any, Any]] = {}
        self._closed: list[weakref.ref[nn.Parameter]] = []
        for p in parameters:
            if p.dtype is not torch.float32 or not p.requires_grad:
                continue
            p.grad_dtype = None  # type: ignore[attr-defined]
            # a prehook of the node that writes .grad: it stays while somebody holds the node
            node = torch.autograd.graph.get_gradient_edge(p).node
            handle = node.register_prehook(_widen(weakref.ref(p)))
            self._hooks[id(p)] = (weakref.ref(p), node, handle)

    def takes(self, parameter: object) -> bool:
        """Return whether `parameter` may get a bfloat16 gradient."""
        return id(parameter) in self._hooks

    def close(self) -> None:
        """Make the parameters plain again; gradients that are there are widened."""
        self._closed += [ref for ref, _, _ in self._hooks.values()]
        for ref, _, handle in self._hooks.values():
            handle.remove()
            p = ref()
            if p is not None:
                if p.grad is not None:
                    p.grad = p.grad.to(p.dtype)
                p.grad_dtype = p.dtype  # type: ignore[attr-defined]
        self._hooks = {}

    def again(self) -> "NarrowGradients":
        """Return what has been closed, on the same parameters; itself where it is not closed."""
        alive = [p for ref in self._closed if (p := ref()) is not None]
        return NarrowGradients(alive) if alive else self


def _widen(ref: "weakref.ref[nn.Parameter]") -> Any:
    def before_accumulating(_: tuple[torch.Tensor | None, ...]) -> None:
        p = ref()
        if p is not None and p.grad is not None and p.grad.dtype is not p.dtype:
            p.grad = p.grad.to(p.dtype)

    return before_accumulating
