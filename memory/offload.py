"""Offload: when saved values leave for the host, and when they come back.

A value may leave once it is made, since a copy only reads it, and is wanted back before the first
node of the backward that reads it. Each direction has one copy engine, which works in order at the
bandwidth of the link; beside it run the kernels, whose time is known (memory/cost.py):

    forward     done(v)  = max(made(v), done of the one before) + bytes(v) / link    -> `outward`
    backward    begin(v) = min(read(v), begin of the next one) - bytes(v) / link     -> `homeward`

The memory of a value is free behind the node that runs when its copy is done, and taken again where
the copy back begins, as late as that may be. What does not fit is exposed: how much later than its
last node the forward ends, and how much earlier than its first one the backward should have begun.
Copies take bandwidth of the device's memory, too, a read and a write:

    seconds of a plan = of what runs again + exposed + 2 bytes / bandwidth of the device

The oldest values leave first: they wait for the longest time. `insert` puts the ops into the graphs
of a cut; `pin` keeps Inductor, which reorders for its own estimate of the peak, from moving them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from magi_train.core import compat
from magi_train.core.graph import call_with_metadata, is_compute, outputs, saved_for_backward
from magi_train.core.hardware import Speed
from magi_train.memory.copies import ARRIVED, FETCH, OPS, SEND
from magi_train.memory.cost import seconds
from magi_train.memory.peak import Storages, body

LEAST_SECONDS = 20e-6
"""A copy that takes less is not worth its launch."""


@dataclass(frozen=True)
class Moves:
    """What a cut sends to the host.

    Attributes:
        nodes: Names of the values.
        bytes: Of all.
        exposed: Predicted seconds that no kernel hides.
    """

    nodes: tuple[str, ...] = ()
    bytes: int = 0
    exposed: float = 0.0


def can_wait(value: object, link: float) -> bool:
    """Return whether a value is a tensor that one copy moves, and that is worth it.

    Args:
        value: A fake tensor.
        link: Bytes a second.
    """
    if not isinstance(value, Tensor) or any(not isinstance(s, int) for s in value.shape):
        return False
    size = value.numel() * value.element_size()
    if size < LEAST_SECONDS * link or size != compat.storage_bytes(value):
        return False
    dense = 1
    for stride, length in sorted(zip(value.stride(), value.shape, strict=True)):
        if length > 1 and stride != dense:
            return False
        dense *= length
    return True


def outward(
    items: Sequence[tuple[int, int]], times: Sequence[float], link: float
) -> tuple[list[int], float]:
    """Return behind which place of the forward each copy to the host is done, and what is exposed.

    Args:
        items: (place that makes it, bytes) of each value, in the order of places.
        times: Seconds of each place.
        link: Bytes a second.
    """
    ends = list(accumulate(times))
    done, places = 0.0, []
    for place, size in items:
        done = max(done, ends[place]) + size / link
        places.append(min(bisect_left(ends, done), len(ends) - 1))
    return places, max(0.0, done - ends[-1]) if items else 0.0


def homeward(
    items: Sequence[tuple[int, int]], times: Sequence[float], link: float
) -> tuple[list[int], float]:
    """Return before which place of the backward each copy back begins, and what is exposed.

    Args:
        items: (place that reads it first, bytes) of each value, in the order of places.
        times: Seconds of each place.
        link: Bytes a second.
    """
    begins = [0.0, *accumulate(times)]
    begin, places = begins[-1], []
    for place, size in reversed(items):
        begin = min(begin, begins[place]) - size / link
        places.append(min(max(0, bisect_right(begins, begin) - 1), place))
    return places[::-1], max(0.0, -begin)


class Trip:
    """When values of one forward leave for the host, and come back in its backward.

    Args:
        forward: Its nodes, in their order.
        backward: Those of its backward, which calls what is saved as the forward does.
        seconds: Of each node.
        link: Bytes a second.

    Attributes:
        made: {name of a value: place of the forward that makes it}.
        read: {name of a value: place of the backward that reads it first}.
        leave: {place of the forward: values whose copy is done behind it}.
        come: {place of the backward: values whose copy begins before it}.
    """

    def __init__(
        self,
        forward: Sequence[Node],
        backward: Sequence[Node],
        seconds: Mapping[Node, float],
        link: float,
    ) -> None:
        self.forward, self.backward, self._link = forward, backward, link
        self._times = [seconds[n] for n in forward], [seconds[n] for n in backward]
        self.made = {n.name: i for i, n in enumerate(forward)}
        last_first = reversed(list(enumerate(backward)))
        self.read = {a.name: i for i, n in last_first for a in n.all_input_nodes}
        self.leave: dict[int, list[Node]] = {}
        self.come: dict[int, list[Node]] = {}

    def move(self, values: Iterable[Node], storages: Storages) -> float:
        """Let these values wait, and no others; return the seconds that no kernel hides."""
        size = {n: storages.total([n]) for n in values}
        out = sorted(size, key=lambda n: self.made[n.name])
        back = sorted(size, key=lambda n: self.read[n.name])
        done, late = outward(
            [(self.made[n.name], size[n]) for n in out], self._times[0], self._link
        )
        begin, early = homeward(
            [(self.read[n.name], size[n]) for n in back], self._times[1], self._link
        )
        self.leave, self.come = {}, {}
        for node, place in zip(out, done, strict=True):
            self.leave.setdefault(place, []).append(node)
        for node, place in zip(back, begin, strict=True):
            self.come.setdefault(place, []).append(node)
        return late + early


def insert(
    forward: GraphModule, backward: GraphModule, names: Iterable[str], speed: Speed, *, fused: bool
) -> Moves:
    """Let saved values of a cut wait on the host.

    Args:
        forward: From a partitioner; returns what it saves.
        backward: Takes that, by name.
        names: Of the values; those that the two do not hand over are left alone.
        speed: Of the device and its link.
        fused: Whether generated code will run the two.
    """
    given = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    bodies = body(forward.graph), body(backward.graph)
    times = {n: seconds(n, speed, fused=fused) for nodes in bodies for n in nodes}
    trip = Trip(*bodies, times, speed.host)
    wanted = set(names) & given.keys() & trip.made.keys() & trip.read.keys()
    saved = [n for n in saved_for_backward(forward) if n.name in wanted]
    storages = Storages(fused=fused)
    exposed = trip.move(saved, storages)
    first, second = bodies
    leave = [(n, first[place]) for place, nodes in trip.leave.items() for n in nodes]
    sent = _send(forward.graph, leave)
    for place, nodes in trip.come.items():
        for node in nodes:
            there = given[node.name]
            _fetch(backward.graph, there, sent[node], second[place], second[trip.read[node.name]])
    for graph in (forward, backward):
        graph.graph.lint()
        graph.recompile()
    return Moves(tuple(n.name for n in saved), storages.total(saved), exposed)


def _send(graph: Graph, values: Sequence[tuple[Node, Node]]) -> dict[Node, Node]:
    """Copy values once they are made, and return instead of each what waits on the host.

    Args:
        graph: The forward.
        values: (value, the node behind which its copy is done), in the order of the graph. None is
            returned to the user.
    """
    begun: dict[Node, Node] = {}
    sent: dict[Node, Node] = {}
    for node, _ in values:
        node.meta[compat.IN_MEMORY] = True  # once: else each op would get a copy of its own
        with graph.inserting_after(node):
            begun[node] = call_with_metadata(graph, SEND, (node,))
    latest: dict[Node, Node] = {}
    for node, behind in values:
        anchor = latest.get(behind, begun.get(behind, behind))
        with graph.inserting_after(begun[node] if behind is node else anchor):
            sent[node] = latest[behind] = call_with_metadata(graph, ARRIVED, (begun[node], node))
        sent[node].name, sent[node].stack_trace = f"{node.name}_on_host", node.stack_trace
    graph.output_node().args = (tuple(sent.get(r, r) for r in outputs(graph)),)
    return sent


def _fetch(graph: Graph, there: Node, sent: Node, begin: Node, read: Node) -> None:
    """Copy a saved value back: from in front of `begin`, until in front of `read`."""
    value, host = there.meta["val"], sent.meta["val"]
    with value.fake_mode:
        there.meta["val"] = torch.empty_strided(
            host.shape, host.stride(), dtype=host.dtype, device=host.device
        )
    there.meta["tensor_meta"] = compat.extract_tensor_metadata(there.meta["val"])
    readers = list(there.users)
    with graph.inserting_before(begin):
        begun = call_with_metadata(graph, FETCH, (there, value.device))
        begun.stack_trace = sent.stack_trace
    with graph.inserting_before(read):
        back = call_with_metadata(graph, ARRIVED, (begun, there))
    for reader in readers:
        reader.replace_input_with(there, back)
    there.name = sent.name  # as saved values of both graphs are called alike


def pin(graph: Graph) -> None:
    """Keep the ops of this module between the kernels of libraries where they are."""
    after: dict[Node, list[Node]] = {}
    before: Node | None = None
    waiting: list[Node] = []
    for node in graph.nodes:
        if node.target in OPS:
            waiting.append(node)
            if before is not None and node.target is not SEND:  # which has what it copies
                after.setdefault(node, []).append(before)
        elif is_compute(node):
            if waiting:
                after[node] = waiting
            before, waiting = node, []
    if after:
        compat.ordered(graph, after)
