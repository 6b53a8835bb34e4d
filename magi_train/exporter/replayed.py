"""Inference replayed as CUDA graphs: one launch for a whole forward, per shape.

At small batches a forward takes as long as its launches. A shape's second call records them, and
later calls copy their inputs into the recorded memory and start the recording. Results are copied
out, because the next call overwrites them. One lock: the memory is shared by all callers, and the
stream of a call waits for that of the one before, where they differ.

Where the device has enough to do, a recording gains nothing and holds memory all the same. If asked
to, a shape's second call therefore times both ways, and drops what does not pay, or cannot be
recorded.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from magi_train.core.device_graphs import DeviceGraphs

logger = logging.getLogger(__name__)

MAX_SHAPES = 16
"""Further shapes run without a graph: each holds memory."""

GAIN, TIMED = 0.05, 3
"""What a replay must gain to be worth its memory; calls of each way that are timed."""

Key = tuple[tuple[int, ...], ...]


class Replayed:
    """A runner that replays another.

    Args:
        run: Takes and returns tensors.
        graphs: The device.
        lock: Held during each call.
        if_faster: Keep recordings only of shapes whose calls become shorter by GAIN.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Tensor]],
        graphs: DeviceGraphs,
        lock: contextlib.AbstractContextManager[Any],
        *,
        if_faster: bool = False,
    ) -> None:
        self._run, self._graphs, self._lock, self._if_faster = run, graphs, lock, if_faster
        self._seen: set[Key] = set()
        self._dropped: set[Key] = set()
        self._recorded: dict[Key, tuple[list[Tensor], list[Any], Callable[[], None]]] = {}
        self._renewals, self._stream = graphs.renewals(), None  # of the last call

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Run, record or replay."""
        key = tuple(tuple(t.shape) for t in tensors)
        with self._lock:
            self._forget_void()
            if key not in self._recorded and not self._record(key, tensors):
                return list(self._run(*tensors))
            return self._replay(key, tensors)

    def _replay(self, key: Key, tensors: Sequence[Tensor]) -> list[Tensor]:
        inputs, results, replay = self._recorded[key]
        self._stream = self._graphs.behind(self._stream)
        for inside, outside in zip(inputs, tensors, strict=True):
            inside.copy_(outside, non_blocking=True)
        replay()
        return [r.clone() for r in results]

    def _record(self, key: Key, tensors: Sequence[Tensor]) -> bool:
        full = len(self._recorded) >= MAX_SHAPES
        if key not in self._seen or key in self._dropped or full or self._graphs.busy():
            self._seen.add(key)  # the first call sets up libraries, which may not be recorded
            return False
        inputs = [t.clone() for t in tensors]
        if self._if_faster:
            plain_ms = self._milliseconds(lambda: self._run(*inputs))
            self._graphs.new_pool()  # what is dropped gives all of its memory back
        try:
            with torch.no_grad():
                results, replay = self._graphs.capture(lambda: list(self._run(*inputs)))
        except Exception as error:
            if not self._if_faster:
                raise
            logger.warning("inputs of %s run without a CUDA graph: %s", list(key), error)
            self._dropped.add(key)
            return False
        self._recorded[key] = (inputs, results, replay)
        if self._if_faster:
            replayed_ms = self._milliseconds(lambda: self._replay(key, tensors))
            if replayed_ms > plain_ms * (1 - GAIN):
                del self._recorded[key]
                self._dropped.add(key)
                self._graphs.new_pool()
                return False
        return True

    def _forget_void(self) -> None:
        """Drop what a failed capture, here or elsewhere, has made void; it is recorded again."""
        renewals = self._graphs.renewals()
        if renewals != self._renewals and self._recorded:
            self._recorded.clear()
            self._graphs.new_pool()
        self._renewals = renewals

    def _milliseconds(self, call: Callable[[], Any]) -> float:
        """Return what a call takes, from an idle device's start to its end: the shortest."""
        found = []
        for _ in range(TIMED):
            marks = [self._graphs.mark()]
            call()
            marks.append(self._graphs.mark())
            found += self._graphs.milliseconds(marks)  # waits
        return min(found)
