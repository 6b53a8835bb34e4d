"""The level "safe": which buckets may travel in bfloat16 because it takes nothing from them.

Under autocast to bfloat16 the backward makes a weight's gradient in bfloat16 and widens it for
float32 `.grad`. Sending such a gradient in bfloat16 rounds only sums: of micro-batches, and of
ranks. Which weights these are is not asked of the model but seen: under autocast the first gradient
of a parameter either equals its rounding to bfloat16 in all elements, or it does not. That works in
every tier, and is right about weights that autocast leaves alone. Where autocast is not seen around
the step, numbers prove nothing (those of a float32 step may be short by chance): only gradients
that a captured backward hands over in bfloat16 count, as autocast inside of the model makes them.

A bucket takes the short way if that holds for all its parameters on all ranks. The first
synchronised backward goes as it is and is followed by one agreement; so is the first under another
state of autocast. A weight that is tied to one that autocast does not cast (an embedding and the
head) has a gradient of float32 and travels as it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from magi_train.comm.plan import CommPlan

Autocast = tuple[bool, str]


def is_exact(gradient: Tensor) -> bool:
    """Return whether bfloat16 holds all elements, and not all are zero."""
    if gradient.dtype is torch.bfloat16:
        return True
    same = torch.equal(gradient, gradient.bfloat16().to(gradient.dtype))
    return same and bool(gradient.any())


class ExactBuckets:
    """What was seen of the gradients of one plan, and what the ranks made of it.

    Args:
        plan: The buckets; those whose codec is "safe" count.
        possible: Whether the process group can carry them.
    """

    def __init__(self, plan: CommPlan, possible: bool = True) -> None:
        self._plan = plan
        buckets = plan.buckets if possible else ()
        self._safe = {s.name for b in buckets if b.codec == "safe" for s in b.slots}
        self._seen: dict[Autocast, dict[str, bool]] = {}
        self._chosen: dict[Autocast, frozenset[int]] = {}

    def undecided(self, autocast: Autocast) -> bool:
        """Return whether an agreement is due for this state of autocast."""
        return bool(self._safe) and autocast not in self._chosen

    def see(self, autocast: Autocast, name: str, gradient: Tensor) -> None:
        """Note the first gradient of a parameter."""
        seen = self._seen.setdefault(autocast, {})
        if name in self._safe and name not in seen and not gradient.is_sparse:
            enabled, _ = autocast
            seen[name] = is_exact(gradient) if enabled else gradient.dtype is torch.bfloat16

    def forget(self, autocast: Autocast) -> None:
        """Forget what was seen under this state of autocast, before anything is chosen."""
        self._seen.pop(autocast, None)

    @property
    def shortens(self) -> bool:
        """Return whether any bucket travels in bfloat16 under any state of autocast."""
        return any(self._chosen.values())

    def mine(self, autocast: Autocast) -> list[int]:
        """Return the buckets that are exact as far as this rank has seen."""
        seen = self._seen.get(autocast, {})
        return [
            i
            for i, b in enumerate(self._plan.buckets)
            if b.codec == "safe"
            and any(s.name in seen for s in b.slots)
            and all(seen.get(s.name, True) for s in b.slots)
        ]

    def choose(self, autocast: Autocast, answers: Sequence[Sequence[int]]) -> list[int]:
        """Take the buckets that all ranks named; return them."""
        chosen = frozenset.intersection(*map(frozenset, answers))
        self._chosen[autocast] = chosen
        return sorted(chosen)

    def codec(self, autocast: Autocast, index: int) -> str:
        """Return what bucket `index` travels in."""
        bucket = self._plan.buckets[index]
        if bucket.codec != "safe":
            return bucket.codec
        return "bfloat16" if index in self._chosen.get(autocast, ()) else bucket.dtype
