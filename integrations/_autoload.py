"""Entry point of group "torch.backends": lets `Trainer(strategy="magi")` work without an import.

`import torch` calls every entry point of that group when it ends. It is meant for device back ends,
and is the only documented hook that runs before Lightning looks up a strategy by name. An exception
here would make `import torch` fail for the whole environment, so nothing escapes; and nothing heavy
is imported: this leaves a finder behind, which registers the strategies when one of the Lightning
packages has finished importing its own `strategies` module. With TORCH_DEVICE_BACKEND_AUTOLOAD=0,
`import magi_train.integrations.lightning` registers instead.
"""

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

TARGETS = {
    "pytorch_lightning.strategies": "pytorch_lightning",
    "lightning.pytorch.strategies": "lightning.pytorch",
    "lightning_fabric.strategies": "lightning_fabric",
    "lightning.fabric.strategies": "lightning.fabric",
}


def _register_into(module: ModuleType) -> None:
    try:
        from magi_train.integrations._register import register_into

        register_into(TARGETS[module.__name__], module)
    except Exception as error:  # noqa: BLE001  a defect of ours must not break the user's import
        warnings.warn(f"magi-train could not register its strategies: {error!r}", stacklevel=2)


class _Loader(importlib.abc.Loader):
    """Runs the real loader, restores it on the module, then registers."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        module.__loader__ = self._real
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        _register_into(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Claims the target modules only, and lets the other finders locate them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in TARGETS:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


def register() -> None:
    """Arrange for the strategies to be registered. Called by torch; calling again does nothing."""
    try:
        if any(isinstance(finder, _Finder) for finder in sys.meta_path):
            return
        for name in TARGETS:  # a Lightning that was imported before us
            module = sys.modules.get(name)
            spec = getattr(module, "__spec__", None)
            if module and spec is not None and not getattr(spec, "_initializing", False):
                _register_into(module)
        sys.meta_path.insert(0, _Finder())
    except Exception as error:  # noqa: BLE001  see the head of this file
        warnings.warn(f"magi-train could not set up its autoload: {error!r}", stacklevel=2)
