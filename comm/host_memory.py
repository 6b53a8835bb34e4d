"""Host memory that is used again: pages fresh from the system cost more than the work on them.

Large tensors on the CPU come from the system, which clears each page at its first touch; that takes
about four times as long as copying the page. Buckets and what codecs need are of the same sizes in
every step, so their memory is kept, and given out again once nobody holds a tensor in it: whether
somebody does is asked of the storage itself, so a gradient that the user still has is never
overwritten. What some steps in a row did not ask for is let go: a user who keeps the gradients of
many steps, or a bucket that is no longer used, must not hold memory for ever. On a GPU, torch's own
allocator does this.
"""

import sys
import threading

import torch
from torch import Tensor

from magi_train.core import compat

KEPT_ROUNDS = 4
"""Residuals take turns with those of the step before, and a bucket may miss a step."""


class HostMemory:
    """Gives out tensors; of any size at most as many are kept as the last rounds needed at once."""

    def __init__(self) -> None:
        self._kept: dict[int, list[torch.UntypedStorage]] = {}
        self._given: dict[int, int] = {}  # by the storage's id: in which round it was given last
        self._round = 0
        self._lock = threading.Lock()  # codecs run in threads

    def empty(
        self, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device
    ) -> Tensor:
        """Return a contiguous tensor `shape` with any content; only memory of the CPU is kept."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        with self._lock:
            storages = self._kept.setdefault(num_bytes, [])
            storages[:] = [s for s in storages if not s.is_shared()]  # another process may read it
            for storage in storages:
                held = (
                    sys.getrefcount(storage) > 3
                )  # list, variable, argument: nobody else in Python
                if not held and compat.storage_uses(storage) == 1:  # nobody but this list
                    break
            else:
                storage = torch.UntypedStorage(num_bytes)
                storages.append(storage)
            self._given[id(storage)] = self._round
            return _on(storage, shape, dtype)

    def end_round(self) -> None:
        """Note the end of a step, and keep nothing that the last KEPT_ROUNDS did not ask for."""
        with self._lock:
            self._round += 1
            last, given = self._round - KEPT_ROUNDS, self._given
            for size, storages in list(self._kept.items()):
                storages[:] = [s for s in storages if given[id(s)] >= last]
                if not storages:
                    del self._kept[size]
            kept = {id(s) for storages in self._kept.values() for s in storages}
            self._given = {key: when for key, when in given.items() if key in kept}

    def forget(self) -> None:
        """Keep nothing of what was given out so far; tensors that are in use keep their memory."""
        with self._lock:
            self._kept.clear()
            self._given.clear()


def _on(storage: torch.UntypedStorage, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    strides = torch.empty(shape, device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)
