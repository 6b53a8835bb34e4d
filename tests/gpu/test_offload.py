"""Activations that wait in pinned memory: streams, measured peak and step time. Needs CUDA."""

import gc
import sys
import time

import pytest
import torch

import magi_train
from magi_train import Config
from magi_train.core.hardware import measured_link, speed_of
from magi_train.memory import copies
from magi_train.memory.copies import ARRIVED, FETCH, SEND
from tests.memory.test_offload import leave_on_the_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GIB, TOLERANCE = 2**30, 0.03
STEPS_BEFORE, STEPS = 8, 16
"""Of the first ones some may be planned anew."""
SLOWER = 1.05
"""A hidden copy takes bandwidth of the device's memory: 1 to 2 % while it runs."""


def device():
    return torch.device("cuda", torch.cuda.current_device())


def test_copies_keep_their_numbers_beside_kernels_that_write_over_their_source():
    a = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for i in range(20):
        x = torch.full((2048, 4096), float(i), device="cuda").t()
        want = x[0, 0].item()
        host = SEND(x)
        a @ a  # so that the copy has something to run beside
        host = ARRIVED(host, x)
        x.fill_(-1.0)  # as whoever gets this memory next
        back = FETCH(host, device())
        a @ a
        back = ARRIVED(back, host)
        assert host.is_pinned()
        assert host.stride() == back.stride() == x.stride()
        assert bool((back == want).all())
    assert not copies._flying


def test_host_memory_is_used_again():
    x = torch.randn(2**22, device="cuda")
    addresses = set()
    for _ in range(10):
        host = ARRIVED(SEND(x), x)
        addresses.add(host.data_ptr())
        torch.cuda.synchronize()
        del host
    assert len(addresses) <= 2


def test_what_an_error_leaves_is_freed_once_it_is_copied():
    x = torch.randn(2**24, device="cuda")
    host = ARRIVED(SEND(x), x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    FETCH(host, device())  # nobody waits for it
    assert torch.cuda.memory_allocated() > before
    torch.cuda.synchronize()
    back = ARRIVED(FETCH(host, device()), host)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before + back.nbytes
    assert torch.equal(back, x)


def test_the_link_is_measured_in_tenths_of_what_is_expected(record_property):
    expected = speed_of("cuda").host
    link = measured_link(expected)
    record_property("link_gb_per_second", link / 1e9)
    assert 0 < link <= expected
    assert link / expected * 10 == pytest.approx(round(link / expected * 10))


def train(budget_gib, *, offload):
    """Return the last plan, peak in GiB, milliseconds a step, losses, gradients of two runs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
    model = LlamaForCausalLM(LlamaConfig(use_cache=False, **sizes, **heads)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    config = Config(tier="graph", memory_budget_gib=budget_gib, offload_activations=offload)
    module, optimizer = magi_train.prepare(model, optimizer, config=config)
    step = magi_train.prepare_step(lambda ids: module(input_ids=ids, labels=ids).loss, module)
    ids = torch.randint(0, 32000, (2, 8192), device="cuda")
    losses, gradients = [], []
    for _ in range(2):  # kernels with atomic sums differ from run to run
        with torch.autocast("cuda", torch.bfloat16):
            step(ids).backward()
        gradients.append({n: p.grad.cpu() for n, p in module.named_parameters()})
        optimizer.zero_grad()
    for i in range(STEPS_BEFORE + STEPS):
        if i == STEPS_BEFORE:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = step(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - start) / STEPS * 1e3
    plan = [r.plan for r in magi_train.report(module).rows if r.name == "fit_budget"][-1]
    peak = torch.cuda.max_memory_allocated() / GIB
    return plan, peak, milliseconds, torch.stack(losses), gradients


def test_a_llama_that_offloads(monkeypatch, capsys):
    """Keeps the budget as planned; steps and numbers are those of the same cut on the device.

    Where kernels are fused in another way, a value may be rounded to bfloat16 once more or less.
    """
    free, free_peak, free_ms, _, _ = train(1000.0, offload=False)
    held = sum(free["resident_gib"].values()) - free["resident_gib"].get("rounding", 0)
    budget = held + 0.5 * (free_peak - held)
    again, again_peak, again_ms, _, _ = train(budget, offload=False)
    plan, peak, ms, losses, gradients = train(budget, offload=True)
    leave_on_the_device(monkeypatch)
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        on_device, device_peak, device_ms, want_losses, want = train(budget, offload=True)
    shown = ("offloaded", "offloaded_gib", "copy_ms", "exposed_ms", "recompute_ms", "step_ms")
    lines = [f"budget {budget:.2f} GiB", f"{'':24}planned measured ms a step"]
    for name, p, gib, time_ms in (
        ("no limit", free, free_peak, free_ms),
        ("recomputed", again, again_peak, again_ms),
        ("offloaded", plan, peak, ms),
        ("the same, on the device", on_device, device_peak, device_ms),
    ):
        lines.append(f"{name:24}{p['planned_gib']:7.2f} {gib:8.2f} {time_ms:9.2f}")
    lines += [f"{key}: {plan[key]}" for key in shown]
    equal = sum(torch.equal(gradients[0][name], g) for name, g in want[0].items())
    lines.append(f"gradients that are equal bit for bit: {equal} of {len(want[0])}")
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    assert plan["offloaded"]
    assert not on_device["offloaded"]
    assert peak <= budget
    assert plan["planned_gib"] == pytest.approx(peak, rel=TOLERANCE)
    assert device_peak > peak
    assert losses[0] == want_losses[0]
    for name, gradient in want[0].items():
        spread = max((a[name] - b[name]).abs().max() for a, b in (gradients, want))
        rounding = torch.finfo(torch.bfloat16).eps * gradient.abs().max()
        assert (gradients[0][name] - gradient).abs().max() <= max(4 * spread, rounding), name
    assert ms <= device_ms * SLOWER + plan["exposed_ms"]
    assert not copies._flying
