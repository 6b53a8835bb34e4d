"""The link: what a message between the ranks costs, measured in under two seconds.

An all-reduce of S bytes takes about `latency + S * seconds_per_byte` (the alpha-beta model). Sizes
from 4 KiB up are timed until the next one would not fit into the budget. A size counts with the
median of its repeats, and that of the slowest rank; the slope is the median of the slopes between
all pairs of large sizes (Theil and Sen), which one disturbed size cannot bend; the latency is what
the middle one of the small sizes takes beyond that. All ranks time the same messages and hear each
other's times, so all compute the same numbers from the same points.

Of messages that are in flight together one waits while another is on the wire, so each costs less
than a latency: the gap of the LogGP model (Alexandrov et al., 1995). It is what a few messages that
were started at once take beyond their bytes, for each of them; a backend that sends one after the
other has a gap like its latency.

    4 KiB ... 64 MiB, and BURST_MESSAGES at once -> points (bytes, seconds), gap -> Link -> schedule

The points are kept in a file beside PyTorch's compile cache, under a key of hosts, ranks, backend,
device and the variables that choose the network. A file is believed only if every rank has the same
one and a single message still takes about as long as it says: links change under one name.
Differs from the textbook: no message may keep the budget, so a slow link is known by small ones.
"""

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from magi_train.core import compat
from magi_train.core.config import CommConfig, link_from_text
from magi_train.core.report import PassRow, Report, write_atomically
from magi_train.core.world import World

VERSION = 2
"""Of the file; another one is measured again."""
BUDGET_SECONDS = 1.5
SIZES = tuple(4**k * 2**10 for k in range(1, 9))
"""Bytes: 4 KiB to 64 MiB."""
REPEATS = 3
SLOPE_FROM_BYTES = 2**18
"""Smaller messages are latency and, behind a shaper, its burst."""
BURST_MESSAGES, BURST_BYTES = 8, 2**18
"""Started at once, for the gap: more than any backend has in flight, and larger than a shaper's
burst."""
LAUNCH_SECONDS, CPU_LAUNCH_SECONDS = 1e-4, 3e-4
"""Host time to launch a bucket where a device does the work; and to pack, launch and end one,
beside its bytes, where the host does (measured there: 0.2 to 0.5 ms)."""
BURST_SHARE = 0.25
"""Of the budget. A link that is too slow for it is taken to have a gap like its latency."""
STILL_HOLDS = 1.6
"""A remembered link is believed while a message takes between 1 / this and this of what it says."""
CHECK_SECONDS = 0.1
LEAST_BYTES = 4 * 2**20
""""auto" measures for gradients of more: with fewer, one or two buckets are all there is."""
NETWORK_VARIABLES = (
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_DISABLE",
    "NCCL_NET",
    "NCCL_P2P_DISABLE",
    "NCCL_SHM_DISABLE",
)

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Link:
    """What an all-reduce between all ranks costs.

    Attributes:
        latency_seconds: Of an empty message.
        seconds_per_byte: Of the tensor that is reduced, not of what a network card sends.
        source: "measured", "remembered" or "given".
        points: What was timed: bytes and seconds.
        gap_seconds: Of a message behind another one, beyond its bytes; None for the latency.
        launch_seconds: Of the host, for each bucket.
    """

    latency_seconds: float
    seconds_per_byte: float
    source: str
    points: Points = ()
    gap_seconds: float | None = None
    launch_seconds: float = CPU_LAUNCH_SECONDS

    def seconds(self, num_bytes: float) -> float:
        """Return how long an all-reduce of `num_bytes` takes by itself."""
        return self.latency_seconds + num_bytes * self.seconds_per_byte

    @property
    def gap(self) -> float:
        """Seconds that a message costs beyond its bytes where another one is on the wire."""
        return self.latency_seconds if self.gap_seconds is None else self.gap_seconds

    def row(self) -> dict[str, Any]:
        """Return the numbers for the report."""
        return {
            "source": self.source,
            "latency_us": round(self.latency_seconds * 1e6, 1),
            "gap_us": round(self.gap * 1e6, 1),
            "gbit_per_second": round(8e-9 / self.seconds_per_byte, 3),
            "milliseconds_by_bytes": {str(b): round(s * 1e3, 3) for b, s in self.points},
        }


def fit(points: Points, source: str = "measured", burst_seconds: float | None = None) -> Link:
    """Return the link that `points` (bytes, seconds), smallest first, are of.

    Args:
        points: Of single messages.
        source: As the link's.
        burst_seconds: What BURST_MESSAGES of BURST_BYTES took that were started at once.
    """
    large = [p for p in points if p[0] >= SLOPE_FROM_BYTES]
    if len(large) < 2:
        large = [points[0], *points[-1:]]
    slopes = [(t - s) / (b - a) for (a, s), (b, t) in combinations(large, 2)]
    slope = max(statistics.median(slopes), 1e-13)  # 10 TB/s: noise made it flat, or fall
    small = [p for p in points if p[0] < SLOPE_FROM_BYTES] or [points[0]]
    latency = max(statistics.median(t - size * slope for size, t in small), 1e-7)
    if burst_seconds is None:
        return Link(latency, slope, source, points)
    more = burst_seconds - latency - BURST_MESSAGES * BURST_BYTES * slope
    gap = min(max(more / (BURST_MESSAGES - 1), 0.0), latency)
    return Link(latency, slope, source, points, gap)


def probe(
    timed: Callable[[int], float],
    slowest: Callable[[float], float],
    budget_seconds: float = BUDGET_SECONDS,
) -> Points:
    """Time messages until the next size would not fit into the budget; at least two sizes.

    Args:
        timed: Sends so many bytes and returns the seconds; all ranks call it together.
        slowest: Returns the largest of all ranks' numbers, the same on every rank.
        budget_seconds: Of all messages together.
    """
    points: list[tuple[int, float]] = []
    slowest(timed(SIZES[0]))  # connections are made, which may take seconds: outside of the budget
    spent = slowest(timed(SIZES[0]))
    for size in SIZES:
        last = points[-1] if points else (size, 0.0)
        if len(points) > 1 and spent + 2 * last[1] * size / last[0] > budget_seconds:
            break
        times = [slowest(timed(size))]
        if spent + (1 + REPEATS) * times[0] <= budget_seconds:
            times = [slowest(timed(size)) for _ in range(REPEATS)]
            spent += times[0]
        spent += sum(times)
        points.append((size, statistics.median(times)))
    return tuple(points)


class _Ranks:
    """Times all-reduces of this job's ranks on one device."""

    def __init__(self, world: World, device: torch.device) -> None:
        self._world, self._device = world, device
        self._buffer = torch.zeros(SIZES[-1] // 4, dtype=torch.float32, device=device)

    def timed(self, num_bytes: int, messages: int = 1) -> float:
        parts = self._buffer[: messages * num_bytes // 4].chunk(messages)
        self._idle()
        start = time.perf_counter()
        for work in [dist.all_reduce(part, async_op=True) for part in parts]:
            self._wait(work)
        self._idle()
        return time.perf_counter() - start

    def burst(self, repeats: int) -> float:
        """Return what BURST_MESSAGES at once take at best: a pause of the host is no gap."""
        times = (self.timed(BURST_BYTES, BURST_MESSAGES) for _ in range(repeats))
        return min([self.slowest(seconds) for seconds in times])

    def slowest(self, seconds: float) -> float:
        value = torch.tensor(seconds, dtype=torch.float64, device=self._device)
        self._wait(dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True))
        return float(value)

    def _wait(self, work: Any) -> None:
        self._world.wait(work, self._device, "the measurement of the link")

    def _idle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def measure(world: World, device: torch.device, budget_seconds: float = BUDGET_SECONDS) -> Link:
    """Time the link between all ranks now, for so long at most; a collective."""
    ranks = _Ranks(world, device)
    burst_budget = BURST_SHARE * budget_seconds
    points = probe(ranks.timed, ranks.slowest, budget_seconds - burst_budget)
    expected = fit(points).seconds(BURST_MESSAGES * BURST_BYTES)
    repeats = min(int(burst_budget / expected), REPEATS)  # alike on all ranks: from shared points
    return fit(points, burst_seconds=ranks.burst(repeats) if repeats else None)


def find(
    world: World,
    device: torch.device,
    timeout_seconds: float,
    *,
    remember: bool = True,
    budget_seconds: float = BUDGET_SECONDS,
) -> Link:
    """Return the link between all ranks: remembered if that still holds, else measured.

    A collective; all ranks return the same numbers.
    """
    where = [platform.node(), *(os.environ.get(name, "") for name in NETWORK_VARIABLES)]
    everywhere = world.gather("where the ranks are", where, timeout_seconds)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    file = _file(everywhere, world.backend, kind)
    mine = _load(file) if remember else None
    answers = world.gather("the remembered link", mine, timeout_seconds)
    if mine is not None and all(answer == answers[0] for answer in answers):
        link = replace(fit(_points(mine), "remembered"), gap_seconds=mine["gap_seconds"])
        if _still_holds(link, _Ranks(world, device)):
            return link
    link = measure(world, device, budget_seconds)
    if remember:
        _save(file, link)
    return link


def link_for(
    config: CommConfig,
    num_bytes: int,
    world: World,
    device: torch.device,
    timeout_seconds: float,
    report: Report,
) -> Link | None:
    """Return the link to plan `num_bytes` of gradients for; None where none is asked for.

    "auto" measures where it may matter: gradients of some size, and ranks that do not all reach
    each other inside of one host through NCCL.
    """
    if world.size == 1 or config.bucket_mib is not None or config.link == "off":
        return None
    if config.link == "auto":
        if num_bytes < LEAST_BYTES:
            return None
        if world.uses_nccl(device) and _one_host(world, timeout_seconds):
            return None
    start = time.perf_counter()
    given = link_from_text(config.link)
    link = Link(*given, "given") if given else find(world, device, timeout_seconds)
    if device.type != "cpu":
        link = replace(link, launch_seconds=LAUNCH_SECONDS)
    report.add(PassRow("link", "run_time", link.row(), time.perf_counter() - start))
    return link


def _one_host(world: World, timeout_seconds: float) -> bool:
    return len(set(world.gather("hosts", platform.node(), timeout_seconds))) == 1


def _still_holds(link: Link, ranks: _Ranks) -> bool:
    sizes = [size for size, seconds in link.points if seconds <= CHECK_SECONDS]
    size = sizes[-1] if sizes else link.points[0][0]
    ranks.slowest(ranks.timed(size))
    took = ranks.slowest(min(ranks.timed(size) for _ in range(2)))
    return 1 / STILL_HOLDS <= took / dict(link.points)[size] <= STILL_HOLDS


# -- the file ------------------------------------------------------------------------------------


def _file(everywhere: Sequence[Any], backend: str, kind: str) -> Path:
    text = json.dumps([VERSION, everywhere, backend, kind])
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Path(compat.cache_dir()) / "magi_train" / f"link-{key}.json"


def _load(file: Path) -> dict[str, Any] | None:
    """Return what `_save` wrote, None where there is nothing that can be used."""
    try:
        found = json.loads(file.read_text())
        points, gap = _points(found), found["gap_seconds"]
        sizes = [size for size, _ in points]
        right = (
            found["version"] == VERSION
            and len(points) > 1
            and sizes == sorted(set(sizes))
            and set(sizes) <= set(SIZES)
            and all(0 < seconds < 1e6 for _, seconds in points)
            and (gap is None or 0 <= gap < 1e6)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if right else None


def _points(found: dict[str, Any]) -> Points:
    return tuple((int(size), float(seconds)) for size, seconds in found["points"])


def _save(file: Path, link: Link) -> None:
    try:
        write_atomically(file, json.dumps({"version": VERSION, **asdict(link)}))
    except OSError:  # a cache that cannot be written costs a measurement the next time
        return
