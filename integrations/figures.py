"""What a training step takes: seconds, memory, energy, exposed communication, and its arithmetic.

Times are of two kinds: steps that are waited for give the median and the tenths; as many back to
back give the mean that people see when they train. Start-up is the time from the begin of the
set-up to the end of the warm-up, less the warm-up's steps at their later speed.

Model FLOPs utilisation is that of Chowdhery et al., PaLM (arXiv:2204.02311), appendix B:

    mfu = FLOPs of a step on one rank / (seconds of a step, back to back x peak of one GPU)

FLOPs are counted by torch.utils.flop_counter over the module as it was given: matrix products,
convolutions and attention, of forward and backward, 2 for a multiplication and an addition. Causal
attention counts whole, and what a peer computes again does not count. The peak is the data sheet's,
for dense bfloat16, whatever a peer computes in: fp8 may come above 1.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from magi_train.core.hardware import energy_counter
from magi_train.integrations.trace import Span, is_communication, total, union

GIB = 2**30


def wait(device: torch.device) -> None:
    """Wait for the device and for all ranks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if torch.distributed.is_initialized():
        ids = [device.index] if device.type == "cuda" else None
        torch.distributed.barrier(device_ids=ids)


def measure(
    step: Callable[[int], Tensor], device: torch.device, warm_up: int, steps: int, began: float
) -> dict[str, Any]:
    """Time steps.

    Args:
        step: Takes the step of a number; returns its loss, detached.
        device: Where.
        warm_up: Steps before the timed ones.
        steps: Timed ones that are waited for, and again as many back to back.
        began: time.perf_counter() when the set-up began.

    Returns:
        Milliseconds, GiB, seconds and joules by name; and the first and the last loss.
    """
    on_gpu = device.type == "cuda"
    first_loss = float(step(0))
    wait(device)
    first = time.perf_counter() - began
    for i in range(1, warm_up):
        step(i)
    wait(device)
    warm = time.perf_counter() - began
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for i in range(steps):
        wait(device)
        begin = time.perf_counter()
        step(warm_up + i)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    middle, tenths = statistics.median(seconds), statistics.quantiles(seconds, n=10)
    loss, in_a_row, joules = back_to_back(step, device, warm_up + steps, steps)
    found = {
        "step_ms": middle * 1e3,
        "step_ms_p10": tenths[0] * 1e3,
        "step_ms_p90": tenths[-1] * 1e3,
        "back_to_back_ms": in_a_row * 1e3,
        **_memory(device),
        "first_step_s": first,
        "warm_up_s": warm,
        "start_up_s": max(0.0, warm - warm_up * middle),
        "first_loss": first_loss,
        "loss": float(loss),
    }
    return found if joules is None else found | {"joules_per_step": joules}


def back_to_back(
    step: Callable[[int], Tensor], device: torch.device, start: int, steps: int
) -> tuple[Tensor, float, float | None]:
    """Take steps; return the last loss, and of one step the seconds and this GPU's joules."""
    wait(device)
    used = energy_counter()
    before, begin = used() if used else 0.0, time.perf_counter()
    for i in range(steps):
        loss = step(start + i)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - begin) / steps
    return loss, seconds, (used() - before) / steps if used else None


def _memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        most, held = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
        return {"peak_gib": most / GIB, "reserved_gib": held / GIB}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}


# -- where the time goes, on a GPU -----------------------------------------------------------------


def _device_spans(step: Callable[[int], Tensor], steps: int) -> list[tuple[str, Span]]:
    """Return what ran on the device in some steps: name, and microseconds from and to."""
    wait(torch.device("cuda", torch.cuda.current_device()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as traced:
        for i in range(steps):
            step(i)
        torch.cuda.synchronize()
    return [
        (event.name, (event.time_range.start, event.time_range.end))
        for event in traced.events()
        if event.device_type == torch.profiler.DeviceType.CUDA and event.time_range.elapsed_us() > 0
    ]


def communication(step: Callable[[int], Tensor], steps: int = 3) -> dict[str, float]:
    """Return, for one step, milliseconds of collectives, and of those that nothing else covers."""
    spans = _device_spans(step, steps)
    return exposed(
        [span for name, span in spans if is_communication(name)],
        [span for name, span in spans if not is_communication(name)],
        steps,
    )


def exposed(collectives: list[Span], others: list[Span], steps: int) -> dict[str, float]:
    """Return figures of one step from the spans of `steps`, in microseconds."""
    comm, compute = union(collectives), union(others)
    talks, busy, both = total(comm), total(compute), total(union(comm + compute))
    covered = talks + busy - both
    return {
        "comm_ms": talks / steps / 1e3,
        "exposed_comm_ms": (talks - covered) / steps / 1e3,
        "comm_under_compute": covered / talks if talks else 1.0,
        "gpu_busy_ms": both / steps / 1e3,
    }


def kernels(step: Callable[[int], Tensor], steps: int = 3, shown: int = 25) -> dict[str, Any]:
    """Return device milliseconds a step by kernel name, the longest first, and their sum."""
    by_name: dict[str, float] = {}
    for name, (start, end) in _device_spans(step, steps):
        by_name[name[:90]] = by_name.get(name[:90], 0.0) + (end - start) / 1e3 / steps
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:shown]
    return {"kernels": {n: round(ms, 3) for n, ms in longest}, "kernels_ms": sum(by_name.values())}


# -- arithmetic ----------------------------------------------------------------------------------


def model_flops(module: nn.Module, loss: Callable[[Any, Any], Tensor], batch: Any) -> int:
    """Return the FLOPs of forward and backward of one batch, as the head of this file counts.

    Tensors without data do: attention is counted as the matrix products it stands for, because the
    counter knows no fused kernel of the CPU, and counts the scores that fused ones compute again.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss(module, batch).backward()
    return int(counter.get_total_flops())


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """Return the model FLOPs utilisation of a step of one rank."""
    return flops / (seconds * peak)
