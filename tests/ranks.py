"""Run a function in N gloo processes and get each rank's result, or how it failed."""

import datetime
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


def _child(rank: int, world_size: int, port: int, folder: str, fn: Any, args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    log = os.open(f"{folder}/{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=300)
    )
    outcome = Outcome()
    try:
        outcome.value = fn(rank, world_size, *args)
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    outcome.ended_at = time.monotonic()
    Path(f"{folder}/{rank}.pickle").write_bytes(pickle.dumps(outcome))
    if not outcome.error:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0 if not outcome.error else 1)  # a failed rank cannot take part in a clean end


def run_ranks(
    fn: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 240
) -> list[Outcome]:
    """Run `fn(rank, world_size, *args)` on every rank; `fn` must be importable."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_child, args=(rank, world_size, port, folder, fn, args))
            for rank in range(world_size)
        ]
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
