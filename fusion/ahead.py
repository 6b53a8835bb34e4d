"""Kernels that compile in a thread of their own while PyTorch captures and compiles a graph.

The first launch of a Triton kernel takes 1 to 4 s, most of them in LLVM, ptxas and a C compiler,
which leave the interpreter to others. Four kernels made 12 of the 41 s in which BERT started on an
H200; meanwhile PyTorch compiles for 20. So whoever knows early that a kernel will be needed lets
the thread launch it on next to nothing. What is compiled is found later by its specialization, so
the early arguments must have the types, constants and alignments of the late ones. A wrong guess
costs time of a processor, and a failure nothing: who needs the kernel meets it again.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import torch

_asked: set[tuple[str, torch.device, object]] = set()
_running: dict[str, list[Future[None]]] = {}


@lru_cache(maxsize=1)
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "magi-train-kernels")


def compile_ahead(
    kernel: str, device: torch.device, launch: Callable[[], object], variant: object = None
) -> None:
    """Launch a kernel in the thread, once for each device and variant.

    Args:
        kernel: What `wait` is told.
        device: On which it is launched, under `torch.cuda.device` on CUDA.
        launch: Launches it. It must call the kernel's function, not an op, which waits.
        variant: Tells apart what compiles to different code.
    """
    key = (kernel, device, variant)
    if key not in _asked:
        _asked.add(key)
        _running.setdefault(kernel, []).append(_thread().submit(_quietly, launch, device))


def _quietly(launch: Callable[[], object], device: torch.device) -> None:
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with contextlib.suppress(Exception), here:
        launch()


def wait(kernel: str) -> None:
    """Return once nothing of that name is being compiled in the thread."""
    if _running:
        for future in _running.pop(kernel, ()):
            future.result()


def wait_for_all() -> None:
    """Return once the thread is idle."""
    for kernel in tuple(_running):
        wait(kernel)
