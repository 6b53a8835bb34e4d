"""Quantisation inside a graph: the scale of a whole tensor, and the op that casts by it.

Dynamic tensorwise scaling: a tensor is divided by `scale = max |x| / largest fp8 number`, so that
its largest element becomes the largest of the format; a product of two such tensors is multiplied
by both scales. The maximum is taken over rows first, then over those: generated code puts the first
into the kernel that writes the rows (a norm, an activation), so that no pass over memory is added.

Not finite: the maximum of a tensor with an inf or a NaN is inf or NaN, so is its scale, and so is
every element of every product with it (0 * inf is NaN). One bad element spoils the whole product
instead of one row, and is never hidden from `GradScaler` or anomaly checks.

All zero: the scale is FLOOR / largest, the quotients are zero.
"""

import operator
import sys
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from magi_train.core.graph import call_with_metadata, example_value
from magi_train.core.passes import source_fingerprint

SOURCE = source_fingerprint(sys.modules[__name__])
aten = torch.ops.aten
FLOOR = 2.0**-100
"""The least maximum: the reciprocal of its scale is still a float32."""
OF_VALUES, OF_GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
"""Three bits of mantissa for activations and weights, five of exponent for gradients."""

_library = torch.library.Library("magi_train", "FRAGMENT")
_library.define("fp8_cast(Tensor x, Tensor scale, bool gradient) -> (Tensor, Tensor)")


def _dtype(gradient: bool) -> torch.dtype:
    return OF_GRADIENTS if gradient else OF_VALUES


def _on_device(x: Tensor, scale: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    from magi_train.fusion.kernels.fp8_cast import fp8_cast

    with torch.cuda.device(x.device):  # Triton launches on the current one
        return fp8_cast(x, scale, _dtype(gradient))


def _on_host(x: Tensor, scale: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    from magi_train.fusion.kernels.fp8_cast import fp8_cast_reference

    return fp8_cast_reference(x, scale, _dtype(gradient))


def _fake(x: Tensor, scale: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    dtype = _dtype(gradient)
    return x.new_empty((rows, columns), dtype=dtype), x.new_empty((columns, rows), dtype=dtype)


_library.impl("fp8_cast", _on_device, "CUDA")
_library.impl("fp8_cast", _on_host, "CPU")
_library.impl("fp8_cast", _fake, "Meta")

fp8_cast = torch.ops.magi_train.fp8_cast.default
"""`(x [m, n], scale [], whether e5m2) -> (fp8 [m, n], fp8 [n, m])`, see kernels/fp8_cast.py."""


def call_like(like: Node, target: Any, *args: Any) -> Node:
    """Insert a call that AOTAutograd's partitioner takes for what `like` was."""
    node = call_with_metadata(like.graph, target, args)
    own = dict(node.meta)
    inherited = {k: v for k, v in like.meta.items() if k != "tensor_meta"}
    node.meta = {**inherited, **own}
    return node


def insert_scale(x: Node, like: Node, dtype: torch.dtype) -> Node:
    """Insert the scale of `x` `[m, n]`: float32, `[]`."""
    peak = call_like(like, aten.amax.default, _row_peaks(x, like), [0])
    wide = call_like(like, torch.ops.prims.convert_element_type.default, peak, torch.float32)
    safe = call_like(like, aten.clamp_min.default, wide, FLOOR)
    return call_like(like, aten.mul.Tensor, safe, 1.0 / torch.finfo(dtype).max)


def _row_peaks(x: Node, like: Node) -> Node:
    """Insert max |x| of each row; of a concatenation, from its parts as they are produced."""
    parts: Any = x.args[0] if x.target is aten.cat.default and x.args[1:] in ((1,), (-1,)) else [x]
    peaks = [call_like(like, aten.amax.default, call_like(like, aten.abs.default, p), [1])
             for p in parts]  # fmt: skip
    while len(peaks) > 1:
        peaks = [call_like(like, aten.maximum.default, *peaks[:2]), *peaks[2:]]
    return peaks[0]


def insert_cast(x: Node, scale: Node, like: Node, dtype: torch.dtype, *, both: bool) -> list[Node]:
    """Insert `x / scale` in fp8, `[m, n]`; if `both`, its transpose `[n, m]` as well."""
    if both:
        pair = call_like(like, fp8_cast, x, scale, dtype is OF_GRADIENTS)
        return [_element(pair, like, 0), _element(pair, like, 1)]
    convert = torch.ops.prims.convert_element_type.default
    largest = torch.finfo(dtype).max
    wide = call_like(like, convert, x, torch.float32)
    inverse = call_like(like, aten.reciprocal.default, scale)
    quotient = call_like(like, aten.mul.Tensor, wide, inverse)
    low = call_like(like, aten.clamp_min.default, quotient, -largest)
    clamped = call_like(like, aten.clamp_max.default, low, largest)
    return [call_like(like, convert, clamped, dtype)]


def _element(pair: Node, like: Node, index: int) -> Node:
    node = call_like(like, operator.getitem, pair, index)
    assert isinstance(example_value(node), Tensor)
    return node
