"""Rewrites that are proven: slice a region of the graph, run it, compare it with its replacement.

A pass proposes by structure and this module accepts by numbers. The pass finds an anchor (a loss, a
norm) and names the inputs of the region that it wants to replace:

    slice_region   what lies between these inputs and the output. Nothing else may read inside, no
                   op may change a tensor in place there, nothing may be random.
    Small          stands small sizes in for the real or symbolic ones: a proof costs milliseconds.
    prove          runs the region and the replacement on random inputs of several magnitudes and
                   compares outputs and gradients.

Each proof runs twice. First in float64 without autocast, where only explicit casts in the region
round, so that a near miss (another constant, an index that is off by one) shows; then in the
recorded dtypes under the recorded autocast, where the replacement must round no more than the
region does. The error is measured in the Euclidean norm, relative: rounding errors that are
independent do not grow with the size there (Higham, Accuracy and Stability of Numerical Algorithms,
section 4.2), so a few unit roundoffs of the coarsest dtype that the region computes in is the
tolerance. Random inputs can prove a pass wrong, never right for all inputs: the structure, which a
pass checks itself, must leave no room for a difference that appears at some values only.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from magi_train.core import compat
from magi_train.core.graph import example_value, is_read, mutated, op_name, run_nodes

MAGNITUDES = (1e-2, 1.0, 10.0)
ROUNDINGS = 32
"""Unit roundoffs by which two right computations may differ: a few follow each other. Times the
magnitude where that exceeds 1, since exp turns an absolute error into a relative one."""
EXACT_UNIT = 2.0**-40
"""Taken for the unit roundoff of float64: room for sums of any length, and for nothing else."""
UPSTREAM = 3.0
"""Gradient that flows into the output of a region during a proof; not 1, which hides a lost one."""
KEPT_SIZE = 16
"""Sizes up to this are small already."""
STAND_INS = (17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)

_SHAPED = {"view", "reshape", "_unsafe_view"}
_CHECKS = {"_assert_tensor_metadata"}
_CANNOT_RUN = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True)
class Autocast:
    """What autocast does at one place of a graph."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    def context(self, *, off: bool = False) -> Any:
        """Return the context manager of this state, or of the same device without autocast."""
        enabled = self.enabled and not off
        return torch.autocast(self.device_type, self.dtype, enabled=enabled, cache_enabled=False)


@dataclass(frozen=True)
class Region:
    """Nodes that compute `output` from `inputs` and `sizes` and that nothing else reads."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    sizes: tuple[Node, ...]
    output: Node


def slice_region(gm: GraphModule, inputs: Sequence[Node], output: Node) -> Region | str:
    """Return the region between `inputs` and `output`, or why it may not be replaced.

    The output must be a new tensor, not a view of an input: later changes in place could reach the
    inside or the inputs only through it.
    """
    found: set[Node] = set()
    sizes: set[Node] = set()
    todo = [output]
    while todo:
        node = todo.pop()
        if node in found or node in inputs:
            continue
        if isinstance(example_value(node), int | torch.SymInt):
            sizes.add(node)
            continue
        if node.op not in ("call_function", "call_method"):
            return f"it also depends on {node.name}"
        found.add(node)
        todo += node.all_input_nodes
    order = list(gm.graph.nodes)
    nodes = tuple(n for n in order if n in found)
    for node in order[order.index(nodes[0]) : order.index(output) + 1]:
        if mutated(node):
            return (
                f"{node.name} changes a tensor in place between {nodes[0].name} and {output.name}"
            )
    for node in found - {output}:
        others = [u for u in node.users if u not in found and op_name(u) not in _CHECKS]
        readers = [u for u in others if u.op == "output" or mutated(u) or is_read(u)]
        if readers:
            return f"{node.name} is also read by {readers[0].name}"
    return Region(nodes, tuple(inputs), tuple(n for n in order if n in sizes), output)


def autocast_at(gm: GraphModule, node: Node) -> Autocast:
    """Return the autocast state of `node`: the ambient one, as the graph changed it before."""
    device_type = example_value(node).device.type
    ambient = Autocast(
        device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    )
    open_contexts: dict[Node, Autocast] = {}
    for each in gm.graph.nodes:
        if each is node:
            break
        if op_name(each) == "_enter_autocast" and each.args[0] == device_type:
            dtype, enabled = (*each.args[1:3], None, None)[:2]
            dtype = dtype if isinstance(dtype, torch.dtype) else ambient.dtype
            open_contexts[each] = Autocast(device_type, enabled is not False, dtype)
        elif op_name(each) == "_exit_autocast":
            open_contexts.pop(each.args[0], None)  # type: ignore[arg-type]
    return [ambient, *open_contexts.values()][-1]


class Small:
    """Small stand-ins for the sizes of some tensors: equal for equal sizes, else different.

    Args:
        values: Fake tensors whose sizes will be asked for.

    Raises:
        ValueError: They have more sizes than there are stand-ins.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self._fixed: dict[int, int] = {}
        self._symbols: dict[Any, int] = {}
        for value in values:
            for size in map(compat.known_size, value.shape):
                if isinstance(size, int):
                    if size > KEPT_SIZE and size not in self._fixed:
                        self._fixed[size] = self._next()
                else:
                    for symbol in compat.size_symbols(size):
                        if symbol not in self._symbols:
                            self._symbols[symbol] = self._next()

    def _next(self) -> int:
        taken = len(self._fixed) + len(self._symbols)
        if taken == len(STAND_INS):
            raise ValueError(f"it has more than {taken} different sizes")
        return STAND_INS[taken]

    def size(self, value: Any) -> int:
        """Return what stands in for one size.

        Raises:
            ValueError: Nothing does.
        """
        value = compat.known_size(value)
        if isinstance(value, torch.SymInt):
            return compat.evaluate_size(value, self._symbols)
        if value <= KEPT_SIZE or value in self._fixed:
            return self._fixed.get(value, int(value))
        raise ValueError(f"no small stand-in for the size {value}")

    def shape(self, value: Tensor) -> tuple[int, ...]:
        """Return the shape that stands in for that of `value`."""
        return tuple(self.size(s) for s in value.shape)

    def arguments(self, node: Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return what `node` is called with: shapes that are spelled out are made small."""
        if op_name(node) not in _SHAPED or kwargs or len(args) < 2:
            return args, kwargs
        sizes = list(args[1]) if isinstance(args[1], list | tuple) else list(args[1:])
        whole = sizes if -1 in sizes else [-1, *sizes[1:]]  # products of sizes have no stand-in
        literal = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
        given = zip(whole, literal, strict=True)  # type: ignore[arg-type]
        small = [s if s == -1 or isinstance(n, Node) else self.size(s) for s, n in given]
        return (args[0], small), kwargs


@dataclass(frozen=True)
class Draw:
    """How to draw inputs for one run of a proof.

    Attributes:
        generator: Source of randomness; the user's is not touched.
        magnitude: Standard deviation of the input that carries the scale.
        exact: Whether floating point inputs are float64 instead of their own dtype.
    """

    generator: torch.Generator
    magnitude: float
    exact: bool

    def normal(self, shape: Sequence[int], like: Tensor, scale: float) -> Tensor:
        """Return normal numbers on the device of `like`, rounded to its dtype unless exact."""
        numbers = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        return numbers.to(like.device, torch.float64 if self.exact else like.dtype)

    def integers(self, low: int, high: int, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return integers of [low, high) in the dtype and on the device of `like`."""
        numbers = torch.randint(low, high, tuple(shape), generator=self.generator)
        return numbers.to(like.device, like.dtype)


def prove(
    region: Region,
    reference: Callable[[bool], Callable[..., Tensor]],
    draw: Callable[[Draw], Sequence[Tensor]],
    small: Small,
    autocast: Autocast,
) -> str:
    """Return "" if the region computes what the reference does, else where they differ.

    Args:
        region: From `slice_region`.
        reference: From whether a run is exact (float64) to the function of the region's inputs, in
            their order, that shall replace it.
        draw: Makes these inputs. Floating point ones are differentiated.
        small: Knows the sizes.
        autocast: As it is where the region runs.
    """
    recorded = example_value(region.output).dtype
    generator = torch.Generator().manual_seed(0)
    for exact in (True, False):
        for magnitude in MAGNITUDES:
            with compat.unset_fake_temporarily(), torch.enable_grad(), autocast.context(off=exact):
                try:
                    inputs = draw(Draw(generator, magnitude, exact))
                    got, unit = _run(region, inputs, small)
                    want = _differentiate(reference(exact)(*inputs), inputs)
                except _CANNOT_RUN as error:
                    return f"it cannot be executed ({type(error).__name__}: {str(error)[:80]})"
                if not exact and not got[0].dtype == want[0].dtype == recorded:
                    return f"it is {recorded}, alone {got[0].dtype}, replaced {want[0].dtype}"
                off = max(map(_distance, got, want))
                if not off <= ROUNDINGS * unit * max(1.0, magnitude):
                    return (
                        f"it differs from the reference by {off:.1e} at magnitude {magnitude:g}"
                        f"{' in float64' if exact else ''}"
                    )
    return ""


def _run(region: Region, inputs: Sequence[Tensor], small: Small) -> tuple[list[Any], float]:
    """Return output and gradients of the region, and the unit roundoff of its coarsest dtype."""
    for each in inputs:
        each.requires_grad_(each.is_floating_point())
    known: dict[Node, Any] = {n: small.size(example_value(n)) for n in region.sizes}
    with Reproducible():
        values = run_nodes(
            region.nodes, known | dict(zip(region.inputs, inputs, strict=True)), small.arguments
        )
    tensors = [values[n] for n in region.nodes if isinstance(values[n], Tensor)]
    floats = [t for t in tensors if t.is_floating_point()]
    unit = max(EXACT_UNIT, *(torch.finfo(t.dtype).eps / 2 for t in floats))
    if any(t.is_cuda and t.dtype is torch.float32 for t in floats):
        unit = max(unit, 2.0**-11)  # TF32, if the user allows it
    return _differentiate(values[region.output], inputs), unit


def _differentiate(output: Tensor, inputs: Sequence[Tensor]) -> list[Any]:
    """Return the output and its gradients by the floating point inputs."""
    leaves = [t for t in inputs if t.requires_grad]
    upstream = torch.full_like(output, UPSTREAM)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream, allow_unused=True)]


def _distance(got: Tensor | None, want: Tensor | None) -> float:
    """Return the relative difference; inf where shapes differ or values are not finite."""
    if got is None or want is None:
        return 0.0 if got is want else float("inf")
    a, b = got.detach().double(), want.detach().double()
    if a.shape != b.shape or not bool(a.isfinite().all() & b.isfinite().all()):
        return float("inf")
    off, size = float((a - b).norm()), float(a.norm())
    return 0.0 if off == 0 else off / size if size else float("inf")


def execute(
    gm: GraphModule, needed: set[Node], known: Mapping[Node, Any], target: Node
) -> Tensor | str:
    """Return the real value of `target`, or why it cannot be computed.

    Args:
        gm: The graph.
        needed: The nodes to run.
        known: Values that are given.
        target: The node that is asked for.
    """
    off = torch.autocast("cpu", enabled=False)
    try:
        with compat.unset_fake_temporarily(), torch.no_grad(), off, Reproducible():
            values = run_nodes([n for n in gm.graph.nodes if n in needed], dict(known))
    except _CANNOT_RUN as error:
        return f"its subgraph cannot be executed ({type(error).__name__}: {str(error)[:80]})"
    value = values[target]
    return value if isinstance(value, Tensor) else f"{target.name} is not a tensor"


class Reproducible(compat.TorchDispatchMode):  # type: ignore[misc]
    """Refuses ops whose result is not a function of their arguments."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in str(func):
            raise ValueError(f"{func} is random or uninitialised")
        return func(*args, **(kwargs or {}))
