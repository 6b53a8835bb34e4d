"""What replaying a step asks of a device: capture, replay, streams, events, random state.

A CUDA graph is the list of kernels that a function launched, with their addresses, which the device
runs again after one launch. `CudaGraphs` is the only place that touches CUDA's side of it; what may
be replayed, and when, is decided elsewhere and tested without a device (magi_train/replay.py).

Capture runs on a stream of its own, into a memory pool of its own, in mode "thread_local": a data
loader's thread may go on using the device. It must not wait for all of the device, though, which
the beginning of a capture does: one runs at a time, whoever asks for it.

A capture that fails leaves three things behind which torch does not take back by itself, seen in
the sources of 2.11 and 2.13: the side stream is still current, the allocator still serves the pool,
and the generator still counts offsets for a graph. `capture` takes all three back, so that the step
goes on without a graph. The generator gets another state for that. Graphs captured before keep the
old one, whose numbers no seed reaches any more, or whose count (2.11) refuses every replay:
`renewals` tells who holds such graphs.
"""

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from magi_train.core import compat

Results = list[Tensor | None]


class DeviceGraphs(Protocol):
    """A device that can record what a function does, and do it again."""

    device: torch.device

    def capture(self, function: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """Record `function` without effect; return its results, and what computes them again.

        The results keep their memory: each replay overwrites it.
        """
        ...

    def busy(self) -> bool:
        """Return whether the caller itself is being captured."""
        ...

    def stream(self) -> int:
        """Return what identifies the current stream."""
        ...

    def behind(self, stream: Any) -> Any:
        """Let the current stream wait for what `stream` has to do, if that is another one.

        Args:
            stream: As this returned it; None for nothing.

        Returns:
            The current stream.
        """
        ...

    def renewals(self) -> int:
        """Return how often a failed capture was taken back: no graph from before may be replayed.

        Of this device, whoever captured.
        """
        ...

    def mark(self) -> Any:
        """Return an event, recorded now."""
        ...

    def milliseconds(self, marks: Sequence[Any]) -> list[float]:
        """Return the device's time between neighbours of `marks`; waits for the last one."""
        ...

    def reserved(self) -> int:
        """Return the bytes held from the device, less those that nothing uses."""
        ...

    def room(self, pools: int) -> int:
        """Return the bytes that a plain call may still take, beside `pools` bytes of graphs."""
        ...

    def random_state(self) -> Tensor:
        """Return the state of the device's random numbers."""
        ...

    def randomly(self, state: Tensor) -> contextlib.AbstractContextManager[None]:
        """Return a context with the random numbers of `state`, afterwards as before."""
        ...

    def new_pool(self) -> None:
        """Capture into other memory from now on; that of graphs which are gone is free again."""
        ...


_alone = threading.RLock()
"""Held by what captures, and by what waits for a whole device."""
_renewals: Counter[int] = Counter()
"""By the index of a CUDA device; see `DeviceGraphs.renewals`."""


class CudaGraphs:
    """See `DeviceGraphs`.

    Args:
        device: A CUDA device, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._side: torch.cuda.Stream | None = None
        self._pool: Any = None

    def capture(self, function: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """Record `function`; see `DeviceGraphs`.

        Raises:
            Exception: Whatever `function` raised, or CUDA, about what cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
        before, mode = torch.cuda.current_stream(self.device), "thread_local"
        with _alone:
            try:
                with torch.cuda.graph(graph, self._pool, self._side, capture_error_mode=mode):
                    results = function()
            except BaseException:
                torch.cuda.set_stream(before)
                compat.end_failed_capture(self.device.index, self._pool)
                generator = self._generator()
                generator.graphsafe_set_state(generator.clone_state())
                _renewals[self.device.index] += 1
                raise
        return results, graph.replay

    def _generator(self) -> torch.Generator:
        return torch.cuda.default_generators[self.device.index]

    def busy(self) -> bool:
        """Return whether the current stream is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def stream(self) -> int:
        """Return the address of the current stream."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def behind(self, stream: torch.cuda.Stream | None) -> torch.cuda.Stream:
        """Let the current stream wait for `stream`; return the current one."""
        current = torch.cuda.current_stream(self.device)
        if stream is not None and stream != current:
            current.wait_stream(stream)
        return current

    def renewals(self) -> int:
        """Return how often a failed capture was taken back."""
        return _renewals[self.device.index]

    def mark(self) -> torch.cuda.Event:
        """Return an event, recorded now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def milliseconds(self, marks: Sequence[Any]) -> list[float]:
        """Return the time between neighbours of `marks`; waits for the last one."""
        marks[-1].synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]

    def reserved(self) -> int:
        """Return the bytes that torch's allocator holds and uses."""
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)

    def room(self, pools: int) -> int:
        """Return what the device has free, and what torch's allocator holds outside of `pools`."""
        free, _ = torch.cuda.mem_get_info(self.device)
        reserved, used = (
            torch.cuda.memory_reserved(self.device), torch.cuda.memory_allocated(self.device)
        )  # fmt: skip
        return free + max(reserved - used - pools, 0)

    def random_state(self) -> Tensor:
        """Return the state of the device's default generator."""
        return self._generator().get_state()

    @contextlib.contextmanager
    def randomly(self, state: Tensor) -> Iterator[None]:
        """Use the random numbers of `state`."""
        before = self.random_state()
        self._generator().set_state(state)
        try:
            yield
        finally:
            self._generator().set_state(before)

    def new_pool(self) -> None:
        """Capture into another pool; a handle without graphs must not be used again."""
        with _alone:
            torch.cuda.synchronize(self.device)  # a replay may still be running in the old one
        self._pool = None


makers: dict[str, Callable[[torch.device], DeviceGraphs]] = {"cuda": CudaGraphs}
"""Device types that can replay. Tests add "cpu"."""


def device_graphs(device: torch.device) -> DeviceGraphs | None:
    """Return the graphs of a device, None where it has none."""
    return makers[device.type](device) if device.type in makers else None
