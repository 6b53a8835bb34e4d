"""The schedule: when buckets leave, predicted for a link, and the bucket sizes that suit it.

Buckets leave in order, each when its last gradient exists and the wire is free. A backend has more
than one in flight, so behind another a message costs a gap instead of a latency (`comm.link`):

    start_i = max(ready_i, sent_{i-1})   sent_i = start_i + messages_i * gap + bytes_i * per_byte
    end_i = sent_i + messages_i * (latency - gap)
    exposed = max(0, last end - end of the backward) + buckets * host's launch

Small buckets start early and leave a short tail, but each costs a gap and the host's time; `choose`
tries powers of two for the size of a bucket, with the first bucket as small as the last or not, and
takes what is exposed least. Powers of two also keep a plan, and the code compiled for it, from
following noise.

Before a step was seen, the backward is taken to last as long as the communication, in which case
the sizes matter most, and gradients to appear evenly by bytes. Afterwards `Profile` knows when each
gradient appears.

Source: LogGP (Alexandrov et al., 1995) without its processor terms;
Li et al. (2020), PyTorch Distributed, for order and buckets. Differs:
sizes are searched on the model of the measured link instead of being fixed.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from magi_train.comm.link import Link

KIB = 2**10
CAPS = tuple(2**k * KIB for k in range(6, 18))
"""Bucket sizes that are tried: 64 KiB to 128 MiB."""
SMALL = 0.125
"""Size of the last bucket, and of a small first one, as a part of the others'."""
WARM, TIMED = 2, 3


@dataclass(frozen=True)
class Sizes:
    """When buckets are full, in bytes of the gradients: the first one, others, and the last."""

    first: int
    cap: int
    last: int


@dataclass(frozen=True)
class Message:
    """A bucket as the link sees it.

    Attributes:
        num_bytes: As an all-reduce of as many.
        messages: Collectives that follow each other.
        ready: Part of the backward after which it may leave, or seconds; see `exposed`.
    """

    num_bytes: int
    messages: int
    ready: float


def exposed(buckets: Sequence[Message], link: Link, backward_seconds: float | None = None) -> float:
    """Return for how many seconds communication holds the step up.

    Args:
        buckets: In launch order; `ready` counts in seconds from the first gradient, or as a part
            of the backward where that is None.
        link: What they travel on.
        backward_seconds: From the first gradient to the last; None where it is not known.
    """
    unit = 1.0
    if backward_seconds is None:
        unit = backward_seconds = sum(b.num_bytes for b in buckets) * link.seconds_per_byte
    sent = end = 0.0
    for b in buckets:
        start = max(b.ready * unit, sent)
        sent = start + b.messages * link.gap + b.num_bytes * link.seconds_per_byte
        end = max(end, sent + b.messages * (link.latency_seconds - link.gap))
    return max(0.0, end - backward_seconds) + len(buckets) * link.launch_seconds


def choose(total_bytes: int, predict: Callable[[Sizes], float]) -> Sizes:
    """Return the sizes with the least `predict`ed seconds; of equal ones, the largest."""
    caps = [cap for cap in CAPS if cap < 2 * total_bytes] or [CAPS[0]]
    tried = [Sizes(caps[-1], caps[-1], 0)]  # everything at once
    for cap in reversed(caps):
        small = int(cap * SMALL)
        tried += [Sizes(cap, cap, small), Sizes(small, cap, small)]
    return min(tried, key=predict)


class Profile:
    """When gradients appear in the backward: the median of some steps, from the host's clock.

    Attributes:
        done: Whether enough was seen.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._now: dict[str, float] = {}
        self._seen: dict[str, list[float]] = {}
        self._backwards = 0
        self.done = False

    def mark(self, name: str) -> None:
        """Note that a parameter's gradient exists."""
        self._now[name] = self._clock()

    def end(self) -> None:
        """End a backward."""
        now, self._now = self._now, {}
        if not now or self.done:
            return
        self._backwards += 1
        if self._backwards > WARM:
            begin = min(now.values())
            for name, at in now.items():
                self._seen.setdefault(name, []).append(at - begin)
        self.done = self._backwards == WARM + TIMED

    def ready(self) -> dict[str, float]:
        """Return the seconds from the first gradient to each one that appeared."""
        return {name: statistics.median(times) for name, times in self._seen.items()}


class Meter:
    """What steps take, and for how long they wait for gradients: medians of the last RECENT ones.

    By the host's clock, so it is right where the host does the work: on the CPU.
    """

    RECENT = 20

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waited, self._ended = 0.0, 0.0
        self._waits: deque[float] = deque(maxlen=self.RECENT)
        self._steps: deque[float] = deque(maxlen=self.RECENT)

    def wait(self, work: Callable[[], None]) -> None:
        """Call `work`, which waits for gradients."""
        start = self._clock()
        work()
        self._waited += self._clock() - start

    def end(self) -> dict[str, float]:
        """End a synchronised backward; return the medians in milliseconds, by name."""
        now, before = self._clock(), self._ended
        self._waits.append(self._waited)
        self._waited, self._ended = 0.0, now
        if before:
            self._steps.append(now - before)
        found = {"exposed_communication_ms": self._waits, "synchronised_step_ms": self._steps}
        return {name: 1e3 * statistics.median(times) for name, times in found.items() if times}

    def forget(self) -> None:
        """Start again: what is measured has changed."""
        self._waits.clear()
        self._steps.clear()
