"""The picture of one step's memory: its planned course, and the largest tensors at the peak.

From the partitioned graphs, by the lifetimes of memory/peak.py, whether or not there is a budget.
Activations and gradients of the captured graph; what is resident besides (parameters, optimizer
state) is given with a budget, and counted from the first steps otherwise (core/record.py). The
times of forward and backward are those of the roofline (memory/cost.py).
"""

from dataclasses import dataclass

from torch.fx import GraphModule

from magi_train.core.hardware import Speed
from magi_train.core.passes import Plan
from magi_train.memory.cost import seconds
from magi_train.memory.peak import body, simulate

SAMPLES = 64
"""Points of the course that are kept, each the highest of its stretch."""
MIB = 2**20


@dataclass(frozen=True)
class StepPicture(Plan):
    """Memory and predicted time of one captured graph and its backward.

    Attributes:
        peak_mib: The highest point of the course, resident memory left out.
        at: The node that runs then.
        course_mib: While forward and backward run, resident memory left out.
        forward_part: Part of the course's points that is the forward.
        resident_mib: {what is there all the time: MiB}; empty where no budget asked for it.
        largest: The largest tensors at the peak: mib, node, and the user's line.
        forward_ms: Predicted.
        backward_ms: Predicted.
        blocks: How often the graph runs in one forward of the model.
    """

    peak_mib: float
    at: str
    course_mib: list[float]
    forward_part: float
    resident_mib: dict[str, float]
    largest: list[dict[str, object]]
    forward_ms: float
    backward_ms: float
    blocks: int


def picture(
    forward: GraphModule,
    backward: GraphModule,
    *,
    fused: bool,
    speed: Speed,
    resident: dict[str, int],
    blocks: int,
) -> StepPicture:
    """Return the picture of a partitioned step.

    Args:
        forward: From a partitioner.
        backward: From the same.
        fused: Whether generated code runs them.
        speed: Of the device.
        resident: {what is there all the time: bytes}.
        blocks: How often the graph runs in one forward.
    """
    course = simulate(forward, backward, fused=fused)
    step = -(-len(course.live) // SAMPLES) or 1
    first, second = body(forward.graph), body(backward.graph)
    ahead = sum(seconds(node, speed, fused=fused) for node in first)
    back = sum(seconds(node, speed, fused=fused) for node in second)
    return StepPicture(
        peak_mib=_mib(course.peak),
        at=course.at,
        course_mib=[_mib(max(course.live[i : i + step])) for i in range(0, len(course.live), step)],
        forward_part=round(len(first) / max(1, len(first) + len(second)), 4),
        resident_mib={name: _mib(size) for name, size in resident.items()},
        largest=[
            {"mib": _mib(t.size_bytes), "node": t.node, "line": t.line} for t in course.largest
        ],
        forward_ms=round(ahead * 1e3, 6),
        backward_ms=round(back * 1e3, 6),
        blocks=blocks,
    )


def _mib(size: int) -> float:
    return round(size / MIB, 6)
