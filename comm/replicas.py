"""Replicas: whether all ranks hold the same weights, by a checksum of each parameter.

Data-parallel ranks never send weights, so what drives them apart (a step on one rank only, a
parameter changed by hand, a defect of memory) stays unseen until the loss shows it. A checksum is
the sum of a parameter's bits, read as integers, in 64 bits: the order of summation does not matter,
and one element that differs always changes it; elements that only changed places are not seen. It
costs one read of the weights and 8 bytes a parameter on the wire.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from magi_train.core.errors import ReplicaMismatchError
from magi_train.core.world import World

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor`'s bits as integers, `[]` in int64."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view(_INTEGERS[real.element_size()]).sum(dtype=torch.int64)


def compare(parameters: Mapping[str, Tensor], world: World, device: torch.device) -> None:
    """Compare the checksums of all ranks; a collective.

    Raises:
        ReplicaMismatchError: On every rank, if a parameter differs on any.
    """
    with torch.no_grad():
        mine = torch.stack([checksum(p.detach()) for p in parameters.values()])
        everybody = [torch.empty_like(mine) for _ in range(world.size)]
        work = dist.all_gather(everybody, mine, async_op=True)
        world.wait(work, device, "the comparison of replicas")
        sums = torch.stack(everybody)
        different = (sums != sums[0]).any(0)
    if not different.any():
        return
    which = different.nonzero().flatten().tolist()
    name, values = list(parameters)[which[0]], sums[:, which[0]].tolist()
    ranks = [rank for rank, value in enumerate(values) if value != values[0]]
    raise ReplicaMismatchError(
        f"{name} is not the same on all ranks: ranks {ranks} differ from rank 0, and so do "
        f"{len(which) - 1} parameters after it. Every rank must take the same optimizer steps, and "
        "nothing else may write weights; start again from a checkpoint"
    )
