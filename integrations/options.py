"""What both strategies of Lightning share: the options they take, and no group for one process."""

import contextlib
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any

from magi_train.core.config import CommConfig, Config
from magi_train.core.errors import MagiError

_WITHOUT_EFFECT = {"find_unused_parameters", "gradient_as_bucket_view", "static_graph"}
_COMM = {"bucket_cap_mb": "bucket_mib", "broadcast_buffers": "broadcast_buffers"}
_HOOKS = {"ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"}


def take_options(config: Config | None, options: dict[str, Any]) -> Config:
    """Take DDP's own options out of `options`; return the settings that they and `config` make.

    Raises:
        ValueError: An option that only a DistributedDataParallel could honour, a setting given
            twice, or an engine that does not replicate.
    """
    comm = {ours: options.pop(theirs) for theirs, ours in _COMM.items() if theirs in options}
    if comm and config is not None:
        raise ValueError(f"give MagiStrategy either config or {sorted(comm)}, not both")
    for name in _WITHOUT_EFFECT & options.keys():
        del options[name]
    for name in _HOOKS & options.keys():
        if options.pop(name) is not None:
            raise ValueError(
                f"MagiStrategy does not take {name}; the wire format is "
                "Config(comm=CommConfig(compression=...))"
            )
    config = config or Config(comm=CommConfig(**comm))
    if config.engine != "replicate":
        raise ValueError(
            f"strategy 'magi' replicates the model, but Config.engine is {config.engine!r}; use "
            "strategy='magi_fsdp'"
        )
    return config


def refuse_unknown(strategy: Any) -> None:
    """Refuse what Lightning kept for a DistributedDataParallel.

    Raises:
        ValueError: There is any; names it.
    """
    unknown = getattr(strategy, "_ddp_kwargs", {})
    if unknown:
        raise ValueError(
            f"MagiStrategy does not take {sorted(unknown)}: these are arguments of "
            "DistributedDataParallel; use config=magi_train.Config(...)"
        )


def refuse_outer_steps(config: Config, whose: str) -> None:
    """Refuse weights that differ between ranks, where somebody else saves and evaluates them.

    Args:
        config: The settings.
        whose: The loop that would do so, for the message.

    Raises:
        MagiError: `CommConfig.outer_steps` is set.
    """
    if config.comm.outer_steps is not None:
        raise MagiError(
            "CommConfig.outer_steps needs a training loop of your own with magi_train.prepare, "
            f"which calls exchange_weights before it saves and evaluates; {whose} does not"
        )


def is_alone(strategy: Any) -> bool:
    """Return whether the job is this one process, which then needs no process group."""
    return bool(strategy.num_nodes * strategy.num_processes == 1)


@contextlib.contextmanager
def named_if_damaged(path: Any) -> Iterator[None]:
    """Name the file where reading a checkpoint fails as it does for one that was cut short.

    Raises:
        MagiError: It failed so.
    """
    try:
        yield
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if zipfile.is_zipfile(path):  # its end is there, so it was written whole
            raise
        raise MagiError(
            f"{path} cannot be read as a checkpoint: it was cut short or damaged ({error}); use an "
            "earlier checkpoint"
        ) from error
