"""The trial: whether a level's codec gains anything on the user's own steps.

Fewer bytes are no gain where the link keeps up or where the codec costs more than it saves, and
then the rounding is for nothing. So the levels "balanced" and "aggressive" try three forms in
turns, one a step: the gradients as they are, all of them in bfloat16, and the codec. The level
allows each of them, so the trial costs no extra step. A step lasts from the end of one synchronised
backward to the end of the next, and with it the optimizer, the data and the forward between them.

The slowest rank's medians count. From the most exact form to the least, a form is taken only if it
beats the one taken so far by more than GAIN. All ranks decide alike, from the same numbers.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

GAIN = 0.03
WARM, ROUNDS = 3, 5
"""Steps with the codec before the first that counts, and turns of all forms."""
AS_IS, HALF, CODEC = "none", "bfloat16", "codec"
FORMS: dict[str, str | None] = {AS_IS: "", HALF: "bfloat16", CODEC: None}
"""Form, and Compressor.instead for it."""


def idle_clock() -> float:
    """Return the time in seconds once the device has nothing left to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Trial:
    """Times the forms in turns.

    Attributes:
        form: What the step that comes travels in.
        done: Whether the form is chosen for good.
    """

    def __init__(self, clock: Callable[[], float] = idle_clock) -> None:
        self._clock = clock
        self._steps, self._began = 0, 0.0
        self._seconds: dict[str, list[float]] = {form: [] for form in FORMS}
        self.form, self.done = CODEC, False

    def step(self) -> bool:
        """End a synchronised step; return whether all forms had their turns."""
        now = self._clock()
        if self._steps >= WARM:
            self._seconds[self.form].append(now - self._began)
        self._steps += 1
        self._began = now
        turn = self._steps - WARM
        self.form = CODEC if turn < 0 else list(FORMS)[turn % len(FORMS)]
        return turn == ROUNDS * len(FORMS)

    def medians(self) -> dict[str, float]:
        """Return the seconds of a step in each form on this rank."""
        return {form: statistics.median(times) for form, times in self._seconds.items()}

    def choose(self, answers: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Choose from the medians of all ranks; return the slowest rank's seconds by form."""
        worst = {form: max(answer[form] for answer in answers) for form in FORMS}
        self.form, self.done = AS_IS, True
        for form in FORMS:
            if worst[form] < worst[self.form] * (1 - GAIN):
                self.form = form
        return worst
