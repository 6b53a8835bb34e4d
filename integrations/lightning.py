"""MagiStrategy for Lightning's Trainer, and the registration for where autoload is switched off.

`from magi_train.integrations.lightning import MagiStrategy` gives the class for the Lightning that
the script uses: `lightning.pytorch` if it is loaded or installed, else `pytorch_lightning`. Where
both are loaded, `strategy_class("pytorch_lightning")` names one.
"""

import importlib.util
import sys
from typing import Any

from magi_train.integrations import _autoload
from magi_train.integrations._register import NAMESPACES, strategy_class

__all__ = ["MagiStrategy", "strategy_class"]  # noqa: F822  made by __getattr__

_autoload.register()


def _installed(namespace: str) -> bool:
    try:
        return importlib.util.find_spec(namespace) is not None
    except ModuleNotFoundError:
        return False


def __getattr__(name: str) -> Any:
    if name != "MagiStrategy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    loaded = [n for n in NAMESPACES if n in sys.modules]
    usable = loaded or [n for n in NAMESPACES if _installed(n)]
    if not usable:
        raise ImportError("MagiStrategy needs Lightning: pip install 'magi-train[lightning]'")
    return strategy_class(usable[0])
