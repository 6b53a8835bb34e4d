"""Weight shadows: what autocast casts every step is kept in low precision by the optimizer.

Under autocast a matrix product reads its float32 weight through a cast: 6 bytes a weight and step,
4 read and 2 written. A shadow is that cast, made once: the optimizer's kernel has the new weight in
registers and writes it a second time, rounded as the cast would (nearest even), for 2 bytes.
Parameters, their gradients and `state_dict` stay float32; the numbers are autocast's.

Three parts:

* `WeightShadows` owns the memory: one flat tensor for matrices and one for vectors, each parameter
  at a fixed place in registration order, so that neighbours (query, key, value) are neighbours.
* `GraphShadows` hands the flat tensors to a captured graph as two more inputs, for whichever
  parameters the graph is called with: one graph serves all blocks of a kind.
* `UseWeightShadows`, on the joint graph, replaces each cast of a parameter by its place there.

When is a shadow stale? Whatever writes a parameter through PyTorch (another optimizer,
`load_state_dict`, an in-place op) moves its version counter, and an assignment to `.data` its
address: both are compared before every forward, and all stale shadows are cast again. A write
*through* `.data` moves neither. For that the optimizer's kernel compares shadow and weight before
it overwrites them, and the next forward raises `StaleShadowError`: all of them in the first steps,
an eighth in turns later, so that whole tensors are always caught and slices in their turn.

A CUDA graph of the user's that holds a whole step writes weights without either. So a forward that
is captured has the casts in its graph, and from then on every other forward casts, too.
"""

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from magi_train.core import compat
from magi_train.core.errors import StaleShadowError
from magi_train.core.graph import CASTS, SAME, call_with_metadata, input_position
from magi_train.core.passes import PassContext, Plan, Stage, source_fingerprint

SOURCE = source_fingerprint(sys.modules[__name__])
ALIGN_ELEMENTS = 128
"""Each shadow starts at a multiple of this, so that kernels may use wide loads on it."""
MATRICES, VECTORS = 0, 1


@dataclass(frozen=True)
class Place:
    """Where the shadow of one parameter lies.

    Attributes:
        flat: MATRICES or VECTORS.
        offset: First element in that flat tensor.
        shape: Of the parameter.
        strides: Of the parameter, and of its shadow.
    """

    flat: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """First element behind the shadow."""
        return self.offset + torch.Size(self.shape).numel()


class DriftFlag:
    """A number on the device that a kernel raises, read without waiting for the device.

    Attributes:
        flag: int32 of one element, 0 until something drifted.
    """

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._host = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")

    def fetch(self) -> None:
        """Start to copy the flag to the host."""
        self._host.copy_(self.flag, non_blocking=True)

    def raised(self) -> bool:
        """Return whether the flag was up in a copy that has arrived.

        The host's number is read while a copy may be under way: it goes from 0 to 1 once. To ask
        whether the last copy has arrived would never be answered yes where the host runs ahead.
        """
        return bool(self._host)


class WeightShadows:
    """Low-precision copies of the float32 weights that one optimizer step writes.

    Nothing is allocated before a captured graph asks for it.

    Attributes:
        windows: What captured graphs were given, by graph and parameters.
        drift: Raised by a step that found a shadow other than its weight; None without parameters.
    """

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._places: dict[int, Place] = {}
        self._known: dict[int, tuple[int, int]] = {}
        self._used: set[int] = set()
        self._doubted: set[int] = set()
        self._captured = False
        self.windows: dict[tuple[object, ...], list[Tensor]] = {}
        self._flats: tuple[Tensor, ...] = ()
        self.drift: DriftFlag | None = None

    def manage(self, parameters: Iterable[nn.Parameter]) -> None:
        """Lay out shadows for `parameters`, given in registration order; those before are gone.

        Parameters that are not dense float32 are left out.
        """
        dense = compat.is_non_overlapping_and_dense
        self._parameters = [p for p in parameters if p.dtype is torch.float32 and dense(p)]
        self._places, self._known, self._used, self._flats = {}, {}, set(), ()
        self._doubted, self.windows = set(), {}
        self.drift = DriftFlag(self._parameters[0].device) if self._parameters else None
        ends = [0, 0]
        for p in self._parameters:
            flat = MATRICES if p.dim() > 1 else VECTORS
            place = Place(flat, ends[flat], tuple(p.shape), p.stride())
            self._places[id(p)] = place
            ends[flat] = -(-place.end // ALIGN_ELEMENTS) * ALIGN_ELEMENTS

    def place(self, parameter: object) -> Place | None:
        """Return where the shadow of `parameter` lies; None where it has none.

        None as well if it has another dtype, device or layout now: `module.to` changes it in place.
        """
        place = self._places.get(id(parameter))
        if place is None or self.drift is None or not isinstance(parameter, Tensor):
            return None
        as_managed = (
            parameter.dtype is torch.float32
            and parameter.device == self.drift.flag.device
            and tuple(parameter.shape) == place.shape
            and parameter.stride() == place.strides
        )
        return place if as_managed else None

    def of(self, parameter: Tensor) -> Tensor | None:
        """Return the shadow of `parameter`, shaped as it; None where no graph reads one."""
        place = self.place(parameter) if id(parameter) in self._used else None
        if place is None:
            return None
        return self._flats[place.flat].as_strided(place.shape, place.strides, place.offset)

    def allocate(self, dtype: torch.dtype) -> bool:
        """Make sure that there are shadows in `dtype`; False where they are in another one."""
        if not self._flats and self._parameters:
            device = self._parameters[0].device
            ends = [
                max((p.end for p in self._places.values() if p.flat == flat), default=0)
                for flat in (MATRICES, VECTORS)
            ]
            self._flats = tuple(torch.zeros(n, dtype=dtype, device=device) for n in ends)
        return bool(self._flats) and self._flats[0].dtype is dtype

    @property
    def num_bytes(self) -> int:
        """Memory that the shadows take now."""
        return sum(flat.nbytes for flat in self._flats)

    def use(self, parameters: Iterable[Tensor]) -> None:
        """Keep the shadows of `parameters` from now on: a graph reads them."""
        self._used.update(id(p) for p in parameters)

    def refresh(self) -> None:
        """Cast every parameter that has been written since its shadow was.

        Raises:
            StaleShadowError: A weight changed behind its shadow, and a step used the old value.
        """
        if self.drift is not None and self.drift.raised():
            raise StaleShadowError(
                "a weight was written through `.data` after a step, so the step that followed "
                "still used its old value; write it in place under torch.no_grad(), or prepare "
                "with Config(fusion=FusionConfig(weight_shadows=False))"
            )
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self._captured = True
        used = [p for p in self._parameters if id(p) in self._used]
        stale = [(p, s) for p in used if self._stale(p) and (s := self.of(p)) is not None]
        if not stale:
            return
        # A backward may be waiting that needs what was there: the version counter tells it. Nothing
        # was there at first use, and nothing has changed, as far as anybody can know, where a
        # shadow is only doubted.
        written = {id(p) for p, _ in stale if self._known.get(id(p), _mark(p)) != _mark(p)}
        for bump in (False, True):
            group: list[Tensor] = [p for p, _ in stale if (id(p) in written) == bump]
            shadows = [s if bump else s.data for p, s in stale if (id(p) in written) == bump]
            if group:
                with torch.no_grad():
                    torch._foreach_copy_(shadows, group)
        self._note_fresh(p for p, _ in stale)

    def before_step(self, parameter: Tensor) -> Tensor | None:
        """Return the shadow that a step shall write, true to the parameter as it is now."""
        shadow = self.of(parameter)
        if shadow is not None and self._stale(parameter):
            shadow.copy_(parameter.detach())
            self._note_fresh([parameter])
        return shadow

    def after_step(self, parameters: Iterable[Tensor]) -> None:
        """Note that a step wrote the shadows of `parameters`, and may have raised the flag."""
        self._note_fresh(parameters)
        if self.drift is not None:
            self.drift.fetch()

    def invalidate(self) -> None:
        """Cast everything again before the next forward."""
        self._doubted = set(self._known)

    def _stale(self, p: Tensor) -> bool:
        seen = self._known.get(id(p)) == _mark(p)
        return self._captured or id(p) in self._doubted or not seen

    def _note_fresh(self, parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            self._known[id(p)] = _mark(p)
            self._doubted.discard(id(p))

    def window(self, flat: int, start: int, length: int) -> Tensor:
        """Return `length` elements of a flat tensor."""
        return self._flats[flat].narrow(0, start, length)


def _mark(p: Tensor) -> tuple[int, int]:
    return p._version, p.data_ptr()


@dataclass(frozen=True)
class ShadowLayout:
    """Where a graph finds the shadows of its parameters.

    Attributes:
        dtype: Of the shadows, for example "bfloat16".
        inputs: Position of the flat tensors among the graph's inputs.
        lengths: Elements of each of them.
        weights: Position of each parameter among the inputs, and its place in them.
    """

    dtype: str
    inputs: tuple[int, int]
    lengths: tuple[int, int]
    weights: tuple[tuple[int, Place], ...]


@dataclass(frozen=True)
class ShadowPlan(Plan):
    """Which casts of a joint graph read a shadow instead.

    Attributes:
        weights: Positions among the graph's inputs of the parameters whose casts are gone.
        casts: Casts that are gone.
        mib_not_written: What these casts wrote.
    """

    weights: tuple[int, ...]
    casts: int
    mib_not_written: float


class UseWeightShadows:
    """See the head of this module."""

    name = "use_weight_shadows"
    stage = Stage.JOINT

    def __init__(self, layout: ShadowLayout) -> None:
        self.layout = layout

    def uuid(self) -> str:
        """Return what compiled code depends on."""
        return f"{SOURCE}-{self.layout}"

    def plan(self, gm: GraphModule, context: PassContext) -> ShadowPlan | None:
        """Count the casts of parameters that have a shadow; None where there are none."""
        found = self._casts(gm)
        if not found:
            return None
        mib = sum(c.meta["val"].numel() * c.meta["val"].element_size() for c, *_ in found) / 2**20
        weights = sorted({position for _, _, position in found})
        return ShadowPlan(tuple(weights), len(found), round(mib, 3))

    def apply(self, gm: GraphModule, plan: ShadowPlan, context: PassContext) -> None:
        """Read the shadows."""
        flats = {input_position(n): n for n in gm.graph.find_nodes(op="placeholder")}
        views: dict[Place, Node] = {}
        for cast, place, _ in self._casts(gm):
            if place not in views:
                with gm.graph.inserting_before(_first_op(gm)):
                    views[place] = _view(gm.graph, flats[self.layout.inputs[place.flat]], place)
            cast.replace_all_uses_with(views[place])
            gm.graph.erase_node(cast)

    def _casts(self, gm: GraphModule) -> list[tuple[Node, Place, int]]:
        places, dtype = dict(self.layout.weights), getattr(torch, self.layout.dtype)
        found = []
        for node in gm.graph.find_nodes(op="placeholder"):
            position = input_position(node)
            if position is not None and position in places:
                casts = _casts_of(node, dtype)
                found += [(cast, places[position], position) for cast in casts]
        return found


def _casts_of(node: Node, dtype: torch.dtype) -> list[Node]:
    found = []
    for user in node.users:
        if user.target in SAME:
            found += _casts_of(user, dtype)
        elif user.target in CASTS and user.args[0] is node:
            cast, weight = user.meta["val"], node.meta["val"]
            same = cast.device == weight.device and cast.stride() == weight.stride()
            if same and cast.dtype is dtype:
                found.append(user)
    return found


def _view(graph: Graph, flat: Node, place: Place) -> Node:
    """Insert the view of one shadow; as_strided would count from the start of the storage."""
    aten = torch.ops.aten
    part = call_with_metadata(graph, aten.slice.Tensor, (flat, 0, place.offset, place.end))
    outer_first = sorted(range(len(place.shape)), key=lambda d: -place.strides[d])
    sizes = [place.shape[d] for d in outer_first]
    stored = call_with_metadata(graph, aten.view.default, (part, sizes))
    if outer_first == sorted(outer_first):
        return stored
    back = [outer_first.index(d) for d in range(len(place.shape))]
    return call_with_metadata(graph, aten.permute.default, (stored, back))


def _first_op(gm: GraphModule) -> Node:
    return next(n for n in gm.graph.nodes if n.op != "placeholder")


class GraphShadows:
    """The shadows of one captured graph: two inputs more, filled in at every call.

    Args:
        shadows: Of the model.
        layout: Where the graph expects them.
    """

    def __init__(self, shadows: WeightShadows, layout: ShadowLayout) -> None:
        # Dynamo keeps what it compiled for as long as the process lives: hold no weights here
        self._shadows, self.layout = weakref.ref(shadows), layout
        self._read: list[int] = []

    def bind(
        self, compiled: Callable[..., Any], read: Iterable[int] | None = None
    ) -> Callable[..., Any]:
        """Return `compiled` without the two inputs.

        Args:
            compiled: Takes the flat tensors last.
            read: Positions of the parameters whose shadows it reads; None if that is not known.
        """
        self._read = [i for i, _ in self.layout.weights] if read is None else list(read)
        if not self._read:
            nothing = [torch.empty(0), torch.empty(0)]
            return lambda *args: compiled(*args, *nothing)

        def call(*args: Any) -> Any:
            return compiled(*args, *self._flats(args))

        return call

    def _flats(self, args: Sequence[Any]) -> list[Tensor]:
        parameters = [args[i] for i, _ in self.layout.weights]
        shadows = self._shadows()
        if shadows is None:
            return self._packed(parameters)
        key = (self, *map(id, parameters))
        if key not in shadows.windows:
            windows = self._same_layout(shadows, parameters)
            if windows is None:
                return self._packed(parameters)
            shadows.windows[key] = windows
            shadows.use(args[i] for i in self._read)
        shadows.refresh()
        return shadows.windows[key]

    def _same_layout(
        self, shadows: WeightShadows, parameters: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """Return the part of the shadows that lies as the graph expects, None if it does not."""
        starts: dict[int, int] = {}
        if not shadows.allocate(getattr(torch, self.layout.dtype)):
            return None
        for p, (_, want) in zip(parameters, self.layout.weights, strict=True):
            place = shadows.place(p)
            if place is None:
                return None
            start = starts.setdefault(want.flat, place.offset - want.offset)
            if dataclasses.replace(want, offset=want.offset + start) != place:
                return None
        lengths = self.layout.lengths
        return [shadows.window(f, starts.get(f, 0), lengths[f]) for f in (MATRICES, VECTORS)]

    def _packed(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Cast now: parameters that lie otherwise, or that nobody shadows."""
        dtype = getattr(torch, self.layout.dtype)
        flats = [
            torch.empty(n, dtype=dtype, device=parameters[0].device) for n in self.layout.lengths
        ]
        with torch.no_grad():
            for p, (_, want) in zip(parameters, self.layout.weights, strict=True):
                flats[want.flat].as_strided(want.shape, want.strides, want.offset).copy_(p)
        return flats


def shadow_graph(
    gm: GraphModule, inputs: Sequence[Any], shadows: WeightShadows, device_type: str
) -> tuple[GraphModule, list[Any], GraphShadows] | None:
    """Give a captured graph inputs for the shadows of its parameters; None where none apply.

    Args:
        gm: Dynamo's graph.
        inputs: Its example inputs.
        shadows: Of the model.
        device_type: Whose autocast counts.

    Returns:
        A copy of the graph with two inputs more, all its example inputs, and what fills them in.
    """
    dtype = compat.autocast_dtype(gm, device_type)
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    parameters = [(i, compat.live_example(node)) for i, node in enumerate(placeholders)]
    found = [(i, place) for i, p in parameters if (place := shadows.place(p)) is not None]
    if dtype is None or not found or not shadows.allocate(dtype):
        return None
    lengths, weights = [0, 0], []
    first = {f: min((p.offset for _, p in found if p.flat == f), default=0) for f in (0, 1)}
    for i, place in found:
        own = dataclasses.replace(place, offset=place.offset - first[place.flat])
        weights.append((i, own))
        lengths[place.flat] = max(lengths[place.flat], own.end)
    positions = (len(placeholders), len(placeholders) + 1)
    name = str(dtype).removeprefix("torch.")
    layout = ShadowLayout(name, positions, (lengths[0], lengths[1]), tuple(weights))
    device = inputs[found[0][0]].device
    flats = {
        title: compat.empty_like_inputs(inputs, length, dtype, device)
        for title, length in zip(("magi_matrices", "magi_vectors"), lengths, strict=True)
    }
    more = [*inputs, *flats.values()]
    return compat.with_inputs(gm, flats), more, GraphShadows(shadows, layout)
