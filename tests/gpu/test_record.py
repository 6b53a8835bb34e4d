"""The record of steps on a CUDA device: nothing waits for it, losses arrive, memory and energy."""

import pytest
import torch
from torch import nn

import magi_train
from magi_train import Config
from magi_train.core.hardware import energy_counter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def steps_of(count):
    model = nn.Linear(256, 256, device="cuda")
    prepared = magi_train.prepare(model, config=Config(tier="eager"))
    step = magi_train.prepare_step(lambda x: prepared(x).square().mean(), prepared)
    x = torch.randn(64, 256, device="cuda")
    step(x).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(count):
            step(x).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    want = step(x).item()
    return magi_train.report(prepared).steps, want


def test_no_step_waits_for_the_device_and_losses_arrive():
    steps, want = steps_of(50)
    assert steps.count == 51
    assert steps.memory_of == "allocated on the device"
    assert steps.memory_gib[-1][1] == pytest.approx(torch.cuda.max_memory_allocated() / 2**30, 1e-3)
    assert steps.loss
    assert all(value == pytest.approx(want, rel=1e-5) for _, value in steps.loss)


def test_energy_grows():
    read = energy_counter()
    if read is None:
        pytest.skip("this GPU has no energy counter")
    before = read()
    for _ in range(200):
        torch.randn(2048, 2048, device="cuda") @ torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    assert read() >= before
