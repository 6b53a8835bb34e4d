"""Dropout whose mask is drawn by a kernel of its own and kept as 1 bit an element.

Inductor draws `rand(seed, i) > p` where it is read, one call of Philox an element, and keeps a byte
of each for the backward. Both cost: the drawing more than all else that such a kernel does (see
kernels/dropout_bits.py), the bytes an eighth to a half of what activations take. Here

    bits = dropout_bits(seeds, index, size / 8, p)    in front, from the same seed
    kept = (bits[..., i // 8] >> i % 8) & 1           where it is read, forward and backward

The seeds are still PyTorch's: `torch.manual_seed`, checkpoints, replays and the state of the
device's generator act as before. The bits are others, as those of generated code already differ
from eager's; a graph that is run again from its seeds gets the same ones.

Left alone, with the reason in the plan: what is small; sizes whose last dimension is no known
multiple of 8; probabilities that 16 bits do not hold well; draws with other readers.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from magi_train.core import compat
from magi_train.core.graph import CASTS, insert_call, insert_computation, op_name
from magi_train.core.passes import PassContext, Plan, Stage, source_fingerprint
from magi_train.fusion.ahead import compile_ahead
from magi_train.fusion.kernel_ops import define
from magi_train.fusion.quantize import call_like

SOURCE = source_fingerprint(sys.modules[__name__])
aten, prims = torch.ops.aten, torch.ops.prims

SMALLEST = 2**19
"""Elements from which a kernel of its own costs less than drawing where it is read."""
LEAST, MOST = 2.0**-9, 1 - 2.0**-5
"""Probabilities in between are met within 2^-9 of themselves, and scales within 2^-12."""

UNPACKED = "magi_train_unpacked_mask"
"""In the meta of a mask that is read from bits."""


def _fake(seeds: Tensor, index: int, shape: list[int], p: float) -> Tensor:
    return seeds.new_empty(shape, dtype=torch.uint8)


dropout_bits = define(
    "dropout_bits(Tensor seeds, int index, SymInt[] shape, float p) -> Tensor", _fake
)
"""`(seeds [n], index, shape, p) -> uint8 shape`, see kernels/dropout_bits.py."""


@dataclass(frozen=True)
class DropoutPlan(Plan):
    """Which masks become bits.

    Attributes:
        packed: Names of the comparisons that made them.
        left_alone: The other random numbers, each with the reason.
    """

    packed: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]


class PackDropout:
    """See the head of this module."""

    name = "pack_dropout"
    stage = Stage.JOINT

    def uuid(self) -> str:
        """Return what compiled code depends on."""
        return SOURCE

    def plan(self, gm: GraphModule, context: PassContext) -> DropoutPlan | None:
        """Return what becomes bits; None in a graph that draws no random numbers."""
        packed, left = [], []
        for draw in gm.graph.nodes:
            if op_name(draw) == "inductor_random":
                reason = self._why_not(draw)
                if reason:
                    left.append((draw.name, reason))
                else:
                    packed.append(_compared(draw).name)
        return DropoutPlan(tuple(packed), tuple(left)) if packed or left else None

    def apply(self, gm: GraphModule, plan: DropoutPlan, context: PassContext) -> None:
        """Draw bits in place of numbers."""
        by_name = {n.name: n for n in gm.graph.nodes}
        for device in {by_name[name].meta["val"].device for name in plan.packed}:
            compile_ahead("dropout_bits", device, _on_nothing)
        for number, kept in enumerate(by_name[name] for name in plan.packed):
            drawn = _drawn(kept)
            size: Any = drawn.args[0]
            lookup = drawn.args[1]
            assert isinstance(lookup, Node), "of inductor_random"
            arguments = (*lookup.args, [*size[:-1], size[-1] // 8], kept.args[1])
            with gm.graph.inserting_before(kept):
                bits = call_like(kept, dropout_bits, *arguments)
            # Each mask has places of its own: the partitioner would save what is unpacked by places
            # that another mask, far ahead, has read. Of each only the last three bits count.
            kwargs = {"start": 8 * number, "step": 1, "dtype": torch.int32,
                      "device": bits.meta["val"].device, "requires_grad": False}  # fmt: skip
            places = insert_call(kept, prims.iota.default, (8,), kwargs)
            new = insert_computation(kept, _unpacked, (bits, places, size))
            new.meta[UNPACKED] = True
            kept.replace_all_uses_with(new)
            gm.graph.erase_node(kept)
        gm.graph.eliminate_dead_code()

    def _why_not(self, draw: Node) -> str:
        size: Any = draw.args[0]
        lookup, how = draw.args[1:3]
        kept = _compared(draw)
        if how != "rand" or kept is None:
            return "it is not compared with a probability, or read by more than that"
        if not isinstance(lookup, Node) or op_name(lookup) != "inductor_lookup_seed":
            return "its seed is not one of PyTorch's seeds of a graph"
        p = kept.args[1]
        assert isinstance(p, float), "checked where it was found"
        if not LEAST <= p <= MOST:
            return f"16 bits do not hold a probability of {p:g} well"
        last = size[-1] if size else 1
        if not isinstance(last, int) or last % 8:
            return f"its last dimension, {last}, is no known multiple of 8"
        elements = compat.size_hint(draw.meta["val"].numel())
        if elements is None or elements < SMALLEST:
            return f"it has {elements} elements; from {SMALLEST} on it gains"
        return ""


def _on_nothing(device: torch.device) -> None:
    from magi_train.fusion.kernels.dropout_bits import dropout_bits

    dropout_bits(torch.zeros(1, dtype=torch.int64, device=device), 0, [16], 0.5)


def _compared(draw: Node) -> Any:
    """Return the one node `draw > p` that reads it, as floats of any dtype, or None."""
    reader = draw
    while len(reader.users) == 1:
        reader = next(iter(reader.users))
        if reader.target is aten.gt.Scalar and isinstance(reader.args[1], float):
            return reader
        if reader.target not in CASTS or not reader.meta["val"].is_floating_point():
            break
    return None


def _drawn(kept: Node) -> Node:
    """Return the random numbers that a node of the plan compares."""
    node = kept
    while op_name(node) != "inductor_random":
        assert isinstance(node.args[0], Node), "a tensor"
        node = node.args[0]
    return node


def _unpacked(bits: Any, places: Any, size: Any) -> Any:
    """Return the mask that `bits` hold, bool of `size`; `places` are 0 to 7, modulo 8."""
    place = aten.bitwise_and.Scalar(places, 7)
    words = prims.convert_element_type.default(aten.unsqueeze.default(bits, -1), torch.int32)
    shifted = aten.bitwise_right_shift.Tensor(words, place)
    kept = aten.ne.Scalar(aten.bitwise_and.Scalar(shifted, 1), 0)
    return aten.view.default(kept, size)
