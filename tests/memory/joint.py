"""The joint graph of a small model, its row of plans, and the cut that a plan makes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from magi_train.core import compat
from magi_train.core.graph import saved_for_backward
from magi_train.core.hardware import HOST, Speed
from magi_train.memory.offload import Moves, insert
from magi_train.memory.remat import Joint, Row, SavedSet


@dataclass
class Captured:
    """A joint graph.

    Attributes:
        graph: As the partitioner gets it.
        inputs: Its example inputs.
        rest: What else the partitioner gets.
        row: The plans for it.
    """

    graph: GraphModule
    inputs: Any
    rest: dict[str, Any]
    row: Row

    def cut(self, plan: SavedSet) -> tuple[GraphModule, GraphModule]:
        """Return forward and backward under a plan."""
        with compat.saving(plan.saved):
            return compat.min_cut_partition(copied(self.graph), self.inputs, **self.rest)

    def cut_and_move(self, plan: SavedSet) -> tuple[tuple[GraphModule, GraphModule], Moves]:
        """Return the same with what waits on the host, and what that is."""
        cut = self.cut(plan)
        return cut, insert(*cut, plan.moved, self.row.joint.speed, fused=False)


def copied(graph: GraphModule) -> GraphModule:
    return GraphModule(graph, copy.deepcopy(graph.graph))


def capture(
    function: Callable[..., Any], *args: Any, speed: Speed = HOST, room_bytes: int = 0
) -> Captured:
    """Capture a function of tensors that returns its loss."""
    found = []

    def partition(joint: GraphModule, inputs: Any, **rest: Any) -> Any:
        trial = copied(joint)
        default = compat.min_cut_partition(trial, inputs, **rest)
        graph = Joint(trial.graph, rest["num_fwd_outputs"], speed, fused=False)
        names = {n.name for n in saved_for_backward(default[0])}
        row = Row(graph, [n for n in graph.nodes if n.name in names], room_bytes)
        found.append(Captured(copied(joint), inputs, rest, row))
        return default

    def run(gm: GraphModule, _: Any) -> Any:
        return compat.make_boxed(gm.forward)

    backend = compat.aot_autograd(fw_compiler=run, bw_compiler=run, partition_fn=partition)
    with compat.forced_backward_lowering():
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    return found[0]
