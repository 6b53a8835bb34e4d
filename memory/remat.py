"""Rematerialization: a row of plans from "save what is not free" to "save next to nothing".

A plan is the set S of forward values that the backward gets; what else it needs, it recomputes from
S and from the inputs. For one joint graph the row of plans does not depend on any budget:

1. S of PyTorch's min-cut, which recomputes only what is free.
2. S and the checkpoints: the values that cross the forward where least crosses it, such as the
   stream between the layers of a chain. They stay, and bound what a recomputation runs again:
   without them the first recomputed layer would rebuild the whole chain, and keep it.
3. From there one other value after the other leaves S, always the one that costs the least time
   for the bytes it frees (a greedy knapsack; Kirisame et al. 2021, arXiv 2006.09616, use the
   same ratio). Equal layers tie: the earliest goes first, as its backward runs when little is left.
4. The same with every second, fourth, ... checkpoint (Chen et al. 2016, arXiv 1604.06174), twice:
   a layer often has two places of the same size, and it matters whether what runs again ends with
   the layer or in its middle.

Where values may wait on the host, each S stands there several times, with no, some and more of its
values on the host (memory/offload.py): the oldest half of those whose copies are hidden under
kernels, all of those, and all that are worth a copy.

Every plan is judged by its predicted peak (memory/peak.py) and by the time of what it recomputes
(memory/cost.py), and of copies. For a budget the fastest plan that fits is taken:

    minimise seconds(S)  subject to  peak(S) <= budget                              -> `Row.choose`

Since the row is fixed, a smaller budget never takes a faster plan or a higher peak: both are
monotonic by construction. Values that draw random numbers, and values computed from an input that
the step writes to, are never recomputed; nor are copies of inputs that the model itself makes.

Differs from PyTorch's `activation_memory_budget`: bytes of the peak in place of a ratio of what is
saved; attention is priced; a chain has checkpoints.
"""

import dataclasses
import heapq
import math
import operator
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import Tensor
from torch.fx import Graph, Node

from magi_train.core.graph import copies_of_inputs, descendants, outputs, tangents, written_over
from magi_train.core.hardware import Speed, pinned_bytes
from magi_train.memory import cost
from magi_train.memory.offload import Trip, can_wait
from magi_train.memory.peak import Storages, Timeline, body, join, walk

SPACINGS = (1, 2, 4, 8)
"""Of every so many checkpoints one is saved."""
MOST_PLANS = 24
"""Plans of one spacing that are judged; more are thinned out evenly."""
WINDOW = 24
"""A checkpoint lies where less crosses the forward than at this many places on either side."""
SLACK = 1.02
"""What crosses may exceed the least by this factor: small tensors come and go."""


@dataclass(frozen=True)
class SavedSet:
    """One plan.

    Attributes:
        saved: Names of the forward values that the backward gets, without inputs.
        seconds: Predicted time of all that the backward runs again.
        moved: Those of `saved` that wait on the host.
        copy_seconds: Predicted time that their copies cost.
    """

    saved: frozenset[str]
    seconds: float
    moved: frozenset[str] = frozenset()
    copy_seconds: float = 0.0

    @property
    def price(self) -> tuple[float, int]:
        """What the plan costs, to order plans by."""
        return self.seconds + self.copy_seconds, len(self.moved)


class Joint:
    """A joint graph of forward and backward, and what it costs to save less of it.

    Args:
        graph: From AOTAutograd, without duplicates.
        num_outputs: How many of its outputs are the forward's.
        speed: Of the device.
        fused: Whether generated code will run it.
        device_type: What the step is planned for; "": where its tensors lie.
    """

    def __init__(
        self, graph: Graph, num_outputs: int, speed: Speed, *, fused: bool, device_type: str = ""
    ) -> None:
        results = outputs(graph)
        self.storages, self.speed = Storages(fused=fused, device_type=device_type), speed
        self.nodes = body(graph)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.inputs = graph.find_nodes(op="placeholder")
        self._sources = {n: [a for a in n.all_input_nodes if a in self.place] for n in self.nodes}
        self.tangents = tangents(graph)
        self.results = [n for n in results[:num_outputs] if isinstance(n, Node)]
        self.gradients = [n for n in results[num_outputs:] if isinstance(n, Node)]
        self.seconds = {n: cost.seconds(n, speed, fused=fused) for n in self.nodes}
        self.late = descendants(self.tangents)
        self._written = written_over(graph)
        self.fixed = {
            n for n in self.nodes
            if not cost.is_repeatable(n) or any(a in self._written for a in n.all_input_nodes)
        }  # fmt: skip
        self.fixed.update(copies_of_inputs(graph))

    @cached_property
    def forward_seconds(self) -> float:
        """Predicted time of the forward and of the backward, nothing recomputed."""
        return sum(self.seconds[n] for n in self.nodes)

    def needed(self, goals: Iterable[Node], saved: set[Node]) -> set[Node]:
        """Return what must be computed to get `goals` if `saved` and inputs are there."""
        seen: set[Node] = set()
        todo = [n for n in goals if n in self.place and n not in saved]
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += [a for a in self._sources[node] if a not in saved]
        return seen

    def recomputed(self, saved: set[Node]) -> set[Node]:
        """Return the forward nodes that the backward runs again."""
        return self.needed(self.gradients, saved) - self.late

    def read(self, saved: set[Node]) -> set[Node]:
        """Return those of `saved` that the backward reads."""
        run = self.needed(self.gradients, saved)
        direct = {g for g in self.gradients if g in saved}
        return {a for n in run for a in self._sources[n] if a in saved} | direct

    def timeline(self, saved: set[Node], moved: set[Node] | None = None) -> Timeline:
        """Return the predicted timeline of forward and backward.

        Args:
            saved: What the backward gets.
            moved: Those of it that wait on the host.
        """
        moved = moved or set()
        stay = saved - moved
        trip = self.trip(saved)
        trip.move(sorted(moved, key=self.place.__getitem__), self.storages)
        first, _ = walk(
            trip.forward,
            self.storages,
            resident=self.inputs,
            keep=[*self.results, *stay],
            leave=trip.leave,
        )
        second, _ = walk(
            trip.backward,
            self.storages,
            start=[*stay, *self.results, *self.tangents],
            held=self.tangents,
            resident=[n for n in self.inputs if n not in self.tangents],
            keep=[*self.results, *self.gradients],
            come=trip.come,
        )
        return join(first, second)

    def trip(self, saved: set[Node]) -> Trip:
        """Return the ways that values can take to the host and back."""
        orders = self.forward_order(saved), self.backward_order(saved)
        return Trip(*orders, self.seconds, self.speed.host)

    def movable(self, saved: set[Node]) -> list[Node]:
        """Return those of `saved` that could wait on the host, in the order of the forward.

        Each has a memory of its own, which no input, result or gradient shares.
        """
        apart = [*self.inputs, *self.results, *self.gradients]
        others = Counter(s for n in saved for s in self.storages.of(n))
        others.update(s for n in apart for s in self.storages.of(n))
        link = self.speed.host
        found = [
            n
            for n in self.read(saved) - self.late
            if can_wait(n.meta.get("val"), link)
            and all(others[s] == 1 for s in self.storages.of(n))
        ]
        return sorted(found, key=self.place.__getitem__) if link else []

    def forward_order(self, saved: set[Node]) -> list[Node]:
        """Return the forward's nodes as PyTorch's partitioner orders them."""
        run = self.needed([*self.results, *saved], set()) - self.late
        return _parts_first([n for n in self.nodes if n in run])

    def backward_order(self, saved: set[Node]) -> list[Node]:
        """Return the backward's nodes as PyTorch's partitioner orders them.

        The backward's own nodes stay in order, each behind what has to be recomputed for it.
        """
        wanted = self.needed(self.gradients, saved)
        run = [n for n in self.nodes if n in wanted]
        tangents = set(self.tangents)
        first = next((i for i, n in enumerate(run) if tangents & {*n.all_input_nodes}), 0)
        done: set[Node] = set()
        order: list[Node] = []
        for goal in [*run[first:], *(g for g in self.gradients if g in wanted)]:
            todo, missing = [goal], set()
            while todo:
                node = todo.pop()
                if node in wanted and node not in missing and node not in done:
                    missing.add(node)
                    todo += self._sources[node]
            order += sorted(missing, key=self.place.__getitem__)
            done |= missing
        return _parts_first(order)


def _parts_first(order: Sequence[Node]) -> list[Node]:
    """Take apart each result of several tensors at once, as PyTorch's partitioner does.

    The tensors that nobody reads are free then.
    """
    there = set(order)
    moved = []
    for node in order:
        if node.target is not operator.getitem:
            parts = [u for u in node.users if u.target is operator.getitem and u in there]
            moved += [node, *parts]
        elif node.args[0] not in there:
            moved.append(node)
    return moved


def checkpoints(joint: Joint) -> list[frozenset[Node]]:
    """Return, in order, the values that cross the forward where least crosses it.

    At each place of the forward the bytes are counted that were computed before it and are read
    behind it, by the forward alone. What crosses every such place (rotations, masks) is in each.
    """
    wanted = joint.needed(joint.results, set())
    order = [n for n in joint.nodes if n in wanted]
    inputs = {s for n in joint.inputs for s in joint.storages.of(n)}
    last: dict[int, int] = {}
    maker: dict[int, Node] = {}
    for i, node in enumerate(order):
        for s in joint.storages.of(node) if isinstance(node.meta.get("val"), Tensor) else ():
            maker.setdefault(s, node)  # of several results, what takes one of them
        for source in (node, *node.all_input_nodes):
            last.update((s, i) for s in joint.storages.of(source) if s not in inputs)
    alive: set[int] = set()
    crossing: list[frozenset[int]] = []
    for i, node in enumerate(order):
        alive.update(s for s in joint.storages.of(node) if s in last)
        alive = {s for s in alive if last[s] > i}
        crossing.append(frozenset(alive))
    size = [sum(joint.storages.size[s] for s in c) for c in crossing]
    found: dict[frozenset[int], None] = {}
    for i in range(len(order)):
        around = size[max(0, i - WINDOW) : i + WINDOW + 1]
        if 0 < size[i] <= SLACK * min(x for x in around if x):
            found[crossing[i]] = None
    return [frozenset(maker[s] for s in c if s in maker) for c in found]


class Row:
    """The plans for one joint graph, the fastest first.

    Args:
        joint: The graph.
        default: What PyTorch's min-cut saves.
        room_bytes: Of the host, for what waits there; 0: nothing does.
    """

    def __init__(self, joint: Joint, default: Iterable[Node], room_bytes: int = 0) -> None:
        self.joint, self._room = joint, room_bytes
        self._nodes = {n.name: n for n in joint.nodes}
        self._given = {s for n in joint.inputs for s in joint.storages.of(n)}
        self._timelines: dict[SavedSet, Timeline] = {}
        self._waiting: dict[SavedSet, int] = {}
        start = {n for n in default if n in joint.place}
        plans = [*self._plans(start)]
        bounds = checkpoints(joint)
        for first, spacing in dict.fromkeys(
            (max(s - late, 0), s) for s in SPACINGS for late in (1, 2)
        ):
            stay = {n for bound in bounds[first::spacing] for n in bound}
            for saved in _thin(list(_evict(joint, start | stay, stay))):
                plans += self._plans(saved)
        self.default = plans[0]
        self.plans = sorted(dict.fromkeys(plans), key=lambda p: p.price)

    def _plans(self, saved: set[Node]) -> Iterator[SavedSet]:
        """Yield the plan that saves a set on the device, and some with ever more on the host."""
        again = self.joint.recomputed(saved)
        names = frozenset(n.name for n in saved)
        # exact in any order: that of a set differs from rank to rank, and all must choose alike
        plan = SavedSet(names, math.fsum(self.joint.seconds[n] for n in again))
        yield plan
        values = self.joint.movable(saved) if self._room else []
        sizes = [self.joint.storages.total([n]) for n in values]
        total, held = [0, *accumulate(sizes)], [*accumulate(map(pinned_bytes, sizes))]
        most = bisect_right(held, self._room)
        if not most:
            return
        trip = self.joint.trip(saved)

        def exposed(count: int) -> float:
            return trip.move(values[:count], self.joint.storages)

        hidden = bisect_left(range(1, most + 1), True, key=lambda count: exposed(count) > 0)
        half = bisect_left(total, total[hidden] / 2)
        for count in sorted({half, hidden, most} - {0}):
            cost = exposed(count) + 2 * total[count] / self.joint.speed.bytes
            moved = frozenset(n.name for n in values[:count])
            yield dataclasses.replace(plan, moved=moved, copy_seconds=cost)

    def timeline(self, plan: SavedSet) -> Timeline:
        """Return the predicted timeline of a plan."""
        if plan not in self._timelines:
            saved, moved = ({self._nodes[n] for n in names} for names in (plan.saved, plan.moved))
            self._timelines[plan] = self.joint.timeline(saved, moved)
        return self._timelines[plan]

    def saved_bytes(self, plan: SavedSet) -> int:
        """Return the bytes that a plan keeps on the device for the backward, without inputs."""
        return self._kept(plan, ())

    def waiting_bytes(self, plan: SavedSet) -> int:
        """Return the bytes that a forward leaves until its backward.

        What it saves, and its results: whoever is given them saves them, or computes from them.
        """
        if plan not in self._waiting:
            self._waiting[plan] = self._kept(plan, self.joint.results)
        return self._waiting[plan]

    def _kept(self, plan: SavedSet, more: Iterable[Node]) -> int:
        storages = self.joint.storages
        nodes = [*(self._nodes[name] for name in plan.saved - plan.moved), *more]
        kept = {s for node in nodes for s in storages.of(node)}
        return sum(storages.size[s] for s in kept - self._given)  # a view of an input is one

    def choose(
        self,
        peak: Callable[[SavedSet], int],
        limit_bytes: int,
        at_least: Callable[[SavedSet], int] = lambda plan: 0,
    ) -> SavedSet | None:
        """Return the fastest plan whose peak of the step is within the limit, None if none is.

        Args:
            peak: Of a plan.
            limit_bytes: What it may be.
            at_least: Bytes below which no peak can be; cheaper to ask for.
        """
        order = [self.default, *self.plans]
        fitting = (p for p in order if at_least(p) <= limit_bytes and peak(p) <= limit_bytes)
        return next(fitting, None)

    def frontier(self, peak: Callable[[SavedSet], int]) -> list[SavedSet]:
        """Return the plans that a budget can choose, from the default to the least peak."""
        best = [self.default]
        for plan in self.plans:
            if peak(plan) < peak(best[-1]):
                best.append(plan)
        return best


def _thin(sets: list[set[Node]]) -> list[set[Node]]:
    step = -(-len(sets) // MOST_PLANS)
    return [*sets[::step], sets[-1]]


def _evict(joint: Joint, start: set[Node], stay: set[Node]) -> Iterator[set[Node]]:
    """Yield ever smaller sets: one storage after the other leaves, the cheapest first.

    The queue holds each storage at the price it had when it was last looked at; one whose price has
    risen is put back.
    """
    saved = joint.read(start)
    again = joint.recomputed(saved)
    yield set(saved)
    inputs = {s for n in joint.inputs for s in joint.storages.of(n)}
    groups: dict[tuple[int, ...], list[Node]] = {}
    for node in sorted(saved - stay, key=joint.place.__getitem__):
        groups.setdefault(joint.storages.of(node), []).append(node)

    def price(storage: tuple[int, ...]) -> float:
        group = groups[storage]
        more = joint.needed(group, saved - set(group)) - again
        size = sum(joint.storages.size[s] for s in storage)
        if more & joint.fixed or set(storage) & inputs or not size:
            return math.inf
        return math.fsum(joint.seconds[n] for n in more) / size

    queue = [(price(s), joint.place[group[0]], s) for s, group in groups.items()]
    heapq.heapify(queue)
    while queue:
        _, place, storage = heapq.heappop(queue)
        now = price(storage)
        if now == math.inf:
            continue
        if queue and (now, place) > queue[0][:2]:
            heapq.heappush(queue, (now, place, storage))
            continue
        again |= joint.needed(groups[storage], saved - set(groups[storage]))
        saved -= set(groups[storage])
        saved = joint.read(saved)
        yield set(saved)
