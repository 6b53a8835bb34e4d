"""Find, by structure, a cross-entropy whose logits come from a linear, and read its recipe.

Upward from the loss: casts, views, factors and tanh on single tensors, then slices of tokens, then
the linear. What is found here is a proposal; fusion/loss.py proves it.
"""

from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from magi_train.core.graph import example_value, op_name
from magi_train.fusion.chunked import Recipe

_aten = torch.ops.aten
_LEGACY = ("size_average", "ignore_index", "reduce", "reduction")
_PYTHON = ("input", "target", "weight", *_LEGACY, "label_smoothing")
_EXPORTED = ("input", "target", "weight", "reduction", "ignore_index", "label_smoothing")
ANCHORS = {
    F.cross_entropy: _PYTHON,
    _aten.cross_entropy_loss.default: _EXPORTED,
    F.nll_loss: _PYTHON[:-1],
    _aten.nll_loss_nd.default: _EXPORTED[:-1],
}
"""Losses, with the names of their arguments in order."""
DEFAULTS: dict[str, Any] = {
    "weight": None,
    "size_average": None,
    "ignore_index": -100,
    "reduce": None,
    "reduction": "mean",
    "label_smoothing": 0.0,
}
REDUCTIONS = ("none", "mean", "sum")
"""In the order of the numbers that exported graphs use."""

_CASTS = {"float", "double", "to", "_to_copy", "type_as", "contiguous", "clone"}
_VIEWS = {"view", "reshape", "flatten", "_unsafe_view"}
_PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply"}
_QUOTIENTS = {"div", "truediv", "__truediv__", "divide", "true_divide"}
_LOG_SOFTMAX = {"log_softmax"}
_MATMULS = {"matmul", "mm", "__matmul__"}


@dataclass(frozen=True)
class Match:
    """A loss and what it is computed from.

    Attributes:
        loss: The cross-entropy.
        linear: What made its logits.
        logits: The loss's input, `[tokens, vocabulary]`.
        x: Input of the linear.
        weight: Its weight.
        bias: Its bias, or None.
        labels: `[tokens]`.
        recipe: Everything else.
    """

    loss: Node
    linear: Node
    logits: Node
    x: Node
    weight: Node
    bias: Node | None
    labels: Node
    recipe: Recipe


def match_loss(loss: Node) -> Match | str:
    """Return what `loss`, a node that calls one of ANCHORS, is made of, or why it does not fit."""
    arguments = {**DEFAULTS, **dict(zip(ANCHORS[loss.target], loss.args, strict=False))}  # type: ignore[index]
    arguments |= loss.kwargs
    logits, labels = arguments["input"], arguments["target"]
    why = _refused(loss, arguments)
    if why:
        return why
    top = logits
    if "nll_loss" in op_name(loss):
        if op_name(top) not in _LOG_SOFTMAX or _dim(top) not in (1, -1):
            return "its input is not a log_softmax over the vocabulary"
        top = top.args[0]
    path = _path(top)
    if isinstance(path, str):
        return path
    linear, slices, steps = path
    x, weight, bias, transposed = _operands(linear)
    wide = example_value(logits).dtype
    recipe = Recipe(
        ignore_index=arguments["ignore_index"],
        mean=_reduction(arguments) == "mean",
        smoothing=float(arguments["label_smoothing"]),
        slices=slices,
        steps=steps,
        vocabulary=example_value(logits).shape[1],
        transposed=transposed,
        differentiated=tuple(  # type: ignore[arg-type]
            n is not None and example_value(n).requires_grad for n in (x, weight, bias)
        ),
        compute=example_value(linear).dtype,
        wide=wide if wide is torch.float64 else torch.float32,
        out=example_value(loss).dtype,
    )
    return Match(loss, linear, logits, x, weight, bias, labels, recipe)


def _reduction(arguments: dict[str, Any]) -> str:
    given = arguments["reduction"]
    return REDUCTIONS[given] if isinstance(given, int) else given


def _refused(loss: Node, arguments: dict[str, Any]) -> str:
    """Return why this loss is of a kind that is left alone, "" if it is not."""
    logits, labels = example_value(arguments["input"]), example_value(arguments["target"])
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        return "its logits or labels are not known"
    if not example_value(loss).requires_grad:
        return "it needs no gradient"
    if labels.is_floating_point():
        return "its targets are probabilities, not labels"
    if logits.dim() != 2 or labels.dim() != 1:
        return f"its logits are {logits.dim()}-dimensional, not [tokens, vocabulary]"
    if arguments["weight"] is not None:
        return "it weighs classes"
    if arguments["size_average"] is not None or arguments["reduce"] is not None:
        return "it uses the deprecated size_average or reduce"
    if _reduction(arguments) not in ("mean", "sum"):
        return f"its reduction is {_reduction(arguments)!r}"
    if not isinstance(arguments["ignore_index"], int):
        return "its ignore_index is not a constant"
    if not isinstance(arguments["label_smoothing"], float | int):
        return "its label_smoothing is not a constant"
    return ""


def _dim(log_softmax: Node) -> Any:
    return log_softmax.kwargs.get("dim", log_softmax.args[1] if len(log_softmax.args) > 1 else None)


Path = tuple[Node, tuple[Any, ...], tuple[tuple[str, float], ...]]


def _path(top: Any) -> Path | str:
    """Walk from the loss's input up to the linear; return it, the slices and the steps."""
    slices: list[Any] = []
    steps: list[tuple[str, float]] = []
    while True:
        if not isinstance(top, Node) or not isinstance(example_value(top), Tensor):
            return "its logits are not computed from one tensor"
        name = op_name(top)
        if _operands(top) is not None:
            return top, tuple(reversed(slices)), tuple(reversed(steps))
        index, factor = _token_index(top), _factor(top)
        if index is not None:
            slices.append(index)
        elif factor is not None:
            steps.append(("scale", factor))
        elif name == "tanh":
            steps.append(("tanh", 0.0))
        elif name in _VIEWS:
            if slices:
                return f"{top.name} reshapes before tokens are picked"
        elif name not in _CASTS:
            return f"{top.name} is neither a linear nor a cast, view, factor or tanh of its logits"
        tensors = [a for a in top.all_input_nodes if isinstance(example_value(a), Tensor)]
        top = next((a for a in top.args if a in tensors), None)


def _operands(node: Node) -> Any:
    """Return (input, weight, bias, whether the weight is transposed) of a linear, or None."""
    name, args = op_name(node), [*node.args, *node.kwargs.values()]
    x: Any
    weight: Any
    if name == "linear" and not set(node.kwargs) - {"bias"}:
        x, weight, bias = (*args, None)[:3]
    elif name in _MATMULS and not node.kwargs:
        x, weight, bias = *args[:2], None
    else:
        return None
    fits = isinstance(x, Node) and isinstance(weight, Node)
    if not fits or example_value(weight).dim() != 2 or example_value(x).dim() < 2:
        return None
    return x, weight, bias, name != "linear"


def _factor(node: Node) -> float | None:
    """Return the constant that a node multiplies its one tensor with, or None."""
    name, args = op_name(node), node.args
    if node.kwargs or len(args) != 2:
        return None
    numbers = [a for a in args if isinstance(a, Number)]
    if len(numbers) != 1:
        return None
    if name in _PRODUCTS:
        return float(numbers[0])  # type: ignore[arg-type]
    if name in _QUOTIENTS and args[1] is numbers[0] and numbers[0]:
        return 1.0 / float(numbers[0])  # type: ignore[arg-type]
    return None


def _token_index(node: Node) -> tuple[Any, ...] | None:
    """Return the index by which a node picks tokens and leaves the vocabulary whole, or None."""
    if op_name(node) != "getitem" or not isinstance(node.args[0], Node):
        return None
    source, out = example_value(node.args[0]), example_value(node)
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not isinstance(source, Tensor) or source.dim() != out.dim():
        return None
    if not all(i is Ellipsis or isinstance(i, slice) for i in index):
        return None
    whole = slice(None, None, None)
    if Ellipsis in index:
        last = index[-1] if index[-1] is not Ellipsis else whole
    else:
        last = index[-1] if len(index) == source.dim() else whole
    return index if last == whole else None
