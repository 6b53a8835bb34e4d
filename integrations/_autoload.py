"""Entry point of group "torch.backends": lets `Trainer(strategy="magi")` work without an import.

`import torch` calls every entry point of that group when it ends. It is meant for device back ends,
and is the only documented hook that runs before Lightning looks up a strategy by name. An exception
here would make `import torch` fail for the whole environment, so nothing escapes; and nothing heavy
is imported: this leaves a finder behind, which registers the strategies when one of the Lightning
packages has finished importing its own `strategies` module. With TORCH_DEVICE_BACKEND_AUTOLOAD=0,
`import magi_train.integrations.lightning` registers instead.
"""

import warnings
from types import ModuleType

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


_CALLBACKS = dict.fromkeys(TARGETS, _register_into)


def register() -> None:
    """Arrange for the strategies to be registered. Called by torch; calling again does nothing."""
    try:
        from magi_train.integrations.on_import import when_imported

        when_imported(_CALLBACKS)
    except Exception as error:  # noqa: BLE001  see the head of this file
        warnings.warn(f"magi-train could not set up its autoload: {error!r}", stacklevel=2)
