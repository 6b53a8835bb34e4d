"""Activation budget: how many bytes a captured forward may save for its backward.

Objective: the least recomputation, that is the largest ratio r of PyTorch's own memory budget,
    subject to: bytes saved by the forward at r <= budget       -> Implemented in: `_search`.
The bytes are counted in the partitioned forward, each saved tensor once -> `saved_bytes`.

PyTorch's partitioner takes a ratio between "recompute everything" (0) and "save what is not free"
(1). Saved bytes fall with the ratio in steps, so a bisection over r with a fixed number of trials
finds the largest step that fits. Outputs of attention ops are marked as must-save where that fits:
the partitioner does not know every attention kernel as expensive and would recompute it as if it
were free. If the budget holds only without the marks, they go.

Source: PyTorch's partitioner, `activation_memory_budget` (a knapsack over the min-cut).
    Differs: bytes in place of a ratio, and attention is priced.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy

from magi_train.core import compat
from magi_train.core.errors import PassError
from magi_train.core.graph import num_bytes, saved_for_backward
from magi_train.core.passes import Plan

MIB = 2**20
TRIALS = 5
"""Bisection steps: the ratio is found to 1/32."""


@dataclass(frozen=True)
class BudgetPlan(Plan):
    """How one joint graph was cut.

    Attributes:
        budget_mib: What was asked for; None for no limit.
        saved_mib: What the forward saves for its backward.
        unlimited_mib: What it would save without a budget.
        ratio: PyTorch's budget ratio that was chosen; 1 recomputes only what is free.
        recomputes_attention: Whether attention is run again in the backward.
    """

    budget_mib: float | None
    saved_mib: float
    unlimited_mib: float
    ratio: float
    recomputes_attention: bool


def saved_bytes(forward: GraphModule) -> int:
    """Return the bytes of all tensors that `forward` keeps for its backward."""
    return sum(num_bytes(node.meta.get("val")) for node in saved_for_backward(forward))


Partition = tuple[GraphModule, GraphModule]


class BoundActivations:
    """A partitioner: min-cut within a budget of bytes.

    Args:
        budget_bytes: What one forward may save.
        note: Called with the plan; not on a compile-cache hit, when nothing is partitioned.
    """

    name = "bound_activations"
    stage = "joint"

    def __init__(self, budget_bytes: int, note: Callable[[BudgetPlan], None]) -> None:
        self.budget_bytes, self._note = budget_bytes, note

    def __call__(self, joint: GraphModule, inputs: Sequence[Any], **rest: Any) -> Partition:
        """Return forward and backward.

        Raises:
            PassError: Even recomputing everything saves more; names the smallest budget.
        """
        unlimited = saved_bytes(_cut(joint, inputs, 1.0, keep_attention=False, rest=rest)[0])
        if unlimited <= self.budget_bytes:
            found: tuple[float, bool, int] | None = (1.0, True, unlimited)
        else:
            found = self._search(joint, inputs, rest, keep_attention=True)
            found = found or self._search(joint, inputs, rest, keep_attention=False)
        if found is None:
            least = saved_bytes(_cut(joint, inputs, 0.0, keep_attention=False, rest=rest)[0])
            raise PassError(
                f"MemoryConfig.activation_budget_mib is {self.budget_bytes / MIB:.3f}, but this "
                f"model saves at least {least / MIB:.3f} MiB when everything else is recomputed; "
                "raise the budget, or lower the batch size or sequence length"
            )
        ratio, keep_attention, saved = found
        self._note(
            BudgetPlan(
                round(self.budget_bytes / MIB, 3),
                round(saved / MIB, 3),
                round(unlimited / MIB, 3),
                ratio,
                not keep_attention,
            )
        )
        return _cut(joint, inputs, ratio, keep_attention=keep_attention and ratio < 1, rest=rest)

    def _search(
        self,
        joint: GraphModule,
        inputs: Sequence[Any],
        rest: dict[str, Any],
        *,
        keep_attention: bool,
    ) -> tuple[float, bool, int] | None:
        """Return the largest ratio that fits, with the bytes it saves, or None."""
        fits: tuple[float, bool, int] | None = None
        low, high = 0.0, 1.0
        ratio = 0.0
        for _ in range(TRIALS + 1):
            saved = saved_bytes(
                _cut(joint, inputs, ratio, keep_attention=keep_attention, rest=rest)[0]
            )
            if saved <= self.budget_bytes:
                fits, low = (ratio, keep_attention, saved), ratio
            elif ratio == 0.0:
                return None
            else:
                high = ratio
            ratio = (low + high) / 2
        return fits


def _cut(
    joint: GraphModule,
    inputs: Sequence[Any],
    ratio: float,
    *,
    keep_attention: bool,
    rest: dict[str, Any],
) -> Partition:
    trial = GraphModule(joint, copy.deepcopy(joint.graph))  # shares constants, copies nodes
    if keep_attention:
        for node in trial.graph.nodes:
            name = str(node.target)
            if node.op == "call_function" and "attention" in name and "backward" not in name:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    with compat.activation_ratio(ratio):
        return compat.min_cut_partition(trial, inputs, **rest)  # type: ignore[no-any-return]
