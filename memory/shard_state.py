"""A sharded optimizer's state, whole again: what `state_dict` returns and `load_state_dict` takes.

What a state holds for a piece, `[elements]`, is gathered; numbers (`step`) are the same for every
piece of a parameter, and the first owner's is taken. The result is what torch's own optimizer would
have returned on one rank, with tensors on the CPU: all of them may not fit beside the model.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from magi_train.core.errors import MagiError
from magi_train.memory.shard_plan import Segment
from magi_train.memory.shards import Bucket, Shards, Slot, in_memory_order, ordered_as

Held = dict[str, Any]
Description = dict[str, dict[str, Any]]
"""Of the state of one parameter on one rank: see `_describe`."""


def keep_pieces(shards: Shards, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Cut what the optimizer holds for these parameters, whole until now, to this rank's pieces."""
    for p in parameters:
        held, slot = optimizer.state.pop(p, None), shards.slots[id(p)]
        if held and slot.start < slot.end:
            optimizer.state[p] = _piece_of(slot, held)


def _piece_of(slot: Slot, held: Held) -> Held:
    p = slot.parameter.detach()
    cut: Held = {}
    for name, value in held.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            if value.shape != p.shape:
                raise ValueError(
                    f"the optimizer state {name!r} of {slot.name} must have the parameter's shape "
                    f"{tuple(p.shape)}, got {tuple(value.shape)}; save what state_dict() returns "
                    "when all ranks call it"
                )
            # a copy: a view would keep all of it in memory
            value = ordered_as(p, value)[slot.start : slot.end].clone()
        cut[name] = value
    return cut


def cut_loaded(shards: Shards, optimizer: Optimizer, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict for whole parameters with only what this rank keeps.

    Raises:
        ValueError: A state has another shape than its parameter.
    """
    saved = [key for group in loaded["param_groups"] for key in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    if len(saved) != len(own):
        return dict(loaded)  # torch explains
    slots = {key: shards.slots.get(id(p)) for key, p in zip(saved, own, strict=True)}
    state = {}
    for key, held in loaded["state"].items():
        slot = slots.get(key)
        if slot is None:
            state[key] = held
        elif slot.start < slot.end:
            state[key] = _piece_of(slot, held)
    return {**loaded, "state": state}


def whole_state(shards: Shards, optimizer: Optimizer, question: str) -> dict[int, Held]:
    """Return the state of all cut parameters, by the parameter's `id`. A collective call.

    Args:
        shards: Of the optimizer.
        optimizer: Whose `state` holds this rank's pieces.
        question: How this call is named where ranks wait for each other.

    Raises:
        RemoteRankError: Not all ranks called it in time.
    """
    keys = list(shards.slots)
    mine: dict[str, Description] = {}
    for number, slot in enumerate(shards.slots.values()):
        held = optimizer.state.get(slot.parameter)
        if held and slot.start < slot.end:
            mine[str(number)] = {name: _describe(slot.name, name, v) for name, v in held.items()}
    merged: dict[int, Description] = {}
    for answer in shards.world.gather(question, mine, shards.timeout_seconds):
        for number, description in answer.items():
            merged.setdefault(keys[int(number)], description)
    states: dict[int, Held] = {}
    for key, description in merged.items():
        p = shards.slots[key].parameter
        states[key] = {name: _make(p, what) for name, what in description.items()}
    for bucket in shards.buckets:
        for name, dtype in _kinds(bucket, merged):
            _gather(shards, bucket, optimizer, states, merged, (name, dtype))
    return states


def _describe(owner: str, name: str, value: Any) -> dict[str, Any]:
    """Return a state's entry as JSON: {"cut": dtype}, {"tensor": dtype, "value"} or {"value"}."""
    if not isinstance(value, Tensor):
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise MagiError(
            f"the optimizer state {name!r} of {owner} must be a tensor or a number to be gathered, "
            f"got {type(value).__name__}; prepare with Config(shard_optimizer=False)"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    if value.dim() > 0:
        return {"cut": dtype}
    return {"tensor": dtype, "value": value.item()}


def _make(p: Tensor, what: dict[str, Any]) -> Any:
    if "cut" in what:
        return torch.empty_like(p.detach(), dtype=getattr(torch, what["cut"]), device="cpu")
    if "tensor" in what:
        return torch.tensor(what["value"], dtype=getattr(torch, what["tensor"]))
    return what["value"]


def _kinds(bucket: Bucket, merged: dict[int, Description]) -> list[tuple[str, str]]:
    """Return names and dtypes of what is gathered for a bucket, in an order all ranks share."""
    found = {
        (name, what["cut"])
        for slot in bucket.slots
        for name, what in merged.get(id(slot.parameter), {}).items()
        if "cut" in what
    }
    return sorted(found)


def _gather(
    shards: Shards,
    bucket: Bucket,
    optimizer: Optimizer,
    states: dict[int, Held],
    merged: dict[int, Description],
    kind: tuple[str, str],
) -> None:
    name, dtype = kind

    def has(part: Segment) -> bool:
        key = id(bucket.slots[part.slot].parameter)
        return merged.get(key, {}).get(name, {}).get("cut") == dtype

    def mine(part: Segment) -> Tensor | None:
        slot = bucket.slots[part.slot]
        if not has(part):
            return None
        return optimizer.state[slot.parameter][name].narrow(0, part.start - slot.start, part.length)

    def place(_: int, part: Segment) -> Tensor | None:
        if not has(part):
            return None
        whole = states[id(bucket.slots[part.slot].parameter)][name]
        return in_memory_order(whole).narrow(0, part.start, part.length)

    shards.exchange(bucket, getattr(torch, dtype), mine, place, f"optimizer state {name!r}")
