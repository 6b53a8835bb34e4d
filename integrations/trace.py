"""A profiler's trace: how much of a step computes, communicates, and waits for communication.

Reads what `torch.profiler`'s `export_chrome_trace` or `tensorboard_trace_handler` wrote. Kernels
of NCCL, barriers between GPUs and copies from one to another are communication, all other kernels
compute; a moment with both is overlap, one with communication alone is exposed. The step that
counts is the last whole `ProfilerStep` of the trace; without such marks, the whole trace.
"""

import gzip
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Span = tuple[float, float]
MOST_BYTES = 400 * 2**20
"""Larger traces are left alone."""


@dataclass(frozen=True)
class StepTrace:
    """One step on the device, in milliseconds from its begin.

    Attributes:
        file: Where it was read.
        compute: Spans with a kernel that computes.
        communication: Spans with one that communicates.
        exposed: Spans with communication alone.
        step_ms: From the step's begin to its end.
    """

    file: str
    compute: list[Span]
    communication: list[Span]
    exposed: list[Span]
    step_ms: float


def find_trace(folder: Path) -> StepTrace | None:
    """Return the newest trace of a folder; None where there is none with kernels in it."""
    found = [p for p in folder.iterdir() if p.name.endswith((".json", ".json.gz"))]
    for path in sorted(found, key=lambda p: -p.stat().st_mtime):
        if path.stat().st_size > MOST_BYTES or "trace" not in path.name:
            continue
        try:
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            step = read_step(json.loads(data)["traceEvents"], path.name)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read as a profiler's trace: %s", path, error)
            continue
        if step is not None:
            return step
    return None


def read_step(events: Iterable[dict[str, Any]], file: str) -> StepTrace | None:
    """Return the last whole step of a trace's events; None without kernels."""
    timed = [e for e in events if e.get("ph") == "X" and "dur" in e]
    marks = sorted(
        (float(e["ts"]), float(e["ts"]) + float(e["dur"]))
        for e in timed
        if str(e.get("name", "")).startswith("ProfilerStep#") and e.get("cat") == "user_annotation"
    )
    kernels = [
        e
        for e in timed
        if e.get("cat") == "kernel"
        or (e.get("cat") == "gpu_memcpy" and is_communication(str(e.get("name"))))
    ]
    if not kernels:
        return None
    begin = marks[-1][0] if marks else min(float(e["ts"]) for e in kernels)
    end = marks[-1][1] if marks else max(float(e["ts"]) + float(e["dur"]) for e in kernels)
    spans: dict[bool, list[Span]] = {True: [], False: []}
    for each in kernels:
        start = float(each["ts"])
        stop = start + float(each["dur"])
        if stop > begin and start < end:
            span = ((max(start, begin) - begin) / 1e3, (min(stop, end) - begin) / 1e3)
            spans[is_communication(str(each["name"]))].append(span)
    compute, communication = union(spans[False]), union(spans[True])
    exposed = difference(communication, compute)
    return StepTrace(file, compute, communication, exposed, (end - begin) / 1e3)


def is_communication(name: str) -> bool:
    """Return whether a kernel or copy of this name is there for other ranks."""
    name = name.lower()
    return "nccl" in name or "symmetric_memory" in name or "memcpy ptop" in name


def union(spans: Iterable[Span]) -> list[Span]:
    """Return the same time as spans in order that do not touch."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def difference(spans: Iterable[Span], without: list[Span]) -> list[Span]:
    """Return what of `spans` lies outside of `without`, both in order and apart."""
    left: list[Span] = []
    i = 0
    for start, stop in spans:
        while i < len(without) and without[i][1] <= start:
            i += 1
        j = i
        while start < stop and j < len(without) and without[j][0] < stop:
            if without[j][0] > start:
                left.append((start, without[j][0]))
            start = max(start, without[j][1])
            j += 1
        if start < stop:
            left.append((start, stop))
    return left


def total(spans: Iterable[Span]) -> float:
    """Return the sum of their lengths."""
    return sum(stop - start for start, stop in spans)
