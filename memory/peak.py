"""Peak: which tensors are alive after every node of a forward and of its backward.

Both graphs are walked in the order in which they run. A node allocates the storages of its result
that are not there yet, and a storage is freed behind the last node that uses it:

    live(i) = sum of storages defined at or before i and used after i, or kept     -> `walk`
    peak    = the largest live(i), counted while node i runs: inputs and result together

Views share the storage of what they look at; sizes are rounded up to what PyTorch's CUDA allocator
hands out. Inputs of the forward are not counted: who owns them holds them for the whole step
(memory/step.py). What the forward returns is held to the end, as by a user who keeps the output.

Generated code does not store every value: with `fused`, a pointwise node whose readers all lie in
front of the next kernel of a library (a product, a convolution, an attention) has no storage of its
own, and its inputs live as long as its readers need them. What is stored is written over an input
of the same size that is read for the last time. An approximation: Inductor also reorders, and fuses
across such kernels, which lowers the real peak. The measured peak of the first step corrects it.

Source: lifetime analysis as in register allocation; Inductor's own estimate
(torch/_inductor/memory.py). Differs: needs no scheduler, so it can judge a plan before lowering.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from magi_train.core import compat
from magi_train.core.graph import is_pointwise, is_reduction, is_view, num_bytes, outputs, user_line

ROUND_BYTES = 512
"""The CUDA caching allocator hands out multiples of this."""
LARGEST = 10
"""How many tensors at the peak are named."""
WIDE_BYTES = 4
"""Attention kernels sum the gradient of the query in float32, in a workspace of their own."""


@dataclass(frozen=True)
class Tensor:
    """One piece of memory that is alive at the peak.

    Attributes:
        node: The node that made it.
        size_bytes: Rounded as the allocator does.
        line: The user's line that made it, "" if unknown.
    """

    node: str
    size_bytes: int
    line: str


@dataclass(frozen=True)
class Timeline:
    """Memory over a sequence of nodes, in bytes, without what is resident anyway.

    Attributes:
        nodes: In the order in which they run.
        live: Bytes while each of them runs.
        peak: The largest of `live`; 0 without nodes.
        at: The node that runs at the peak.
        largest: The largest tensors then.
    """

    nodes: tuple[str, ...]
    live: tuple[int, ...]
    peak: int
    at: str
    largest: tuple[Tensor, ...]


class Storages:
    """Which memory the value of each node lies in. A storage is a number.

    Args:
        fused: Generated code runs the graph: see the head of the module.
        device_type: What the step is planned for; "": where its tensors lie.

    Attributes:
        size: Bytes of each storage, rounded up.
    """

    def __init__(self, *, fused: bool, device_type: str = "") -> None:
        self.fused, self.device_type = fused, device_type
        self.size: dict[int, int] = {}
        self._of: dict[Node, tuple[int, ...]] = {}

    def of(self, node: Node) -> tuple[int, ...]:
        """Return the storages of a node's value, none for what is no tensor."""
        found = self._of.get(node)
        if found is None:
            found = self._of[node] = self._find(node)
        return found

    def _find(self, node: Node) -> tuple[int, ...]:
        source = node.args[0] if node.args else None
        if is_view(node) and isinstance(source, Node) and isinstance(_value(source), torch.Tensor):
            return self.of(source)
        keys = []
        for leaf in pytree.tree_leaves(_value(node)):
            if isinstance(leaf, torch.Tensor):
                key = compat.storage_key(leaf)
                if key not in self.size:
                    self.size[key] = -(-compat.storage_bytes(leaf) // ROUND_BYTES) * ROUND_BYTES
                keys.append(key)
        return tuple(dict.fromkeys(keys))

    def total(self, nodes: Iterable[Node]) -> int:
        """Return the bytes of the storages of `nodes`, each once."""
        return sum(self.size[s] for s in {s for node in nodes for s in self.of(node)})


def _value(node: Node) -> object:
    return node.meta.get("val")


def walk(
    order: Sequence[Node],
    storages: Storages,
    *,
    start: Iterable[Node] = (),
    resident: Iterable[Node] = (),
    keep: Iterable[Node] = (),
) -> tuple[Timeline, set[int]]:
    """Run `order` in thought.

    Args:
        order: Nodes without placeholders and output.
        storages: Of the graph.
        start: Nodes whose values are alive at first, and freed behind their last use.
        resident: Nodes whose values are not counted.
        keep: Nodes whose values stay alive to the end.

    Returns:
        The timeline, and the storages that are alive after it.
    """
    free_of_charge = {s for node in resident for s in storages.of(node)}
    kept = {s for node in keep for s in storages.of(node)}
    stored, last_use = _lifetimes(order, storages, keep)
    live = {s for node in start for s in storages.of(node)} - free_of_charge
    maker = {s: node for node in start for s in storages.of(node)}
    frees: dict[int, list[int]] = {}
    for storage, i in last_use.items():
        frees.setdefault(i, []).append(storage)
    live -= {s for s in live if s not in last_use and s not in kept}
    now, peak, peak_at = sum(storages.size[s] for s in live), 0, -1
    sizes, at_peak = [], set(live)
    for i, node in enumerate(order):
        new = storages.of(node) if stored[i] else ()
        made = [s for s in new if s not in live and s not in free_of_charge]
        for s in made:
            live.add(s)
            maker[s] = node
            now += storages.size[s]
        freed = [s for s in frees.get(i, ()) if s in live and s not in kept]
        over = _written_over(node, made, freed, storages) if storages.fused else 0
        sizes.append(now - over + _workspace(node, storages.device_type))
        if sizes[-1] > peak:
            peak, peak_at, at_peak = sizes[-1], i, set(live)
        for s in freed:
            live.discard(s)
            now -= storages.size[s]
    made = [s for s in at_peak if s in maker]  # by name among equals: all runs tell the same
    by_size = sorted(made, key=lambda s: (-storages.size[s], maker[s].name))[:LARGEST]
    largest = tuple(Tensor(maker[s].name, storages.size[s], user_line(maker[s])) for s in by_size)
    names = tuple(node.name for node in order)
    at = order[peak_at].name if peak_at >= 0 else ""
    return Timeline(names, tuple(sizes), peak, at, largest), live


def _lifetimes(
    order: Sequence[Node], storages: Storages, keep: Iterable[Node]
) -> tuple[list[bool], dict[int, int]]:
    """Return which nodes store their value, and the place of the last use of each storage."""
    kept, place = set(keep), {node: i for i, node in enumerate(order)}
    kernels = _kernels_before(order) if storages.fused else []
    stored = [True] * len(order)
    until: dict[Node, int] = {}  # the last place at which a node's value is read
    last_use: dict[int, int] = {}
    for i in range(len(order) - 1, -1, -1):
        node = order[i]
        end = i
        if storages.fused and node not in kept and _is_inlined(node, place, kernels, kept, stored):
            stored[i] = False
        if not stored[i] or is_view(node):
            end = until.get(node, i)
        for source in node.all_input_nodes:
            until[source] = max(until.get(source, i), end)
            for s in storages.of(source):
                last_use[s] = max(last_use.get(s, end), end)
        for s in storages.of(node) if stored[i] else ():
            last_use.setdefault(s, i)
    for i, node in enumerate(order):  # a view has storage where what it looks at has
        seen = node.args[0] if node.args else None
        if is_view(node) and isinstance(seen, Node) and seen in place:
            stored[i] = stored[place[seen]]
    return stored, last_use


def _written_over(node: Node, made: Sequence[int], freed: Sequence[int], storages: Storages) -> int:
    """Return the bytes of a result that generated code writes over an input that it read last."""
    if not is_pointwise(node):
        return 0
    left = [storages.size[s] for s in freed if s not in made]
    over = 0
    for size in (storages.size[s] for s in made):
        if size in left:
            left.remove(size)
            over += size
    return over


def _kernels_before(order: Sequence[Node]) -> list[int]:
    """Return for each place how many kernels of a library run before it."""
    counts, count = [], 0
    for node in order:
        counts.append(count)
        count += not _is_generated(node)
    return counts


def _is_generated(node: Node) -> bool:
    return (
        is_pointwise(node)
        or is_reduction(node)
        or is_view(node)
        or node.target is operator.getitem
        or not isinstance(_value(node), torch.Tensor)
    )


def _is_inlined(
    node: Node,
    place: Mapping[Node, int],
    kernels: Sequence[int],
    kept: set[Node],
    stored: Sequence[bool],
) -> bool:
    """Return whether every reader of a pointwise node is generated into the same kernel."""
    if not is_pointwise(node):
        return False
    mine = kernels[place[node]]
    todo = list(node.users)
    while todo:
        user = todo.pop()
        i = place.get(user)
        if i is None:  # in the other graph, or the output
            continue
        if not _is_generated(user) or kernels[i] != mine or (user in kept and is_view(user)):
            return False
        if is_view(user):
            todo += user.users
    return True


def _workspace(node: Node, device_type: str) -> int:
    """Return the bytes that a kernel takes for itself while it runs on a CUDA device.

    Args:
        node: Of a graph from AOTAutograd.
        device_type: What the step is planned for; "": where its tensors lie.
    """
    name = str(node.target)
    if "attention" not in name or "backward" not in name:
        return 0
    value = pytree.tree_leaves(_value(node))[0]
    if not isinstance(value, torch.Tensor) or (device_type or value.device.type) != "cuda":
        return 0
    return num_bytes(value) // value.element_size() * WIDE_BYTES


def body(graph: Graph) -> list[Node]:
    """Return the nodes of a graph that compute something, in their order."""
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def simulate(
    forward: GraphModule, backward: GraphModule, *, fused: bool, device_type: str = ""
) -> Timeline:
    """Return the timeline of a partitioned step: its forward, then its backward.

    Args:
        forward: From a partitioner: returns the user's outputs, then what it saves.
        backward: Takes what is saved, by name, and the tangents; returns gradients.
        fused: Whether generated code runs the two.
        device_type: What the step is planned for; "": where its tensors lie.
    """
    storages = Storages(fused=fused, device_type=device_type)
    inputs = forward.graph.find_nodes(op="placeholder")
    results = [node for node in outputs(forward.graph) if isinstance(node, Node)]
    first, _ = walk(body(forward.graph), storages, resident=inputs, keep=results)
    names = {node.name for node in inputs}
    given = backward.graph.find_nodes(op="placeholder")
    held = [r for r in results if r.name not in {g.name for g in given}]
    gradients = [node for node in outputs(backward.graph) if isinstance(node, Node)]
    second, _ = walk(
        body(backward.graph),
        storages,
        start=[*held, *(g for g in given if g.name not in names)],
        resident=[*inputs, *(g for g in given if g.name in names)],
        keep=[*held, *gradients],
    )
    return join(first, second)


def join(first: Timeline, second: Timeline) -> Timeline:
    """Return one timeline of two that follow each other."""
    higher = first if first.peak >= second.peak else second
    return Timeline(
        first.nodes + second.nodes,
        first.live + second.live,
        higher.peak,
        higher.at,
        higher.largest,
    )
