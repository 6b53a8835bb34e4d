"""The memory budget: the fastest step whose predicted peak stays within it.

Objective: the least time of recomputation, and of copies to the host where these are allowed,
    subject to: peak of the whole step <= budget,                      -> `FitBudget`
where
    peak of the step = resident                                        -> memory/step.py
                     + the largest of
                         forward and backward, by lifetimes            -> memory/peak.py
                         the optimizer's step: gradients and its temporaries
    and time         = a roofline of what runs again                   -> memory/cost.py
                     + what copies cost                                -> memory/offload.py

over the plans of memory/remat.py. Where one captured block serves many (the REGION tier), every
block saves the same: `blocks` - 1 of them wait with what they saved while one runs, or, at the end
of the backward, have left their gradients.

What is not predicted: fragmentation and the CUDA context (the budget bounds what is allocated, as
`torch.cuda.max_memory_allocated` counts it), workspaces of kernels other than cuBLAS and attention,
and in the REGION tier everything outside of the blocks. The peak of the first real step is compared
with the plan, and corrects it once.
"""

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from torch.fx import GraphModule, Node

from magi_train.core import compat
from magi_train.core.errors import MagiError, PassError
from magi_train.core.graph import saved_for_backward
from magi_train.core.passes import Plan
from magi_train.memory.offload import Moves, insert
from magi_train.memory.peak import Timeline, simulate
from magi_train.memory.remat import Joint, Row, SavedSet
from magi_train.memory.step import GIB, Limit, shares

SHOWN_OPS = 6
CUTS_TRIED = 5
"""How often a plan whose cut comes out larger than predicted makes room for a smaller one."""
Partition = tuple[GraphModule, GraphModule]


class _Planned(TypedDict):
    fused: bool
    device_type: str


@dataclass(frozen=True)
class BudgetPlan(Plan):
    """How one joint graph was cut.

    Attributes:
        budget_gib: What was asked for.
        planned_gib: Predicted peak of the step.
        without_gib: Predicted peak without a budget.
        recompute_ms: Predicted time of what the backward runs again, a step.
        step_ms: Predicted time of forward and backward without that.
        saved_gib: What the forward saves for its backward.
        recomputed: {op: how often it runs again}, the slowest first.
        offloaded: {op: how many of its results wait on the host}, the largest first.
        offloaded_gib: What they take there.
        copy_ms: Predicted time of their copies, each way.
        exposed_ms: Predicted time of the copies that no kernel hides.
        resident_gib: {what is there all the time: how much}.
        frontier: Where the limit asks for a survey: [peak in GiB, what it costs in ms] of each plan
            that some budget would choose, the fastest first.
    """

    budget_gib: float
    planned_gib: float
    without_gib: float
    recompute_ms: float
    step_ms: float
    saved_gib: float
    recomputed: dict[str, int]
    offloaded: dict[str, int]
    offloaded_gib: float
    copy_ms: float
    exposed_ms: float
    resident_gib: dict[str, float]
    frontier: list[list[float]]


class SurveyedError(MagiError):
    """A step was planned to see what it takes, and is not compiled.

    Attributes:
        plan: What was found.
        course: The predicted course of the step.
    """

    def __init__(self, plan: BudgetPlan, course: Timeline) -> None:
        super().__init__("the step was planned, not compiled")
        self.plan, self.course = plan, course


class FitBudget:
    """A partitioner: the cut whose step fits.

    Args:
        limit: The budget, and what of it is taken.
        note: Called with the plan; not on a compile-cache hit, when nothing is partitioned.
    """

    name = "fit_budget"
    stage = "joint"

    def __init__(self, limit: Limit, note: Callable[[BudgetPlan], None]) -> None:
        self.limit, self._note = limit, note

    def __call__(self, joint: GraphModule, inputs: Sequence[Any], **rest: Any) -> Partition:
        """Return forward and backward.

        Raises:
            PassError: No plan fits; names the smallest budget and what would lower it.
            SurveyedError: The limit asks for a survey.
        """
        trial = _copy(joint)
        default = compat.min_cut_partition(trial, inputs, **rest)
        on: _Planned = {"fused": self.limit.fused, "device_type": self.limit.device_type}
        graph = Joint(trial.graph, rest["num_fwd_outputs"], self.limit.speed, **on)
        names = {node.name for node in saved_for_backward(default[0])}
        row = Row(graph, (n for n in graph.nodes if n.name in names), self.limit.room_bytes)
        chosen = self._choose(row, self.limit.budget_bytes)
        if chosen is None:
            chosen = self._least(row)
            if self.limit.strict:
                raise PassError(self._impossible(row, chosen, self._peak(row, chosen)))

        def cut_for(plan: SavedSet) -> tuple[Partition, Moves]:
            if plan is row.default:
                return default, Moves()
            with compat.saving(plan.saved):
                first, second = compat.min_cut_partition(_copy(joint), inputs, **rest)
            speed, fused = self.limit.speed, self.limit.fused
            return (first, second), insert(first, second, plan.moved, speed, fused=fused)

        tried: list[tuple[int, SavedSet, Partition, Moves, Timeline]] = []
        for _ in range(CUTS_TRIED):  # the partitioner may order nodes otherwise than the row does
            cut, moves = cut_for(chosen)
            course = simulate(*cut, **on)
            tried.append((self._step_bytes(course, row, chosen), chosen, cut, moves, course))
            beyond = tried[-1][0] - self.limit.budget_bytes
            if beyond <= 0:
                break
            lower = self._choose(row, self._peak(row, chosen) - beyond) or self._least(row)
            if any(lower is plan for _, plan, *_ in tried):
                break
            chosen = lower
        size, chosen, cut, moves, course = min(tried, key=lambda each: each[0])
        if size > self.limit.budget_bytes and self.limit.strict:
            raise PassError(self._impossible(row, chosen, size))
        plan = self._plan(row, chosen, moves, course)
        if self.limit.survey:
            raise SurveyedError(plan, course)
        self._note(plan)
        return cut

    def _choose(self, row: Row, limit_bytes: int) -> SavedSet | None:
        def at_least(plan: SavedSet) -> int:
            saved = row.saved_bytes(plan)
            return self.limit.step_bytes(saved, saved)

        return row.choose(lambda plan: self._peak(row, plan), limit_bytes, at_least)

    def _least(self, row: Row) -> SavedSet:
        return min(row.plans, key=lambda plan: self._peak(row, plan))

    def _peak(self, row: Row, plan: SavedSet) -> int:
        return self._step_bytes(row.timeline(plan), row, plan)

    def _step_bytes(self, course: Timeline, row: Row, plan: SavedSet) -> int:
        return self.limit.step_bytes(course.peak, row.saved_bytes(plan))

    def _milliseconds(self, seconds: float) -> float:
        return round(seconds * 1e3 * self.limit.blocks, 6)

    def _impossible(self, row: Row, least: SavedSet, size: int) -> str:
        course = row.timeline(least)
        rows = [f"{t.node} {t.size_bytes / GIB:.3g}" for t in course.largest[:3]]
        return (
            f"Config.memory_budget_gib is {self.limit.budget_bytes / GIB:.6g}, but a step takes at "
            f"least {size / GIB:.6g} GiB when as much as possible is recomputed. "
            f"Besides activations: {shares(self.limit)}; largest at the peak: {', '.join(rows)}. "
            "Raise the budget, or lower it with a smaller batch or sequence, a smaller "
            f"FusionConfig.loss_chunk_mib, {self._offload_too()}or an optimizer with less state"
        )

    def _offload_too(self) -> str:
        possible = self.limit.speed.host and not self.limit.room_bytes
        return "Config(offload_activations=True), " if possible else ""

    def _plan(self, row: Row, chosen: SavedSet, moves: Moves, course: Timeline) -> BudgetPlan:
        graph, limit = row.joint, self.limit
        again: dict[str, float] = {}
        counts: dict[str, int] = {}
        for node in graph.recomputed({n for n in graph.nodes if n.name in chosen.saved}):
            name = str(node.target)
            again[name] = again.get(name, 0.0) + graph.seconds[node]
            counts[name] = counts.get(name, 0) + 1
        slowest = sorted((n for n in again if again[n] > 0), key=lambda n: (-again[n], n))
        survey = row.frontier(lambda plan: self._peak(row, plan)) if limit.survey else []
        return BudgetPlan(
            budget_gib=_gib(limit.budget_bytes),
            planned_gib=_gib(self._step_bytes(course, row, chosen)),
            without_gib=_gib(self._peak(row, row.default)),
            recompute_ms=self._milliseconds(chosen.seconds),
            step_ms=round(graph.forward_seconds * 1e3 * limit.blocks, 6),
            saved_gib=_gib(row.saved_bytes(chosen) * limit.blocks),
            recomputed={n: counts[n] for n in slowest[:SHOWN_OPS]},
            offloaded=self._offloaded(graph, moves),
            offloaded_gib=_gib(moves.bytes * limit.blocks),
            copy_ms=self._milliseconds(moves.bytes / limit.speed.host if moves.bytes else 0.0),
            exposed_ms=self._milliseconds(moves.exposed),
            resident_gib={name: _gib(size) for name, size in limit.resident.items()},
            frontier=[[_gib(self._peak(row, p)), self._milliseconds(p.price[0])] for p in survey],
        )

    @staticmethod
    def _offloaded(graph: Joint, moves: Moves) -> dict[str, int]:
        counts: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for node in graph.nodes:
            if node.name in moves.nodes:
                source = node.args[0] if node.target is operator.getitem else node
                name = str(source.target if isinstance(source, Node) else node.target)
                counts[name] = counts.get(name, 0) + 1
                sizes[name] = sizes.get(name, 0) + graph.storages.total([node])
        largest = sorted(counts, key=lambda name: (-sizes[name], name))
        return {name: counts[name] for name in largest[:SHOWN_OPS]}


def _copy(joint: GraphModule) -> GraphModule:
    return GraphModule(joint, copy.deepcopy(joint.graph))  # shares constants, copies nodes


def _gib(size: int) -> float:
    return round(size / GIB, 9)
