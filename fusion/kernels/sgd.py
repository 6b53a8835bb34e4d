"""SGD with momentum over any number of tensors, in one pass over their memory.

For every element, in this order (g: gradient, p: master, b: momentum buffer):

    g /= grad_scale; g *= clip; g = -g if maximize
    g += weight_decay * p
    b = g on the first step, else momentum * b + (1 - dampening) * g;  g = g + momentum * b
        (nesterov) or b
    p -= lr * g
    shadow = p rounded to the nearest, ties to even

Source: PyTorch, aten/src/ATen/native/cuda/FusedSgdKernel.cu. Differs: "first step" is known for
    each tensor, not for all of a group; a first step that `found_inf` skips leaves a buffer of
    zeros, where torch leaves one that was never written.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from magi_train.fusion.kernels.multi_tensor import (
    ALIGNED,
    BLOCK,
    COLUMNS,
    FIRST,
    FLAGS,
    GRAD,
    LIVE,
    MASTER,
    NUMEL,
    SHADOW,
    TILE,
    TRITON_DTYPE,
    WARPS,
    AddressTable,
    StepScalars,
    elements,
    note_drift,
    read_gradient,
    read_gradient_reference,
    to_nearest,
)

BUFFER = tl.constexpr(3)


@dataclass(frozen=True, kw_only=True)
class SgdSettings:
    """One parameter group's settings; a tensor as `lr` has one element on the device."""

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool = False
    maximize: bool = False


@triton.jit
def _update(
    row, start, first, lr, momentum, rest, weight_decay, grad_scale, clip, drift, stride, phase,
    GRAD_DTYPE: tl.constexpr, SHADOW_DTYPE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Update the block at `start`; WIDE: it is whole and every address a multiple of 16 bytes."""
    left = tl.minimum(tl.load(row + NUMEL) - start, BLOCK)
    grads = elements(row, GRAD, start, GRAD_DTYPE, WIDE)
    masters = elements(row, MASTER, start, tl.float32, WIDE)
    buffers = elements(row, BUFFER, start, tl.float32, WIDE)
    shadows = elements(row, SHADOW, start, SHADOW_DTYPE or tl.float32, WIDE)
    shadowed = tl.load(row + SHADOW) != 0
    for at in range(0, BLOCK if WIDE else left, TILE):
        if WIDE:
            mask = None
        else:
            mask = at + tl.arange(0, TILE) < left
        g = read_gradient(grads + at, mask, grad_scale, clip, GRAD_DTYPE, MAXIMIZE)
        p = tl.load(masters + at, mask=mask)
        if drift is not None:
            look = shadowed
            if WIDE:
                look = shadowed & ((at // TILE + phase) % stride == 0)
            if look:
                note_drift(shadows + at, mask, p, drift, SHADOW_DTYPE)
        g += weight_decay * p
        if MOMENTUM:
            b = tl.load(buffers + at, mask=mask)
            b = tl.where(first, g, momentum * b + rest * g)
            tl.store(buffers + at, b, mask=mask)
            if NESTEROV:
                g += momentum * b
            else:
                g = b
        p -= lr * g
        tl.store(masters + at, p, mask=mask)
        if SHADOW_DTYPE is not None:
            if shadowed:
                tl.store(shadows + at, to_nearest(p, SHADOW_DTYPE), mask=mask)


@triton.jit(do_not_specialize=["stride", "phase"])
def _sgd(
    table, blocks, lr, momentum, rest, weight_decay, grad_scale, clip, found_inf,
    drift, stride, phase,
    GRAD_DTYPE: tl.constexpr, SHADOW_DTYPE: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, LR_TENSOR: tl.constexpr,
):  # fmt: skip
    """One block: find the tensor, then update with wide accesses where that is possible."""
    place = blocks + 2 * tl.program_id(0)
    start = tl.load(place + 1).to(tl.int64) * BLOCK
    row = table + tl.load(place) * COLUMNS
    flags = tl.load(row + FLAGS)
    first = (flags & FIRST) != 0
    live = (flags & LIVE) != 0
    if found_inf is not None:
        live = live & (tl.load(found_inf) == 0)
    if LR_TENSOR:
        rate = tl.load(lr).to(tl.float32)
    else:
        rate = lr
    if live:
        if ((flags & ALIGNED) != 0) & (tl.load(row + NUMEL) - start >= BLOCK):
            _update(row, start, first, rate, momentum, rest, weight_decay, grad_scale, clip,
                    drift, stride, phase, GRAD_DTYPE, SHADOW_DTYPE, MOMENTUM, NESTEROV, MAXIMIZE,
                    True)  # fmt: skip
        else:
            _update(row, start, first, rate, momentum, rest, weight_decay, grad_scale, clip,
                    drift, stride, phase, GRAD_DTYPE, SHADOW_DTYPE, MOMENTUM, NESTEROV, MAXIMIZE,
                    False)  # fmt: skip


def sgd(
    table: AddressTable,
    settings: SgdSettings,
    scalars: StepScalars,
    grad_dtype: torch.dtype,
    shadow_dtype: torch.dtype | None,
) -> None:
    """Take one step for every live row of `table`, in place.

    Args:
        table: Rows of addresses: master, grad, shadow or 0, momentum buffer or 0; the rest 0.
        settings: The group's.
        scalars: This step's.
        grad_dtype: Of every gradient: float32, bfloat16 or float16.
        shadow_dtype: Of every shadow: bfloat16 or float16; None if no row has one.
    """
    s = settings
    if not len(table.blocks):
        return
    _sgd[(len(table.blocks),)](
        table.rows, table.blocks, s.lr, s.momentum, 1 - s.dampening, s.weight_decay,
        scalars.grad_scale, scalars.clip, scalars.found_inf,
        scalars.drift if shadow_dtype is not None else None, *scalars.looked_at(),
        GRAD_DTYPE=TRITON_DTYPE[grad_dtype], SHADOW_DTYPE=TRITON_DTYPE[shadow_dtype],
        MOMENTUM=s.momentum != 0, NESTEROV=s.nesterov, MAXIMIZE=s.maximize,
        LR_TENSOR=isinstance(s.lr, Tensor), num_warps=WARPS,
    )  # fmt: skip


def sgd_reference(
    master: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    settings: SgdSettings,
    scalars: StepScalars,
) -> None:
    """Do to one tensor, in plain torch and in place, what the kernel does; in `master`'s dtype.

    Args:
        master: The parameter; float64 for a reference.
        grad: Same shape.
        state: Empty before the first step; then momentum_buffer, if there is momentum.
        settings: The group's.
        scalars: This step's; `drift` is not looked at.
    """
    s = settings
    if scalars.found_inf is not None and float(scalars.found_inf):
        return
    g = read_gradient_reference(grad, master.dtype, scalars, maximize=s.maximize)
    g = g + s.weight_decay * master
    if s.momentum:
        before = state.get("momentum_buffer")
        b = g if before is None else s.momentum * before + (1 - s.dampening) * g
        state["momentum_buffer"] = b.clone()
        g = g + s.momentum * b if s.nesterov else b
    master -= float(s.lr) * g
