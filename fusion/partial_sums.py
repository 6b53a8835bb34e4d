"""The op that generated code calls for the last step of a sum over rows: column_sums.

The backward of a norm sums over the columns of each row, and over the rows for the gradients of
weight and bias. Inductor's kernel does both in one read; each of its programs leaves the sums of
its 16 or more rows, which the generated code then adds up with torch's `sum`. That kernel takes 12
to 16 us for 3 MB in L2, twice for each norm: 1.5 of 56 ms of a step of ViT-L. The op of
fusion/kernels/column_sums.py takes 3. compat.partial_sums_by puts it there.
"""

import torch
from torch import Tensor

_library = torch.library.Library("magi_train", "FRAGMENT")
_library.define("column_sums(Tensor x) -> Tensor")

OPERATOR = "torch.ops.magi_train.column_sums.default"


def _on_device(x: Tensor) -> Tensor:
    from magi_train.fusion.kernels.column_sums import column_sums

    return column_sums(x)  # generated code has made the device current


_library.impl("column_sums", _on_device, "CUDA")
