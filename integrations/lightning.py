"""The strategies of Lightning's Trainer and Fabric; registration where autoload is switched off.

`from magi_train.integrations.lightning import MagiStrategy` gives the class for the Lightning that
the script uses: `lightning.pytorch` if it is loaded or installed, else `pytorch_lightning`;
`MagiFabricStrategy` likewise. Where both are loaded, `strategy_class("pytorch_lightning")` names
one.
"""

import importlib.util
import sys
from typing import Any

from magi_train.integrations import _autoload
from magi_train.integrations._register import (
    FABRICS,
    NAMESPACES,
    deepspeed_class,
    fully_sharded_class,
    strategy_class,
)

__all__ = [  # noqa: F822  the first four are made by __getattr__
    "MagiDeepSpeedStrategy",
    "MagiFabricStrategy",
    "MagiFullyShardedStrategy",
    "MagiStrategy",
    "deepspeed_class",
    "fully_sharded_class",
    "strategy_class",
]

_autoload.register()


def _installed(namespace: str) -> bool:
    try:
        return importlib.util.find_spec(namespace) is not None
    except ModuleNotFoundError:
        return False


def __getattr__(name: str) -> Any:
    kinds = {
        "MagiStrategy": NAMESPACES,
        "MagiFullyShardedStrategy": NAMESPACES,
        "MagiDeepSpeedStrategy": NAMESPACES,
        "MagiFabricStrategy": FABRICS,
    }
    if name not in kinds:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    loaded = [n for n in kinds[name] if n in sys.modules]
    usable = loaded or [n for n in kinds[name] if _installed(n)]
    if not usable:
        raise ImportError(f"{name} needs Lightning: pip install 'magi-train[lightning]'")
    makers = {
        "MagiFullyShardedStrategy": fully_sharded_class,
        "MagiDeepSpeedStrategy": deepspeed_class,
    }
    return makers.get(name, strategy_class)(usable[0])
