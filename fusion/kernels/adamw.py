"""AdamW, Adam and AMSGrad over any number of tensors, in one pass over their memory.

For every element, in this order (g: gradient, p: master, m and v: moments, t: step from 1 on):

    g /= grad_scale; g *= clip; g = -g if maximize
    p -= lr * weight_decay * p  (decoupled: AdamW)   or   g += weight_decay * p  (Adam)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g;  w = v, or with amsgrad its maximum over all steps
    p -= lr / (1 - beta1^t) * m / (sqrt(w) / sqrt(1 - beta2^t) + eps)
    shadow = p rounded to the nearest, ties to even

Two launches: one program a tensor counts the step and computes what depends on it, in float64; then
one block for each BLOCK elements. Nothing is read or written twice, so a step costs 28 bytes a
parameter (float32 gradient), and 2 more for a shadow: this kernel is bound by memory.

Source: PyTorch, aten/src/ATen/native/cuda/fused_adam_utils.cuh. Differs: betas, eps and the decay
    are float32, as in torch's foreach code, where the fused kernel mixes float64 in (within few
    units in the last place a step); the gradient may be narrower than the master; `clip`, `shadow`
    and `drift` are new; a step that `found_inf` skips does not count even if several devices
    overflowed (torch subtracts their number).
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from magi_train.fusion.kernels.multi_tensor import (
    ALIGNED,
    BLOCK,
    COLUMNS,
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

EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
STEP = tl.constexpr(6)


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """One parameter group's settings; a tensor as `lr` has one element on the device."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool = True
    amsgrad: bool = False
    maximize: bool = False


@triton.jit
def _advance(
    table, scalars, lr, log_beta1, log_beta2, weight_decay, found_inf, LR_TENSOR: tl.constexpr
):
    """Count a step of each live tensor; scalars: decay, lr / correction1, sqrt(correction2)."""
    tensor = tl.program_id(0)
    row = table + tensor * COLUMNS
    live = (tl.load(row + FLAGS) & LIVE) != 0
    if found_inf is not None:
        live = live & (tl.load(found_inf) == 0)
    if live:
        counter = tl.load(row + STEP).to(tl.pointer_type(tl.float32))
        step = tl.load(counter) + 1
        tl.store(counter, step)
        if LR_TENSOR:
            rate = tl.load(lr).to(tl.float64)
        else:
            rate = tl.cast(lr, tl.float64)
        correction1 = 1 - tl.exp(step.to(tl.float64) * log_beta1)
        correction2 = 1 - tl.exp(step.to(tl.float64) * log_beta2)
        tl.store(scalars + 3 * tensor, (rate * weight_decay).to(tl.float32))
        tl.store(scalars + 3 * tensor + 1, (rate / correction1).to(tl.float32))
        tl.store(scalars + 3 * tensor + 2, tl.sqrt(correction2).to(tl.float32))


@triton.jit
def _update(
    row, start, scalars, beta1, beta2, rest1, rest2, eps, weight_decay, grad_scale, clip,
    drift, stride, phase,
    GRAD_DTYPE: tl.constexpr, SHADOW_DTYPE: tl.constexpr, DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Update the block at `start`; WIDE: it is whole and every address a multiple of 16 bytes."""
    left = tl.minimum(tl.load(row + NUMEL) - start, BLOCK)
    grads = elements(row, GRAD, start, GRAD_DTYPE, WIDE)
    masters = elements(row, MASTER, start, tl.float32, WIDE)
    firsts = elements(row, EXP_AVG, start, tl.float32, WIDE)
    seconds = elements(row, EXP_AVG_SQ, start, tl.float32, WIDE)
    largest = elements(row, MAX_EXP_AVG_SQ, start, tl.float32, WIDE)
    shadows = elements(row, SHADOW, start, SHADOW_DTYPE or tl.float32, WIDE)
    shadowed = tl.load(row + SHADOW) != 0
    decay, step_size, correction = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    for at in range(0, BLOCK if WIDE else left, TILE):
        if WIDE:
            mask = None
        else:
            mask = at + tl.arange(0, TILE) < left
        g = read_gradient(grads + at, mask, grad_scale, clip, GRAD_DTYPE, MAXIMIZE)
        p = tl.load(masters + at, mask=mask)
        m = tl.load(firsts + at, mask=mask)
        v = tl.load(seconds + at, mask=mask)
        if drift is not None:
            look = shadowed
            if WIDE:
                look = shadowed & ((at // TILE + phase) % stride == 0)
            if look:
                note_drift(shadows + at, mask, p, drift, SHADOW_DTYPE)
        if DECOUPLED:
            p -= decay * p
        else:
            g += weight_decay * p
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        tl.store(firsts + at, m, mask=mask)
        tl.store(seconds + at, v, mask=mask)
        if AMSGRAD:
            v = tl.maximum(tl.load(largest + at, mask=mask), v)
            tl.store(largest + at, v, mask=mask)
        p -= tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), correction) + eps)
        tl.store(masters + at, p, mask=mask)
        if SHADOW_DTYPE is not None:
            if shadowed:
                tl.store(shadows + at, to_nearest(p, SHADOW_DTYPE), mask=mask)


@triton.jit(do_not_specialize=["stride", "phase"])
def _adamw(
    table, blocks, scalars, beta1, beta2, rest1, rest2, eps, weight_decay,
    grad_scale, clip, found_inf, drift, stride, phase,
    GRAD_DTYPE: tl.constexpr, SHADOW_DTYPE: tl.constexpr, DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """One block: find the tensor, then update with wide accesses where that is possible."""
    place = blocks + 2 * tl.program_id(0)
    tensor = tl.load(place)
    start = tl.load(place + 1).to(tl.int64) * BLOCK
    row = table + tensor * COLUMNS
    flags = tl.load(row + FLAGS)
    live = (flags & LIVE) != 0
    if found_inf is not None:
        live = live & (tl.load(found_inf) == 0)
    if live:
        if ((flags & ALIGNED) != 0) & (tl.load(row + NUMEL) - start >= BLOCK):
            _update(row, start, scalars + 3 * tensor, beta1, beta2, rest1, rest2, eps,
                    weight_decay, grad_scale, clip, drift, stride, phase, GRAD_DTYPE,
                    SHADOW_DTYPE, DECOUPLED, AMSGRAD, MAXIMIZE, True)  # fmt: skip
        else:
            _update(row, start, scalars + 3 * tensor, beta1, beta2, rest1, rest2, eps,
                    weight_decay, grad_scale, clip, drift, stride, phase, GRAD_DTYPE,
                    SHADOW_DTYPE, DECOUPLED, AMSGRAD, MAXIMIZE, False)  # fmt: skip


def adamw(
    table: AddressTable,
    settings: AdamSettings,
    scalars: StepScalars,
    grad_dtype: torch.dtype,
    shadow_dtype: torch.dtype | None,
) -> None:
    """Take one step for every live row of `table`, in place.

    Args:
        table: Rows of addresses: master, grad, shadow or 0, exp_avg, exp_avg_sq, max_exp_avg_sq
            or 0, step. All float32 but grad and shadow; the step is one float32.
        settings: The group's.
        scalars: This step's.
        grad_dtype: Of every gradient: float32, bfloat16 or float16.
        shadow_dtype: Of every shadow: bfloat16 or float16; None if no row has one.
    """
    s = settings
    num_tensors, num_blocks = len(table.numels), len(table.blocks)
    corrections = torch.empty(num_tensors, 3, dtype=torch.float32, device=table.device)
    log1, log2 = (math.log(b) if b else -math.inf for b in (s.beta1, s.beta2))
    is_tensor = isinstance(s.lr, Tensor)
    _advance[(num_tensors,)](
        table.rows, corrections, s.lr, log1, log2, s.weight_decay, scalars.found_inf,
        LR_TENSOR=is_tensor, num_warps=1,
    )  # fmt: skip
    if not num_blocks:
        return
    _adamw[(num_blocks,)](
        table.rows, table.blocks, corrections, s.beta1, s.beta2, 1 - s.beta1, 1 - s.beta2, s.eps,
        s.weight_decay, scalars.grad_scale, scalars.clip, scalars.found_inf,
        scalars.drift if shadow_dtype is not None else None, *scalars.looked_at(),
        GRAD_DTYPE=TRITON_DTYPE[grad_dtype], SHADOW_DTYPE=TRITON_DTYPE[shadow_dtype],
        DECOUPLED=s.decoupled, AMSGRAD=s.amsgrad, MAXIMIZE=s.maximize, num_warps=WARPS,
    )  # fmt: skip


def adamw_reference(
    master: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    settings: AdamSettings,
    scalars: StepScalars,
) -> None:
    """Do to one tensor, in plain torch and in place, what the kernel does; in `master`'s dtype.

    Args:
        master: The parameter; float64 for a reference.
        grad: Same shape.
        state: step, exp_avg, exp_avg_sq, and max_exp_avg_sq with amsgrad.
        settings: The group's.
        scalars: This step's; `drift` is not looked at.
    """
    s = settings
    if scalars.found_inf is not None and float(scalars.found_inf):
        return
    g = read_gradient_reference(grad, master.dtype, scalars, maximize=s.maximize)
    lr = float(s.lr)
    if s.decoupled:
        master -= lr * s.weight_decay * master
    else:
        g = g + s.weight_decay * master
    state["step"] += 1
    t = float(state["step"])
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m.copy_(s.beta1 * m + (1 - s.beta1) * g)
    v.copy_(s.beta2 * v + (1 - s.beta2) * g * g)
    if s.amsgrad:
        v = state["max_exp_avg_sq"].copy_(torch.maximum(state["max_exp_avg_sq"], v))
    denominator = v.sqrt() / math.sqrt(1 - s.beta2**t) + s.eps
    master -= lr / (1 - s.beta1**t) * m / denominator
