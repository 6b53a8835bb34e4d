"""Averages that copy engines carry, so that waiting for a link takes nothing from the backward.

NCCL's kernels hold multiprocessors for as long as a collective takes, waiting for other ranks
included, and the backward beside them does without. GPUs of one host that reach each other's memory
need no kernel for that: a bucket goes in pieces, two shots each, over memory that is mapped on all
ranks, and all that multiprocessors do is a mean and a copy.

    each rank's chunks of a piece  -> into their owners' memory, by copy engines
    barrier; the owner's mean over the ranks, in float32, rounded once
    the mean                       -> into everybody's memory, by copy engines
    barrier; the piece is copied, and widened, into the bucket's flat tensor

Each shot has its half of the memory, and between two writes to a place all ranks pass a barrier
that the reader enters after it has read: nothing is written over too early. All ranks get the same
bytes, and each number is rounded once, however many ranks there are.

Source: torch's own low-contention collectives (torch.distributed._symmetric_memory) move data in
this way. Differs: an all-reduce, of any size, in bounded memory.
"""

import logging
import platform
import threading
import time
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from magi_train.comm.codecs.lanes import StreamExchange
from magi_train.core import compat
from magi_train.core.config import CommConfig
from magi_train.core.errors import MagiError
from magi_train.core.world import GRACE_SECONDS, World

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 * 2**20
"""Of a bucket, at a time; a rank maps twice as much, for two shots."""
ALIGN_BYTES = 256


class PeerAverage:
    """The mean over ranks, through memory that all of them can write.

    Args:
        buffers: By rank, `[bytes]` of uint8, as mapped here; the same number of bytes each.
        rank: Of this process.
        barrier: Returns, or orders the current stream, after all ranks have come here.
    """

    def __init__(self, buffers: Sequence[Tensor], rank: int, barrier: Callable[[], None]) -> None:
        self._buffers, self._rank, self._barrier = buffers, rank, barrier
        self._half = buffers[0].numel() // 2

    def run(self, packed: Tensor, flat: Tensor) -> None:
        """Write the mean over ranks of `packed` to `flat`, in the order of the current stream.

        Args:
            packed: `[numel]`, of a floating-point dtype, contiguous.
            flat: `[numel]`, of that dtype or a wider one; may be `packed` itself.
        """
        # whole, aligned chunks for all ranks
        together = len(self._buffers) * (ALIGN_BYTES // packed.element_size())
        step = self._half // packed.element_size() // together * together
        for start in range(0, packed.numel(), step):
            self._piece(packed[start : start + step], flat[start : start + step], together)

    def _piece(self, packed: Tensor, flat: Tensor, together: int) -> None:
        size, me = len(self._buffers), self._rank
        chunk = -(-packed.numel() // together) * together // size
        num_bytes = size * chunk * packed.element_size()
        first, second = (
            [b[start : start + num_bytes].view(packed.dtype) for b in self._buffers]
            for start in (0, self._half)
        )
        parts = [packed[r * chunk : (r + 1) * chunk] for r in range(size)]
        order = [(me + i) % size for i in range(size)]  # not all ranks to one at a time
        for r in order:
            first[r][me * chunk :][: parts[r].numel()].copy_(parts[r])
        self._barrier()
        mean = second[me][me * chunk :][: parts[me].numel()]
        if mean.numel():
            torch.mean(first[me].view(size, chunk)[:, : mean.numel()], 0, out=mean)
        for r in order[1:]:
            second[r][me * chunk :][: mean.numel()].copy_(mean)
        self._barrier()
        flat.copy_(second[me][: flat.numel()])


class CopyEngines:
    """Averages of buckets on a stream of their own, watched for ranks that do not come.

    Args:
        world: The ranks; a failure is told through it.
        average: Does the work.
        timeout_seconds: After which a rank that does not come is an error on all.
    """

    def __init__(self, world: World, average: PeerAverage, timeout_seconds: float) -> None:
        self._average, self._timeout = average, timeout_seconds
        self._watched: tuple[StreamExchange, str, float] | None = None
        self._latest: tuple[StreamExchange, str, float] | None = None
        watched = weakref.ref(world), weakref.ref(self)
        threading.Thread(target=_watch, args=watched, name="magi-copies", daemon=True).start()

    def start(self, packed: Tensor, flat: Tensor, what: str) -> StreamExchange:
        """Begin to write the mean over ranks of `packed` to `flat`; see PeerAverage.run."""
        exchange = StreamExchange(lambda: self._average.run(packed, flat), packed, flat)
        self._latest = exchange, what, time.monotonic() + self._timeout
        self._watched = self._watched or self._latest
        return exchange

    def late(self) -> str:
        """Return what has not ended in time, "" if nothing.

        Averages end in their order: one at a time is looked at, and its event is asked for only
        when its time is over, as a CUDA graph that is being recorded forbids that.
        """
        if self._watched is None or time.monotonic() <= self._watched[2]:
            return ""
        exchange, what, _ = self._watched
        if not exchange.arrived():
            return what
        self._watched = self._latest
        return ""


def _watch(world: "weakref.ref[World]", engines: "weakref.ref[CopyEngines]") -> None:
    """Tell all ranks when an average is late: a waiting kernel cannot say what it waits for."""
    while True:
        time.sleep(1)
        ranks, watched = world(), engines()
        if ranks is None or watched is None:
            return
        if what := watched.late():
            error = MagiError(
                f"rank {ranks.rank} waited in vain for the other ranks in the average of {what}; "
                "every rank must take the same number of steps (uneven data?)"
            )
            logger.error("%s", error)  # the others may have ended, and CUDA's error says nothing
            ranks.fail(error)
            return
        del ranks, watched


_known: "weakref.WeakKeyDictionary[World, dict[torch.device, CopyEngines]]"
_known = weakref.WeakKeyDictionary()


def copy_engines(
    config: CommConfig, world: World, device: torch.device, timeout_seconds: float
) -> CopyEngines | None:
    """Return what averages gradients if `config` asks for copy engines; a collective.

    Raises:
        MagiError: The ranks' GPUs do not reach each other's memory; says why.
    """
    if world.size == 1 or not config.copy_engines:
        return None
    known = _known.setdefault(world, {})
    if device not in known:
        average, why = _mapped(world, device, timeout_seconds)
        if average is None:
            raise MagiError(
                f"CommConfig.copy_engines needs GPUs that reach each other's memory, but {why}; "
                "leave it out"
            )
        known[device] = CopyEngines(world, average, timeout_seconds)
    return known[device]


def _mapped(
    world: World, device: torch.device, timeout_seconds: float
) -> tuple[PeerAverage | None, str]:
    """Map memory on all ranks; return what averages through it, or why that cannot be."""
    if not world.uses_nccl(device):
        return None, f"gradients lie on {device.type} and travel by {world.backend}"
    where = [platform.node(), str(torch.cuda.get_device_properties(device).uuid)]
    places = world.gather("the GPUs of the ranks", where, timeout_seconds)
    if len({host for host, _ in places}) > 1:
        return None, "the ranks are on several hosts"
    if len({gpu for _, gpu in places}) < world.size:
        return None, "ranks share a GPU"
    average, why = None, ""
    try:
        # the barrier ends in a trap, which says nothing: the watch is to come first
        patience = timeout_seconds + 2 * GRACE_SECONDS
        buffers, barrier = compat.peer_memory(2 * PIECE_BYTES, device, patience)
        average = PeerAverage(buffers, world.rank, barrier)
    except RuntimeError as error:
        why = f"on rank {world.rank}: {error}".splitlines()[0]
    reasons = list(filter(None, world.gather("memory of the GPUs", why, timeout_seconds)))
    return (None, reasons[0]) if reasons else (average, "")
