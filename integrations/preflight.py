"""A check on every rank before the script starts: can these ranks work together, on this machine?

Each rank forks; the child compares versions and settings through the launcher's store, looks at its
device's free memory and at the disk, and takes part in one all-reduce over the back end that
training will use. Where the launcher keeps its store to itself (rank 0 then hosts one, and would
have to host it twice), ranks of one node meet in a file instead. In a child, because NCCL and CUDA
then leave nothing behind in the process that runs the script, and a back end that hangs can be
killed and named. Source of the wish: users of NCCL cannot tell a broken link from a bug of theirs
(pytorch-lightning issue 19487).
"""

import json
import os
import platform
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, TCPStore  # type: ignore[attr-defined]

from magi_train.core import settings, versions
from magi_train.core.errors import MagiError

LIMIT_SECONDS = 60.0
LOW_DISK_BYTES = 5 * 2**30
BUSY_FRACTION = 0.1
"""Part of a device's memory that others may hold without a warning."""
NUMEL = 2**20


def check(own_view: bool = False, folder: Path | None = None) -> None:
    """Run the check; a line from rank 0 says what was found, or why nothing was looked at.

    Args:
        own_view: Each rank sees its own device only, as under torchrun's --virtual-local-rank.
        folder: An empty one that all ranks of this node have.

    Raises:
        MagiError: Ranks differ, or the all-reduce fails or does not end; names rank and step.
    """
    if int(os.environ["WORLD_SIZE"]) == 1 or os.environ.get("TORCHELASTIC_RESTART_COUNT") != "0":
        return
    file = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        if folder is None or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
            _say_skipped()
            return
        file = folder / "preflight"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        if own_view:
            os.environ["LOCAL_WORLD_SIZE"] = "1"
        _child(writer, file)
    os.close(writer)
    steps = _follow(reader, child)
    last = steps[-1] if steps else "its start"
    if last != "done":
        raise MagiError(
            f"the pre-flight check of rank {os.environ['RANK']} failed at {last}; "
            "`magi run --no-preflight` starts without it"
        )


def _say_skipped() -> None:
    if os.environ["RANK"] == "0":
        sys.stderr.write(
            "magi run: no pre-flight check: restarted ranks need a store of their own "
            "(--max-restarts), so the launcher shares none, and ranks of several nodes have no "
            "other place to meet; a start without --max-restarts checks them\n"
        )
        sys.stderr.flush()


def _follow(reader: int, child: int) -> list[str]:
    """Return the steps that the child reports, killing it at the limit."""
    deadline, text = time.monotonic() + LIMIT_SECONDS, b""
    while select.select([reader], [], [], max(deadline - time.monotonic(), 0.0))[0]:
        chunk = os.read(reader, 65536)
        if not chunk:  # the child has ended
            break
        text += chunk
    else:
        os.kill(child, signal.SIGKILL)
        text += f": no end within {LIMIT_SECONDS:.0f} s".encode()
    os.waitpid(child, 0)
    os.close(reader)
    return text.decode(errors="replace").split("\0")[1:]


def _child(writer: int, file: Path | None) -> None:
    def step(name: str) -> None:
        os.write(writer, f"\0{name}".encode())

    try:
        _examine(step, file)
        os.write(writer, b"\0done")
    except Exception as error:  # noqa: BLE001  it goes to the parent, which raises
        os.write(writer, f": {error}".encode())
        if not isinstance(error, MagiError):
            os.write(writer, ("\n" + traceback.format_exc()).encode())
    finally:
        os._exit(0)  # not through the cleanup of a process that was only half started


def _examine(step: Any, file: Path | None) -> None:
    begin = time.monotonic()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    step("meeting the other ranks")
    store = PrefixStore("magi/preflight", _meeting_place(file, size))
    step("looking at the device")
    device, mine = _device(), facts()
    mine["device"] = str(device)
    answers = gather(store, "facts", mine, rank, size)
    step("comparing the ranks")
    compare(answers)
    backends = {"gloo" if a["device"] == "cpu" else "nccl" for a in answers}
    step(f"all-reduce ({', '.join(sorted(backends))})")
    if len(backends) > 1:
        raise MagiError(f"some ranks have a GPU and others have none: {answers}")
    backend = backends.pop()
    milliseconds = all_reduce(store, backend, device, rank, size)
    gather(store, "end", {}, rank, size)  # or the first to leave breaks the others' connections
    if rank == 0:
        versions = f"torch {answers[0]['equal']['torch']}"
        seconds = time.monotonic() - begin
        sys.stderr.write(
            f"magi run: pre-flight ok in {seconds:.1f} s: {size} ranks, {backend} all-reduce of "
            f"{NUMEL * 4 // 2**20} MiB in {milliseconds:.1f} ms, {versions}\n"
            + "".join(f"magi run: warning: {w}\n" for w in warnings_of(answers))
        )
        sys.stderr.flush()


def _meeting_place(file: Path | None, size: int) -> Any:
    """Return a store that all ranks reach: in `file`, or the launcher's."""
    if file is not None:
        return FileStore(str(file), size)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=LIMIT_SECONDS)
    return TCPStore(host, port, size, is_master=False, timeout=limit)


def _device() -> torch.device:
    local = int(os.environ["LOCAL_RANK"])
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = torch.cuda.device_count()
    if count >= ranks:
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device("cpu")


def facts() -> dict[str, Any]:
    """Return what this rank is: `equal` must be so on all ranks, the rest is looked at."""
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "gpus": torch.cuda.device_count(),
        "ranks_here": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "free_disk_bytes": shutil.disk_usage(os.getcwd()).free,
        "equal": {
            "torch": torch.__version__,
            "triton": versions.installed("triton") or "none",
            "magi-train": versions.own(),
            "python": platform.python_version(),
            settings.VARIABLE: os.environ.get(settings.VARIABLE, ""),
        },
    }
    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        found |= {"free_bytes": free, "total_bytes": total}
    return found


def gather(store: Any, what: str, mine: dict[str, Any], rank: int, size: int) -> list[Any]:
    """Return the answers of all ranks."""
    store.set(f"{what}/{rank}", json.dumps(mine))
    store.wait([f"{what}/{r}" for r in range(size)], timedelta(seconds=LIMIT_SECONDS / 2))
    return [json.loads(store.get(f"{what}/{r}")) for r in range(size)]


def compare(answers: list[Any]) -> None:
    """Raise MagiError where ranks differ in what must be equal; names the rank and the thing."""
    for rank, answer in enumerate(answers):
        for name, value in answers[0]["equal"].items():
            theirs = answer["equal"][name]
            if theirs != value:
                raise MagiError(
                    f"{name} must be the same on every rank: rank 0 on {answers[0]['host']} has "
                    f"{value or 'none'}, rank {rank} on {answer['host']} has {theirs or 'none'}"
                )


def warnings_of(answers: list[Any]) -> list[str]:
    """Return sentences on full disks, and on devices that are shared or busy."""
    found = {}
    for rank, answer in enumerate(answers):
        if answer["free_disk_bytes"] < LOW_DISK_BYTES:
            gib = answer["free_disk_bytes"] / 2**30
            found[answer["host"]] = (
                f"{gib:.1f} GiB of disk are free on {answer['host']}: checkpoints may not fit"
            )
        if answer["ranks_here"] > 1 and 0 < answer["gpus"] < answer["ranks_here"]:
            found[f"GPUs of {answer['host']}"] = (
                f"{answer['ranks_here']} ranks share {answer['gpus']} GPU(s) on {answer['host']}: "
                "NCCL refuses that; --nproc auto starts one rank a GPU"
            )
        total = answer.get("total_bytes", 0)
        used = total - answer.get("free_bytes", 0)
        if used > BUSY_FRACTION * total:
            found[f"rank {rank}"] = (
                f"others hold {used / 2**30:.0f} of {total / 2**30:.0f} GiB on the device of "
                f"rank {rank} ({answer['host']})"
            )
    return list(found.values())


def all_reduce(store: Any, backend: str, device: torch.device, rank: int, size: int) -> float:
    """Return the milliseconds of one all-reduce of NUMEL floats, after a first one.

    Raises:
        MagiError: The sum is wrong.
    """
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=LIMIT_SECONDS / 2),
    )
    for _ in range(2):
        values = torch.ones(NUMEL, device=device)
        begin = time.monotonic()
        dist.all_reduce(values)
        low, high = float(values.min()), float(values.max())  # waits for the device
        milliseconds = (time.monotonic() - begin) * 1e3
    if low != size or high != size:
        raise MagiError(f"the sum of ones over {size} ranks is {low:g} to {high:g}")
    return milliseconds
