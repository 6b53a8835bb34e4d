"""Call something when a module has been imported, without importing it now.

Python's own hook for this is a finder on `sys.meta_path`: it claims the named modules only, lets
the other finders locate them, and stands in for their loader until the module has been executed.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]


class _Loader(importlib.abc.Loader):
    """Runs the real loader, restores it on the module, then calls back."""

    def __init__(self, real: Any, callback: Callback) -> None:
        self._real, self._callback = real, callback

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        module.__loader__ = self._real
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        self._callback(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, callbacks: Mapping[str, Callback]) -> None:
        self.callbacks = callbacks

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        callback = self.callbacks.get(name)
        if callback is None:
            return None
        for finder in sys.meta_path[
            sys.meta_path.index(self) + 1 :
        ]:  # two of us never ask in turns
            if not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, callback)
                return spec
        return None


def when_imported(callbacks: Mapping[str, Callback]) -> None:
    """Arrange for `callbacks[name](module)`: at once where it is imported already, else then.

    The same mapping again does nothing.
    """
    finders = [each for each in sys.meta_path if isinstance(each, _Finder)]
    if any(each.callbacks is callbacks for each in finders):
        return
    for name, callback in callbacks.items():
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        if module and spec is not None and not getattr(spec, "_initializing", False):
            callback(module)
    sys.meta_path.insert(0, _Finder(callbacks))
