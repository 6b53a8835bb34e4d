"""A convolution whose windows do not overlap is a matrix product over patches.

The stem of a vision transformer cuts an image into squares and multiplies each by one matrix. As a
convolution of few input channels that is slow on a GPU: cuDNN pads the channels and converts the
layout of the image first. As a product, `[B, C, H, W]` being h w patches of kh kw:

    patches = x.view(B, C, h, kh, w, kw).permute(0, 2, 4, 1, 3, 5).reshape(B, h w, C kh kw)
    y = (patches @ weight.flatten(1).T + bias).transpose(1, 2).view(B, O, h, w)

This holds where the stride is the kernel's size, without padding, dilation and groups. Sizes of the
input that the kernel does not divide are left alone: a convolution drops the rest. So are many
input channels, which convolution kernels are made for.

The result is a view with the channels innermost, as `conv(x).flatten(2).transpose(1, 2)` wants it:
nothing is copied there. Whether all ops behind take that layout is tried on fake values. Where one
does not, and where the result leaves the graph, is written in place or goes to an op that may count
on strides, it is copied into the layout that the convolution gave.

Arguments are cast first, as autocast would: a cast of the weight as it lies is one that
fusion/shadow.py finds, and half of the bytes are copied.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from magi_train.core import compat
from magi_train.core.graph import (
    HALF,
    example_value,
    insert_computation,
    layout,
    op_name,
    restrided,
    written,
)
from magi_train.core.passes import PassContext, Plan, Stage
from magi_train.fusion.convolutions import CONVOLUTIONS, MANY_CHANNELS

SMALLEST_PATCH = 32
"""Numbers of a patch, over all channels, from which a product gains."""
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True)
class PatchPlan(Plan):
    """Which convolutions become products.

    Attributes:
        products: Those.
        copied: Those of them whose result is copied into the convolution's layout.
        left_alone: The other convolutions, each with the reason.
    """

    products: tuple[str, ...]
    copied: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]


class PatchConvolutions:
    """See the head of this module.

    Args:
        always: Do not ask whether it gains for this dtype.
    """

    name = "patch_convolutions"
    stage = Stage.PRE_GRAD

    def __init__(self, always: bool = False) -> None:
        self.always = always

    def plan(self, gm: GraphModule, context: PassContext) -> PatchPlan | None:
        """Return which convolutions cut their input into patches; None without convolutions."""
        products, copied, left = [], [], []
        start: dict[Node, Tensor] = {}
        convolutions = [n for n in gm.graph.nodes if op_name(n) in CONVOLUTIONS]
        changed = written(gm.graph) if convolutions else set()
        for node in convolutions:
            reason = _unfit(node) or ("" if self.always else _no_gain(node))
            if not reason:
                with_this = {**start, node: _fake_product(node)}
                blocker = "it is changed in place" if node in changed else _blocker(with_this)
                if not blocker:
                    start = with_this
                elif example_value(node).is_contiguous():
                    copied.append(node.name)
                else:
                    reason = f"its layout must stay: {blocker}"
            if reason:
                left.append((node.name, reason))
            else:
                products.append(node.name)
        if not convolutions:
            return None
        return PatchPlan(tuple(products), tuple(copied), tuple(left))

    def apply(self, gm: GraphModule, plan: PatchPlan, context: PassContext) -> None:
        """Put the products in the convolutions' places."""
        by_name = {n.name: n for n in gm.graph.nodes}
        for name in plan.products:
            node = by_name[name]
            given = [arguments(node)[n] for n in ("input", "weight", "bias")]
            shape = _Shape.of(node, dense=name in plan.copied)
            node.replace_all_uses_with(insert_computation(node, shape.compute, given))
            gm.graph.erase_node(node)


@dataclass(frozen=True)
class _Shape:
    """What the product must know that proxies do not tell.

    Attributes:
        kernel: Size of a patch in each spatial dimension.
        counts: Patches in each.
        dtype: Of the result.
        cast: Whether the input, the weight and the bias have another dtype.
        dense: Whether the result is copied.
    """

    kernel: tuple[int, ...]
    counts: tuple[int, ...]
    dtype: torch.dtype
    cast: tuple[bool, ...]
    dense: bool = False

    @staticmethod
    def of(node: Node, dense: bool = False) -> "_Shape":
        result, (x, weight, bias) = example_value(node), _values(node)
        kernel = tuple(weight.shape[2:])
        counts = tuple(size // k for size, k in zip(x.shape[2:], kernel, strict=True))
        cast = tuple(t is not None and t.dtype != result.dtype for t in (x, weight, bias))
        return _Shape(kernel, counts, result.dtype, cast, dense)

    def compute(self, x: Any, weight: Any, bias: Any) -> Any:
        """Return what the convolution does: `[batch, out_channels, *counts]`."""
        given = zip((x, weight, bias), self.cast, strict=True)
        x, weight, bias = (t.to(self.dtype) if cast else t for t, cast in given)
        spatial = len(self.kernel)
        for i, sizes in enumerate(zip(self.counts, self.kernel, strict=True)):
            x = x.unflatten(2 + 2 * i, sizes)
        which, inside = range(2, 2 + 2 * spatial, 2), range(3, 3 + 2 * spatial, 2)
        patches = x.permute(0, *which, 1, *inside).flatten(1, spatial).flatten(2)
        out = F.linear(patches, weight.flatten(1), bias).transpose(1, 2).unflatten(2, self.counts)
        return out.contiguous() if self.dense else out


def arguments(node: Node) -> dict[str, Any]:
    """Return all arguments of a convolution by name, defaults filled in."""
    return {**DEFAULTS, **dict(zip(ARGUMENTS, node.args, strict=False)), **node.kwargs}


def _values(node: Node) -> list[Any]:
    given = (arguments(node)[n] for n in ("input", "weight", "bias"))
    return [example_value(n) if isinstance(n, Node) else n for n in given]


def _unfit(node: Node) -> str:
    """Return why a convolution is no product over patches, or a slow one; "" if it gains."""
    given = arguments(node)
    result, (x, weight, bias) = example_value(node), _values(node)
    tensors = [x, weight, result, *([] if given["bias"] is None else [bias])]
    if not all(type(t) is compat.FakeTensor for t in tensors):
        return "the shapes of its tensors are not known"
    if not all(isinstance(size, int) for size in weight.shape):
        return "a size of its weight is dynamic"
    if not result.dtype.is_floating_point:
        return f"it yields {result.dtype}"
    kernel = tuple(weight.shape[2:])
    reason = _overlap(given, kernel) or _many_or_small(weight.shape[1], math.prod(kernel))
    return reason or _rest(x, kernel)


def _overlap(given: Mapping[str, Any], kernel: tuple[int, ...]) -> str:
    """Return why windows do not lie side by side and fill the input, "" if they do."""
    stride = _each(given["stride"], len(kernel))
    if stride != kernel:
        return f"its stride {_text(stride)} is not its kernel's size {_text(kernel)}"
    if given["padding"] != "valid" and any(_each(given["padding"], len(kernel))):
        return "it pads its input"
    if set(_each(given["dilation"], len(kernel))) != {1}:
        return "it is dilated"
    return "" if given["groups"] == 1 else f"it has {given['groups']} groups"


def _many_or_small(channels: int, numbers: int) -> str:
    """Return why a product would not gain for windows of so many numbers a channel."""
    if channels >= MANY_CHANNELS:
        return f"{channels} input channels are many: convolution kernels are made for them"
    if channels * numbers < SMALLEST_PATCH:
        return f"its patches have {channels * numbers} numbers, fewer than {SMALLEST_PATCH}"
    return ""


def _rest(x: Tensor, kernel: tuple[int, ...]) -> str:
    """Return why an input is not cut into whole patches, "" if it is."""
    if x.dim() != len(kernel) + 2:
        return "its input has no batch dimension"
    sizes = tuple(x.shape[2:])
    if not all(isinstance(size, int) for size in sizes):
        return "a spatial size of its input is dynamic"
    if any(size % k for size, k in zip(sizes, kernel, strict=True)):
        return f"its kernel {_text(kernel)} does not divide its input {_text(sizes)}"
    return ""


def _each(value: Any, spatial: int) -> tuple[Any, ...]:
    """Return one value for each spatial dimension."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * spatial if len(values) == 1 else values


def _text(sizes: Sequence[Any]) -> str:
    return "x".join(map(str, sizes))


def _no_gain(node: Node) -> str:
    dtype = example_value(node).dtype
    return "" if dtype in HALF else f"{dtype} may lose: gains were measured in half precision only"


def _fake_product(node: Node) -> Tensor:
    """Return the value of the product, with its layout."""
    result = example_value(node)
    with result.fake_mode, torch.no_grad():
        return _Shape.of(node).compute(*_values(node))  # type: ignore[no-any-return]


def _blocker(start: dict[Node, Tensor]) -> str:
    """Return what behind convolutions needs their old layout, "" if nothing does."""
    moved = {n: fake for n, fake in start.items() if layout(fake) != layout(example_value(n))}
    found = restrided(moved) if moved else {}
    if isinstance(found, tuple):
        return f"{found[0].name}: {found[1]}"
    readers = (user for node in found for user in node.users if _counts_on_strides(user))
    first = next(readers, None)
    return "" if first is None else f"{first.name} may count on strides"


def _counts_on_strides(node: Node) -> bool:
    """Return whether an op may read memory by itself: not one of torch's, or `as_strided`."""
    target: Any = node.target
    if "as_strided" in op_name(node):
        return True
    if node.op == "call_method":
        return False
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target).split(".")[0] not in ("aten", "prims")
    module = getattr(target, "__module__", None) or "torch"  # of builtins of torch it is None
    return compat.is_higher_order(target) or module.split(".")[0] not in ("torch", "_operator")
