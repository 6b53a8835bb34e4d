"""Which plan each block follows, where one captured graph serves all blocks (the REGION tier).

A budget between what "all save much" and "all save little" take is used up by two variants of the
graph, a fast one D and a lean one L:

    minimise    k seconds(L) + (n - k) seconds(D)    over D, L of the row of plans and 0 <= k <= n
    subject to  peak of the step <= budget                                       -> `Choices.choose`

The first k of the n blocks, in the order of the forward, are lean: what they save waits longest.
While block i runs, those before it wait with what they saved, and those behind it have left their
gradients, g each, so the largest is found where a run of equal blocks ends:

    peak of the step = max over i of  peak(i) + sum of what j < i left + (n - i) g
                                                                                -> Limit.step_bytes

Which D, L and k some budget chooses is a list of rising times and falling peaks that depends on no
budget (-> `Choices.frontier`): a smaller one never gives a faster step or a higher peak. A second
variant takes as long to compile as the first, so it is in the list only if the fastest plan for all
blocks that takes no more memory is slower by more than `WORTH`.

A lean plan has no higher peak of its own than the fast one. So the peak of the step is at most the
planned one if more blocks are lean: where several graphs serve the blocks, each takes its own first
k blocks for lean; and where the plan of code from a cache is lost, all of them are. Where blocks
are of several kinds, all blocks of a graph follow one plan: others wait beside them that are not
captured yet.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from magi_train.memory.remat import Row, SavedSet
from magi_train.memory.step import Limit

WORTH = 0.01
"""Of the time of forward and backward; a second variant that gains less is not compiled."""


@dataclass(frozen=True)
class Choice:
    """What the blocks of a step do.

    Attributes:
        runs: How many blocks follow which plan, in the order of the forward; one run or two.
        peak: Predicted, of the step, in bytes.
    """

    runs: tuple[tuple[int, SavedSet], ...]
    peak: int

    @property
    def price(self) -> tuple[float, int]:
        """What the choice costs, to order choices by: seconds, values that are moved."""
        prices = [(count, *plan.price) for count, plan in self.runs]
        return sum(n * seconds for n, seconds, _ in prices), sum(n * m for n, _, m in prices)


class Choices:
    """What a budget can choose from.

    Args:
        row: The plans for the graph.
        limit: How many blocks there are, and what is taken besides.
    """

    def __init__(self, row: Row, limit: Limit) -> None:
        self._row, self._limit = row, limit

    def choose(self, limit_bytes: int) -> Choice | None:
        """Return the fastest choice whose peak is within `limit_bytes`, None if none is."""
        alike = self._row.choose(lambda p: self.alike(p).peak, limit_bytes, self._at_least)
        if not self._limit.two_variants or alike is self._row.default:
            return None if alike is None else self.alike(alike)
        return next((c for c in self.frontier if c.peak <= limit_bytes), None)

    @property
    def least(self) -> Choice:
        """The choice with the lowest peak."""
        return self.frontier[-1]

    @cached_property
    def frontier(self) -> list[Choice]:
        """What some budget chooses, from PyTorch's own plan for all to the lowest peak."""
        alike = [self.alike(p) for p in self._row.frontier(lambda p: self.alike(p).peak)]
        mixed = [c for c in self._mixed() if self._is_worth_it(c, alike)]
        rest = sorted([*alike[1:], *mixed], key=lambda choice: choice.price)
        return _falling([alike[0], *rest])

    def alike(self, plan: SavedSet) -> Choice:
        """Return the choice in which all blocks follow one plan."""
        return self._of((self._limit.blocks, plan))

    def _of(self, *runs: tuple[int, SavedSet]) -> Choice:
        row = self._row
        sizes = ((n, row.timeline(p).peak, row.waiting_bytes(p)) for n, p in runs)
        return Choice(runs, self._limit.step_bytes(*sizes))

    def _at_least(self, plan: SavedSet) -> int:
        waiting = self._row.waiting_bytes(plan)
        return self._limit.step_bytes((self._limit.blocks, waiting, waiting))

    def _mixed(self) -> Iterator[Choice]:
        n = self._limit.blocks
        plans = self._candidates() if self._limit.two_variants else ()
        for fast, lean in itertools.combinations(plans, 2):
            if self._row.timeline(lean).peak > self._row.timeline(fast).peak:
                continue
            for count in range(1, n):
                yield self._of((count, lean), (n - count, fast))

    def _candidates(self) -> list[SavedSet]:
        """Return the plans that no other beats in time, peak and what waits, the fastest first."""
        found: list[tuple[int, int, SavedSet]] = []
        for plan in self._row.plans:
            peak, waiting = self._row.timeline(plan).peak, self._row.waiting_bytes(plan)
            beaten = any(p <= peak and w <= waiting for p, w, _ in found)
            if plan.price >= self._row.default.price and not beaten:
                found.append((peak, waiting, plan))
        return [plan for *_, plan in found]

    def _is_worth_it(self, mixed: Choice, alike: Sequence[Choice]) -> bool:
        other = next((c for c in alike if c.peak <= mixed.peak), None)
        step = self._limit.blocks * self._row.joint.forward_seconds
        return other is None or other.price[0] - mixed.price[0] > WORTH * step


def _falling(choices: Iterable[Choice]) -> list[Choice]:
    """Return those with a lower peak than all before them."""
    found: list[Choice] = []
    for choice in choices:
        if not found or choice.peak < found[-1].peak:
            found.append(choice)
    return found


class Turn:
    """Which block is running; it is told by whoever calls the block.

    Attributes:
        block: Its id; 0 outside of blocks.
    """

    def __init__(self) -> None:
        self.block = 0


def in_turn(
    variants: Sequence[Callable[..., Any]], counts: Sequence[int], turn: Turn
) -> Callable[..., Any]:
    """Return a function that calls the variant of the block that is running.

    Blocks take their places in the order of their first calls, and keep them: where a forward runs
    a block twice, and where a checkpoint runs it again in the backward.

    Args:
        variants: In the order of the forward.
        counts: How many blocks follow each of them.
        turn: Says which block is running.
    """
    ends = list(itertools.accumulate(counts))[:-1]
    places: dict[int, int] = {}

    def call(*args: Any) -> Any:
        place = places.setdefault(turn.block, len(places))
        return variants[sum(place >= end for end in ends)](*args)

    return call
