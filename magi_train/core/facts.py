"""Facts about input tensors, learned while the batch is still on the host.

A padding mask is an input, so no graph can know that nothing is padded; no more can it know how
many sequences `position_ids` pack into a row. A look at a tensor on a device makes the host wait
for it. But every batch was on the host once:

* a tensor on the CPU is looked at when the captured function is called;
* a tensor that is moved inside `recording()` is looked at before the move, and what is learned is
  kept with the tensor that it became. Lightning's transfers run inside it, and `to_device` does
  the same for a plain loop. What was recorded ends with the tensor, and with any write in place
  (its version counter moves). Only writes through `.data` escape PyTorch's counter, as they do
  autograd's.

What a fact says is in `Fact`: a mask full of ones, rows that count up, or rows of positions that
begin again at 0 with every sequence.

A captured function is compiled once without facts and once for the facts that drop a mask
(`Assumptions`); which of them runs is decided outside of the graph, call by call. The tensor itself
stays an input: only proofs take it to be ones, and where packed sequences begin is read from it on
the device.
"""

import contextlib
import dataclasses
import itertools
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from magi_train.core import compat
from magi_train.core.graph import written_inputs

MASK_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
MAX_ELEMENTS = 2**20
"""Larger tensors are not looked at: half a millisecond of the host's time."""
MAX_DEPTH, MAX_ITEMS = 4, 64
"""How far nested batches are searched."""
MAX_VARIANTS = 4
"""Captured forms of one function; further combinations of facts run the one without."""
FEWEST_SEQUENCES, MAX_SEQUENCES, GROWTH = 16, 256, 4
"""Bounds on packed sequences: a captured form is for 16, 64 or 256 of them. Every sequence, an
empty one too, costs the kernel a row of thread blocks: 8 sequences in 2 x 8192 tokens (H200, 32
heads of 64, forward and backward) take 5.4 ms in a form for 256 and 16.7 ms in one for 1024, where
a dense mask takes 15.3. More than that are no fact."""

ARGS, KWARGS = "L['args']", "L['kwargs']"
"""What Dynamo calls the arguments of a function that takes *args, **kwargs."""


class Fact(NamedTuple):
    """What is known about the values of a tensor.

    Attributes:
        kind: "ones": all are one (or True). "counting": each row is 0, 1, 2, ... "packed": each row
            is several such counts, one behind the other. "": nothing of use.
        sequences: At most so many counts are in all rows together, if packed.
    """

    kind: Literal["ones", "counting", "packed", ""]
    sequences: int = 0


NOTHING, ONES, COUNTING = Fact(""), Fact("ones"), Fact("counting")
Paths = frozenset[str]
Facts = frozenset[tuple[str, Fact]]

_recorded = WeakTensorKeyDictionary()  # tensor on a device: (fact, version when recorded)


def known(tensor: Tensor) -> Fact | None:
    """Return the fact about `tensor`; None if only its device knows.

    NOTHING for everything that is not looked at: large tensors, subclasses, tensors with gradients,
    and all that do not have two to four dimensions.
    """
    if not _may_be_mask(tensor):
        return NOTHING
    if tensor.device.type == "cpu":
        return _look(tensor)
    fact, version = _recorded.get(tensor, (None, None))
    return fact if version == tensor._version else None


def _may_be_mask(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and 2 <= tensor.dim() <= 4
        and 0 < tensor.numel() <= MAX_ELEMENTS
        and not tensor.requires_grad
        and not tensor.is_inference()  # it counts no versions
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.dtype in MASK_DTYPES
    )


def _look(tensor: Tensor) -> Fact:
    first = tensor[(0,) * tensor.dim()].item()
    if first == 1 and tensor[(-1,) * tensor.dim()].item() == 1 and bool((tensor == 1).all()):
        return ONES
    whole = tensor.dtype in (torch.int64, torch.int32) and tensor.dim() == 2
    return _look_at_positions(tensor) if whole and first == 0 else NOTHING


def _look_at_positions(tensor: Tensor) -> Fact:
    begins = tensor == 0
    goes_on = begins[:, 1:] | (tensor[:, 1:] == tensor[:, :-1] + 1)
    if not bool(begins[:, 0].all() & goes_on.all()):
        return NOTHING
    count, rows = int(begins.sum()), tensor.shape[0]
    if count == rows:
        return COUNTING
    bound = FEWEST_SEQUENCES
    while bound < count:
        bound *= GROWTH
    return Fact("packed", bound) if bound <= MAX_SEQUENCES else NOTHING


class _Recorder(TorchFunctionMode):
    """Sees each move from the host to a device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (Tensor.to, Tensor.cuda) and isinstance(result, Tensor):
            source = args[0]
            if source.device.type == "cpu" and result.device.type != "cpu":
                if _may_be_mask(source) and _may_be_mask(result):
                    _recorded[result] = (_look(source), result._version)
        return result


def recording() -> contextlib.AbstractContextManager[Any]:
    """Return a context that remembers facts about the tensors that are moved to a device in it."""
    return _Recorder()


def to_device(batch: Any, device: torch.device | str | int, non_blocking: bool = True) -> Any:
    """Move a batch, and remember which of its masks are all ones, and which positions are packed.

    With it, batches without padding train without a mask, and packed sequences with variable-length
    attention; after a plain `.to(device)` nobody can tell without waiting for the device.

    Args:
        batch: Tensors, and objects with a method `to`, in dicts, lists and tuples. Anything else
            stays as it is.
        device: Where to; a number is a CUDA device.
        non_blocking: As in Tensor.to; a move to the host always waits.

    Returns:
        The same structure on `device`.
    """
    device = torch.device(device)

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=non_blocking and device.type != "cpu")
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    with recording():
        return pytree.tree_map(move, batch)


def tensors(tree: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a nested batch, each with the expression that Dynamo reads it by."""
    if isinstance(tree, Tensor):
        yield path, tree
    if depth == MAX_DEPTH:
        return
    items: Any = ()
    if isinstance(tree, dict):
        items = ((f"{path}[{key!r}]", value) for key, value in tree.items())
    elif isinstance(tree, UserDict):
        items = ((f"{path}.data[{key!r}]", value) for key, value in tree.data.items())
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        items = ((f"{path}.{name}", getattr(tree, name)) for name in tree._fields)
    elif isinstance(tree, list | tuple):
        items = ((f"{path}[{i}]", value) for i, value in enumerate(tree))
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = (f.name for f in dataclasses.fields(tree))
        items = ((f"{path}.{name}", getattr(tree, name, None)) for name in names)
    for where, value in itertools.islice(items, MAX_ITEMS):
        yield from tensors(value, where, depth + 1)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, by the expressions that Dynamo reads them by.

    The graph is matched with the call by these and not by identity: a tensor may be passed twice,
    or lie in an attribute as well, and the next call may pass two.

    Attributes:
        paths: Of all tensors.
        facts: Of those about which one is known.
        unknown: Of tensors that only their device knows.
    """

    paths: Paths = frozenset()
    facts: Facts = frozenset()
    unknown: Paths = frozenset()

    def places(self, gm: GraphModule) -> dict[str, str]:
        """Return {name of a graph input: its path}, without inputs whose memory `gm` changes."""
        if not self.paths:
            return {}
        inputs = gm.graph.find_nodes(op="placeholder")
        written = {_memory(node) for node in written_inputs(gm)}
        named = {node: compat.source_name(node) for node in inputs}
        return {
            node.name: path
            for node, path in named.items()
            if path in self.paths and not (written and _memory(node) in written)
        }


def _memory(placeholder: Node) -> int | None:
    example = compat.live_example(placeholder)
    if isinstance(example, compat.FakeTensor):  # has no address
        return compat.storage_key(example)
    return example.untyped_storage().data_ptr() if isinstance(example, Tensor) else None


class Assumptions:
    """Which inputs of one captured function are worth a fact, and which variant a call takes.

    Args:
        enabled: False: nothing is ever looked at.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._masks: set[Paths] = set()
        self._proven: set[Facts] = set()  # without their bounds, as in _useless
        self._useless: set[Facts] = set()
        self._variants: set[Facts] = {frozenset()}
        self._learned = False

    def look(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
        """Return what is known about the arguments of a call.

        Before the first compilation every tensor is looked at, later those that decide a mask.
        """
        if not self._enabled or (self._learned and not self._masks):
            return Inputs()
        wanted = Paths().union(*self._masks)
        found = dict(tensors(tuple(args), ARGS)) | dict(tensors(dict(kwargs), KWARGS))
        seen = {p: known(t) for p, t in found.items() if not self._learned or p in wanted}
        facts = frozenset((p, fact) for p, fact in seen.items() if fact is not None and fact.kind)
        unknown = frozenset(p for p, fact in seen.items() if fact is None)
        return Inputs(frozenset(found), facts, unknown)

    def key(self, inputs: Inputs) -> Facts:
        """Return the facts that select the variant for a call: those that drop a mask whole.

        A variant for more packed sequences takes fewer as well.
        """
        sets = [_about(mask, inputs.facts) for mask in self._masks]
        key = Facts().union(*(s for s in sets if s and _kinds(s) not in self._useless))
        fitting = [v for v in self._variants if _kinds(v) == _kinds(key) and _bounds(v, key)]
        if fitting:
            return min(fitting, key=lambda v: sum(fact.sequences for _, fact in v))
        if len(self._variants) >= MAX_VARIANTS:
            return frozenset()
        self._variants.add(key)
        return key

    def learn(
        self, inputs: Inputs, assumed: Facts, before: Sequence[Paths], after: Sequence[Paths]
    ) -> str:
        """Take note of which facts helped; return advice for the report, "" for none.

        Args:
            inputs: Of the call that compiled.
            assumed: Facts that the graph was compiled with.
            before: For each masked attention of the captured graph, the inputs of its mask.
            after: The same once the passes have run: what is gone was proven.
        """
        self._learned = True
        masks = {m for m in before if m and m <= inputs.paths}
        self._masks |= masks
        for mask in masks:
            tried = _kinds(_about(mask, assumed))
            if tried and after.count(mask) < before.count(mask):
                self._proven.add(tried)
            elif tried and tried not in self._proven:
                self._useless.add(tried)
        unknown = ", ".join(sorted(Paths().union(*masks) & inputs.unknown))
        if not unknown:
            return ""
        return (
            f"masks made of {unknown} stay, since nothing is known about its values on the device; "
            "move batches with magi_train.to_device(batch, device)"
        )


def _about(mask: Paths, facts: Facts) -> Facts:
    """Return the facts about the inputs of a mask if there is one about each, else none."""
    found = frozenset((path, fact) for path, fact in facts if path in mask)
    return found if len(found) == len(mask) else frozenset()


def _kinds(facts: Facts) -> Facts:
    return frozenset((path, Fact(fact.kind)) for path, fact in facts)


def _bounds(large: Facts, small: Facts) -> bool:
    """Return whether facts of the same kinds allow at least as many sequences as others."""
    most = dict(large)
    return all(most[path].sequences >= fact.sequences for path, fact in small)
