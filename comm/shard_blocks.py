"""Which parts of a model are gathered and freed as one, found by structure.

They are the children of a ModuleList or Sequential of which at least two have equal parameter
shapes: the layers of a transformer, whatever they are called. No class is named.
"""

import collections
from collections.abc import Iterator

from torch import nn

CONTAINERS = (nn.ModuleList, nn.Sequential)


def blocks_to_shard(module: nn.Module) -> list[nn.Module]:
    """Return the outermost repeated blocks of a model, in order.

    A block that shares a parameter with the rest of the model is left to the root: whoever gathers
    a shared parameter must gather it for all its users.
    """
    found = list({id(b): b for b in _repeated(module)}.values())
    users = _users(module)
    return [b for b in found if all(users[key] == n for key, n in _users(b).items())]


def _users(module: nn.Module) -> collections.Counter[int]:
    """Return at how many places in `module` each parameter is used, by its id."""
    slots = module.named_parameters(remove_duplicate=False)
    return collections.Counter(id(p) for _, p in slots)


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, CONTAINERS):
        # a row of plain layers is not worth a gather and a graph each
        children = [c for c in module.children() if any(c.children()) and _has_parameters(c)]
        shapes = [tuple(tuple(p.shape) for p in c.parameters()) for c in children]
        if len(set(shapes)) < len(shapes):
            yield from children
            return
    for child in module.children():
        yield from _repeated(child)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
