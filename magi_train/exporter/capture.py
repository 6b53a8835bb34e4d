"""Capture of a module for inference: arguments sorted, sizes found, the forward as one graph.

torch.export traces a wrapper that takes the tensors in a row and returns tensors in a row, so that
every target has the same simple interface and a loaded file needs none of the model's classes.
"""

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from magi_train.core import compat
from magi_train.core.errors import ExportError
from magi_train.exporter import shapes
from magi_train.exporter.compare import relative_error, rounding
from magi_train.exporter.contract import (
    Constant,
    Contract,
    Size,
    Skeleton,
    TensorSpec,
    always_holds,
    dtype_name,
    flatten,
    holds,
    names_in,
)
from magi_train.exporter.quantized import with_narrow_weights
from magi_train.exporter.settings import Precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """How a module is called: which of its arguments are tensors.

    Attributes:
        positional: Names of the arguments that are given by position.
        order: All names.
        tensors: The examples by name.
        constants: The other arguments.
    """

    positional: tuple[str, ...]
    order: tuple[str, ...]
    tensors: dict[str, Tensor]
    constants: dict[str, Constant]

    def fill(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return args and kwargs of a call with these tensors."""
        given = {**self.constants, **dict(zip(self.tensors, tensors, strict=True))}
        args = tuple(given.pop(name) for name in self.positional)
        return args, given


def sort_arguments(module: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any]) -> Call:
    """Return how `module` is called with the examples.

    Raises:
        ExportError: An argument is neither a tensor nor a plain constant, or none is a tensor.
    """
    if isinstance(example_inputs, Tensor):
        raise ExportError("example_inputs must be a tuple or a mapping of arguments, got a tensor")
    if isinstance(module, torch.jit.ScriptModule):
        raise ExportError(
            f"{type(module).__name__} is a TorchScript module, whose code cannot be captured; "
            "export the module that it was made of"
        )
    by_name = isinstance(example_inputs, Mapping)
    args = () if by_name else tuple(example_inputs)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ExportError(f"{type(module).__name__} cannot be called so: {error}") from error
    names = []
    for key, parameter in bound.signature.parameters.items():
        if key in bound.arguments and parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{key}_{i}" for i in range(len(bound.arguments[key]))]
        elif key in bound.arguments:
            names.append(key)
    positional = tuple(names[: len(args)])
    given = {**dict(zip(positional, args, strict=True)), **kwargs}
    # as the signature has them, whatever order a mapping came in: later calls may be positional
    given = {n: given[n] for n in [*(n for n in names if n in given), *(given.keys() - {*names})]}
    tensors, constants = {}, {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            tensors[name] = value.detach().contiguous()  # as every later call's are
        elif value is None or isinstance(value, bool | int | float | str):
            constants[name] = value
        else:
            raise ExportError(
                f"{name} is a {type(value).__name__}; an exported file takes tensors and constants "
                "(numbers, flags, texts, None); wrap the module in one that takes them one by one"
            )
    if not tensors:
        raise ExportError("example_inputs holds no tensor, so that nothing could change")
    return Call(positional, tuple(given), tensors, constants)


class Flat(nn.Module):
    """`module`, taking tensors in a row and returning a tuple of tensors."""

    def __init__(
        self, module: nn.Module, call: Call, keep: Sequence[str] | None, cast: Any
    ) -> None:
        super().__init__()
        self.module = module
        self._call, self._keep, self._cast = call, keep, cast

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the module; with a cast, in that dtype."""
        given = [t.to(self._cast) if self._cast and t.is_floating_point() else t for t in tensors]
        args, kwargs = self._call.fill(given)
        found, _, _ = flatten(self.module(*args, **kwargs), self._keep)
        outside = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        return tuple(t.to(outside) if self._cast and t.dtype == self._cast else t for t in found)


@dataclass
class Captured:
    """A module as a graph.

    Attributes:
        graph: Takes the tensors in order; its weights are attributes.
        specs: torch.export's specification of every input.
        contract: What goes in and comes out.
        inputs: The examples.
        reference: What the module itself returned for them.
        notes: What the user should know.
    """

    graph: GraphModule
    specs: tuple[shapes.Spec, ...]
    contract: Contract
    inputs: tuple[Tensor, ...]
    reference: list[Tensor]
    notes: list[str] = field(default_factory=list)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context in evaluation mode without gradients; modes and buffers are put back.

    Only the flag is set: a `train()` of the module's own may rewrite its weights.
    """
    training = [m for m in module.modules() if m.training]
    kept = [(b, b.clone()) for b in module.buffers()]
    of_modules = (m._buffers for m in module.modules())
    places = [(own, dict(own)) for own in of_modules if isinstance(own, dict)]  # not TorchScript's
    for each in training:
        each.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for each in training:
            each.training = True
        for now, old in places:  # a forward may put another tensor into a buffer's place
            now.update(old)
        with torch.no_grad():
            for buffer, before in kept:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def in_precision(module: nn.Module, dtype: torch.dtype, buffers: bool) -> nn.Module:
    """Return a copy with its parameters in `dtype`, and the buffers of modules that have some."""
    changed = copy.deepcopy(module)
    for part in changed.modules():
        own = dict(part.named_parameters(recurse=False))
        tensors = [*own.values(), *(part.buffers(recurse=False) if own or buffers else ())]
        for each in tensors:
            if each.is_floating_point():
                each.data = each.data.to(dtype)
    return changed


def capture(
    module: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    dynamic: shapes.Dynamic,
    dynamic_shapes: Any,
    outputs: Sequence[str] | None,
    precision: Precision | None,
) -> Captured:
    """Return `module` as a graph for inference; the module is left as it was.

    Raises:
        ExportError: It cannot be captured, or a size that was declared dynamic is fixed by it.
    """
    call = sort_arguments(module, example_inputs)
    limits, only_try = shapes.wanted_sizes(dynamic)
    places = {name: shapes.find_dimensions(call.tensors, name) for name in limits}
    for name in [n for n, found in places.items() if not found]:
        if not only_try:
            raise ExportError(
                f"no input has a {name} dimension that could be found; declare it with "
                "dynamic_shapes={'input': {dimension: torch.export.Dim(...)}}"
            )
        del places[name]
    examples = shapes.widened(call.tensors, places)
    declared = shapes.declared_by_name(dynamic_shapes, call.order)
    specs = shapes.specs_for(examples, places, limits, declared)
    with evaluating(module):
        reference, skeleton, dropped = _reference(module, call, examples, outputs)
    notes = [f"output {name} is left out of the file" for name in dropped]
    precise = precision is None
    with evaluating(module):  # anew: the file holds the buffers as they are
        body = module
        if precision == "int8" or precision == "float8":
            body, done = with_narrow_weights(module, precision)
            notes.append(done)
            precision = None
        graph = _trace(body, call, examples, specs, outputs, precision)
    fakes = dict(zip(examples, _inputs(graph), strict=True))
    where, limits = shapes.with_declared(fakes, specs, places, limits)
    for size, found in where.items():
        low, high = _proven(
            module, graph, call, examples, fakes, found, limits[size], outputs, precise
        )
        if (low, high) != limits[size]:
            sentence = f"{size} must lie in {low}..{high or ''}: the model's code depends on it"
            asked = size in places and not only_try
            if asked and (low, high) != (2, limits[size][1]):
                raise ExportError(f"{sentence}; declare that range")
            notes.append(sentence)
            limits[size] = (low, high)
    found_shapes, symbols, conditions = shapes.captured_sizes(fakes, where, limits)
    sizes = {size: examples[at[0][0]].shape[at[0][1]] for size, at in where.items()}
    for size in [size for size in where if limits[size][0] == 1]:
        if not all(holds(each, {**sizes, size: 1}) for each in conditions):
            limits[size] = (2, limits[size][1])
            notes.append(f"{size} must lie in 2..{limits[size][1] or ''}: {conditions} ask for it")
            found_shapes, symbols, _ = shapes.captured_sizes(fakes, where, limits)
    ones = [size.name for size in symbols.values() if size.minimum == 1]
    together = _narrowed(examples, [place for size in ones for place in where[size]])
    if len(ones) > 1 and not _same_results(module, graph, call, together, outputs, precise):
        conditions.append(f"max({', '.join(ones)}) > 1")
    named = {size.name: size for size in symbols.values()}
    conditions = [each for each in conditions if not always_holds(each, named)]
    if conditions:
        more = f" and {len(conditions) - 3} more" if len(conditions) > 3 else ""
        notes.append(
            f"sizes must fulfil {', '.join(conditions[:3])}{more}: the model's code asks for it"
        )
    for size, at in places.items():
        fixed = [key for key, dim in at.items() if isinstance(found_shapes[key][dim], int)]
        if fixed:
            have = found_shapes[fixed[0]][at[fixed[0]]]
            sentence = f"{size} of {fixed[0]} is fixed at {have}"
            if not only_try:
                raise ExportError(f"{sentence}: the model's code depends on that number")
            notes.append(f"{sentence}: the model's code depends on that number")
    device = next(iter(examples.values())).device.type
    inputs = tuple(TensorSpec(k, dtype_name(t.dtype), found_shapes[k]) for k, t in examples.items())
    results = _results(graph, skeleton, symbols)
    contract = Contract(
        call.order, inputs, call.constants, device, results, skeleton, tuple(conditions)
    )
    return Captured(
        graph, tuple(specs.values()), contract, tuple(examples.values()), reference, notes
    )


def _proven(
    module: nn.Module,
    graph: GraphModule,
    call: Call,
    examples: Mapping[str, Tensor],
    fakes: Mapping[str, Any],
    where: Sequence[shapes.Place],
    limits: shapes.Limits,
    outputs: Sequence[str] | None,
    precise: bool,
) -> shapes.Limits:
    """Return the part of `limits` for which the graph is what the module computes.

    The tracer keeps the bounds that branches of the module imply. It never sees the size 1, which
    is tried instead.
    """
    low, high = limits
    sizes = [compat.known_size(fakes[key].shape[dim]) for key, dim in where]
    bounds = [compat.symbol_bounds(size) for size in sizes if not isinstance(size, int)]
    for least, most in bounds:
        low = max(low, least) if least > 2 else low
        high = most if high is None else high if most is None else min(high, most)
    if low == 1 and bounds:
        rows = _narrowed(examples, where)
        low = 1 if _same_results(module, graph, call, rows, outputs, precise) else 2
    return low, high


def _narrowed(examples: Mapping[str, Tensor], where: Sequence[shapes.Place]) -> list[Tensor]:
    """Return the examples with these dimensions of size 1."""
    rows = dict(examples)
    for key, dim in where:
        rows[key] = rows[key].narrow(dim, 0, 1)
    return [*rows.values()]


def _same_results(
    module: nn.Module,
    graph: GraphModule,
    call: Call,
    tensors: Sequence[Tensor],
    outputs: Sequence[str] | None,
    precise: bool,
) -> bool:
    args, kwargs = call.fill([t.clone() for t in tensors])
    try:
        with evaluating(module):
            wanted = flatten(module(*args, **kwargs), outputs)[0]
        with evaluating(graph):  # anew: it writes to the same buffers
            got = graph(*(t.clone() for t in tensors))
    except Exception as error:  # noqa: BLE001  (the user's code may raise anything)
        logger.debug("a size of 1 cannot be run: %s", error)
        return False
    same = (_alike(a, b, precise) for a, b in zip(got, wanted, strict=False))
    return len(got) == len(wanted) and all(same)


def _alike(got: Tensor, wanted: Tensor, precise: bool) -> bool:
    if got.shape != wanted.shape:
        return False
    return relative_error(got, wanted) <= (rounding(wanted) if precise else 0.1)


def _reference(
    module: nn.Module, call: Call, examples: Mapping[str, Tensor], keep: Sequence[str] | None
) -> tuple[list[Tensor], Skeleton, list[str]]:
    args, kwargs = call.fill([t.clone() for t in examples.values()])
    buffers = dict(module.named_buffers())
    try:
        value = module(*args, **kwargs)
    except Exception as error:
        raise ExportError(
            f"{type(module).__name__} itself fails on example_inputs: {type(error).__name__}: "
            f"{error}"
        ) from error
    for key, now in module.named_buffers():
        before = buffers.get(key, now)
        if now is not before and now.shape == before.shape and not torch.equal(now, before):
            raise ExportError(
                f"{type(module).__name__} replaces its buffer {key} by another tensor while it is "
                "evaluated, which a file would not do; write into it, as by copy_() or add_()"
            )
    tensors, skeleton, dropped = flatten(value, keep)
    names = list(skeleton[1]) if isinstance(skeleton, list) and skeleton[0] == "dict" else []
    missing = [name for name in keep or () if name not in [*names, *dropped]]
    have = [*names, *dropped] if isinstance(value, Mapping) else f"a {type(value).__name__}"
    if missing:
        raise ExportError(f"outputs {missing} not found: the module returns {have}")
    if not tensors:
        raise ExportError(
            f"{type(module).__name__} returns {have}, and no tensor: results must be tensors, or "
            "tuples, lists, mappings and dataclasses of them"
        )
    return [t.detach() for t in tensors], skeleton, dropped


def _trace(
    module: nn.Module,
    call: Call,
    examples: Mapping[str, Tensor],
    specs: Mapping[str, shapes.Spec],
    keep: Sequence[str] | None,
    precision: str | None,
) -> GraphModule:
    dtype = getattr(torch, precision) if precision else None
    inputs, dynamic = tuple(examples.values()), (tuple(specs.values()),)
    for buffers in (False, True) if dtype else (False,):
        body = in_precision(module, dtype, buffers) if dtype else module
        try:
            program = torch.export.export(
                Flat(body, call, keep, dtype), inputs, dynamic_shapes=dynamic
            )
            return program.module(check_guards=False)
        except Exception as error:
            if buffers or not dtype:
                name = type(module).__name__
                raise ExportError(f"torch.export cannot capture {name}: {error}") from error
    raise AssertionError("unreachable")


def _inputs(graph: GraphModule) -> list[Any]:
    return [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]


def _results(
    graph: GraphModule, skeleton: Skeleton, symbols: Mapping[str, Size]
) -> tuple[TensorSpec, ...]:
    """Return dtype and shape of what the graph returns; sizes that are computed have a formula."""
    values: Any = graph.graph.output_node().args[0]
    found = []
    for name, node in zip(names_in(skeleton), values, strict=True):
        fake = node.meta["val"]
        shape = tuple(
            s if isinstance(s, int) else symbols.get(str(s), Size(str(s), 0, None))
            for s in map(compat.known_size, fake.shape)
        )
        found.append(TensorSpec(name, dtype_name(fake.dtype), shape))
    return tuple(found)
