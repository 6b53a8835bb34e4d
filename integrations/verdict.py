"""What follows from the runs of a script: do losses agree, how fast is a step, is it worth it.

The verdict needs three numbers: whether the losses agree, how much faster a step is, and whether
that is more than parts of one kind's runs differ among themselves.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from magi_train.integrations.probe import Seen

GAIN = 1.03
"""How much faster a step must be to be worth it."""
ALIKE = 0.05
"""By how much the first losses may differ, of the same weights and data in another precision."""
SMALLER = 0.9
"""The part of the memory that may remain for magi to be worth it where it is not faster."""


@dataclass(frozen=True)
class Side:
    """What runs of one kind gave, over all rounds and ranks.

    Attributes:
        step_ms: Median of the timed steps, of the slowest rank.
        parts_ms: The same of each half of each round.
        p10_ms: A tenth of the steps is faster.
        p90_ms: A tenth is slower.
        peak_gib: Of the rank that needs most.
        start_up_s: Of each round; the first one may compile what the next finds in caches.
        losses: Of rank 0's steps, of the first round.
    """

    step_ms: float
    parts_ms: list[float]
    p10_ms: float
    p90_ms: float
    peak_gib: float
    start_up_s: list[float]
    losses: list[float | None]


@dataclass(frozen=True)
class Agreement:
    """How the losses compare; differences are relative to the larger of the two.

    Attributes:
        agree: Whether the median and the mean of the last quarter are within the tolerance.
        compared: Steps of which both losses are known, and one is a number.
        median: Of the steps' differences.
        worst: Of them.
        late: Difference between the means of the last quarter of the steps.
        first: Difference of the first losses.
    """

    agree: bool
    compared: int
    median: float
    worst: float
    late: float
    first: float


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        use: "yes", "no" or "cannot say".
        why: A sentence.
        speed: How many times faster a step is.
        memory: Which part of the memory it takes.
        pays_after: Steps until a longer start-up is made up for; None where it never is.
    """

    use: str
    why: str
    speed: float
    memory: float
    pays_after: int | None


def side(rounds: Sequence[Sequence[Seen]]) -> Side:
    """Return runs of one kind, `rounds[round][rank]`, as one."""
    slowest = [max(ranks, key=lambda seen: statistics.median(seen.seconds)) for ranks in rounds]
    steps = [1e3 * s for seen in slowest for s in seen.seconds]
    tenths = statistics.quantiles(steps, n=10)
    return Side(
        statistics.median(steps),
        [1e3 * statistics.median(half) for seen in slowest for half in _halves(seen.seconds)],
        tenths[0],
        tenths[-1],
        max(seen.peak_gib for ranks in rounds for seen in ranks),
        [max(seen.start_up_seconds for seen in ranks) for ranks in rounds],
        rounds[0][0].losses,
    )


def _halves(seconds: Sequence[float]) -> list[Sequence[float]]:
    middle = len(seconds) // 2
    return [seconds[:middle], seconds[middle:]]


def compare(
    one: Sequence[float | None], other: Sequence[float | None], tolerance: float
) -> Agreement:
    """Compare losses step by step; without a pair to compare they do not agree.

    Two that are both NaN say nothing.
    """
    known = [(a, b) for a, b in zip(one, other, strict=False) if a is not None and b is not None]
    pairs = [(a, b) for a, b in known if not (math.isnan(a) and math.isnan(b))]
    if not pairs:
        return Agreement(False, 0, math.nan, math.nan, math.nan, math.nan)
    apart = [_apart(a, b) for a, b in pairs]
    last = pairs[-max(1, len(pairs) // 4) :]
    late = _apart(statistics.fmean(a for a, _ in last), statistics.fmean(b for _, b in last))
    median = statistics.median(apart)
    return Agreement(
        median <= tolerance and late <= tolerance, len(pairs), median, max(apart), late, apart[0]
    )


def _apart(a: float, b: float) -> float:
    if a == b:
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def judge(plain: Side, ours: Side, agreement: Agreement) -> Verdict:
    """Return whether to use it."""
    speed, memory = plain.step_ms / ours.step_ms, ours.peak_gib / plain.peak_gib
    gain = (plain.step_ms - ours.step_ms) / 1e3
    more = ours.start_up_s[-1] - plain.start_up_s[-1]
    pays = max(0, math.ceil(more / gain)) if gain > 0 else None
    noise = max(max(s.parts_ms) / min(s.parts_ms) for s in (plain, ours))
    if not agreement.compared:
        use, why = "cannot say", "no loss is a number, or backward is called on no single number"
    elif agreement.first > ALIKE:
        use = "no"
        why = (
            "the losses differ before the first step was taken; a script that goes on from its own "
            "checkpoint, or begins without a seed, does that on its own"
        )
    elif not agreement.agree:
        use, why = "no", "the losses differ by more than the tolerance"
    elif max(speed, 1 / speed) <= noise and noise > GAIN:
        use = "cannot say"
        why = (
            f"steps of one kind drift by {noise - 1:.0%}, as much as the two differ: more --rounds"
        )
    elif speed >= GAIN:
        use, why = "yes", f"a step is {speed:.2f} times as fast"
    elif memory <= SMALLER and speed >= 1 / GAIN:
        use, why = "yes", f"a step needs {memory:.0%} of the memory and is as fast"
    else:
        use, why = "no", f"a step is {speed:.2f} times as fast; {GAIN} would be worth it"
    return Verdict(use, why, speed, memory, pays)
