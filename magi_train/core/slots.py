"""Slots: the memory that a recording hands out, whether anybody still holds it, what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magi_train.core import compat

SMALL = 2**20
"""Bytes up to which an output is copied out from the start: the loss, whatever is logged."""


class RefusedError(Exception):
    """This graph cannot be replayed; says why."""


@dataclass(frozen=True)
class Layout:
    """What a tensor is made from."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> Layout:
        """Return the layout of `tensor`."""
        return Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    @staticmethod
    def dense(tensor: Tensor) -> Layout:
        """Return a layout like that of `tensor` in which no memory repeats (an expanded ones)."""
        if compat.is_non_overlapping_and_dense(tensor):
            return Layout.of(tensor)
        stride = torch.empty(tensor.shape, device="meta").stride()
        return Layout(tensor.shape, stride, tensor.dtype, tensor.device)

    def make(self) -> Tensor:
        """Return a tensor of zeros that is laid out so."""
        new = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return new.zero_()


class Slot:
    """A result in the recording's memory, which is handed out at every replay.

    Attributes:
        tensor: The result; each replay overwrites it.
        copied: Hand out copies.
        found: Times in a row that something handed out was found alive.
    """

    def __init__(self, tensor: Tensor, copied: bool) -> None:
        self.tensor, self.copied, self.found = tensor, copied, 0
        self._storage = tensor.untyped_storage()
        self._unused = 0

    def rest(self) -> None:
        """Note that nobody but the recording holds the memory now."""
        self._unused = compat.storage_uses(self._storage)

    def alive(self) -> bool:
        """Return whether something that was handed out still exists."""
        return compat.storage_uses(self._storage) > self._unused


def refusal(
    args: Sequence[Any], stable: frozenset[int], written: Iterable[int], device: torch.device
) -> str:
    """Return why a call with these arguments cannot be recorded, "" if it can.

    Args:
        args: Of the compiled callable.
        stable: Positions of arguments whose address does not change.
        written: Positions of arguments that the call writes.
        device: That records.
    """
    for position, a in enumerate(args):
        if not isinstance(a, Tensor):
            return f"input {position} is a number: a size is dynamic, or a value changes"
        what = f"input {position}, {a.dtype} of shape {tuple(a.shape)},"
        if a.device != device:
            return f"{what} lies on {a.device}, not on {device}"
        if type(a) not in (Tensor, torch.nn.Parameter) or a.layout is not torch.strided:
            return f"{what} is a {type(a).__name__} with layout {a.layout}"
        if a.is_inference():
            return f"{what} was made in inference mode"
        if any(n > 1 and s == 0 for n, s in zip(a.shape, a.stride(), strict=True)):
            return f"{what} repeats its memory"
    for position in written:
        a = args[position]
        if position not in stable or a.requires_grad:
            return f"the step writes input {position}, which is no buffer of the model"
    return ""


def is_small(tensor: Tensor) -> bool:
    """Return whether a result is copied out from the start."""
    return tensor.nbytes <= SMALL
