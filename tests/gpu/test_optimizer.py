"""The fused optimizer step on a real device, beside torch's fused one and float64. Needs CUDA."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

pytest.importorskip("triton")
from magi_train.core.report import Report
from magi_train.fusion.kernels import multi_tensor
from magi_train.fusion.kernels.multi_tensor import BLOCK_ELEMENTS, StepScalars
from magi_train.fusion.optimizer import TakenOver, take_over
from tests.close import difference, tolerance
from tests.optimizers import ALL, give_gradients, parameters, reference_step

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or multi_tensor.interpreted(),
    reason="needs a CUDA device and TRITON_INTERPRET unset",
)

STEPS = 5
SIZES = (1, 7, 1024, BLOCK_ELEMENTS, 3 * BLOCK_ELEMENTS + 5, 0, 1_000_003)
LIMIT = tolerance(torch.float32, 1, 8 * STEPS)


def taken(optimizer, **kwargs):
    take_over(optimizer, Report(), **kwargs)
    assert isinstance(optimizer, TakenOver)
    return optimizer


def apart(got, want):
    """Return the largest difference, each tensor relative to its largest element."""
    return difference(
        {i: p.detach().cpu() for i, p in enumerate(got)}, dict(enumerate(w.cpu() for w in want))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_steps_equal_float64_and_torch_fused(name, dtype):
    kind, settings = ALL[name]
    ours, theirs = parameters(SIZES, "cuda"), parameters(SIZES, "cuda")
    masters, states = [p.detach().double() for p in ours], [{} for _ in ours]
    shadows = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in ours[::2]}
    optimizer = taken(kind(ours, **settings, fused=True), shadow_of=shadows.get)
    reference = kind(theirs, **settings, fused=True)
    scalars = StepScalars(grad_scale=torch.tensor(8.0, device="cuda"))
    for step in range(STEPS):
        give_gradients(ours, step, dtype, scale=8.0)
        grads = [p.grad.double() for p in ours]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.float()
        for each in (optimizer, reference):
            each.grad_scale = scalars.grad_scale
            each.found_inf = torch.tensor(float(step == 2), device="cuda")
            each.step()
        if step != 2:
            reference_step(kind, settings, masters, grads, states, scalars)
    assert apart(ours, masters) <= LIMIT
    assert apart(ours, theirs) <= 2 * LIMIT
    for p, shadow in shadows.items():
        assert torch.equal(shadow, p.bfloat16())
    for p, q, state in zip(ours, theirs, states, strict=True):
        for key in reference.state[q]:  # values are ours: torch rounds the betas to float32
            assert apart([optimizer.state[p][key]], [state[key].double()]) <= 2 * LIMIT, key


def test_views_that_are_not_aligned():
    """Gradients and parameters at any offset, as in a bucket; their neighbours stay."""
    sizes, memory = (5, BLOCK_ELEMENTS + 3, 4096), torch.randn(40_000, device="cuda")
    before, ours, start = memory.clone(), [], 1
    for n in sizes:
        ours.append(nn.Parameter(memory[start : start + n]))
        start += n + 2
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for params, optimizer in ((ours, taken(AdamW(ours))), (theirs, AdamW(theirs, fused=True))):
        give_gradients(params, 0)
        optimizer.step()
    assert apart(ours, [p.detach().double() for p in theirs]) <= LIMIT
    start = 0
    for p, n in zip(ours, sizes, strict=True):
        gap = p.storage_offset()
        assert torch.equal(memory[start:gap], before[start:gap])
        start = gap + n
    assert torch.equal(memory[start:], before[start:])


def test_drift_is_seen():
    params = parameters(SIZES, "cuda")
    shadows = {p: p.detach().bfloat16() for p in params}
    drift = torch.zeros((), dtype=torch.int32, device="cuda")
    optimizer = taken(AdamW(params), shadow_of=shadows.get, drift=drift)
    for step in range(3):
        give_gradients(params, step)
        if step == 2:
            assert int(drift) == 0
            params[-1].data[-1] += 1
        optimizer.step()
    assert int(drift) == 1


@pytest.mark.parametrize("fused", [None, True])
def test_no_step_waits_for_the_device(fused):
    params = parameters(SIZES, "cuda")
    optimizer = taken(AdamW(params, lr=torch.tensor(1e-3, device="cuda"), fused=fused,
                            foreach=None if fused else False))  # fmt: skip
    give_gradients(params, 0)
    optimizer.step()
    give_gradients(params, 1)  # new addresses
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.clip_factor = torch.ones((), device="cuda")
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {float(optimizer.state[p]["step"]) for p in params} == {2.0}
    place = {v["step"].device.type for v in optimizer.state_dict()["state"].values()}
    assert place == {"cuda" if fused else "cpu"}
