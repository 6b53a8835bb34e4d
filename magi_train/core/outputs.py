"""What leaves a captured graph: gradients that never come back, and backwards that come back twice.

AOTAutograd makes one autograd node of a captured graph. Three things are different there from the
nodes that it stands for, and `Outputs` mends them by hooks on that node:

* An output that the loss does not use has no gradient. The node takes zeros for it, and gives zeros
  to parameters that only this output depends on, where autograd would leave `.grad` alone: weight
  decay and momentum would then move weights that no loss knows. `FindUnused` notes which inputs
  depend on which outputs, and such zeros are dropped.
* `backward(retain_graph=True)`: generated code writes over what was saved for it ("donated
  buffers"), and the compiler refuses to run it twice. What is saved is kept and put back.
* `backward(create_graph=True)` cannot be differentiated again, which is said in our words.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from magi_train.core import compat
from magi_train.core.errors import SecondDerivativeError
from magi_train.core.graph import input_gradients
from magi_train.core.passes import PassContext, Plan, Stage, source_fingerprint

SOURCE = source_fingerprint(sys.modules[__name__])


@dataclass(frozen=True)
class UnusedPlan(Plan):
    """Inputs whose gradients come from some outputs only.

    Attributes:
        inputs: Position of each among the graph's inputs, and those of its outputs among the
            graph's outputs.
    """

    inputs: tuple[tuple[int, tuple[int, ...]], ...]


class FindUnused:
    """See the head of this module; changes nothing in the graph."""

    name = "unused_outputs"
    stage = Stage.JOINT

    def uuid(self) -> str:
        """Return what the plan depends on besides the graph."""
        return SOURCE

    def plan(self, gm: GraphModule, context: PassContext) -> UnusedPlan | None:
        """Follow the gradients of outputs to those of inputs; None where all depend on all."""
        tangents: dict[Node, int | None] = {}
        for node in gm.graph.find_nodes(op="placeholder"):
            what = node.meta.get("desc")
            if isinstance(what, compat.TangentAOTInput):
                plain = isinstance(what.output, compat.PlainAOTOutput)
                tangents[node] = what.output.idx if plain else None
        if len(tangents) < 2:
            return None
        reached: dict[Node, frozenset[int | None]] = {}
        for node in gm.graph.nodes:
            own: frozenset[int | None] = frozenset([tangents[node]] if node in tangents else [])
            reached[node] = own.union(*(reached[n] for n in node.all_input_nodes))
        found = []
        for position, (_, gradient) in input_gradients(gm.graph).items():
            mine = reached[gradient]
            if 0 < len(mine) < len(tangents) and None not in mine:
                found.append((position, tuple(sorted(i for i in mine if i is not None))))
        return UnusedPlan(tuple(found)) if found else None

    def apply(self, gm: GraphModule, plan: UnusedPlan, context: PassContext) -> None:
        """Do nothing: hooks act on the plan."""


class Outputs:
    """Calls a captured graph, and hooks the autograd node that its outputs share.

    A hook before the node's backward decides; one behind it, for which the engine would hold what
    comes in until then, is there only where something is to be done.

    Args:
        compiled: The graph, compiled.
        depends: The `inputs` of an UnusedPlan; empty to leave zeros as they are.
        is_node: Which autograd nodes are the graph's, where not those of AOTAutograd: those of a
            replay, which is recorded with gradients for all outputs, and runs twice by itself.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        depends: Sequence[tuple[int, Sequence[int]]] = (),
        is_node: Callable[[Any], bool] = compat.is_compiled_node,
    ) -> None:
        self._compiled = compiled
        self._depends = depends
        self._is_node = is_node
        self._positions: list[tuple[int, tuple[int, ...]]] = []

    def __call__(self, *args: Any) -> Any:
        """Call the graph."""
        outputs = self._compiled(*args)
        node = self._node_of(outputs, args) if torch.is_grad_enabled() else None
        if node is not None:
            if self._depends and not self._positions:
                self._positions = _positions(node, args, outputs, self._depends)
            # what such hooks hand over may be read once, and is another tensor for each backward
            fresh = compat.saved_tensors_are_hooked()
            node.register_prehook(functools.partial(self._before, node, fresh))
        return outputs

    def _node_of(self, outputs: Sequence[Any], args: Sequence[Any]) -> Any:
        """Return the node of the graph that made `outputs`, or None.

        An output may be an argument, or a view of one: then its node is that of another graph.
        """
        for output in outputs:
            node = output.grad_fn if isinstance(output, Tensor) else None
            if node is not None and not self._is_node(node) and node.next_functions:
                node = node.next_functions[0][0]  # a view, made anew outside of the graph
            if node is None or not self._is_node(node):
                continue
            if not any(isinstance(x, Tensor) and x.grad_fn is node for x in args):
                return node
        return None

    @compat.untraced
    def _before(self, node: Any, fresh: bool, gradients: Sequence[Tensor | None]) -> None:
        if torch.is_grad_enabled():
            raise SecondDerivativeError(
                "a gradient with create_graph=True was asked for of what is compiled, and compiled "
                "graphs have no second derivatives. Put the whole loss, torch.autograd.grad "
                "included, into the captured function (prepare_step), or prepare this model with "
                "Config(tier='eager')"
            )
        unused = {
            i for i, needs in self._positions if all(gradients[output] is None for output in needs)
        }
        put_back: Callable[[], None] | None = None
        if compat.is_compiled_node(node) and compat.graph_is_retained():
            put_back = compat.run_again_afterwards(node, fresh)
        if not unused and put_back is None:
            return

        @compat.untraced
        def after(grads: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> Any:
            handle.remove()  # the node's next backward decides by itself
            if put_back is not None:
                put_back()
            return tuple(None if i in unused else g for i, g in enumerate(grads))

        handle = node.register_hook(after)


def _positions(
    node: Any,
    args: Sequence[Any],
    outputs: Sequence[Any],
    depends: Sequence[tuple[int, Sequence[int]]],
) -> list[tuple[int, tuple[int, ...]]]:
    """Return the plan in the node's own counting: of gradients that it returns, and that it gets.

    What cannot be found there is left out, so that its zeros stay.
    """
    edges = {edge: i for i, edge in enumerate(node.next_functions) if edge[0] is not None}
    numbers: dict[int, int] = {}
    for i, output in enumerate(outputs):
        if isinstance(output, Tensor) and output.grad_fn is node:
            numbers[i] = output.output_nr
    found = []
    for position, needs in depends:
        if position >= len(args) or not isinstance(args[position], Tensor):
            continue
        edge = tuple(torch.autograd.graph.get_gradient_edge(args[position])[:2])
        if edge in edges and all(i in numbers for i in needs):
            found.append((edges[edge], tuple(numbers[i] for i in needs)))
    return found
