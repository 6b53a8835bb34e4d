"""Lanes: where exchanges run while the backward computes.

Beside gloo, a collective blocks whoever waits for it. An exchange with two of them passes through
three lanes: the caller encodes and starts the first collective; thread 1 waits for it, combines,
and starts the second; thread 2 waits for that and decodes. One with four collectives, over
nodes, has two threads more. So one bucket can be combined and another decoded while a third is on
the wire. All collectives of a lane belong to process groups of that lane, and exchanges go through
each lane in the order of their start: every rank starts the same sequence in every group, whatever
the threads' timing, and whatever the caller's own collectives do in the default group.

Beside NCCL nothing blocks the host: the whole exchange is enqueued at once on a stream of its own,
and `wait` makes the caller's stream wait for its end.
"""

import functools
import queue
import threading
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from magi_train.comm.codecs import Collective
from magi_train.comm.nodes import Groups
from magi_train.core.world import World

LANES, LANES_WITH_NODES = 2, 4
"""Collectives that an exchange may have."""

END_SECONDS = 3.0
"""How long the end of a program waits for a lane; World.wait looks up once a second."""

T = TypeVar("T")
_lanes: "weakref.WeakKeyDictionary[World, dict[int, Lanes]]" = weakref.WeakKeyDictionary()


def begin(request: Collective, groups: Groups) -> tuple[Tensor, "dist.Work"]:
    """Start a collective; return where its result will be, and its handle."""
    tensor, group = request.tensor, groups.among(request.among)
    if request.kind == "all_reduce":
        return tensor, dist.all_reduce(tensor, group=group, async_op=True)
    result = request.out
    assert result is not None, "only an all-reduce works in place"
    if request.kind == "all_to_all":
        return result, dist.all_to_all_single(result, tensor, group=group, async_op=True)
    gather = getattr(dist, "all_gather_single", None)  # the name since torch 2.13
    gather = gather or dist.all_gather_into_tensor
    return result, gather(result, tensor, group=group, async_op=True)


def run(
    exchange: Generator[Collective, Tensor, T], world: World, device: torch.device, groups: Groups
) -> T:
    """Run an exchange from start to end in the caller; return its result."""
    value: Any = None
    with torch.no_grad():
        while True:
            try:
                request = exchange.send(value)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            value, work = begin(request, groups)
            world.wait(work, device, "an exchange of gradients' residuals")


class StreamExchange:
    """Work on a stream beside the backward's, enqueued all at once.

    Args:
        enqueue: Issues it, in the order of the current stream.
        tensors: What it reads and writes, made on the current stream; held until that has waited
            for the end.
    """

    def __init__(self, enqueue: Callable[[], None], *tensors: Tensor) -> None:
        self._held: tuple[Tensor, ...] = ()
        self._stream = _side_stream(tensors[0].device)
        self._begun = torch.cuda.current_stream(tensors[0].device)
        self._stream.wait_stream(self._begun)
        self._held = tensors
        with torch.no_grad(), torch.cuda.stream(self._stream):
            enqueue()
            self._end = self._stream.record_event()

    def wait(self) -> None:
        """Make the current stream wait for the end."""
        current = torch.cuda.current_stream(self._begun.device)
        self._end.wait(current)
        if current == self._begun:  # whose memory is given out again in its order
            self._held = ()

    def arrived(self) -> bool:
        """Return whether it has ended."""
        return self._end.query()

    def __del__(self) -> None:
        for tensor in self._held:  # an error came between, or another stream has waited
            tensor.record_stream(self._stream)


_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device, priority=-1)  # its kernels are short
    return _streams[device]


class ThreadExchange:
    """An exchange that is on its way through the lanes."""

    def __init__(
        self, exchange: Generator[Collective, Tensor, None], world: World, what: str
    ) -> None:
        self.exchange, self.world, self.what = exchange, world, what
        self.done: Future[None] = Future()

    def wait(self) -> None:
        """Wait for the end; raise what went wrong in a lane, or that another rank failed."""
        while True:
            try:
                return self.done.result(timeout=1)
            except TimeoutError:
                if self.done.done():
                    raise
                self.world.check()

    def arrived(self) -> bool:
        """Return whether the exchange has ended."""
        return self.done.done()


class Lanes:
    """The process groups and threads of one job's ranks; made once, by all ranks together."""

    def __init__(self, world: World, node_size: int) -> None:
        # World.wait decides when it has been too long
        options = {"backend": "gloo", "timeout": timedelta(days=1)}
        count = LANES if node_size == 1 else LANES_WITH_NODES
        self._groups = [Groups(world, node_size, options) for _ in range(count)]
        self._queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(count)]
        for lane, each in enumerate(self._queues):
            name = f"magi-lane-{lane + 1}"
            thread = threading.Thread(target=_serve, args=(each,), name=name, daemon=True)
            thread.start()
            weakref.finalize(world, each.put, None)
            world.at_close(functools.partial(_end, each, thread))

    @staticmethod
    def of(world: World, node_size: int) -> "Lanes":
        """Return the lanes of `world` with such nodes; the first call is a collective."""
        known = _lanes.setdefault(world, {})
        if node_size not in known:
            known[node_size] = Lanes(world, node_size)
        return known[node_size]

    def start(self, each: ThreadExchange) -> None:
        """Encode, and send an exchange on its way."""
        self._advance(0, each, None)
        if each.done.done():
            each.done.result()  # an error in the caller's own part is raised where it is

    def _advance(self, lane: int, each: ThreadExchange, value: Tensor | None) -> None:
        try:
            with torch.no_grad():
                request = each.exchange.send(value)  # type: ignore[arg-type]
            result, work = begin(request, self._groups[lane])
        except StopIteration:
            each.done.set_result(None)
        except BaseException as error:  # noqa: BLE001  (whoever waits gets it)
            each.done.set_exception(error)
        else:
            after = self._advance
            self._queues[lane].put((each, work, lambda: after(lane + 1, each, result)))


def _serve(incoming: "queue.SimpleQueue[Any]") -> None:
    """Wait for the collectives of one lane, in order, until None comes."""
    while (item := incoming.get()) is not None:
        _finish(*item)
        del item  # an idle thread keeps no World alive


def _end(incoming: "queue.SimpleQueue[Any]", thread: threading.Thread) -> None:
    """Let a lane come to its end: one inside of gloo when Python ends would abort the process."""
    incoming.put(None)
    thread.join(timeout=END_SECONDS)


def _finish(each: ThreadExchange, work: "dist.Work", go_on: Callable[[], None]) -> None:
    try:
        each.world.wait(work, torch.device("cpu"), each.what)
    except BaseException as error:  # noqa: BLE001
        each.done.set_exception(error)
    else:
        go_on()
