"""Which sizes of an artifact's inputs may change: declared by the caller, or found by trying.

"batch" is the first dimension of every input that has as many rows as the first; "sequence" is the
second one of the token-like inputs. torch.export proves for each whether the model leaves it open
(Dim.AUTO): a size that the model fixes becomes a number again. Sizes of 1 say nothing to a tracer,
which takes them for a broadcast; such an example is repeated to 2 before it is captured.
"""

import dataclasses
import keyword
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from magi_train.core import compat
from magi_train.core.errors import ExportError
from magi_train.exporter.contract import FUNCTIONS, Size

Limits = tuple[int, int | None]
Dynamic = str | Sequence[str] | Mapping[str, Limits | None] | None
Spec = dict[int, Any]
"""Of one input: dimension to torch.export's Dim or hint."""
Place = tuple[str, int]
"""An input and one of its dimensions."""


def wanted_sizes(dynamic: Dynamic) -> tuple[dict[str, Limits], bool]:
    """Return the limits of each size that is asked for, and whether they are only to be tried.

    Raises:
        ValueError: A name is neither "batch" nor "sequence", or its limits are no range.
    """
    if dynamic == "auto":
        return {"batch": (1, None), "sequence": (1, None)}, True
    given = {dynamic: None} if isinstance(dynamic, str) else dynamic or {}
    pairs = given if isinstance(given, Mapping) else dict.fromkeys(given)
    found: dict[str, Limits] = {}
    for name, limits in pairs.items():
        if name not in ("batch", "sequence"):
            raise ValueError(
                f"dynamic must name 'batch', 'sequence' or both, or be 'auto'; got {name!r}; other "
                "dimensions are declared with dynamic_shapes"
            )
        low, high = limits or (1, None)
        if low < 1 or (high is not None and high < max(low, 2)):
            raise ValueError(f"dynamic[{name!r}] must be (at least 1, at least 2), got {limits}")
        found[name] = (low, high)
    return found, False


def find_dimensions(tensors: Mapping[str, Tensor], name: str) -> dict[str, int]:
    """Return which dimension of which input is the batch or the sequence; may be empty."""
    if name == "batch":
        first = next((t for t in tensors.values() if t.dim()), None)
        return {
            key: 0
            for key, t in tensors.items()
            if first is not None and t.dim() and t.shape[0] == first.shape[0]
        }
    like = [t for t in tensors.values() if t.dim() == 2 and not t.dtype.is_floating_point]
    like = like or [t for t in tensors.values() if t.dim() == 3]
    return {
        key: 1
        for key, t in tensors.items()
        if like and t.dim() in (2, 3) and t.shape[1] == like[0].shape[1]
    }


def widened(
    tensors: Mapping[str, Tensor], dimensions: Mapping[str, Mapping[str, int]]
) -> dict[str, Tensor]:
    """Return the examples with dynamic dimensions of size 1 repeated to 2."""
    result = dict(tensors)
    for places in dimensions.values():
        for key, dim in places.items():
            if result[key].shape[dim] == 1:
                result[key] = torch.cat([result[key]] * 2, dim)
    return result


def specs_for(
    tensors: Mapping[str, Tensor],
    dimensions: Mapping[str, Mapping[str, int]],
    limits: Mapping[str, Limits],
    declared: Mapping[str, Any],
) -> dict[str, Spec]:
    """Return torch.export's specification of every input."""
    specs: dict[str, Spec] = {name: {} for name in tensors}
    for size, places in dimensions.items():
        low, high = limits[size]
        for key, dim in places.items():
            specs[key][dim] = Dim.AUTO(min=low, max=high)
    for key, spec in declared.items():
        if key not in specs:
            raise ExportError(f"dynamic_shapes names {key!r}; the tensors are {list(specs)}")
        specs[key].update(spec if isinstance(spec, Mapping) else dict(enumerate(spec or ())))
    return specs


def declared_by_name(dynamic_shapes: Any, order: Sequence[str]) -> dict[str, Any]:
    """Return `dynamic_shapes`, a mapping or a sequence in the arguments' order, by name."""
    if dynamic_shapes is None:
        return {}
    if isinstance(dynamic_shapes, Mapping):
        given = dict(dynamic_shapes)
    else:
        given = dict(zip(order, dynamic_shapes, strict=False))
    return {name: spec for name, spec in given.items() if spec}


def with_declared(
    fakes: Mapping[str, Tensor],
    specs: Mapping[str, Spec],
    places: Mapping[str, Mapping[str, int]],
    limits: Mapping[str, Limits],
) -> tuple[dict[str, list[Place]], dict[str, Limits]]:
    """Return where each size is, and its limits, with those that `dynamic_shapes` declares.

    Dimensions that turned out to be equal are one size.
    """
    where = {size: list(found.items()) for size, found in places.items()}
    known = {place: size for size, found in where.items() for place in found}
    names: dict[str, str] = {}  # by symbol
    for (key, dim), name in known.items():
        names.setdefault(str(compat.known_size(fakes[key].shape[dim])), name)
    found_limits = dict(limits)
    for key, fake in fakes.items():
        for dim, size in enumerate(map(compat.known_size, fake.shape)):
            if isinstance(size, int) or (key, dim) in known:
                continue
            hint = specs[key].get(dim)
            name = names.setdefault(str(size), _name_of(hint, key, dim, where))
            where.setdefault(name, []).append((key, dim))
            low, high = found_limits.get(name, (1, None))
            least, most = _declared_limits(hint)
            most = min((h for h in (high, most) if h), default=None)
            found_limits[name] = (max(low, least), most)
    return where, found_limits


def captured_sizes(
    fakes: Mapping[str, Tensor],
    where: Mapping[str, Sequence[Place]],
    limits: Mapping[str, Limits],
) -> tuple[dict[str, tuple[int | Size, ...]], dict[str, Size], list[str]]:
    """Return the inputs' shapes, the size of each symbol, and what sizes must fulfil."""
    shapes: dict[str, tuple[int | Size, ...]] = {}
    symbols: dict[str, Size] = {}
    named: list[tuple[str, torch.SymInt]] = []
    names = {place: size for size, found in where.items() for place in found}
    for key, fake in fakes.items():
        shape: list[int | Size] = []
        for dim, size in enumerate(map(compat.known_size, fake.shape)):
            if isinstance(size, int):
                shape.append(size)
                continue
            name = names[key, dim]
            known = _by_steps(Size(name, *limits[name]), compat.size_divisor(size))
            shape.append(symbols.setdefault(str(size), known))
            named.append((name, size))
        shapes[key] = tuple(shape)
    return shapes, symbols, compat.size_conditions(named)


def _by_steps(size: Size, divisor: int) -> Size:
    """Return `size` where the model's code has asked whether a number divides it, and it did."""
    least = -(-size.minimum // divisor) * divisor
    return dataclasses.replace(size, minimum=least, multiple=divisor) if divisor > 1 else size


def _declared_limits(hint: Any) -> Limits:
    low, high = getattr(hint, "min", None), getattr(hint, "max", None)
    unbounded = not isinstance(high, int) or high > 2**62
    return low if isinstance(low, int) and low > 0 else 1, None if unbounded else high


def _name_of(hint: Any, key: str, dim: int, taken: Container[str]) -> str:
    """Return a Dim's name, if conditions can hold it ("2*rows" is an expression) and it is free."""
    name = str(getattr(hint, "__name__", ""))
    usable = name.isidentifier() and not keyword.iskeyword(name) and name not in FUNCTIONS
    return name if usable and name not in taken else f"{key}_{dim}"
