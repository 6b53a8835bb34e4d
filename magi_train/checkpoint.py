"""Checkpoints of models that may be sharded: one folder, readable on any number of ranks.

The format is torch's own, of `torch.distributed.checkpoint` (DCP): each rank writes what it holds,
and whoever reads takes the pieces it needs. Names are those of the plain module, so a checkpoint of
one engine loads under another, and `plain_state_dict` reads it in one process, with no group and
nothing of ours in it. A folder is written under another name and renamed when all ranks are done:
if a rank fails, or a disk is full, the previous checkpoint is still there.

Engine "deepspeed" writes DeepSpeed's own files instead (comm/zero_files.py), under the same rules;
`plain_state_dict` reads them too, and other engines take the weights from it.
"""

import contextlib
import itertools
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from magi_train.comm import zero_files
from magi_train.comm.broadcast import broadcast
from magi_train.comm.zero import Zero
from magi_train.core import compat
from magi_train.core.errors import MagiError
from magi_train.core.world import HEARTBEAT_SECONDS, World
from magi_train.memory.sharded_optimizer import is_sharded

TIMEOUT_SECONDS = 600.0
"""How long a rank waits for the slowest writer."""


def save_checkpoint(
    folder: str | os.PathLike[str], module: nn.Module, optimizer: Optimizer | None = None
) -> None:
    """Write weights, buffers and optimizer state; call it on all ranks, between steps.

    Buffers that differ between ranks (BatchNorm statistics) become those of rank 0. With
    `CommConfig.outer_steps` the outer step is made first, as `exchange_weights` does.

    Args:
        folder: Seen by all ranks under this name; an existing checkpoint is replaced at the end.
        module: What `prepare` or `DataParallel` made, or a plain or sharded module.
        optimizer: Over its parameters.

    Raises:
        MagiError: A rank could not write, and the previous checkpoint is left as it was; or the
            optimizer is one of `Config(shard_optimizer=True)`, which has its own way.
    """
    zero = _zero_of(module)
    if zero is not None:
        save_zero(zero, folder)
        return
    runtime = module.__dict__.get("_magi_runtime")
    if runtime is not None:  # what is written must be the same on all ranks
        runtime.reducer.exchange_weights()
    final, world = Path(folder), World.current()
    partial = final.with_name(f".{final.name}.partial")
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    broadcast(world, [b for b in _own(module).buffers() if not isinstance(b, DTensor)])
    _refuse_shards(optimizer)
    held = module_state(module)
    # a tuple is written as one: of a mapping torch would write the values, and its keys as text
    state = {"model": {n: v if isinstance(v, Tensor) else (v,) for n, v in held.items()}}
    if optimizer is not None:
        state["optimizer"] = optimizer_state(module, optimizer)
    _together(world, "checkpoint begins", "")
    try:
        with _quiet():
            save(state, checkpoint_id=partial)
        why = ""
    except CheckpointException as error:  # a BaseException
        why = "; ".join(f"on rank {r}, {_cause(each)}" for r, each in error.failures.items())
    except Exception as error:  # noqa: BLE001  whatever it is, the others must hear of it
        why = f"{type(error).__name__}: {error}"
    reasons = _together(world, "checkpoint is written", why)
    if reasons:
        raise MagiError(
            f"{final} could not be written: {reasons[0]}; what was there before is kept"
        )
    _put_in_place(world, partial, final)


def save_zero(
    zero: Zero, folder: str | os.PathLike[str], state: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint of engine "deepspeed", with `state` of the caller's; on all ranks.

    Raises:
        MagiError: This rank could not write; the previous checkpoint is left as it was, and the
            other ranks, which wait inside of DeepSpeed, are ended.
    """
    final, world = Path(folder), zero.world
    partial = final.with_name(f".{final.name}.partial")
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    _together(world, "checkpoint begins", "")
    try:
        zero_files.write(zero, partial, state or {})
    except Exception as error:
        _wait_for_the_cause(world)
        failed = MagiError(
            f"{final} could not be written: on rank {world.rank}, {type(error).__name__}: {error}; "
            "what was there before is kept"
        )
        world.fail(failed)
        raise failed from error
    _together(world, "checkpoint is written", "")
    _put_in_place(world, partial, final)


def _wait_for_the_cause(world: World) -> None:
    """Raise RemoteRankError if another rank failed first, which broke what this one waited for."""
    deadline = time.monotonic() + 2 * HEARTBEAT_SECONDS
    while world.size > 1 and time.monotonic() < deadline:
        world.check()
        time.sleep(0.1)


def _zero_of(module: nn.Module) -> Zero | None:
    reducer = getattr(module.__dict__.get("_magi_runtime"), "reducer", None)
    return reducer if isinstance(reducer, Zero) else None


def load_checkpoint(
    folder: str | os.PathLike[str], module: nn.Module, optimizer: Optimizer | None = None
) -> None:
    """Read what `save_checkpoint` wrote, on any number of ranks and under any engine.

    Call it on all ranks, after `prepare`.

    Raises:
        MagiError: There is no whole checkpoint; names the folder, or the file.
    """
    zero = _zero_of(module)
    if zero is not None:
        if not zero_files.is_zero_checkpoint(folder):
            raise MagiError(
                f"{folder} is no checkpoint of engine 'deepspeed'; load its weights before "
                "prepare(): model.load_state_dict(magi_train.plain_state_dict(folder))"
            )
        zero_files.read(zero, Path(folder))
        return
    if zero_files.is_zero_checkpoint(folder):
        raise MagiError(
            f"{folder} is a checkpoint of engine 'deepspeed', whose optimizer state only DeepSpeed "
            "reads; load its weights: model.load_state_dict(magi_train.plain_state_dict(folder))"
        )
    _refuse_shards(optimizer)
    read_folder(folder, module, {} if optimizer is None else {"optimizer": optimizer})
    shadows = getattr(module.__dict__.get("_magi_runtime"), "shadows", None)
    if shadows is not None:
        shadows.invalidate()


def read_folder(
    folder: str | os.PathLike[str],
    module: nn.Module,
    optimizers: Mapping[str, Optimizer],
    model: str = "model",
    *,
    strict: bool = True,
) -> None:
    """Read a folder of `torch.distributed.checkpoint`, on all ranks.

    Args:
        folder: What `module_state` and `optimizer_state` returned, written under names.
        module: Gets its state, in place.
        optimizers: By the names under which their state was written.
        model: The name under which the module's state was written.
        strict: The folder holds all of the module's state.

    Raises:
        MagiError: There is no whole checkpoint, or it holds the state of another model.
    """
    own = _own(module)
    _must_be_whole(folder)
    there = FileSystemReader(Path(folder)).read_metadata()
    saved = {key: _parameters_with_state(folder, there, own, key) for key in optimizers}
    names = set().union(*saved.values())
    frozen = [p for n, p in _named(own).items() if n in names and not p.requires_grad]
    try:
        for p in frozen:  # torch leaves their state out
            p.requires_grad_(True)
        state: dict[str, Any] = {
            key: _state_to_fill(own, optimizer, saved[key]) for key, optimizer in optimizers.items()
        }
        held = own.state_dict()
        own_names = {compat.name_in_checkpoints(n): n for n in held}
        more = {_path(there, key)[1] for key in _keys_under(there, model)} - own_names.keys()
        if strict and more:
            raise MagiError(
                f"{folder} holds {min(more)}, which {type(own).__name__} has not; load it into the "
                "model that it was saved from, or take plain_state_dict()"
            )
        tensors = {
            n: held[m]
            for n, m in own_names.items()
            if isinstance(held[m], Tensor) and not n.endswith("_extra_state")  # of any shape
        }
        if not strict:
            found = there.state_dict_metadata
            tensors = {n: value for n, value in tensors.items() if f"{model}.{n}" in found}
        state[model] = tensors
        others = {n: _keys_under(there, f"{model}.{n}") for n in own_names.keys() - tensors.keys()}
        for key in itertools.chain.from_iterable(others.values()):
            state[key] = _empty(there, key)
        with _quiet():
            _load(state, folder)
            filled = {own_names[n]: value for n, value in tensors.items()}
            for n, keys in others.items():
                if keys:
                    filled[own_names[n]] = _unwrapped(_nested(there, {k: state[k] for k in keys}))
            own.load_state_dict(filled, strict=strict)
            for key, optimizer in optimizers.items():
                options = StateDictOptions(strict=False)
                set_optimizer_state_dict(own, optimizer, state[key], options=options)
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _load(state: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Fill `state` from a folder, in place; torch's own error is no Exception."""
    try:
        load(state, checkpoint_id=Path(folder))
    except CheckpointException as error:
        why = "; ".join(f"on rank {r}, {_cause(each)}" for r, each in error.failures.items())
        raise MagiError(f"{folder} does not fit what it is read into: {why}") from error


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return a module's state by the names that checkpoints hold, the user's hooks included.

    As torch's `get_model_state_dict`, which refuses what hooks add.
    """
    held = _own(module).state_dict()
    return {compat.name_in_checkpoints(name): value for name, value in held.items()}


def optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state by the parameters' names in checkpoints; nothing is changed."""
    fresh = not optimizer.state
    state: dict[str, Any] = get_optimizer_state_dict(_own(module), optimizer)
    if fresh:  # torch has filled it by a step on zeros
        state["state"] = {}
        optimizer.state.clear()
    return state


def _named(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by their names in checkpoints."""
    return {compat.name_in_checkpoints(n): p for n, p in module.named_parameters()}


def _parameters_with_state(
    folder: str | os.PathLike[str], there: Metadata, module: nn.Module, optimizer: str
) -> set[str]:
    """Return the parameters that a checkpoint holds state of, under the name of an optimizer."""
    names, found = _named(module), set()
    held = there.state_dict_metadata
    before = f"{optimizer}.state."  # the parameter's name follows
    keys = [key for key in held if key.startswith(before)]
    if not any(key.startswith(f"{optimizer}.") for key in held):
        raise MagiError(
            f"{folder} was saved without {optimizer.replace('_', ' ')}: load it without an "
            "optimizer (in Lightning with load_state_dict() before fit, without ckpt_path)"
        )
    for key in keys:
        name = key.removeprefix(before)
        while name and name not in names:  # what follows is the state's own name
            name = name.rpartition(".")[0]
        found.add(name)
    if keys and not found & names.keys():
        raise MagiError(
            f"{folder} holds optimizer state of other parameters than the model's, for example "
            f"{keys[0].removeprefix(before)}; load it without the optimizer, or into the model "
            "that it was saved from"
        )
    return found & names.keys()


def _state_to_fill(module: nn.Module, optimizer: Optimizer, saved: set[str]) -> dict[str, Any]:
    """Return what a checkpoint is read into, with optimizer state of the parameters in `saved`.

    What the optimizer lacks of it torch makes by a step on zeros, but only while there is no
    gradient, and no state of any parameter.
    """
    every = [p for group in optimizer.param_groups for p in group["params"]]
    mine = {id(p) for p in every}
    wanted = [p for n, p in _named(module).items() if n in saved and id(p) in mine]
    gradients, before = [p.grad for p in every], dict(optimizer.state)
    try:
        if any(p not in optimizer.state for p in wanted):
            optimizer.state.clear()
            for p in every:
                p.grad = None
        state: dict[str, Any] = get_optimizer_state_dict(module, optimizer)
    except BaseException:
        optimizer.state.update(before)
        raise
    finally:
        for p, gradient in zip(every, gradients, strict=True):
            p.grad = gradient
    # of a parameter that never had a gradient none was saved
    state["state"] = {n: each for n, each in state["state"].items() if n in saved}
    return state


def plain_state_dict(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a checkpoint's weights and buffers as `module.load_state_dict` takes them.

    Needs one process and host memory for the whole model, and no process group.

    Returns:
        Whole tensors on the CPU, and what `get_extra_state` returned, by their names in the plain
        module.

    Raises:
        MagiError: There is no whole checkpoint; names the folder.
    """
    if zero_files.is_zero_checkpoint(folder):
        return zero_files.plain(Path(folder))
    _must_be_whole(folder)
    reader = FileSystemReader(Path(folder))
    there = reader.read_metadata()
    state = {key: _empty(there, key) for key in _keys_under(there, "model")}
    with _quiet():
        load(state, storage_reader=reader, no_dist=True)
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        by_name.setdefault(_path(there, key)[1], {})[key] = value
    return {name: _unwrapped(_nested(there, values)) for name, values in by_name.items()}


def _keys_under(metadata: Metadata, name: str) -> list[str]:
    """Return the keys of a checkpoint under which a value was written, or what it holds."""
    found = metadata.state_dict_metadata
    return [key for key in found if key == name or key.startswith(f"{name}.")]


def _empty(metadata: Metadata, key: str) -> Tensor | None:
    """Return what an entry of a checkpoint can be read into."""
    entry = metadata.state_dict_metadata[key]
    if not isinstance(entry, TensorStorageMetadata):
        return None
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _path(metadata: Metadata, key: str) -> tuple[Any, ...]:
    """Return where a key was: the part of the checkpoint, the name in it, and places below that."""
    return tuple((metadata.planner_data or {}).get(key, tuple(key.split(".", 1))))


def _nested(metadata: Metadata, values: Mapping[str, Any]) -> Any:
    """Put together one value of a state dict, of which torch may have written parts."""
    root: dict[Any, Any] = {}
    for key, value in values.items():
        place, (*above, last) = root, _path(metadata, key)[1:]
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    (whole,) = root.values()
    return _with_lists(whole)


def _with_lists(value: Any) -> Any:
    """Return nested dicts with a list for each whose keys are places."""
    if not isinstance(value, dict) or not value:
        return value
    inner = {key: _with_lists(each) for key, each in value.items()}
    return [inner[i] for i in sorted(inner)] if all(isinstance(i, int) for i in inner) else inner


def _unwrapped(value: Any) -> Any:
    """Return what `save_checkpoint` made a tuple of."""
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch's own functions warn about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*no_dist|torch.distributed is .*")
        yield


def _own(module: nn.Module) -> nn.Module:
    """Return the module whose names a checkpoint holds."""
    runtime = module.__dict__.get("_magi_runtime")
    if runtime is not None:
        return runtime.module  # type: ignore[no-any-return]
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def _refuse_shards(optimizer: Optimizer | None) -> None:
    if optimizer is not None and is_sharded(optimizer):
        raise MagiError(
            "with Config(shard_optimizer=True) the optimizer's state is saved by its own "
            "state_dict(), called on all ranks; leave the optimizer out here"
        )


def _must_be_whole(folder: str | os.PathLike[str]) -> None:
    if not (Path(folder) / ".metadata").is_file():  # which DCP writes last
        raise MagiError(
            f"{folder} holds no whole checkpoint: it has no .metadata; name a folder that "
            "save_checkpoint() wrote"
        )
    try:
        places = FileSystemReader(Path(folder)).read_metadata().storage_data or {}
    except (EOFError, pickle.UnpicklingError) as error:
        raise MagiError(f"{Path(folder) / '.metadata'} was cut short: {error}") from error
    ends: dict[Path, int] = {}
    for place in places.values():
        path = Path(folder) / place.relative_path
        ends[path] = max(ends.get(path, 0), place.offset + place.length)
    for path, end in ends.items():
        got = path.stat().st_size if path.is_file() else None
        if got is None or got < end:
            what = "is missing" if got is None else f"has {got} bytes instead of {end}"
            raise MagiError(f"{path} {what}: the checkpoint was cut short; use an earlier one")


def _put_in_place(world: World, partial: Path, final: Path) -> None:
    """Let rank 0 rename what all have written; raise on all ranks if it cannot."""
    why = ""
    if world.rank == 0:
        try:
            _rename(partial, final)
        except OSError as error:
            why = f"on rank 0, {type(error).__name__}: {error}"
    reasons = _together(world, "checkpoint is in place", why)
    if reasons:
        raise MagiError(
            f"the checkpoint is whole in {partial} and could not be renamed to {final}: "
            f"{reasons[0]}; what was there before is kept"
        )


def _rename(partial: Path, final: Path) -> None:
    aside = final.with_name(f".{final.name}.old")
    _remove(aside)
    there = os.path.lexists(final)
    if there:
        final.rename(aside)
    try:
        partial.rename(final)
    except OSError:
        if there:
            aside.rename(final)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    """Remove a folder, or the file or link that another way of saving left in its place."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _together(world: World, what: str, why: str) -> list[str]:
    answers = world.gather(what, why, TIMEOUT_SECONDS)
    return [text for text in answers if text]


def _cause(failure: Any) -> str:
    """Return what a rank raised, from DCP's pair of error and stack."""
    error = failure[0] if isinstance(failure, tuple) else failure
    return f"{type(error).__name__}: {error}"
