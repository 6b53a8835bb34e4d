"""Whether two ways to run a model compute the same."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from magi_train.core.errors import ExportError

TF32_EPS = 2.0**-10
"""Of the format with 10 bits of mantissa that tensor cores round float32 to."""


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return the Euclidean norm of the difference, relative to that of `wanted`; inf for NaNs.

    Elements that are not finite in `wanted` must be the same in `got`.
    """
    a, b = got.double().flatten(), wanted.double().flatten()
    finite = b.isfinite()
    if a.shape != b.shape or not bool(((a == b) | (a.isnan() & b.isnan()))[~finite].all()):
        return float("inf")
    off, size = float((a - b)[finite].norm()), float(b[finite].norm())
    if off != off:
        return float("inf")
    return off / size if size else off


def rounding(result: Tensor) -> float:
    """Return how far, relatively, rounding may move a result: the root of its dtype's eps."""
    dtype = result.dtype if result.is_floating_point() else torch.float32
    return float(torch.finfo(dtype).eps ** 0.5)


def allowed(program: torch.export.ExportedProgram) -> float:
    """Return how far, relatively, code may be from a program that it was made of.

    The square root of the rounding error of the least precise dtype that the program computes in.
    Results may be wider. Numbers of one byte are weights, which are widened where they are read. On
    accelerators float32 may mean TF32: in cuDNN's convolutions by default, in generated ones not.
    """
    values = [v for n in program.graph.nodes for v in pytree.tree_leaves(n.meta.get("val"))]
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    kinds = {(v.dtype, v.device.type) for v in tensors if v.dtype.itemsize > 1}
    coarse = [
        TF32_EPS if dtype is torch.float32 and device != "cpu" else torch.finfo(dtype).eps
        for dtype, device in kinds
    ]
    return float(max(coarse, default=torch.finfo(torch.float32).eps) ** 0.5)


def check_same(
    got: Sequence[Tensor], wanted: Sequence[Tensor], limit: float, what: str, advice: str
) -> None:
    """Make sure that code computed what a program does.

    Args:
        got: Its results, and the inputs that it may have written to.
        wanted: Those of the program.
        limit: From `allowed`.
        what: What was run, for the error.
        advice: What to do in place of it.

    Raises:
        ExportError: It did not.
    """
    for number, (result, right) in enumerate(zip(got, wanted, strict=True)):
        if not right.is_floating_point():
            continue  # the index of a largest value may be another one of two that are close
        error = relative_error(result, right)
        if not error <= limit:
            raise ExportError(
                f"{what}, result {number} is off by {error:.1e} (relative) from the program's, and "
                f"{limit:.1e} is allowed; {advice}"
            )
