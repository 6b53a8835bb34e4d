"""Run a function in N gloo processes and get each rank's result, or how it failed.

A rank is a process of its own. Where CUDA is not available it is forked off a server that did
nothing but import what every rank imports, instead of importing it once more.
"""

import contextlib
import datetime
import multiprocessing.forkserver
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

IMPORTED = ["torch", "torch._dynamo", "torch._inductor.compile_fx", "magi_train.api"]
ENVIRONMENT = dict(os.environ)
"""Before any test: some variables are read by those imports."""


@dataclass
class Outcome:
    """What one rank left behind.

    Attributes:
        value: What the function returned; None if it raised or was ended.
        error: "TypeName: message" of what it raised; "" if it returned.
        ended_at: time.monotonic() when it was done, None if it never got there.
        exit_code: Of the process.
    """

    value: Any = None
    error: str = ""
    ended_at: float | None = None
    exit_code: int | None = None


def _context() -> Any:
    if torch.cuda.is_available():
        return mp.get_context("spawn")  # CUDA may not be used behind a fork
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    variables = dict(os.environ)
    _set_environment(ENVIRONMENT)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        _set_environment(variables)
    return context


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _join(rank: int, world_size: int, port: int, folder: str, variables: dict[str, str]) -> None:
    """Make this process a gloo rank that writes its output to a file."""
    torch.set_num_threads(1)
    _set_environment(variables)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    log = os.open(f"{folder}/{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    seconds = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=seconds)


def _call(fn: Callable[..., Any], *args: Any) -> Outcome:
    outcome = Outcome()
    try:
        outcome.value = fn(*args)
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    outcome.ended_at = time.monotonic()
    return outcome


def _child(joined: tuple[Any, ...], fn: Any, args: Any) -> None:
    _join(*joined)
    rank, world_size, _, folder, _ = joined
    outcome = _call(fn, rank, world_size, *args)
    Path(f"{folder}/{rank}.pickle").write_bytes(pickle.dumps(outcome))
    if not outcome.error:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0 if not outcome.error else 1)  # a failed rank cannot take part in a clean end


def _serve(joined: tuple[Any, ...], pipe: Any) -> None:
    _join(*joined)
    rank, world_size = joined[:2]
    variables = dict(os.environ)
    while (work := pipe.recv()) is not None:
        torch._dynamo.reset()
        _set_environment(variables)  # the work before may have changed them
        pipe.send(_call(work[0], rank, world_size, *work[1]))
    os._exit(0)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class RankPool:
    """Two gloo processes that run one function after the other; new ones after a failure."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def __call__(self, fn: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Outcome]:
        """Run `fn(rank, 2, *args)` on both ranks; `fn` must be importable."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((fn, args))
        deadline = time.monotonic() + timeout
        outcomes = []
        for rank, pipe in enumerate(self._pipes):
            alive = pipe.poll(max(0.0, deadline - time.monotonic()))
            try:
                outcomes.append(pipe.recv() if alive else Outcome(error=f"rank {rank} hung"))
            except EOFError:
                outcomes.append(Outcome(error=f"rank {rank} died"))
        if any(o.error for o in outcomes):
            self.close(patience=0.0)
        return outcomes

    def _start(self) -> None:
        context, port = _context(), free_port()
        self._folder = tempfile.mkdtemp()
        for rank in range(2):
            mine, theirs = context.Pipe()
            joined = (rank, 2, port, self._folder, dict(os.environ))
            process = context.Process(target=_serve, args=(joined, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)

    def close(self, patience: float = 5.0) -> None:
        """End the processes; those that idle end by themselves, and keep what was measured."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it has died
                pipe.send(None)
        for process in self._processes:
            process.join(patience)
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def run_ranks(
    fn: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 240
) -> list[Outcome]:
    """Run `fn(rank, world_size, *args)` on every rank; `fn` must be importable."""
    context, port = _context(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        joined = [(r, world_size, port, folder, dict(os.environ)) for r in range(world_size)]
        processes = [context.Process(target=_child, args=(each, fn, args)) for each in joined]
        for p in processes:
            p.start()
        deadline = time.monotonic() + timeout
        for p in processes:
            p.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, p in enumerate(processes) if p.is_alive()]
        for p in processes:
            p.kill()
            p.join()
        logs = {r: Path(f"{folder}/{r}.log") for r in range(world_size)}
        text = {r: log.read_text()[-6000:] if log.exists() else "" for r, log in logs.items()}
        assert not hung, f"ranks {hung} were still running after {timeout} s: {text}"
        outcomes = []
        for rank, p in enumerate(processes):
            path = Path(f"{folder}/{rank}.pickle")
            outcome = pickle.loads(path.read_bytes()) if path.exists() else Outcome()
            outcome.exit_code = p.exitcode
            if not path.exists():
                outcome.error = f"ended with {p.exitcode}: {text[rank]}"
            outcomes.append(outcome)
        return outcomes


def values(outcomes: list[Outcome]) -> list[Any]:
    """Return all results; fail with the errors if a rank has none."""
    assert not any(o.error for o in outcomes), "\n".join(o.error for o in outcomes)
    return [o.value for o in outcomes]
