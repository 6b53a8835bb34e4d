"""Tolerances derived from dtype and reduction length, never typed in."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

LONGEST_REDUCTION = 4096
"""At least the elements of the longest sum in a toy model (batch times sequence, hidden size)."""


def tolerance(dtype: torch.dtype, length: int = LONGEST_REDUCTION, roundings: int = 8) -> float:
    """Return the relative error that reordering a computation in `dtype` may make.

    Rounding errors of a sum of `length` terms grow like sqrt(length) times the unit roundoff when
    they are independent (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), and
    `roundings` of them follow each other (layers, forward and backward).
    """
    return roundings * math.sqrt(length) * torch.finfo(dtype).eps / 2


NOISE_FLOOR = 1e-2
"""Tensors are measured against at least this part of the largest of all: some gradients (a key's
bias under softmax) are zero but for rounding, and have no relative accuracy."""


def difference(got: Mapping[str, Tensor | None], want: Mapping[str, Tensor | None]) -> float:
    """Return the largest difference of any tensor, relative to its largest element.

    inf where a tensor is missing on one side only.
    """
    if any((got[n] is None) != (want[n] is None) for n in want):
        return math.inf
    pairs = [
        (got[n].detach().double(), w.detach().double())
        for n, w in want.items()
        if w is not None and w.numel()
    ]
    largest = max((float(w.abs().max()) for _, w in pairs), default=0.0) or 1.0
    return max(
        (
            float((g - w).abs().max()) / max(float(w.abs().max()), NOISE_FLOOR * largest)
            for g, w in pairs
        ),
        default=0.0,
    )


def relative_error(got: Mapping[str, Tensor | None], want: Mapping[str, Tensor | None]) -> float:
    """Return the Euclidean norm of the difference over all tensors, relative to that of `want`."""
    pairs = [(got[n], w) for n, w in want.items() if w is not None]
    if any(g is None for g, _ in pairs):
        return math.inf
    off = sum(float((g.double() - w.double()).square().sum()) for g, w in pairs)
    return math.sqrt(off / sum(float(w.double().square().sum()) for _, w in pairs))
