"""Kernels that compile in a process of their own while PyTorch captures and compiles a graph.

The first launch of a Triton kernel takes 1 to 4 s: four kernels made 12 of the 41 s in which BERT
started on an H200, where PyTorch compiled for 20. So who knows that a kernel will be needed says so
here. A process without a device compiles it into Triton's cache, by a launch on tensors without
memory that stops there; Triton's compiler holds the interpreter's lock, so that a thread would
delay what goes on. Then a thread launches the kernel on next to nothing, which reads the cache and
builds Triton's launcher, by a C compiler. Both know kernels by their specialization, so the early
arguments must have the types, constants and alignments of the late ones. A wrong guess costs time
of another processor, and a failure nothing: who needs the kernel meets it again.
"""

import atexit
import contextlib
import os
import pickle
import select
import subprocess
import sys
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from magi_train.core import compat

Launch = Callable[[torch.device], object]

DEVICES = ("cuda",)
"""Device types for which kernels compile ahead. Tests add "cpu", where a launch is any function."""
SECONDS = 60.0
"""How long one kernel may compile, and how long the process waits for the next one."""
_asked: set[tuple[Hashable, torch.device, Hashable]] = set()
_running: dict[Hashable, list[Future[None]]] = {}


@lru_cache(maxsize=1)
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "magi-train-kernels")


def compile_ahead(
    kernel: Hashable, device: torch.device, launch: Launch, variant: Hashable = None
) -> None:
    """Let a kernel compile, once for each device and variant.

    Args:
        kernel: What `wait` is told.
        device: On which it will run. On one that is not of DEVICES nothing compiles.
        launch: Launches it on next to nothing on a device, which is current if it is a CUDA one, or
            "meta". It can be pickled, and calls the kernel's function, not an op, which waits.
        variant: Tells apart what compiles to different code.
    """
    key = (kernel, device, variant)
    if device.type in DEVICES and key not in _asked:
        compat.share_triton_cache(device)
        _asked.add(key)
        _running.setdefault(kernel, []).append(_thread().submit(_compile, launch, device))


def wait(kernel: Hashable) -> None:
    """Return once nothing of that name is being compiled; what has not begun will not."""
    if _running:
        for future in _running.pop(kernel, ()):
            if not future.cancel():
                future.result()


def wait_for_all() -> None:
    """Return once nothing is being compiled."""
    for kernel in tuple(_running):
        wait(kernel)


def _compile(launch: Launch, device: torch.device) -> None:
    here: Any = contextlib.nullcontext()
    if device.type == "cuda":
        here = torch.cuda.device(device)
        if torch.version.hip is None:
            with contextlib.suppress(Exception):
                major, minor = torch.cuda.get_device_capability(device)
                _process("cuda", 10 * major + minor, 32).compile(launch)
    with contextlib.suppress(Exception), here:
        launch(device)


class Process:
    """A process that compiles for a device which it does not use.

    Args:
        target: Backend, architecture and threads of a warp, as Triton's GPUTarget.
    """

    def __init__(self, *target: str | int) -> None:
        self._target = target
        self._process = self._started()
        atexit.register(self.close)

    def _started(self) -> "subprocess.Popen[bytes]":
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from magi_train.fusion.ahead import serve; serve(*{self._target!r})"
        )
        env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        env.pop("TRITON_INTERPRET", None)
        return subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def close(self) -> None:
        """End it; the next kernel starts another."""
        self._process.kill()
        self._process.communicate()

    def compile(self, launch: Launch) -> bool:
        """Return whether it compiled what `launch` launches.

        Raises:
            OSError: It ended meanwhile, or cannot be started.
        """
        if self._process.poll() is not None:  # after SECONDS without work
            self.close()
            self._process = self._started()
        jobs, answers = self._process.stdin, self._process.stdout
        assert jobs is not None, "a pipe"
        assert answers is not None, "a pipe"
        jobs.write(pickle.dumps(launch).hex().encode() + b"\n")
        jobs.flush()
        if not select.select([answers], [], [], SECONDS)[0]:
            self._process.kill()
        return answers.readline() == b"done\n"


_process = lru_cache(maxsize=None)(Process)


def serve(backend: str, arch: int, warp_size: int) -> None:
    """Compile what stdin names, line by line, and answer each on stdout; until nobody asks."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no answer
    target, run = GPUTarget(backend, arch, warp_size), JITFunction.run
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    JITFunction.run = lambda *args, warmup, **keywords: run(*args, warmup=True, **keywords)
    while select.select([sys.stdin], [], [], SECONDS)[0] and (line := sys.stdin.readline()):
        answer = b"done\n"
        try:
            pickle.loads(bytes.fromhex(line))(torch.device("meta"))
        except Exception:  # noqa: BLE001  who needs the kernel meets it again
            answer = b"failed\n"
        answers.write(answer)
        answers.flush()
