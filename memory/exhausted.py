"""An allocation that failed: a note on the error that says what was planned and what to ask for.

The error keeps its type, since batch size finders catch it and go on. One that leaves a captured
forward gets its note there; one of a backward or of an optimizer's step passes through PyTorch's
engine and gets it when nobody has caught it, before the other ranks are told (core/world.py), who
then end with the same text instead of waiting in a collective.
"""

import torch

from magi_train.core.hardware import device_memory_bytes
from magi_train.memory.step import GIB, StepMemory, measured_peak, usable_bytes

HEAD = "magi-train:"
NOT_FULL = 0.05
"""Part of the peak in segments that are not full from which on they are named."""


def is_exhausted(error: BaseException | None) -> bool:
    """Return whether an error is an allocation that failed, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def explain(error: BaseException, memory: StepMemory | None) -> None:
    """Add the note to an error, once.

    Args:
        error: An allocation that failed.
        memory: The budget of the model that was trained, None without one.
    """
    if any(note.startswith(HEAD) for note in getattr(error, "__notes__", ())):
        return
    peak = measured_peak()
    usable = usable_bytes(device_memory_bytes()) if torch.cuda.is_initialized() else None
    budget, planned = (memory.budget_bytes, memory.planned_bytes) if memory else (None, 0)
    held = torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0
    error.add_note(f"{HEAD} {advice(peak, usable, budget, planned, held)}")


def advice(
    peak: int | None, usable: int | None, budget: int | None, planned: int, held: int = 0
) -> str:
    """Return what happened and what to set, from bytes.

    Args:
        peak: The most that was allocated until then; None where nobody counts.
        usable: What "auto" lets a step take of the device; None without one.
        budget: `Config.memory_budget_gib`; None without one.
        planned: The planned peak under it; 0 before there is a plan.
        held: What the allocator holds of the device.
    """
    measured = "" if peak is None else f" at a peak of {peak / GIB:.4g} GiB so far"
    said = f"an allocation failed{measured}"
    ask = '"auto", or a number of GiB' if usable is None else f"{usable / GIB:.4g}"
    if budget is None:
        said += f", without a memory budget; set Config(memory_budget_gib={ask}), which recomputes"
    elif not planned:
        said += f", before the step was planned; the budget is {budget / GIB:.4g} GiB"
    else:
        over = max(0, (peak or 0) - planned)
        least = min(budget, usable) if usable else budget
        lower = least - over if over or least < budget else int(0.9 * budget)
        said += (
            f"; planned were {planned / GIB:.4g} GiB under a budget of {budget / GIB:.4g} GiB. Set "
            f"Config(memory_budget_gib={lower / GIB:.4g}), or free what else is on the device"
        )
    if peak and held - peak > NOT_FULL * peak:
        said += (
            f". {(held - peak) / GIB:.4g} GiB lie in segments that were not full: with "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment they may serve"
        )
    return f"{said}. A smaller batch helps as well; `magi explain --fits` says what fits"
