"""Distributed-training optimization for PyTorch: prepare a model, train it as before, faster.

Names are imported when they are first used: `import magi_train` costs what `import torch` does,
and torch's entry point, which passes through this package, costs nothing.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from magi_train.api import (
        DataParallel,
        PreparedModule,
        compression_state,
        exchange_weights,
        load_compression_state,
        prepare,
        prepare_step,
        report,
    )
    from magi_train.checkpoint import load_checkpoint, plain_state_dict, save_checkpoint
    from magi_train.core.config import CommConfig, Config, FusionConfig, ShardingConfig
    from magi_train.core.errors import MagiError
    from magi_train.core.facts import to_device
    from magi_train.core.passes import (
        CachedPass,
        PassContext,
        Plan,
        Stage,
        register_pass,
        unregister_pass,
    )
    from magi_train.core.report import Report
    from magi_train.exporter import ExportConfig, export, load

__all__ = [
    "CachedPass",
    "CommConfig",
    "Config",
    "DataParallel",
    "ExportConfig",
    "FusionConfig",
    "MagiError",
    "PassContext",
    "Plan",
    "PreparedModule",
    "Report",
    "ShardingConfig",
    "Stage",
    "compression_state",
    "exchange_weights",
    "export",
    "load",
    "load_checkpoint",
    "load_compression_state",
    "plain_state_dict",
    "prepare",
    "prepare_step",
    "register_pass",
    "report",
    "save_checkpoint",
    "to_device",
    "unregister_pass",
]

_HOMES = {
    "api": (
        "DataParallel",
        "PreparedModule",
        "compression_state",
        "exchange_weights",
        "load_compression_state",
        "prepare",
        "prepare_step",
        "report",
    ),
    "checkpoint": ("load_checkpoint", "plain_state_dict", "save_checkpoint"),
    "core.config": ("CommConfig", "Config", "FusionConfig", "ShardingConfig"),
    "core.errors": ("MagiError",),
    "core.facts": ("to_device",),
    "core.passes": (
        "CachedPass",
        "PassContext",
        "Plan",
        "Stage",
        "register_pass",
        "unregister_pass",
    ),
    "core.report": ("Report",),
    "exporter": ("ExportConfig", "export", "load"),
}


def __getattr__(name: str) -> typing.Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
            globals()[name] = value  # the next look-up does not come here
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
