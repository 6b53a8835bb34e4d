"""Weights of linears in one byte per number, by torchao: files and decoding read less memory.

The weights are stored as int8 or float8 (e4m3) with a scale for each output channel, and widened
where they are used; activations stay as they are. What torchao puts into the module is taken apart
into plain tensors and operators, so a file needs no torchao to run.
"""

import copy
from typing import Any, get_args

import torch
from torch import nn

from magi_train.core.errors import ExportError
from magi_train.exporter.settings import WeightOnly


def with_narrow_weights(module: nn.Module, precision: WeightOnly) -> tuple[nn.Module, str]:
    """Return a copy whose linears hold their weights in `precision`, and what was done.

    Args:
        module: With linears on the CPU or a CUDA device, in any floating dtype; left as it is.
        precision: "int8" or "float8".

    Raises:
        ExportError: torchao is not installed, or the module has no linear.
    """
    assert precision in get_args(WeightOnly), precision
    try:
        from torchao import quantization
        from torchao.utils import unwrap_tensor_subclass
    except ImportError as error:
        raise ExportError(
            f"ExportConfig.precision={precision!r} needs torchao, which cannot be imported "
            f"({error}): pip install 'magi-train[quantize]'"
        ) from error
    kinds: dict[str, Any] = {
        "int8": quantization.Int8WeightOnlyConfig,
        "float8": quantization.Float8WeightOnlyConfig,
    }
    narrow = copy.deepcopy(module)
    before = sum(p.nbytes for p in narrow.parameters())
    linears = [m for m in narrow.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ExportError(
            f"ExportConfig.precision={precision!r} changes the weights of linears, and "
            f"{type(module).__name__} has none; use 'bfloat16'"
        )
    with torch.no_grad():
        quantization.quantize_(narrow, kinds[precision]())
        unwrap_tensor_subclass(narrow)
    after = sum(t.nbytes for t in (*narrow.parameters(), *narrow.buffers()))
    after -= sum(b.nbytes for b in module.buffers())
    return narrow, (
        f"the weights of {len(linears)} linears are {precision}: all parameters take "
        f"{after / 2**20:.1f} MiB, and took {before / 2**20:.1f}"
    )
