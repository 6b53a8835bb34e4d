"""Host memory that is used again: pages fresh from the system cost more than the work on them.

Large tensors on the CPU come from the system, which clears each page at its first touch; that takes
about four times as long as copying the page. Buckets and what codecs need are of the same sizes in
every step, so their memory is kept, and given out again once nobody holds a tensor in it: whether
somebody does is asked of the storage itself, so a gradient that the user still has is never
overwritten. On a GPU, torch's own allocator does this.
"""

import sys
import threading

import torch
from torch import Tensor

from magi_train.core import compat


class HostMemory:
    """Gives out tensors; of any size at most as many exist as were needed at the same time."""

    def __init__(self) -> None:
        self._kept: dict[int, list[torch.UntypedStorage]] = {}
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
                    return _on(storage, shape, dtype)
            storages.append(torch.UntypedStorage(num_bytes))
            return _on(storages[-1], shape, dtype)

    def forget(self) -> None:
        """Keep nothing of what was given out so far; tensors that are in use keep their memory."""
        with self._lock:
            self._kept.clear()


def _on(storage: torch.UntypedStorage, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    strides = torch.empty(shape, device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)
