"""What to try next, from what the report refused, left alone or measured. Each sentence is one act.

A sentence stands only where the report holds its reason; nothing is recommended in general.
"""

from typing import Any

from magi_train.core.report import PassRow, Report
from magi_train.integrations.trace import StepTrace, total

EXPOSED_SHARE, STATE_SHARE, LONG_STEP = 0.05, 0.2, 3.0
"""Of a step, of the memory, and times a typical step: what is worth a sentence."""
SLOW_START_SECONDS = 30.0
ON_NOTES = (
    (
        "known about its values",
        "move batches with `magi_train.to_device(batch, device)`",
    ),
    (
        "ran uncompiled",
        "change the line named here, or try `Config(dynamic=True)` if shapes vary",
    ),
    ("was planned anew", "raise `Config(memory_budget_gib=...)` a little to spare the second plan"),
    ("no optimizer was given", "give the optimizer to `prepare` so that the plan counts its state"),
)
"""What a note says, and what to do."""


def next_steps(report: Report, trace: StepTrace | None) -> list[str]:
    """Return what to try, the most promising first."""
    found = [*_tier(report), *_communication(report, trace), *_memory(report)]
    found += [
        f"{act[0].upper()}{act[1:]}: {note}."
        for note in report.notes
        for sign, act in ON_NOTES
        if sign in note
    ]
    found += [sentence for row in report.rows for sentence in _refusals(row)]
    return list(dict.fromkeys([*found, *_time(report)]))


def _tier(report: Report) -> list[str]:
    wanted = report.settings.get("tier", "auto")
    if report.tier in ("", "graph"):
        return []
    if wanted == report.tier:
        return [f"Leave `Config(tier={wanted!r})` out: a higher tier compiles more."]
    return [f"Change what keeps the step out of one graph: {report.reason}."]


def _communication(report: Report, trace: StepTrace | None) -> list[str]:
    if trace is None or not trace.step_ms:
        return []
    share = total(trace.exposed) / trace.step_ms
    if share < EXPOSED_SHARE:
        return []
    act = "try `CommConfig(bucket_mib=...)` of half and of twice the size"
    if (report.settings.get("comm") or {}).get("compression") is None:
        act = "try `CommConfig(compression='safe')`, which sends fewer bytes and rounds nothing"
    return [f"{share:.0%} of the profiled step waits for communication: {act}."]


def _memory(report: Report) -> list[str]:
    state = report.steps.resident_mib.get("optimizer state", 0.0)
    whole, ranks = sum(report.steps.resident_mib.values()), report.world_size
    sharded = report.settings.get("shard_optimizer")
    if ranks < 2 or sharded or state < STATE_SHARE * whole:
        return []
    saved = state * (1 - 1 / ranks)
    return [f"`Config(shard_optimizer=True)` takes {size(saved)} of optimizer state off each rank."]


def _refusals(row: PassRow) -> list[str]:
    """Return what to change for a pass that left something alone, where the user can."""
    left = row.plan.get("left_alone")
    if not isinstance(left, list):
        return []
    reasons = dict.fromkeys(str(each[-1]) if isinstance(each, list) else str(each) for each in left)
    acts = []
    for reason in reasons:
        if "fits one chunk" in reason or "lies on cpu" in reason:
            continue  # as it should be
        acts.append(f"{row.name} left something alone; change this if you can: {reason}.")
    return acts


def _time(report: Report) -> list[str]:
    steps, acts = report.steps, []
    typical, longest = steps.typical_seconds(), max(steps.longest, default=0.0)
    if typical and longest > LONG_STEP * typical:
        acts.append(
            f"The longest step took {longest:.3g} s, {longest / typical:.3g} times a typical one: "
            "look for data loading, evaluation, checkpoints, or a shape that compiles again there."
        )
    compiled = any(not row.cached and row.stage == "joint" for row in report.rows)
    if steps.first_seconds > SLOW_START_SECONDS and compiled:
        acts.append(
            f"The first step took {steps.first_seconds:.3g} s: keep PyTorch's compile cache "
            "between jobs (TORCHINDUCTOR_CACHE_DIR on a disk that stays)."
        )
    on_gpu = "gpus" in report.versions
    if on_gpu and report.tier == "graph" and not report.settings.get("tune"):
        acts.append("`Config(tune=True)` measures each fusion pass on your own steps.")
    return acts


def memory_advice(plan: dict[str, Any], planned_mib: float) -> str:
    """Return one sentence on what to change about the peak.

    Args:
        plan: Of the row `step_memory`.
        planned_mib: The planned peak with what is resident.
    """
    by_line: dict[str, float] = {}
    for each in plan["largest"]:
        by_line[each["line"]] = by_line.get(each["line"], 0.0) + each["mib"]
    if not by_line:
        return "The captured graph holds nothing of its own at its peak."
    line = max(by_line, key=lambda key: by_line[key])
    share = by_line[line] / plan["peak_mib"] if plan["peak_mib"] else 0.0
    where = short_line(line) if line else "what the compiler made without a line of yours"
    start = f"{where} holds {size(by_line[line])}, {share:.0%} of the graph's own peak"
    if plan["peak_mib"] < 0.3 * planned_mib:
        more = "fewer or smaller weights and optimizer states help more"
        return f"{start}, but most of the memory is resident: {more}."
    goal = (planned_mib - 0.25 * plan["peak_mib"]) / 1024
    budget = f"`Config(memory_budget_gib={goal:.3g})`"
    return f"{start}; a smaller batch shrinks it, {budget} recomputes a quarter of that peak."


def size(mib: float) -> str:
    """Return a size in the unit that suits it."""
    return f"{mib / 1024:.4g} GiB" if mib >= 1024 else f"{mib:.4g} MiB"


def short_line(line: str) -> str:
    """Return `file.py:7: code` of the line of a stack trace; the line itself if it is none."""
    parts = line.split('"', 2)
    if len(parts) < 3 or not parts[2].startswith(", line "):
        return line
    number, _, rest = parts[2].removeprefix(", line ").partition(",")
    code = rest.removeprefix(" in ").partition(" ")[2]
    return f"{parts[1].replace(chr(92), '/').rpartition('/')[2]}:{number}: {code}".rstrip(": ")
