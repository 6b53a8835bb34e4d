"""Give all ranks the tensors of rank 0, and never wait for a rank that has failed."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from magi_train.core.world import World


def broadcast(world: World, tensors: Sequence[Tensor]) -> None:
    """Overwrite `tensors` with those of rank 0, in one message for each dtype.

    Raises:
        RemoteRankError: Another rank failed meanwhile.
    """
    if world.size == 1 or not tensors:
        return
    with torch.no_grad():
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for t in tensors:
            by_dtype.setdefault(t.dtype, []).append(t)
        for group in by_dtype.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            work = dist.broadcast(flat.view(torch.uint8), 0, async_op=True)  # any dtype
            world.wait(work, flat.device, "the broadcast of rank 0's weights and buffers")
            if world.rank == 0:
                continue
            for t, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                t.copy_(part.view_as(t))
