"""Collectives inside the backward graph: two ops, and the pass that places them.

The pass works in Inductor's post-grad slot on the backward graph. For every bucket of the plan it
inserts `magi_train::bucket_launch` right after the bucket's last gradient is computed and
`magi_train::bucket_wait` at the end, and cuts the gradients out of the flat tensor:

    grads ... -> bucket_launch 0 -> more backward -> bucket_launch 1 -> ... -> wait 0 -> wait 1

The order is pinned twice. Launches and waits form one chain through their `after` arguments, so
every rank issues one sequence. And the next matrix product after a launch gets a control dependency
on it, since Inductor's reordering for peak memory otherwise moves collectives to their waits.

The ops are opaque on purpose: whether this backward synchronises, what an earlier one left in
`.grad` and the wire format are the reducer's business at run time, so accumulation needs no second
graph, and one rank may run eagerly beside a compiled one. They name the reducer by its ordinal,
which is the same in every process that prepares its modules in the same order: nothing has to be
registered while compiling, and cached code works in a new process.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from magi_train.comm.plan import CommPlan
from magi_train.comm.reducer import reducer_of
from magi_train.core import compat
from magi_train.core.graph import (
    before_widening,
    call_with_metadata,
    input_gradients,
    is_compute,
    outputs,
)
from magi_train.core.passes import Plan

_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@torch.library.custom_op("magi_train::bucket_launch", mutates_args=(), tags=_TAGS)
def bucket_launch(
    grads: list[Tensor],
    positions: list[int],
    reducer: int,
    bucket: int,
    numel: int,
    dtype: torch.dtype,
    device: torch.device,
    after: list[Tensor],
) -> Tensor:
    """Pack `grads` into a new flat tensor `[numel]` and start its all-reduce; see Reducer.launch.

    Args:
        grads: Gradients of the slots in `positions`.
        positions: Indices of the bucket's slots.
        reducer: Ordinal of the reducer.
        bucket: Index in its plan.
        numel: Elements of the result.
        dtype: Of the result.
        device: Of the result.
        after: Ignored; makes this op run after those that produced it.
    """
    owner = reducer_of(reducer)
    slots = owner.plan.buckets[bucket].slots
    return owner.launch(bucket, grads, [slots[i].name for i in positions])


@bucket_launch.register_fake
def _(grads, positions, reducer, bucket, numel, dtype, device, after):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return torch.empty(numel, dtype=dtype, device=device)


@torch.library.custom_op("magi_train::bucket_wait", mutates_args=("flat",), tags=_TAGS)
def bucket_wait(flat: Tensor, reducer: int, bucket: int, after: list[Tensor]) -> None:
    """Wait until `flat` holds the averages of its bucket."""
    reducer_of(reducer).wait(bucket, flat)


@bucket_wait.register_fake
def _(flat, reducer, bucket, after):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return None


@dataclass(frozen=True)
class InGraphPlan(Plan):
    """Where the collectives of a backward graph went.

    Attributes:
        buckets: All-reduces in the graph.
        gradients: Gradients that they carry.
        unused: Parameters of the plan without a gradient in this graph.
        compute_after_first_launch: Matrix products that may run beside the first collective.
    """

    buckets: int
    gradients: int
    unused: tuple[str, ...]
    compute_after_first_launch: int


class PlaceCollectives:
    """Put the communication plan into a backward graph.

    Args:
        plan: The agreed buckets.
        reducer: Ordinal of the reducer that runs them.
        names: Parameter name by position among the captured graph's inputs.
    """

    name = "place_collectives"
    stage = "backward"

    def __init__(self, plan: CommPlan, reducer: int, names: dict[int, str]) -> None:
        self.comm_plan, self.reducer, self.names = plan, reducer, names

    def fingerprint(self) -> tuple[object, ...]:
        """Return what compiled code depends on."""
        return (self.comm_plan.fingerprint(), self.reducer, tuple(sorted(self.names.items())))

    def plan(self, graph: Graph) -> InGraphPlan | None:
        """Return what will be placed, or None where the graph has no parameter's gradient."""
        grads = self._gradients(graph)
        if not grads:
            return None
        nodes = list(graph.nodes)
        order = {n: i for i, n in enumerate(nodes)}
        slots = self.comm_plan.buckets[0].slots
        first = max((order[grads[s.name][1]] for s in slots if s.name in grads), default=0)
        after = sum(is_compute(n) for n in nodes[first + 1 :])
        every = [s.name for b in self.comm_plan.buckets for s in b.slots]
        unused = tuple(name for name in every if name not in grads)
        return InGraphPlan(len(self.comm_plan.buckets), len(grads), unused, after)

    def apply(self, graph: Graph, *, pin: bool) -> None:
        """Insert launches, waits and views; `pin` their places against Inductor's reordering."""
        grads = self._gradients(graph)
        output = graph.output_node()
        results = outputs(graph)
        device = next(iter(grads.values()))[1].meta["val"].device
        order = {n: i for i, n in enumerate(graph.nodes)}
        first_compute = next(n for n in graph.nodes if n.op != "placeholder")
        launches: list[Node] = []
        latest = first_compute.prev
        for index, bucket in enumerate(self.comm_plan.buckets):
            present = [(i, grads[s.name][1]) for i, s in enumerate(bucket.slots) if s.name in grads]
            latest = max([latest, *(n for _, n in present)], key=lambda n: order[n])
            anchor = latest if latest.op != "placeholder" else first_compute.prev
            with graph.inserting_after(anchor):
                launch = call_with_metadata(
                    graph,
                    torch.ops.magi_train.bucket_launch.default,
                    (
                        [n for _, n in present],
                        [i for i, _ in present],
                        self.reducer,
                        index,
                        bucket.numel,
                        bucket.torch_dtype(),
                        device,
                        launches[-1:],
                    ),
                )
            order[launch] = order[anchor]
            latest = launch
            launches.append(launch)
        previous = launches[-1]
        with graph.inserting_before(output):
            for index, launch in enumerate(launches):
                after = [previous] if previous is not launch else []
                args = (launch, self.reducer, index, after)
                call_with_metadata(graph, torch.ops.magi_train.bucket_wait.default, args)
                previous = launch
            for launch, bucket in zip(launches, self.comm_plan.buckets, strict=True):
                for slot in bucket.slots:
                    if slot.name in grads:
                        position, _ = grads[slot.name]
                        view = (launch, list(slot.shape), list(slot.strides), slot.offset)
                        results[position] = call_with_metadata(
                            graph, torch.ops.aten.as_strided.default, view
                        )
                        compat.set_output_stride(output, position, slot.strides)
        output.args = (tuple(results),)
        if pin:
            self._pin(graph, launches)

    def _gradients(self, graph: Graph) -> dict[str, tuple[int, Node]]:
        """Return {parameter: (position in the output, node to pack)}."""
        found = {}
        for index, (position, node) in input_gradients(graph).items():
            if index in self.names:
                found[self.names[index]] = (position, before_widening(node))
        return found

    @staticmethod
    def _pin(graph: Graph, launches: list[Node]) -> None:
        after: dict[Node, list[Node]] = {}
        for launch in launches:
            node = launch.next
            while node.op != "output" and not is_compute(node):
                node = node.next
            if node.op != "output":
                after.setdefault(node, []).append(launch)
        if after:
            compat.ordered(graph, after)


def place(graph: Graph, collectives: PlaceCollectives, *, pin: bool) -> InGraphPlan | None:
    """Plan and apply on `graph`; return the plan, None for a graph without gradients."""
    plan = collectives.plan(graph)
    if plan is not None:
        collectives.apply(graph, pin=pin)
    return plan
