"""What a report says to somebody who trains: one account, shown as a page, a text, or JSON.

`tell` reads the report and, where there is one beside it, a profiler's trace. Everything here is
derived from these two; what they do not know is left out and said to be unknown. Predicted numbers
come from a roofline (memory/cost.py) and are called so.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from magi_train.core import settings
from magi_train.core.config import SWITCHES
from magi_train.core.record import Steps
from magi_train.core.report import PassRow, Report
from magi_train.integrations.advice import memory_advice, next_steps, size
from magi_train.integrations.trace import Span, StepTrace, total

MEANING = {
    "graph": "the whole function is one graph, its communication inside",
    "region": "repeated blocks are compiled, gradient hooks communicate",
    "eager": "nothing is compiled, gradient hooks communicate",
    "": "no step has been taken",
}
OBSERVED = ("step_memory", "saved_activations", "unused_outputs")
"""Rows that tell of a graph, and change nothing."""


@dataclass
class PassTold:
    """One pass, in words.

    Attributes:
        name: The pass.
        stage: Where it works.
        did: What it did.
        left: What it left alone, and why.
        gain: What it was measured to gain; "" where it was not measured.
    """

    name: str
    stage: str
    did: str
    left: list[str]
    gain: str


@dataclass
class Memory:
    """The step's memory.

    Attributes:
        course_mib: Planned, resident memory left out.
        resident_mib: {what is there all the time: MiB}.
        planned_mib: The planned peak with what is resident.
        measured_mib: The measured peak on the device; None without a device.
        forward_part: Part of the course that is the forward.
        largest: The largest tensors at the peak.
        advice: One sentence on what to change.
        blocks: A sentence for each graph some of whose blocks save less than the others.
    """

    course_mib: list[float]
    resident_mib: dict[str, float]
    planned_mib: float
    measured_mib: float | None
    forward_part: float
    largest: list[dict[str, Any]]
    advice: str
    blocks: list[str] = field(default_factory=list)


@dataclass
class Story:
    """The account of a run; see `tell`."""

    summary: list[str]
    tier: str
    passes: list[PassTold]
    timeline: list[tuple[str, str, list[Span]]]
    timeline_from: str
    exposed_ms: float | None
    memory: Memory | None
    steps: Steps
    joules_per_1000: float | None
    settings: list[tuple[str, str, str]]
    notes: list[str]
    advice: list[str] = field(default_factory=list)


def tell(report: Report, trace: StepTrace | None = None) -> Story:
    """Return the account of a report.

    Args:
        report: Of a run.
        trace: One of its steps, profiled; None without.
    """
    steps, memory = report.steps, _memory(report)
    timeline, source = _timeline(report, trace)
    exposed = total(trace.exposed) if trace is not None else None
    joules = None
    if steps.joules and steps.joules_samples:
        joules = steps.joules / steps.joules_samples * 1000
    tier = f"{report.tier.upper() or 'undecided'}: {MEANING.get(report.tier, '')}"
    if report.reason:
        tier += f". Not a higher tier, because {report.reason}"
    return Story(
        summary=[_pace(report), _done(report), _cost(report, memory, joules)],
        tier=tier,
        passes=[_pass(row, report) for row in report.rows],
        timeline=timeline,
        timeline_from=source,
        exposed_ms=exposed,
        memory=memory,
        steps=steps,
        joules_per_1000=joules,
        settings=_settings(report),
        notes=list(report.notes),
        advice=next_steps(report, trace),
    )


def _pace(report: Report) -> str:
    steps, ranks = report.steps, f"{report.world_size} rank{'s' * (report.world_size > 1)}"
    typical = steps.typical_seconds()
    if not steps.count:
        return f"No step of the run on {ranks} is on record."
    if typical is None:
        return f"One step was taken on {ranks}; it compiled for {steps.first_seconds:.3g} s."
    rate = ""
    if steps.samples and typical:
        rate = f", {rates(steps)[0]:.4g} samples a second a rank"
    return (
        f"{steps.count} steps on {ranks} took {duration(typical)} each{rate}, after a first step "
        f"of {steps.first_seconds:.3g} s that compiled."
    )


def rates(steps: Steps) -> tuple[float, float]:
    """Return samples and tokens a second of a typical step; 0 where unknown."""
    typical = steps.typical_seconds()
    if not typical or not steps.timed:
        return 0.0, 0.0
    return steps.samples / steps.timed / typical, steps.tokens / steps.timed / typical


def duration(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    return f"{seconds * 1e3:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"


def _done(report: Report) -> str:
    rows = [row for row in report.rows if row.name not in OBSERVED]
    did = list(dict.fromkeys(row.name for row in rows if did_something(row)))
    names = f": {', '.join(did[:5])}{' and others' if len(did) > 5 else ''}" if did else ""
    tier = report.tier.upper() or "undecided"
    every = len({row.name for row in rows})
    return f"Tier {tier}; {len(did)} of {every} passes and plans found something to do{names}."


def _cost(report: Report, memory: Memory | None, joules: float | None) -> str:
    steps, parts = report.steps, []
    if steps.memory_gib:
        peak = f"the peak of memory {steps.memory_of} was {steps.memory_gib[-1][1]:.3g} GiB"
        parts.append(peak)
    if memory is not None:
        parts.append(f"the plan of the step's memory peaks at {size(memory.planned_mib)}")
    if len(steps.loss) > 1:
        parts.append(f"the loss went from {steps.loss[0][1]:.4g} to {steps.loss[-1][1]:.4g}")
    if joules is not None:
        parts.append(f"1,000 samples took {joules / 1e3:.4g} kJ on this rank's GPU")
    text = "; ".join(parts) or "memory, loss and energy are not on record"
    return f"{text[0].upper()}{text[1:]}."


def did_something(row: PassRow) -> bool:
    """Return whether a pass changed or decided anything."""
    quiet = ("left_alone", "optimizer")
    return any(v not in (0, [], {}, None, "") for k, v in row.plan.items() if k not in quiet)


def _pass(row: PassRow, report: Report) -> PassTold:
    facts = {k: v for k, v in row.plan.items() if k != "left_alone"}
    did = PassRow(row.name, row.stage, facts, 0.0).summary()
    if row.graphs > 1:
        did += f" (in {row.graphs} graphs)"
    if row.cached:
        did += " (from the compile cache)"
    return PassTold(
        row.name, row.stage, did, _left(row.plan.get("left_alone", [])), _gain(row, report)
    )


def _left(left_alone: Any) -> list[str]:
    """Return what a pass left alone in words, equal reasons counted."""
    if not isinstance(left_alone, list):
        return []
    reasons = Counter(str(each[-1]) if isinstance(each, list) else str(each) for each in left_alone)
    return [f"{count} x {text}" if count > 1 else text for text, count in reasons.items()]


def _gain(row: PassRow, report: Report) -> str:
    """Return what was measured: by `tune`, or by the pass itself."""
    plan = row.plan
    if "plain_ms" in plan and "replay_ms" in plan:
        plain, replay = float(plan["plain_ms"]), float(plan["replay_ms"])
        return f"{plain:.4g} ms a call without, {replay:.4g} ms with"
    tuned = next((each.plan for each in report.rows if each.name == "tune"), {})
    times = tuned.get("milliseconds", {})
    without, whole = times.get(f"without {SWITCHES.get(row.name)}"), times.get("all")
    if without is None or whole is None:
        return ""
    verdict = "dropped" if SWITCHES[row.name] in tuned.get("dropped", []) else "kept"
    return f"{without - whole:+.3g} ms a step without it; {verdict}"


def pictures(report: Report) -> list[dict[str, Any]]:
    """Return the plans of the step's memory, the highest peak first."""
    found = [row.plan for row in report.rows if row.name == "step_memory"]
    return sorted(found, key=lambda plan: -float(plan["peak_mib"]))


def _memory(report: Report) -> Memory | None:
    found = pictures(report)
    if not found:
        return None
    plan = found[0]
    resident = plan["resident_mib"] or report.steps.resident_mib
    planned = sum(resident.values()) + plan["peak_mib"]
    budget = next((row.plan for row in report.rows if row.name == "fit_budget"), None)
    if budget is not None:  # knows of the other blocks and of the optimizer's step
        planned = max(planned, budget["planned_gib"] * 1024)
    measured = None
    if report.steps.memory_gib and "device" in report.steps.memory_of:
        measured = report.steps.memory_gib[-1][1] * 1024
    return Memory(
        course_mib=plan["course_mib"],
        resident_mib=resident,
        planned_mib=planned,
        measured_mib=measured,
        forward_part=plan["forward_part"],
        largest=plan["largest"],
        advice=memory_advice(plan, planned),
        blocks=[_blocks(r.plan) for r in report.rows if r.plan.get("lean_blocks")],
    )


def _blocks(plan: dict[str, Any]) -> str:
    """Return what the two variants of a block do."""
    lean, fast = (
        f"{size(1024 * each['saved_gib'])} and {each['recompute_ms']:.3g} ms"
        for each in plan["variants"]
    )
    return (
        f"Each of the first {plan['lean_blocks']} of {plan['blocks']} blocks saves less and "
        f"recomputes more ({lean}) than each of the others ({fast})."
    )


def _timeline(
    report: Report, trace: StepTrace | None
) -> tuple[list[tuple[str, str, list[Span]]], str]:
    if trace is not None:
        lanes = [
            ("compute", "compute", trace.compute),
            ("communication", "communication", trace.communication),
            ("exposed", "communication alone (exposed)", trace.exposed),
        ]
        return lanes, f"measured by the profiler ({trace.file})"
    found = pictures(report)
    if not found:
        return [], ""
    if report.tier != "region":
        found = found[:1]  # other forms of the same step
    ahead = sum(p["forward_ms"] * p["blocks"] for p in found)
    back = sum(p["backward_ms"] * p["blocks"] for p in found)
    lanes = [
        ("compute", "forward", [(0.0, ahead)]),
        ("compute", "backward", [(ahead, ahead + back)]),
    ]
    plan = next((r.plan for r in report.rows if r.name == "communication_plan"), {})
    count = int(plan.get("buckets", 0))
    if report.world_size > 1 and count:
        each = back / count
        spans = [(ahead + (i + 0.9) * each, ahead + (i + 1) * each) for i in range(count)]
        mib = plan["wire_bytes"] / 2**20
        lanes.append(
            ("communication", f"{count} buckets, {mib:.4g} MiB: order, not duration", spans)
        )
    source = "predicted by a roofline; a profiler's trace in the run folder gives the measured one"
    return lanes, source


def _settings(report: Report) -> list[tuple[str, str, str]]:
    flat: list[tuple[str, str, str]] = []

    def walk(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            key = prefix + name
            if isinstance(value, dict):
                walk(value, f"{key}.")
            else:
                flat.append((key, settings.as_text(value), report.sources.get(key, "default")))

    walk(report.settings, "")
    return sorted(flat, key=lambda each: each[2] == "default")
