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

over the plans of memory/remat.py. Where one captured graph serves many blocks (the REGION tier),
some of them follow a leaner plan than the others                      -> memory/blocks.py

What is not predicted: fragmentation and the CUDA context (the budget bounds what is allocated, as
`torch.cuda.max_memory_allocated` counts it), workspaces of kernels other than cuBLAS and attention,
and in the REGION tier everything outside of the blocks. The peak of the first real step is compared
with the plan, and corrects it once.
"""

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from torch.fx import GraphModule, Node

from magi_train.core import compat
from magi_train.core.errors import MagiError, PassError
from magi_train.core.graph import saved_for_backward
from magi_train.core.passes import Plan
from magi_train.memory.blocks import Choice, Choices
from magi_train.memory.offload import Moves, insert
from magi_train.memory.peak import Timeline, simulate
from magi_train.memory.remat import Joint, Row, SavedSet
from magi_train.memory.step import GIB, Limit, shares

SHOWN_OPS = 6
CUTS_TRIED = 5
"""How often a plan whose cut comes out larger than predicted makes room for a smaller one."""
Partition = tuple[GraphModule, GraphModule]


class _Cut(NamedTuple):
    """What one plan makes of the joint graph."""

    partition: Partition
    moves: Moves
    course: Timeline


class _Planned(TypedDict):
    fused: bool
    device_type: str


@dataclass(frozen=True)
class Variant:
    """What some of the blocks do.

    Attributes:
        blocks: How many.
        recompute_ms: Predicted time of what the backward of one of them runs again.
        saved_gib: What the forward of one of them saves for its backward.
    """

    blocks: int
    recompute_ms: float
    saved_gib: float


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
        blocks: How many blocks the graph serves, counted as if it served all kinds of them.
        lean_blocks: How many of them, the first ones, save less than the others; 0: all are alike.
        variants: Of the blocks, in the order of the forward: one, or the lean ones and the others.
        recomputed: {op: how often it runs again}, the slowest first, in one block of each variant.
        offloaded: {op: how many of its results wait on the host}, the largest first; likewise.
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
    blocks: int
    lean_blocks: int
    variants: list[Variant]
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
        variant: Which of the plan's variants to cut; the last, where there are not so many.
    """

    name = "fit_budget"
    stage = "joint"

    def __init__(self, limit: Limit, note: Callable[[BudgetPlan], None], variant: int = 0) -> None:
        self.limit, self._note, self._variant = limit, note, variant

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
        choices = Choices(row, self.limit)
        chosen = choices.choose(self.limit.budget_bytes)
        if chosen is None:
            chosen = choices.least
            if self.limit.strict:
                raise PassError(self._impossible(row, chosen, chosen.peak))

        def cut_for(plan: SavedSet) -> _Cut:
            cut, moves = default, Moves()
            if plan is not row.default:
                with compat.saving(plan.saved):
                    cut = compat.min_cut_partition(_copy(joint), inputs, **rest)
                speed, fused = self.limit.speed, self.limit.fused
                moves = insert(cut[0], cut[1], plan.moved, speed, fused=fused)
            return _Cut(cut, moves, simulate(*cut, **on))

        cuts: dict[SavedSet, _Cut] = {}
        tried: list[tuple[int, Choice]] = []
        for _ in range(CUTS_TRIED):  # the partitioner may order nodes otherwise than the row does
            cuts |= {plan: cut_for(plan) for _, plan in chosen.runs if plan not in cuts}
            sizes = [(n, cuts[p].course.peak, row.waiting_bytes(p)) for n, p in chosen.runs]
            tried.append((self.limit.step_bytes(*sizes), chosen))
            beyond = tried[-1][0] - self.limit.budget_bytes
            if beyond <= 0:
                break
            lower = choices.choose(chosen.peak - beyond) or choices.least
            if any(lower == choice for _, choice in tried):
                break
            chosen = lower
        size, chosen = min(tried, key=lambda each: each[0])
        if size > self.limit.budget_bytes and self.limit.strict:
            raise PassError(self._impossible(row, chosen, size))
        followed = [(count, plan, cuts[plan]) for count, plan in chosen.runs]
        plan = self._plan(row, choices, size, followed)
        _, _, cut = followed[min(self._variant, len(followed) - 1)]
        if self.limit.survey:
            raise SurveyedError(plan, cut.course)
        self._note(plan)
        return cut.partition

    def _impossible(self, row: Row, least: Choice, size: int) -> str:
        course = row.timeline(least.runs[0][1])
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

    def _plan(
        self, row: Row, choices: Choices, size: int, followed: Sequence[tuple[int, SavedSet, _Cut]]
    ) -> BudgetPlan:
        graph, limit = row.joint, self.limit
        moved = sum(count * cut.moves.bytes for count, _, cut in followed)
        return BudgetPlan(
            budget_gib=_gib(limit.budget_bytes),
            planned_gib=_gib(size),
            without_gib=_gib(choices.alike(row.default).peak),
            recompute_ms=_milliseconds(sum(count * plan.seconds for count, plan, _ in followed)),
            step_ms=_milliseconds(graph.forward_seconds * limit.blocks),
            saved_gib=_gib(sum(count * row.saved_bytes(plan) for count, plan, _ in followed)),
            blocks=limit.blocks,
            lean_blocks=followed[0][0] if len(followed) > 1 else 0,
            variants=[
                Variant(count, _milliseconds(plan.seconds), _gib(row.saved_bytes(plan)))
                for count, plan, _ in followed
            ],
            recomputed=_recomputed(graph, [plan for _, plan, _ in followed]),
            offloaded=_offloaded(graph, [cut.moves for *_, cut in followed]),
            offloaded_gib=_gib(moved),
            copy_ms=_milliseconds(moved / limit.speed.host if moved else 0.0),
            exposed_ms=_milliseconds(sum(count * cut.moves.exposed for count, _, cut in followed)),
            resident_gib={name: _gib(size) for name, size in limit.resident.items()},
            frontier=[
                [_gib(each.peak), _milliseconds(each.price[0])]
                for each in (choices.frontier if limit.survey else ())
            ],
        )


def _recomputed(graph: Joint, plans: Sequence[SavedSet]) -> dict[str, int]:
    again: dict[str, float] = {}
    counts: dict[str, int] = {}
    for plan in plans:
        for node in graph.recomputed({n for n in graph.nodes if n.name in plan.saved}):
            name = str(node.target)
            again[name] = again.get(name, 0.0) + graph.seconds[node]
            counts[name] = counts.get(name, 0) + 1
    slowest = sorted((n for n in again if again[n] > 0), key=lambda n: (-again[n], n))
    return {n: counts[n] for n in slowest[:SHOWN_OPS]}


def _offloaded(graph: Joint, moves: Sequence[Moves]) -> dict[str, int]:
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for node in (n for each in moves for n in graph.nodes if n.name in each.nodes):
        source = node.args[0] if node.target is operator.getitem else node
        name = str(source.target if isinstance(source, Node) else node.target)
        counts[name] = counts.get(name, 0) + 1
        sizes[name] = sizes.get(name, 0) + graph.storages.total([node])
    largest = sorted(counts, key=lambda name: (-sizes[name], name))
    return {name: counts[name] for name in largest[:SHOWN_OPS]}


def _copy(joint: GraphModule) -> GraphModule:
    return GraphModule(joint, copy.deepcopy(joint.graph))  # shares constants, copies nodes


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 6)


def _gib(size: int) -> float:
    return round(size / GIB, 9)
