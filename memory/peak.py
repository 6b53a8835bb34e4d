"""Peak: which tensors are alive after every node of a forward and of its backward.

Both graphs are walked in the order in which they run. A node allocates the storages of its result
that are not there yet, and a storage is freed behind the last node that uses it:

    live(i) = sum of storages defined at or before i and used after i, or kept     -> `walk`
    peak    = the largest live(i), counted while node i runs: inputs and result together

Views share the storage of what they look at; sizes are rounded up to what PyTorch's CUDA allocator
hands out. Inputs of the forward are not counted: who owns them holds them for the whole step
(memory/step.py). What the forward returns is held to the end, as by a user who keeps the output.
What waits on the host (memory/offload.py) takes no memory there: it is free once its copy is done,
and is back from where the copy to the device begins.

Generated code does not store every value. With `fused`, a pointwise node has no storage of its own,
and its inputs live as long as its readers need them, if no kernel of a library (a product, a
convolution, an attention) reads it, nor the other graph, and either

* it is computed again where it is read: by one reader, or from few tensors with few operations, or
* all its readers lie in front of the next kernel of a library: one generated kernel has it all.

What is stored is written over an input of the same shape that is read there for the last time, and
by nothing else that the same kernel stores. An approximation: Inductor also reorders. The measured
peak of the first step corrects it.

Source: lifetime analysis as in register allocation; Inductor's own estimate
(torch/_inductor/memory.py) and its rules of when a value is stored (torch/_inductor/ir.py,
StorageBox; seen on 2.11 to 2.13). Differs: needs no scheduler, so it can judge a plan before
lowering.
"""

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from magi_train.core import compat
from magi_train.core.graph import (
    is_pointwise,
    is_reduction,
    is_view,
    num_bytes,
    op_name,
    outputs,
    user_line,
)
from magi_train.memory.copies import SEND

ROUND_BYTES = 512
"""The CUDA caching allocator hands out multiples of this."""
LARGEST = 10
"""How many tensors at the peak are named."""
MOST_READS, MOST_OPS, MOST_READS_ONCE = 4, 30, 8
"""A value with several readers is stored if it takes more tensors or operations than these two; one
with a single reader, if more tensors than the last."""
SAME_ELEMENTS = {"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "alias"}
"""Views whose elements lie in the order of what they look at."""
WIDE_BYTES = 4
"""Attention kernels sum the gradient of the query in float32, in a workspace of their own, with a
number for each of its rows. For grouped heads, the gradients of key and value lie there too, one
for each head of the query. Measured with cuDNN's on an H200: 516 MiB for 32 heads of 64 over 8, of
32768 tokens in bfloat16."""
NONE: Mapping[int, Sequence[Node]] = {}


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


@dataclass(frozen=True)
class Facts:
    """What a walk asks of a node, again and again.

    Attributes:
        inputs: The nodes that it reads.
        storages: That its value lies in.
        elements: Of its value; None if that is no tensor.
        view: Whether it looks at the memory of its first input.
        pointwise: Whether its elements can be computed where they are read.
        generated: Whether no kernel of a library runs it.
        workspace: Bytes that its kernel takes for itself.
    """

    inputs: tuple[Node, ...]
    storages: tuple[int, ...]
    elements: int | None
    view: bool
    pointwise: bool
    generated: bool
    workspace: int


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
        self._facts: dict[Node, Facts] = {}

    def facts(self, node: Node) -> Facts:
        """Return what is known of a node."""
        found = self._facts.get(node)
        if found is None:
            value = _value(node)
            found = self._facts[node] = Facts(
                tuple(node.all_input_nodes),
                self.of(node),
                compat.size_hint(value.numel()) if isinstance(value, torch.Tensor) else None,
                is_view(node),
                is_pointwise(node),
                _is_generated(node),
                _workspace(node, self.device_type),
            )
        return found

    def of(self, node: Node) -> tuple[int, ...]:
        """Return the storages of a node's value, none for what is no tensor."""
        found = self._of.get(node)
        if found is None:
            found = self._of[node] = self._find(node)
        return found

    def same(self, node: Node, as_node: Node) -> None:
        """Take note that the value of a node of one graph is that of a node of another."""
        self._of[node] = self.of(as_node)

    def _find(self, node: Node) -> tuple[int, ...]:
        source = node.args[0] if node.args else None
        if node.target is SEND:  # the memory of the host is another
            return ()
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
    held: Iterable[Node] = (),
    resident: Iterable[Node] = (),
    keep: Iterable[Node] = (),
    leave: Mapping[int, Sequence[Node]] = NONE,
    come: Mapping[int, Sequence[Node]] = NONE,
) -> tuple[Timeline, set[int]]:
    """Run `order` in thought.

    Args:
        order: Nodes without placeholders and output.
        storages: Of the graph.
        start: Nodes whose values are alive at first, and freed behind their last use.
        held: Those of `start` that nothing is written over: others hold them too.
        resident: Nodes whose values are not counted.
        keep: Nodes whose values stay alive to the end.
        leave: {place in the order: nodes whose values are on their way to the host until then}.
        come: {place in the order: nodes whose values come back from the host from there on}.

    Returns:
        The timeline, and the storages that are alive after it.
    """
    leaving = {s: i for i, nodes in leave.items() for node in nodes for s in storages.of(node)}
    free_of_charge = {s for node in resident for s in storages.of(node)}
    kept = {s for node in keep for s in storages.of(node)}
    gone = [node for nodes in leave.values() for node in nodes]
    stored, last_use, over = _lifetimes(order, storages, [*keep, *gone])
    last_use.update((s, max(i, last_use.get(s, i))) for s, i in leaving.items())
    live = {s for node in start for s in storages.of(node)} - free_of_charge
    fixed = kept | free_of_charge | {s for node in held for s in storages.of(node)}
    maker = {s: node for node in start for s in storages.of(node)}
    frees: dict[int, list[int]] = {}
    for storage, i in last_use.items():
        frees.setdefault(i, []).append(storage)
    live -= {s for s in live if s not in last_use and s not in kept}
    now, peak, peak_at = sum(storages.size[s] for s in live), 0, -1
    sizes, at_peak = [], set(live)
    for i, node in enumerate(order):
        facts = storages.facts(node)
        for back in come.get(i, ()):
            live.update(storages.of(back))
            maker.update((s, back) for s in storages.of(back))
            now += storages.total([back])
        made = []
        for s in facts.storages if stored[i] else ():
            if s not in live and s not in free_of_charge:
                live.add(s)
                made.append(s)
                maker[s] = node
                now += storages.size[s]
        freed = [s for s in frees.get(i, ()) if s in live and s not in kept]
        saved = _written_over(made, [s for s in freed if s in over[i] - fixed], storages)
        sizes.append(now - saved + facts.workspace)
        if sizes[-1] > peak:
            peak, peak_at, at_peak = sizes[-1], i, set(live)
        for s in freed:
            live.discard(s)
            now -= storages.size[s]
    there = [s for s in at_peak if s in maker]  # by name among equals: all runs tell the same
    by_size = sorted(there, key=lambda s: (-storages.size[s], maker[s].name))[:LARGEST]
    largest = tuple(Tensor(maker[s].name, storages.size[s], user_line(maker[s])) for s in by_size)
    names = tuple(node.name for node in order)
    at = order[peak_at].name if peak_at >= 0 else ""
    return Timeline(names, tuple(sizes), peak, at, largest), live


def _lifetimes(
    order: Sequence[Node], storages: Storages, keep: Iterable[Node]
) -> tuple[list[bool], dict[int, int], list[set[int]]]:
    """Return which nodes store their value, the last use of each storage, what may be overwritten.

    The last is {storages that a node reads element by element, at the places that it writes}.
    """
    if storages.fused:
        stored, over = _stored(order, storages, set(keep))
    else:
        stored, over = [True] * len(order), [set() for _ in order]
    until: dict[Node, int] = {}  # the last place at which a node's value is read
    last_use: dict[int, int] = {}
    for i in range(len(order) - 1, -1, -1):
        node = order[i]
        facts = storages.facts(node)
        end = until.get(node, i) if not stored[i] or facts.view else i
        for source in facts.inputs:
            until[source] = max(until.get(source, i), end)
            for s in storages.of(source):
                last_use[s] = max(last_use.get(s, end), end)
        for s in facts.storages if stored[i] else ():
            last_use.setdefault(s, i)
    return stored, last_use, over


def _stored(
    order: Sequence[Node], storages: Storages, kept: set[Node]
) -> tuple[list[bool], list[set[int]]]:
    """Return which nodes generated code stores, and what each can be written over."""
    place = {node: i for i, node in enumerate(order)}
    kernels = _kernels_before(order, storages)
    stored: list[bool] = []
    over: list[set[int]] = []
    reads: dict[Node, set[Node]] = {}  # the tensors from which a node is computed where it is read
    same: dict[Node, set[Node]] = {}  # those of them that are read at the place that is written
    inside: dict[Node, set[Node]] = {}  # what is computed with it there
    readers: Counter[tuple[int, int]] = Counter()
    for i, node in enumerate(order):
        facts = storages.facts(node)
        below = {r for a in facts.inputs for r in reads.get(a, {a})}
        alike = [a for a in facts.inputs if storages.facts(a).elements == facts.elements]
        close = {r for a in alike for r in same.get(a, {a})}
        ops = {node}.union(*(inside.get(a, ()) for a in facts.inputs))
        here = True
        if facts.view:
            first = node.args[0] if node.args else None
            here = stored[place[first]] if isinstance(first, Node) and first in place else True
        elif facts.pointwise and node not in kept:
            users = [u for u in node.users if u in place]
            most = MOST_READS if len(users) > 1 else MOST_READS_ONCE
            again = len(below) <= most and (len(users) < 2 or len(ops) <= MOST_OPS)
            here = not _is_inlined(node, place, kernels, kept, storages, anywhere=again)
        stored.append(here)
        if here and facts.generated and not facts.view:
            readers.update({(s, kernels[i]) for r in below for s in storages.of(r)})
        over.append({s for r in close for s in storages.of(r)} if facts.pointwise else set())
        if not here or facts.view:
            reads[node], inside[node] = below, ops
            same[node] = close if facts.pointwise or op_name(node) in SAME_ELEMENTS else set()
    alone = [{s for s in each if readers[s, kernels[i]] == 1} for i, each in enumerate(over)]
    return stored, alone


def _written_over(made: Sequence[int], freed: Sequence[int], storages: Storages) -> int:
    """Return the bytes of a result that generated code writes over what it reads last."""
    left = [storages.size[s] for s in freed if s not in made]
    over = 0
    for size in (storages.size[s] for s in made):
        if size in left:
            left.remove(size)
            over += size
    return over


def _kernels_before(order: Sequence[Node], storages: Storages) -> list[int]:
    """Return for each place how many kernels of a library run before it."""
    counts, count = [], 0
    for node in order:
        counts.append(count)
        count += not storages.facts(node).generated
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
    storages: Storages,
    *,
    anywhere: bool,
) -> bool:
    """Return whether every reader of a pointwise node is generated, in one kernel or `anywhere`."""
    mine = kernels[place[node]]
    todo = list(node.users)
    while todo:
        user = todo.pop()
        i = place.get(user)
        if i is None:  # in the other graph, or the output
            continue
        facts = storages.facts(user)
        if not facts.generated or (user in kept and facts.view):
            return False
        if not anywhere and kernels[i] != mine:
            return False
        if facts.view:
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
    query, key = (_value(a) if isinstance(a, Node) else None for a in node.args[1:3])
    if not isinstance(query, torch.Tensor) or not isinstance(key, torch.Tensor):
        return 0
    if (device_type or query.device.type) != "cuda" or query.dim() != 4:
        return 0
    size = num_bytes(query)
    elements = size // query.element_size()
    rows = elements // query.shape[-1] if size else 0
    grouped = query.shape[1] != key.shape[1]
    return (elements + rows) * WIDE_BYTES + (2 * size if grouped else 0)


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
    made = {node.name: node for node in forward.graph.nodes}
    for node in given:  # what is saved may look at an input, which its own value does not tell
        if node.name in made:
            storages.same(node, made[node.name])
    held = [r for r in results if r.name not in {g.name for g in given}]
    gradients = [node for node in outputs(backward.graph) if isinstance(node, Node)]
    second, _ = walk(
        body(backward.graph),
        storages,
        start=[*held, *(g for g in given if g.name not in names)],
        held=[g for g in given if "tangents" in g.name],
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
