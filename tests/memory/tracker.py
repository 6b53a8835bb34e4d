"""The real peak of a partitioned step on the CPU: its graphs executed, every allocation counted."""

import weakref
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from magi_train.core.graph import outputs
from magi_train.memory.copies import SEND
from magi_train.memory.peak import ROUND_BYTES


class Tracker(TorchDispatchMode):
    """Counts the storages that ops make, until they die; `peak` is the most at any time.

    Copies that wait on the host lie in another memory.
    """

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {}
        for tensor in known:
            self._seen[tensor.untyped_storage()._cdata] = True

    def _freed(self, key, size):
        self.now -= size
        del self._seen[key]

    def count(self, tree, *, on_host=False):
        for tensor in pytree.tree_leaves(tree):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                size = 0 if on_host else -(-storage.nbytes() // ROUND_BYTES) * ROUND_BYTES
                self._seen[storage._cdata] = True
                weakref.finalize(storage, self._freed, storage._cdata, size)
                self.now += size
                self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count(result, on_host=func is SEND)
        return result


def execute(gm: GraphModule, values: dict[str, object]) -> list[object]:
    """Run a graph; `values` are its inputs by name, forgotten as they are used for the last time.

    Only `values` may hold what shall be freed.
    """
    last = {}
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            last[source.name] = node.name
    dead = {}
    for name, user in last.items():
        dead.setdefault(user, []).append(name)
    for name in [n for n in values if n not in last]:
        del values[name]
    for node in gm.graph.nodes:
        if node.op == "output":
            return [values[r.name] if isinstance(r, Node) else r for r in outputs(gm.graph)]
        if node.op == "placeholder":
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n.name])
        if node.op == "get_attr":
            values[node.name] = getattr(gm, node.target)
        else:
            values[node.name] = node.target(*args, **kwargs)
        args = kwargs = None
        for name in dead.get(node.name, ()):
            del values[name]
        if node.name not in last:
            del values[node.name]
    raise AssertionError("a graph without an output")


def real(fake, generator):
    """Return random values like a fake tensor; small numbers where they may be indices."""
    if not isinstance(fake, torch.Tensor):
        return fake
    made = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)
    if fake.is_floating_point():
        return made.copy_(torch.rand(fake.shape, generator=generator))
    return made.copy_(torch.randint(0, 2, fake.shape, generator=generator))


def traced_peak(forward: GraphModule, backward: GraphModule) -> tuple[int, list[object]]:
    """Return the peak of forward and backward in bytes, inputs not counted, and the gradients."""
    g = torch.Generator().manual_seed(0)
    inputs = {n.name: real(n.meta["val"], g) for n in forward.graph.find_nodes(op="placeholder")}
    tracker = Tracker(t for t in inputs.values() if isinstance(t, torch.Tensor))
    wanted = [n.name for n in backward.graph.find_nodes(op="placeholder")]
    with tracker:
        results = execute(forward, dict(inputs))
        made = {
            n.name: value
            for n, value in zip(outputs(forward.graph), results, strict=True)
            if isinstance(n, Node)
        }
        tangents = {
            n.name: torch.ones(n.meta["val"].shape, dtype=n.meta["val"].dtype)
            for n in backward.graph.find_nodes(op="placeholder")
            if n.name not in made and n.name not in inputs
        }
        user = [value for name, value in made.items() if name not in wanted]
        taken = {name: {**inputs, **made, **tangents}[name] for name in wanted}
        results = made = tangents = None
        gradients = execute(backward, taken)
    del user
    return tracker.peak, gradients


def traced_chain(
    cuts: Sequence[tuple[GraphModule, GraphModule]], stream: tuple[int, ...]
) -> tuple[int, list[object]]:
    """Return the peak of a chain of blocks in bytes, and the gradients of all their weights.

    Args:
        cuts: Forward and backward of each block, in the order of the forward.
        stream: Shape of the one input that the block before gives, and of the one output.
    """
    g = torch.Generator().manual_seed(0)
    given = {n.name: real(n.meta["val"], g) for n in cuts[0][0].graph.find_nodes(op="placeholder")}
    ((place, name),) = [(i, n) for i, (n, x) in enumerate(given.items()) if x.shape == stream]
    tracker = Tracker(given.values())
    kept: list[object] = []
    waiting: list[dict[str, object]] = []
    with tracker:
        there = [given[name]]
        for forward, backward in cuts:
            inputs = {**given, name: there.pop()}
            results = execute(forward, dict(inputs))
            there.append(results[0])
            made = {n.name: x for n, x in zip(outputs(forward.graph), results, strict=True)}
            every = {**inputs, **made}
            wanted = [n.name for n in backward.graph.find_nodes(op="placeholder")]
            waiting.append({n: every.get(n) for n in wanted})  # but for the tangent
            inputs = results = made = every = None
        final = there[0]
        there[0] = torch.ones(stream)
        for _, backward in reversed(cuts):
            values = waiting.pop()
            values |= {n: there.pop() for n in [*values] if values[n] is None}
            gradients = execute(backward, values)
            there.append(gradients.pop(place))
            kept += gradients
            gradients = None
    del final
    return tracker.peak, kept
