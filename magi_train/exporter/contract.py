"""Contract: what an exported file takes and gives, as data that is written into the file.

An artifact's graph takes tensors in a row and gives tensors in a row. The contract says which
argument of the module each of them is, of which dtype, shape and device, and how the results lie in
what the module returned. Arguments that are no tensors (a flag, None) are part of what was captured
and may not change. `bind` names whatever does not fit before any kernel runs.
"""

import ast
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from magi_train.core.errors import ExportError

Skeleton = Any
"""How results lie: an index, ["tuple", [...]], ["dict", {...}], or None for None."""
Constant = bool | int | float | str | None


UNBOUNDED = 2**31
"""Stands for the end of a range that has none."""


@dataclass(frozen=True)
class Size:
    """A size that may change from call to call: name, range with its ends, and a divisor."""

    name: str
    minimum: int
    maximum: int | None
    multiple: int = 1

    def __str__(self) -> str:
        end = "" if self.maximum is None else self.maximum
        steps = f" by {self.multiple}" if self.multiple > 1 else ""
        return f"{self.name} in {self.minimum}..{end}{steps}"

    def values(self) -> range:
        """Return all that it may be; where it has no end, up to a large number."""
        least = math.ceil(self.minimum / self.multiple) * self.multiple
        return range(least, (self.maximum or UNBOUNDED) + 1, self.multiple)

    def takes(self, value: int) -> bool:
        """Return whether the file can be run with this size."""
        within = self.minimum <= value and (self.maximum is None or value <= self.maximum)
        return within and value % self.multiple == 0


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name, its dtype ("float32") and its sizes, fixed or a range."""

    name: str
    dtype: str
    shape: tuple[int | Size, ...]

    def text(self) -> str:
        """Return dtype and shape as one writes them: "int64 [batch in 1..8, 16]"."""
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Contract:
    """See the head of this module.

    Attributes:
        order: Every argument's name, in the order in which they may be given.
        inputs: The tensors among them, in the graph's order.
        constants: The others, with the values that they were captured with.
        device: The type of device that all tensors lie on.
        outputs: What the graph returns.
        skeleton: How these lie in what a call returns.
        conditions: What the sizes must fulfil for the module to take the branches that were
            captured, as Python expressions over their names.
    """

    order: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    constants: Mapping[str, Constant]
    device: str
    outputs: tuple[TensorSpec, ...]
    skeleton: Skeleton
    conditions: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Contract":
        """Return what `as_dict` described."""
        inputs, outputs = (tuple(map(_spec, data[key])) for key in ("inputs", "outputs"))
        return Contract(
            tuple(data["order"]), inputs, dict(data["constants"]), data["device"], outputs,
            data["skeleton"], tuple(data.get("conditions", ())),
        )  # fmt: skip

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the graph's inputs for a call, as they were given.

        Raises:
            ExportError: An argument is missing, unknown, or not what the contract says.
        """
        if len(args) > len(self.order):
            raise ExportError(f"{len(args)} arguments given; the file takes {list(self.order)}")
        given = dict(zip(self.order, args, strict=False))
        twice, unknown = given.keys() & kwargs.keys(), kwargs.keys() - set(self.order)
        if twice or unknown:
            what = f"{min(twice)!r} is given twice" if twice else f"no input is {min(unknown)!r}"
            raise ExportError(f"{what}; the file takes {list(self.order)}")
        given.update(kwargs)
        for name, value in self.constants.items():
            if name in given and (isinstance(given[name], Tensor) or given[name] != value):
                raise ExportError(
                    f"{name} was {value!r} when the model was exported, and is a part of the file; "
                    f"got {_kind(given[name])}; leave it out, or export again with the other value"
                )
        missing = [each.name for each in self.inputs if each.name not in given]
        if missing:
            raise ExportError(f"{missing} missing; the file takes {list(self.order)}")
        sizes: dict[str, tuple[int, str]] = {}
        for each in self.inputs:
            self._check(each, given[each.name], sizes)
        values = {name: have for name, (have, _) in sizes.items()}
        for condition in self.conditions:
            if not holds(condition, values):
                raise ExportError(
                    f"the sizes must fulfil {condition}, as those of the example inputs did, since "
                    f"the model's code asks for it; got {values}; export again with such sizes"
                )
        return [given[each.name] for each in self.inputs]

    def _check(self, wanted: TensorSpec, got: Any, sizes: dict[str, tuple[int, str]]) -> None:
        problem = ""
        if not isinstance(got, Tensor):
            problem = f"got {_kind(got)}, and no tensor"
        elif dtype_name(got.dtype) != wanted.dtype:
            problem = f"got {dtype_name(got.dtype)}; convert it with .to(torch.{wanted.dtype})"
        elif got.device.type != self.device:
            problem = f"got a tensor on {got.device}, and the file is for {self.device!r}"
        elif got.dim() != len(wanted.shape):
            problem = f"got {got.dim()} dimensions, {list(got.shape)}"
        if problem:
            raise ExportError(f"{wanted.name} must be {wanted.text()}: {problem}")
        for number, (size, have) in enumerate(zip(wanted.shape, got.shape, strict=True)):
            fits = have == size if isinstance(size, int) else size.takes(have)
            if not fits:
                raise ExportError(
                    f"{wanted.name} must be {wanted.text()}: got {list(got.shape)}, whose "
                    f"dimension {number} does not fit; export again with it in `dynamic` or "
                    "`dynamic_shapes`, or with other limits"
                )
            if isinstance(size, Size):
                first, where = sizes.setdefault(size.name, (have, wanted.name))
                if first != have:
                    raise ExportError(
                        f"{size.name} is {first} in {where} and {have} in {wanted.name}; these "
                        "sizes must be equal"
                    )

    def sizes(self) -> dict[str, Size]:
        """Return the sizes that may change, by name."""
        found = [s for each in self.inputs for s in each.shape if isinstance(s, Size)]
        return {size.name: size for size in found}

    def example(self, **sizes: int) -> list[Tensor]:
        """Return inputs of the named sizes, at least 1: zeros for integers, else random numbers.

        Raises:
            ExportError: A name is no size of this file, or lies out of its range.
        """
        known = self.sizes()
        for name, value in sizes.items():
            if name not in known:
                raise ExportError(f"{name!r} is no dynamic size; the file has {sorted(known)}")
            if not known[name].takes(value):
                raise ExportError(f"{known[name]}; got {value}")
        made = []
        for each in self.inputs:
            shape = [s if isinstance(s, int) else sizes.get(s.name, s.minimum) for s in each.shape]
            dtype = getattr(torch, each.dtype)
            make = torch.randn if dtype.is_floating_point else torch.zeros
            made.append(make(shape, dtype=dtype, device=self.device))  # type: ignore[operator]
        return made


FUNCTIONS = {"float": float, "max": max, "min": min, "abs": abs, "round": round, "math": math}
"""What the expressions of `Contract.conditions` may call."""
MOST_TRIED = 100_000
"""Combinations of sizes for which a condition is computed, to see whether it can fail."""
_SYNTAX = (
    ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Constant,
    ast.IfExp, ast.Name, ast.Attribute,
    ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


def holds(condition: str, sizes: Mapping[str, int]) -> bool:
    """Return whether sizes fulfil a condition: arithmetic and comparisons over their names.

    Raises:
        ExportError: It is something else: a file's text is not run as code.
    """
    try:
        return bool(eval(_arithmetic(condition), {"__builtins__": {}, **FUNCTIONS, **sizes}))
    except Exception as error:
        raise ExportError(
            f"the file's condition {condition!r} for its sizes cannot be computed "
            f"({type(error).__name__}: {error}); export again"
        ) from error


def always_holds(condition: str, sizes: Mapping[str, Size]) -> bool:
    """Return whether all sizes that are allowed fulfil a condition; False if they are too many."""
    words = ast.walk(ast.parse(condition, mode="eval"))
    names = {word.id for word in words if isinstance(word, ast.Name)} & sizes.keys()
    ranges = {name: sizes[name].values() for name in names}
    if math.prod(map(len, ranges.values())) > MOST_TRIED:
        return False
    return all(
        holds(condition, dict(zip(ranges, each, strict=True)))
        for each in itertools.product(*ranges.values())
    )


@functools.lru_cache(1024)
def _arithmetic(text: str) -> CodeType:
    tree = ast.parse(text, mode="eval")
    for part in ast.walk(tree):
        known = isinstance(part, _SYNTAX)
        if isinstance(part, ast.Attribute):
            known = isinstance(part.value, ast.Name) and part.value.id == "math"
            known = known and not part.attr.startswith("_")
        if not known:
            raise ValueError(f"{ast.unparse(part)!r} is no arithmetic")
    return compile(tree, "condition", "eval")


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def flatten(value: Any, keep: Sequence[str] | None = None) -> tuple[list[Tensor], Skeleton, list]:  # type: ignore[type-arg]
    """Return the tensors in `value`, how they lie in it, and the names of what is left out.

    Args:
        value: A tensor, or tuples, lists, mappings (a model's output is one) and dataclasses of
            tensors. What is neither (a cache of keys) is left out.
        keep: Only these entries of the outermost mapping.
    """
    tensors: list[Tensor] = []
    dropped: list[str] = []

    def walk(part: Any, name: str) -> Skeleton:
        if isinstance(part, Tensor):
            tensors.append(part)
            return len(tensors) - 1
        if is_dataclass(part) and not isinstance(part, Mapping | type):
            part = {each.name: getattr(part, each.name) for each in fields(part)}
        if isinstance(part, Mapping):
            chosen = {k: v for k, v in part.items() if name or keep is None or k in keep}
            dropped.extend(str(k) for k in part if k not in chosen)
            inner = {str(k): walk(v, f"{name}.{k}") for k, v in chosen.items()}
            return ["dict", {k: v for k, v in inner.items() if v is not None}]
        if isinstance(part, list | tuple):
            return ["tuple", [walk(v, f"{name}.{i}") for i, v in enumerate(part)]]
        if part is not None:
            dropped.append(name.removeprefix(".") or type(part).__name__)
        return None

    return tensors, walk(value, ""), dropped


def names_in(skeleton: Skeleton, name: str = "") -> list[str]:
    """Return a name for every tensor of a skeleton, in order: "logits", "hidden_states.0"."""
    if skeleton is None:
        return []
    if isinstance(skeleton, int):
        return [name or "output"]
    kind, parts = skeleton
    items = parts.items() if kind == "dict" else enumerate(parts)
    found = []
    for key, part in items:
        found += names_in(part, f"{name}.{key}" if name else f"{key}")
    return found


class Outputs(dict[str, Any]):
    """Results by name; also as attributes, as models return them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}, only {list(self)}") from None


def rebuild(skeleton: Skeleton, tensors: Sequence[Tensor]) -> Any:
    """Return `tensors` as a skeleton says they lie."""
    if skeleton is None:
        return None
    if isinstance(skeleton, int):
        return tensors[skeleton]
    kind, parts = skeleton
    if kind == "dict":
        return Outputs((key, rebuild(part, tensors)) for key, part in parts.items())
    return tuple(rebuild(part, tensors) for part in parts)


def _spec(data: Mapping[str, Any]) -> TensorSpec:
    sizes = tuple(Size(**s) if isinstance(s, Mapping) else s for s in data["shape"])
    return TensorSpec(data["name"], data["dtype"], sizes)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else f"{value!r:.60}"
