"""What benchmarks of single kernels share: device times, and bandwidth beside a plain copy's."""

import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch

WARM_UP, TIMED = 10, 20
"""The first steps of an optimizer check every shadow; they lie in the warm-up."""


def median_ms(function: Callable[[], Any]) -> float:
    """Return the median device time of a call, back to back."""
    for _ in range(WARM_UP):
        function()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def copy_bandwidth(num_bytes: int = 4 * 2**30) -> float:
    """Return GB/s, reads and writes together, of a copy far larger than the L2 cache."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / median_ms(lambda: target.copy_(source)) / 1e6


def rates(
    ways: dict[str, tuple[Callable[[], Any], float]], shape: tuple[int, ...], copy: float
) -> Iterable[dict[str, Any]]:
    """Time functions; yield and print a row for each, or why there is none.

    Args:
        ways: By name: a function, and the bytes that it must move.
        shape: Of what it works on.
        copy: GB/s of a copy.
    """
    for name, (function, num_bytes) in ways.items():
        row: dict[str, Any] = {"what": name, "shape": shape}
        try:
            ms = median_ms(function)
            speed = num_bytes / ms / 1e6
            row |= {"ms": ms, "gb_per_second": speed, "share_of_copy": speed / copy}
        except Exception as error:
            row["failed"] = repr(error)[-400:]
        print(json.dumps(row), flush=True)
        yield row


def show(rows: Iterable[dict[str, Any]], copy: float) -> None:
    """Print rows of `rates` as a table."""
    print(f"\ncopy, device to device {copy:.0f} GB/s")
    for row in rows:
        figures = row.get("failed") or (
            f"{row['ms']:7.3f} ms {row['gb_per_second']:7.0f} GB/s {row['share_of_copy']:7.1%}"
        )
        print(f"{row['what']:24} {row['shape']!s:16} {figures}")
