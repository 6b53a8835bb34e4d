"""Distributed-training optimization for PyTorch: prepare a model, train it as before, faster."""

from magi_train.api import (
    DataParallel,
    PreparedModule,
    compression_state,
    load_compression_state,
    prepare,
    prepare_step,
    report,
)
from magi_train.core.config import CommConfig, Config, FusionConfig, MemoryConfig
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
from magi_train.exporter import export, load

__all__ = [
    "CachedPass",
    "CommConfig",
    "Config",
    "DataParallel",
    "FusionConfig",
    "MagiError",
    "MemoryConfig",
    "PassContext",
    "Plan",
    "PreparedModule",
    "Report",
    "Stage",
    "compression_state",
    "export",
    "load",
    "load_compression_state",
    "prepare",
    "prepare_step",
    "register_pass",
    "report",
    "to_device",
    "unregister_pass",
]
