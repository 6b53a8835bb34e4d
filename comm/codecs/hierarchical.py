"""Two levels: full precision inside of a node, int8 between nodes.

The links inside of a node are an order of magnitude faster than those between nodes, so only the
latter are worth a rounding. With L ranks in each of M nodes, a bucket is cut into L parts:

    node:    part l of every rank goes to local rank l, which adds them in rank order, in float32
    across:  local ranks l of all nodes exchange the node means of part l in two shots of int8
    node:    every local rank gives its part to the others

A node sends S / 4 bytes for a bucket of S in each shot, however many ranks it has; without levels
every one of its ranks would. Numbers are rounded twice, as in two_shot, but after the mean over the
node. Error feedback belongs to nodes: each rank keeps the residual of its part, 4 / L bytes for a
float32 parameter, and 4 / (L M) of what it owns. A parameter that no rank of a node used keeps its
residual there.

Source: Wang et al. (2023), ZeRO++ (hierarchical quantised collectives). Differs: nothing is rounded
inside of a node, and what is rounded is fed back.
"""

from collections.abc import Generator

import torch
from torch import Tensor

from magi_train.comm.codecs import Collective, Exchange, Scale
from magi_train.comm.codecs.two_shot import TwoShot
from magi_train.comm.host_memory import HostMemory
from magi_train.comm.plan import Bucket

FINITE = 1
"""Numbers behind a part that say whether all of it is finite."""


class Hierarchical(TwoShot):
    """Exchange a bucket in the steps above; `bucket.node_size` ranks in a row are a node.

    Residuals, float32: `[flags_offset / L]` and `[flags_offset / (L M)]`; as much again while an
    exchange is not committed.
    """

    among = "across"

    def __init__(
        self, bucket: Bucket, rank: int, world_size: int, memory: HostMemory | None = None
    ) -> None:
        self.node_size = bucket.node_size
        node, self.place = divmod(rank, self.node_size)
        super().__init__(bucket, node, world_size // self.node_size, memory)
        self.length = bucket.flags_offset // self.node_size
        self.start = self.place * self.length
        self.part = self.length // self.world_size

    @property
    def wire_format(self) -> str:
        """Return what travels between nodes."""
        return "int8"

    def exchange(self, flat: Tensor, used: set[str], scale: Scale) -> Exchange:
        """See Codec.exchange."""
        self._device = flat.device
        slots, ranks, length = self.bucket.slots, self.node_size, self.length
        body = flat[: self.bucket.flags_offset].view(ranks, length)
        rows = self._empty(ranks, length + len(slots))
        rows[:, :length] = body
        rows[:, length:] = self.used_flags(used, torch.float32, flat.device)
        out = self._empty(*rows.shape)
        received = yield Collective("all_to_all", rows, out, "node")

        mine = self._empty(length + FINITE)
        total = mine[:length].copy_(received[0, :length])
        for row in received[1:]:
            total += row[:length]
        total.div_(ranks)
        votes = yield from self._shots(total, self._used_here(used, received), scale)

        assert self.finite is not None
        mine[length:] = self.finite
        everything = self._empty(ranks * len(mine))
        everything = yield Collective("all_gather", mine, everything, "node")
        parts = everything.view(ranks, -1)
        body.copy_(parts[:, :length])
        flat[self.bucket.flags_offset :] = votes
        self.finite = parts[:, length:].bool().all()

    def _used_here(self, used: set[str], received: Tensor) -> set[str]:
        """Return the parameters that have a gradient on any rank of the node."""
        slots = self.bucket.slots
        if len(used) == len(slots):  # as a rule; else a device is waited for
            return used
        here = received[:, self.length :].sum(0).tolist()
        return {s.name for s, count in zip(slots, here, strict=True) if count}

    def mean_residual(self) -> Generator[Collective, Tensor, Tensor | None]:
        """See Codec.mean_residual."""
        mine = yield from super().mean_residual()
        if mine is None:
            return None
        out = self._empty(self.node_size * self.length)
        return (yield Collective("all_gather", mine, out, "node"))
