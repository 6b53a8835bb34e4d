"""Distributed-training optimization for PyTorch: prepare a model, train it as before, faster."""

from magi_train.api import DataParallel, PreparedModule, prepare, prepare_step, report
from magi_train.core.config import CommConfig, Config, FusionConfig, MemoryConfig
from magi_train.core.errors import MagiError
from magi_train.core.facts import to_device
from magi_train.core.report import Report
from magi_train.exporter import export, load

__all__ = [
    "CommConfig",
    "Config",
    "DataParallel",
    "FusionConfig",
    "MagiError",
    "MemoryConfig",
    "PreparedModule",
    "Report",
    "export",
    "load",
    "prepare",
    "prepare_step",
    "report",
    "to_device",
]
