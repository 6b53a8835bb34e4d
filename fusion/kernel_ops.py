"""The ops that graphs call for the kernels of fusion/kernels.

A kernel's module, its function and its reference have one name: the op runs the function on CUDA
devices, `NAME_reference` on the CPU. Triton is imported when the op is called first.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from magi_train.fusion.ahead import wait

_library = torch.library.Library("magi_train", "FRAGMENT")


def define(
    schema: str,
    fake: Callable[..., Any],
    *,
    on_host: Callable[..., Any] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> Any:
    """Define the op of a kernel; return its overload.

    Args:
        schema: "name(...) -> ..."; the first argument is a tensor, on whose device it runs.
        fake: Returns results without values.
        on_host: What runs on the CPU in place of the reference.
        tags: Of the op.
    """
    name = schema.partition("(")[0]

    def kernel(suffix: str = "") -> Callable[..., Any]:
        module = importlib.import_module(f"magi_train.fusion.kernels.{name}")
        return getattr(module, name + suffix)  # type: ignore[no-any-return]

    def on_device(*arguments: Any) -> Any:
        wait(name)
        with torch.cuda.device(arguments[0].device):  # Triton launches on the current one
            return kernel()(*arguments)

    def reference(*arguments: Any) -> Any:
        return kernel("_reference")(*arguments)

    _library.define(schema, tags=tuple(tags))
    _library.impl(name, on_device, "CUDA")
    _library.impl(name, on_host or reference, "CPU")
    _library.impl(name, fake, "Meta")
    return getattr(torch.ops.magi_train, name).default
