"""DeepSpeed's settings from ours: one dict, in which the user's own JSON and our Config agree.

DeepSpeed is configured by a JSON file or a dict (https://www.deepspeed.ai/docs/config-json). What
our settings say goes in, what the user gave stays, and where both speak about the same key with
different values that is an error with both values: neither silently wins. "auto", which other
libraries fill in, counts as not given. DeepSpeed itself is not imported here.
"""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

from magi_train.core.config import Config
from magi_train.core.errors import MagiError

MIB = 2**20
OFFLOADED = {"device": "cpu"}

_FIXED: dict[tuple[str, ...], tuple[Any, str]] = {
    # every step() is a step: the loop that calls it counts the batches it adds up
    ("gradient_accumulation_steps",): (1, "the training loop decides when it calls step()"),
    ("managed_gradient_accumulation",): (False, "the training loop decides when it calls step()"),
    # else DeepSpeed refuses or replaces the optimizer that it is given
    ("zero_allow_untested_optimizer",): (True, "the optimizer is the one given to prepare()"),
    ("zero_force_ds_cpu_optimizer",): (False, "the optimizer is the one given to prepare()"),
}
_REFUSED = {
    "optimizer": "the optimizer is the one that the script makes",
    "scheduler": "the scheduler is the one that the script makes",
    "tensor_parallel": "engine 'deepspeed' shards over all ranks",
    "sequence_parallel_size": "engine 'deepspeed' shards over all ranks",
    "compile": "our passes and DeepSpeed's DeepCompile would both rewrite the graph",
    "hybrid_engine": "it is for generation in the middle of training",
}


def must_be_installed() -> None:
    """Raise unless DeepSpeed can be imported.

    Raises:
        MagiError: It is not installed; says how to install it.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MagiError(
            "engine 'deepspeed' needs DeepSpeed, which is not installed: DS_BUILD_OPS=0 pip "
            "install --no-build-isolation 'magi-train[deepspeed]'; engine='fsdp2' shards without it"
        )


def zero_config(config: Config, owner: str = "Config") -> dict[str, Any]:
    """Return what `deepspeed.initialize` is to be configured with.

    Args:
        config: Of engine "deepspeed".
        owner: What the settings are called in messages.

    Raises:
        ValueError: The user's DeepSpeed settings contradict ours, or ask for what this engine does
            not offer; names both values.
    """
    merged = _read(config.sharding.deepspeed)
    source = "ShardingConfig.deepspeed"
    for key, why in _REFUSED.items():
        if merged.get(key):
            raise ValueError(
                f"{source} has {key!r} = {merged[key]!r}, but {why}; leave it out of it"
            )
    stage = _get(merged, ("zero_optimization", "stage"))
    if stage not in (None, 1, 2, 3):
        raise ValueError(
            f"{source} has zero_optimization.stage = {stage!r}, but engine 'deepspeed' is for "
            "stages 1, 2 and 3; engine='replicate' shards nothing"
        )
    for path, (value, ours) in _asked_for(config, stage or 2).items():
        _put(merged, path, value, source, ours)
    for path, (value, why) in _FIXED.items():
        _put(merged, path, value, source, why)
    if not {"train_batch_size", "train_micro_batch_size_per_gpu"} & merged.keys():
        merged["train_micro_batch_size_per_gpu"] = 1  # for its figures only; it must have one
    merged.setdefault("gradient_clipping", 0.0)  # its own default clips to a norm of 1
    merged.setdefault("steps_per_print", 10**9)
    return merged


def stage_of(settings: dict[str, Any]) -> int:
    """Return the ZeRO stage that `zero_config` chose."""
    return int(settings["zero_optimization"]["stage"])


def _asked_for(config: Config, stage: int) -> dict[tuple[str, ...], tuple[Any, str]]:
    """Return {path: (value, the setting of ours that says so)}."""
    sharding, comm = config.sharding, config.comm
    stage = sharding.zero_stage or stage
    wanted: dict[tuple[str, ...], tuple[Any, str]] = {}
    zero = "zero_optimization"
    wanted[zero, "stage"] = (stage, f"ShardingConfig.zero_stage is {sharding.zero_stage!r}")
    if sharding.offload:
        said = "ShardingConfig.offload is True"
        wanted[zero, "offload_optimizer", "device"] = ("cpu", said)
        if stage == 3:
            wanted[zero, "offload_param", "device"] = ("cpu", said)
    if comm.bucket_mib is not None:
        said = f"CommConfig.bucket_mib is {comm.bucket_mib}, which is this many numbers of 4 bytes"
        wanted[zero, "reduce_bucket_size"] = (int(comm.bucket_mib * MIB / 4), said)
    if comm.compression == "bfloat16":
        wanted["communication_data_type",] = ("bf16", "CommConfig.compression is 'bfloat16'")
    return wanted


def _put(
    merged: dict[str, Any], path: tuple[str, ...], value: Any, source: str, because: str
) -> None:
    """Set a value where the user gave none; raise if the user gave another one."""
    there = _get(merged, path)
    if there is not None and there != value:
        raise ValueError(
            f"{source} has {'.'.join(path)} = {there!r}, but it must be {value!r}, as {because}; "
            "change one of the two"
        )
    for name in path[:-1]:
        inner = merged.get(name)
        merged = merged.setdefault(name, {}) if isinstance(inner, dict | None) else inner
    merged[path[-1]] = value


def _get(settings: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = settings
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _read(given: str | dict[str, Any] | None) -> dict[str, Any]:
    """Return the user's settings without "auto"s."""
    if isinstance(given, str):
        try:
            given = json.loads(Path(given).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"ShardingConfig.deepspeed names {given!r}, which cannot be read as JSON: {error}"
            ) from error
        if not isinstance(given, dict):
            raise ValueError(f"ShardingConfig.deepspeed: a {type(given).__name__} is no object")
    return _without_auto(copy.deepcopy(given or {}))


def _without_auto(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(inner) if isinstance(inner, dict) else inner
        for key, inner in value.items()
        if inner != "auto"
    }
