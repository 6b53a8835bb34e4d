"""Inference replayed as CUDA graphs: one launch for a whole forward, per shape.

At small batches a forward takes as long as its launches. A shape's second call records them, and
later calls copy their inputs into the recorded memory and start the recording. Results are copied
out, because the next call overwrites them. One lock: the memory is shared by all callers.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from magi_train.core.device_graphs import DeviceGraphs

MAX_SHAPES = 16
"""Further shapes run without a graph: each holds memory."""

Key = tuple[tuple[int, ...], ...]


class Replayed:
    """A runner that replays another.

    Args:
        run: Takes and returns tensors.
        graphs: The device.
        lock: Held during each call.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Tensor]],
        graphs: DeviceGraphs,
        lock: contextlib.AbstractContextManager[Any],
    ) -> None:
        self._run, self._graphs, self._lock = run, graphs, lock
        self._seen: set[Key] = set()
        self._recorded: dict[Key, tuple[list[Tensor], list[Any], Callable[[], None]]] = {}

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Run, record or replay."""
        key = tuple(tuple(t.shape) for t in tensors)
        with self._lock:
            if key not in self._recorded and not self._record(key, tensors):
                return list(self._run(*tensors))
            inputs, results, replay = self._recorded[key]
            for inside, outside in zip(inputs, tensors, strict=True):
                inside.copy_(outside, non_blocking=True)
            replay()
            return [r.clone() for r in results]

    def _record(self, key: Key, tensors: Sequence[Tensor]) -> bool:
        if key not in self._seen or len(self._recorded) >= MAX_SHAPES or self._graphs.busy():
            self._seen.add(key)  # the first call sets up libraries, which may not be recorded
            return False
        inputs = [t.clone() for t in tensors]
        with torch.no_grad():
            results, replay = self._graphs.capture(lambda: list(self._run(*inputs)))
        self._recorded[key] = (inputs, results, replay)
        return True
