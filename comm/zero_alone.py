"""What DeepSpeed takes from a launcher, for a process that none has started: a group, LOCAL_RANK.

Both are visible to the whole process: a script that makes its own group finds one, and a Lightning
Trainer waits for the ranks that LOCAL_RANK speaks of. So they go with the last engine, and the
variable before, where DeepSpeed 0.19 needs it while it is being set up only; at stage 3 the first
steps read it too.
"""

import os
from typing import Any

import torch
import torch.distributed as dist

_group: list[Any] = []
"""The process group that is ours, not the user's: at most one."""
_variable: list[str] = []
"""LOCAL_RANK, if it is ours."""


def join() -> int:
    """Make what is not there; return the local rank."""
    if "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = "0"
        _variable[:] = ["LOCAL_RANK"]
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        _group[:] = [dist.group.WORLD]
    return int(os.environ["LOCAL_RANK"])


def drop_variable() -> None:
    """Take LOCAL_RANK out of the environment, if `join` put it there."""
    while _variable:
        os.environ.pop(_variable.pop(), None)


def leave() -> None:
    """Undo `join`, and let DeepSpeed forget the group, which it keeps in places of its own."""
    drop_variable()
    if _group and dist.is_initialized() and dist.group.WORLD is _group.pop():
        import deepspeed

        deepspeed.comm.destroy_process_group()
