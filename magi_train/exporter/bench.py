"""Latency and throughput of an artifact, beside the module it came from.

Each runner gets the same inputs, is warmed up, and is then called back to back; a call ends when
the device is done. p50 is what most callers see, p99 what the slowest see, throughput counts rows
of the batch. Runners take turns in rounds, so that a machine that slows down slows all of them.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from magi_train.exporter.capture import evaluating
from magi_train.exporter.loaded import Loaded

ROUNDS = 5


@dataclass(frozen=True)
class Latency:
    """Of one runner: milliseconds a call at the 50th and the 99th percentile, rows a second."""

    name: str
    p50_ms: float
    p99_ms: float
    rows_per_second: float


def bench(
    loaded: Loaded,
    module: nn.Module | None = None,
    *,
    calls: int = 100,
    compile_peer: bool = True,
    sizes: Mapping[str, int] | None = None,
) -> list[Latency]:
    """Measure an artifact, and `module` eager and under torch.compile beside it.

    Args:
        loaded: From `load`.
        module: What it was exported from; None to measure the artifact alone.
        calls: Of each runner.
        compile_peer: Measure torch.compile too.
        sizes: Dynamic sizes by name; the lowest by default.

    Raises:
        ExportError: A size is unknown or out of its range.
    """
    tensors = loaded.contract.example(**dict(sizes or {}))
    inputs: dict[str, Any] = dict(
        zip((each.name for each in loaded.contract.inputs), tensors, strict=True)
    )
    everything = {**loaded.contract.constants, **inputs}
    given = {name: everything[name] for name in loaded.contract.order}
    runners: dict[str, Callable[[], Any]] = {"artifact": lambda: loaded(**given)}
    if module is not None:
        runners["eager"] = lambda: module(**given)
        if compile_peer:
            compiled = torch.compile(module)
            runners["torch.compile"] = lambda: compiled(**given)
        with evaluating(module):
            return measure(runners, calls, int(tensors[0].shape[0]) if tensors[0].dim() else 1)
    return measure(runners, calls, int(tensors[0].shape[0]) if tensors[0].dim() else 1)


def measure(runners: Mapping[str, Callable[[], Any]], calls: int, rows: int) -> list[Latency]:
    """Measure functions by name.

    Args:
        runners: Run one batch each, and may return before the device is done.
        calls: Of each, at least ROUNDS.
        rows: Of a batch.
    """
    times: dict[str, list[float]] = {name: [] for name in runners}
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    for run in runners.values():
        for _ in range(3):
            run()
    wait()
    for _ in range(ROUNDS):
        for name, run in runners.items():
            for _ in range(max(calls // ROUNDS, 1)):
                start = time.perf_counter()
                run()
                wait()
                times[name].append(1e3 * (time.perf_counter() - start))
    return [
        Latency(name, statistics.median(t), _percentile(t, 0.99), rows * len(t) / sum(t) * 1e3)
        for name, t in times.items()
    ]


def _percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]


def as_table(found: list[Latency]) -> str:
    """Return the measurements as text."""
    lines = [f"{'':14} {'p50 ms':>10} {'p99 ms':>10} {'rows/s':>12}"]
    lines += [
        f"{x.name:14} {x.p50_ms:10.3f} {x.p99_ms:10.3f} {x.rows_per_second:12.1f}" for x in found
    ]
    return "\n".join(lines)
