"""Where weights come from: a state_dict, a file of one, Lightning's checkpoint, a distributed one.

A checkpoint has weights and no code, so a module (or what makes one) comes along. Wrappers put a
prefix in front of all names ("model.", "module.", "_orig_mod."); the one under which every name of
the module is found is taken. Files are read with weights_only=True: they run no code.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magi_train.core.errors import ExportError

Source = str | os.PathLike[str] | Mapping[str, Any]
Model = nn.Module | Callable[[], nn.Module]


def load_module(source: Source, model: Model | None) -> nn.Module:
    """Return `model` with the weights of `source`.

    Args:
        source: See the head of this module.
        model: A module, which is changed, or a function or class that makes one.

    Raises:
        ExportError: There is no model, the source cannot be read, or names or shapes do not fit.
    """
    if not isinstance(source, Mapping | str | os.PathLike):
        raise ExportError(
            "export takes a module, or weights as a state_dict or the path of a checkpoint; got a "
            f"{type(source).__name__}"
        )
    what = "the state_dict" if isinstance(source, Mapping) else str(source)
    if model is None:
        raise ExportError(f"{what} holds weights and no code; pass model=, which takes them")
    module = model if isinstance(model, nn.Module) else model()
    if not isinstance(module, nn.Module):
        raise ExportError(f"model= must be or make a torch.nn.Module, got {type(module).__name__}")
    if isinstance(source, Mapping):
        state = dict(source)
    elif Path(source).is_dir():
        state = _read_distributed(Path(source), module)
    else:
        state = _read_file(Path(source))
    for key in ("state_dict", "model_state_dict", "model"):  # of Lightning, and by custom
        if isinstance(state.get(key), Mapping):
            state = dict(state[key])
            break
    wanted = module.state_dict()
    prefix = find_prefix(state, wanted, what)
    try:
        module.load_state_dict({name: state[prefix + name] for name in wanted})
    except RuntimeError as error:
        raise ExportError(f"{what} does not fit {type(module).__name__}: {error}") from error
    return module


def find_prefix(have: Iterable[str], wanted: Iterable[str], what: str) -> str:
    """Return what stands in front of every wanted name in `have`, "" mostly.

    Raises:
        ExportError: No prefix leads to all names, or several do; says which.
    """
    known, names = set(have), list(wanted)
    if not names:
        return ""
    candidates = [k.removesuffix(names[0]) for k in known if k.endswith(names[0])]
    candidates = sorted(
        {"", *(c for c in candidates if c == "" or c.endswith("."))}, key=lambda c: (len(c), c)
    )
    missing = {c: [n for n in names if c + n not in known] for c in candidates}
    best = min(candidates, key=lambda c: len(missing[c]))
    if missing[best]:
        raise ExportError(
            f"{what} lacks {len(missing[best])} of {len(names)} weights, the first "
            f"{best + missing[best][0]!r}; it has {sorted(known)[:3]}, ..."
        )
    complete = [c for c in candidates if not missing[c]]
    if best and len(complete) > 1:
        raise ExportError(
            f"{what} holds weights of these names under {complete}; pass the state_dict of the one "
            "that you mean"
        )
    return best


def _read_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ExportError(f"the checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ExportError(
            f"{path} cannot be read as weights ({type(error).__name__}: {str(error)[:300]}); if "
            "you trust it, load it yourself and pass the module"
        ) from error
    if not isinstance(found, Mapping):
        raise ExportError(f"{path} holds a {type(found).__name__}, and no state_dict")
    return dict(found)


def _read_distributed(folder: Path, module: nn.Module) -> dict[str, Tensor]:
    """Read what torch.distributed.checkpoint wrote, by however many ranks, in this one process."""
    from torch.distributed import checkpoint as stored

    checkpoint: Any = stored
    reader = checkpoint.FileSystemReader(folder)
    try:
        names = list(reader.read_metadata().state_dict_metadata)
    except Exception as error:
        raise ExportError(
            f"{folder} is no distributed checkpoint that torch can read "
            f"({type(error).__name__}: {error})"
        ) from error
    wanted = {n: t for n, t in module.state_dict().items() if isinstance(t, Tensor)}
    prefix = find_prefix(names, wanted, str(folder))
    state = {prefix + name: torch.empty_like(t, device="cpu") for name, t in wanted.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that this is one process, as meant
            checkpoint.load(state, storage_reader=reader, no_dist=True)
    except (Exception, stored.api.CheckpointException) as error:  # the latter is no Exception
        raise ExportError(
            f"{folder} does not fit {type(module).__name__}: {type(error).__name__}: {error}"
        ) from error
    return state
