"""Checkpoints of engine "deepspeed": DeepSpeed's files, a list of them, and other numbers of ranks.

DeepSpeed writes a folder with files of each rank, and a plain resume needs as many ranks and the
same stage. For anything else it has universal checkpoints: a tool cuts the files up by parameter,
and any number of ranks reads them. Here that happens by itself when it is needed. A list of all
files and their sizes is written last, so that a folder that was cut short is known before DeepSpeed
reads it, and named. What DeepSpeed's own `save_checkpoint` wrote has no such list; it is read all
the same: its file `latest` names the folder inside, whose files tell the stage and the ranks.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magi_train.comm.zero import Zero
from magi_train.core.errors import MagiError

TAG = "checkpoint"
"""Name of the folder inside of the folder, as in Lightning's checkpoints of DeepSpeed."""
UNIVERSAL = "universal"
LIST = "magi_files.json"
BUFFERS = "magi_buffers"
TIMEOUT_SECONDS = 1800.0
"""How long ranks wait for the one that converts."""


def is_zero_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder is, or was to be, a checkpoint of DeepSpeed's."""
    folder = Path(folder)
    return (folder / LIST).is_file() or (folder / "latest").is_file() or (folder / TAG).is_dir()


def write(zero: Zero, folder: Path, state: dict[str, Any]) -> None:
    """Write weights, optimizer state and `state` into a new folder; on all ranks.

    Raises:
        OSError: And others of DeepSpeed's, on the rank that cannot write.
    """
    # universal checkpoints hold parameters only
    buffers = {name: b.cpu() for name, b in zero.module.named_buffers()}
    with zero.inside():
        zero.engine.save_checkpoint(str(folder), client_state={**state, BUFFERS: buffers}, tag=TAG)
    if zero.world.rank == 0:
        files = {str(p.relative_to(folder)): p.stat().st_size for p in _files(folder)}
        about = {"ranks": zero.world.size, "stage": zero.stage, "files": files}
        (folder / LIST).write_text(json.dumps(about, indent=1))


def read(zero: Zero, folder: Path, *, strict: bool = True) -> dict[str, Any]:
    """Read what `write` wrote, on any number of ranks; return its `state`. On all ranks.

    Raises:
        MagiError: A file is missing or cut short, or was written at a stage that does not convert.
    """
    about = must_be_whole(folder)
    if (about["stage"] == 3) != (zero.stage == 3):
        raise MagiError(
            f"{folder} was written at ZeRO stage {about['stage']}, and this model is at stage "
            f"{zero.stage}: DeepSpeed converts between stages 1 and 2 only; use the same stage, or "
            "take the weights: model.load_state_dict(magi_train.plain_state_dict(folder)) before "
            "prepare()"
        )
    if about["ranks"] == zero.world.size:
        return _load(zero, folder, about["tag"], strict)
    _convert_together(zero, folder, about)
    settings = zero.engine._config  # what engine.load_universal_checkpoint() reads
    before, settings.load_universal_checkpoint = settings.load_universal_checkpoint, True
    try:
        state = _load(zero, folder, _universal(about["tag"]), strict)
    finally:
        settings.load_universal_checkpoint = before
    if "files" not in about:  # DeepSpeed's own, which keep buffers beside the weights
        saved = _model_states(folder / about["tag"])["module"]
        for name, buffer in zero.module.named_buffers():
            if name in saved:
                buffer.copy_(saved[name])
    return state


def load_weights(
    module: nn.Module, state: dict[str, Tensor], rank: int, *, sharded: bool, strict: bool = True
) -> None:
    """Load plain weights and buffers into a model that DeepSpeed has; on all ranks, one by one.

    Args:
        module: The user's.
        state: Whole tensors by their plain names.
        rank: This process's; weights that are sharded are taken from rank 0.
        sharded: Whether the model is at stage 3.
        strict: All names must be there, and no others.

    Raises:
        MagiError: Names differ, and `strict` is True; names some.
    """
    import deepspeed

    wrong = sorted(module.state_dict().keys() ^ state.keys())
    if wrong and strict:
        raise MagiError(f"the checkpoint and the model do not have the same names: {wrong[:4]}")
    with torch.no_grad():
        for name, p in module.named_parameters():
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=sharded):
                if name in state and (rank == 0 or not sharded):
                    p.copy_(state[name])
        for name, buffer in module.named_buffers():
            if name in state:
                buffer.copy_(state[name])


def client_state(folder: Path) -> dict[str, Any]:
    """Return what the caller of `write` added, read without an engine."""
    state = _model_states(folder / must_be_whole(folder)["tag"])
    return {k: v for k, v in state.items() if k not in ("module", "optimizer", BUFFERS)}


def plain(folder: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights and buffers, whole, by their plain names; in one process.

    Raises:
        MagiError: A file is missing or cut short; names it.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    tag = must_be_whole(folder)["tag"]
    with contextlib.redirect_stdout(io.StringIO()):
        found = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag)
    return {name: tensor.clone() for name, tensor in found.items()}


def must_be_whole(folder: Path) -> dict[str, Any]:
    """Return the number of `ranks`, the `stage` and the `tag`, the folder inside of the folder.

    Raises:
        MagiError: The list, or a file of it, is missing or has another size; names it.
    """
    if not (folder / LIST).is_file():
        if (folder / "latest").is_file():
            return _written_by_deepspeed(folder)
        raise MagiError(
            f"{folder} holds no whole checkpoint: it has no {LIST}, which is written last; use an "
            "earlier checkpoint"
        )
    about: dict[str, Any] = json.loads((folder / LIST).read_text())
    for name, size in about["files"].items():
        path = folder / name
        got = path.stat().st_size if path.is_file() else None
        if got != size:
            what = "is missing" if got is None else f"has {got} bytes instead of {size}"
            raise MagiError(
                f"{path} {what}: the checkpoint was cut short; use an earlier checkpoint"
            )
    return {**about, "tag": TAG}


def _written_by_deepspeed(folder: Path) -> dict[str, Any]:
    """Return what `must_be_whole` does, of a folder that has no list."""
    tag = (folder / "latest").read_text().strip()
    optimizers = list((folder / tag).glob("*mp_rank_00_optim_states.pt"))
    weights = list((folder / tag).glob("*mp_rank_00_model_states.pt"))
    if not optimizers or not weights:
        raise MagiError(
            f"{folder} holds no whole checkpoint: its file 'latest' names {tag!r}, and there is no "
            f"{'*_optim_states.pt' if weights else '*_model_states.pt'} of DeepSpeed's in "
            f"{folder / tag}; use an earlier checkpoint"
        )
    sharded = any(path.name.startswith("zero_pp_rank_") for path in weights)
    return {"ranks": len(optimizers), "stage": 3 if sharded else 2, "tag": tag}


def _model_states(inner: Path) -> dict[str, Any]:
    """Return what the first file of weights holds."""
    path = sorted(inner.glob("*mp_rank_00_model_states.pt"))[0]
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return found


def _universal(tag: str) -> str:
    """Return the name of the universal form; of DeepSpeed's own, one folder holds several tags."""
    return UNIVERSAL if tag == TAG else f"{tag}_{UNIVERSAL}"


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != LIST)


def _load(zero: Zero, folder: Path, tag: str, strict: bool) -> dict[str, Any]:
    with zero.inside():
        path, state = zero.engine.load_checkpoint(
            str(folder), tag=tag, load_module_strict=strict, load_lr_scheduler_states=False
        )
    if path is None:
        raise MagiError(f"DeepSpeed finds no checkpoint in {folder / tag}")
    state = state or {}
    there = dict(zero.module.named_buffers())
    for name, saved in state.pop(BUFFERS, {}).items():
        there[name].copy_(saved)
    return state


def _convert_together(zero: Zero, folder: Path, about: dict[str, Any]) -> None:
    """Let rank 0 convert; raise on all ranks if it cannot."""
    why = ""
    if zero.world.rank == 0:
        try:
            _convert(folder, about)
        except Exception as error:  # noqa: BLE001  whatever it is, the others must hear of it
            why = f"{type(error).__name__}: {error}"
    why = zero.world.gather("checkpoint is converted", why, TIMEOUT_SECONDS)[0]
    if why:
        raise MagiError(
            f"{folder} was written on {about['ranks']} ranks, and its conversion for "
            f"{zero.world.size} failed on rank 0: {why}; start as many ranks as wrote it"
        )


def _convert(folder: Path, about: dict[str, Any]) -> None:
    """Write DeepSpeed's universal form beside what it is made from, once."""
    from deepspeed.checkpoint import ds_to_universal

    inner, name = folder / about["tag"], _universal(about["tag"])
    done, partial = folder / name, folder / f".{name}.partial"
    if done.is_dir():
        newest = max(path.stat().st_mtime for path in _files(inner))
        if "files" in about or done.stat().st_mtime >= newest:  # else a tag was written again
            return
    shutil.rmtree(done, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    options = argparse.Namespace(
        input_folder=str(inner),
        output_folder=str(partial),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(options)
    partial.rename(done)
    (folder / "latest_universal").write_text(name)  # for DeepSpeed's own users
