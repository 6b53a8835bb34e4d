"""GB/s of the cross-entropy kernel, beside what Inductor makes of the same lines, and Liger's.

    python -m benchmarks.cross_entropy --commit HASH --output benchmarks/results/NAME.json

Loss and gradient by the logits, of logits of bfloat16. The bytes are three streams: the logits are
read for the loss, read for the gradient, and the gradient is written, 6 bytes an element. A kernel
whose second read comes out of the L2 may so come above a copy. Logits are larger than four L2
caches. The forward and backward that Inductor generates are timed as one, as they are in a step.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import records
from benchmarks.bandwidth import copy_bandwidth, rates, show

SHAPES = ((8192, 128256), (16384, 50304), (16384, 30522), (16384, 50257))
"""The last two as generated code lays such logits out: rows padded to a multiple of 128 bytes."""
TILES = ((4096, 4), (4096, 8), (2048, 4), (8192, 8), (16384, 16))
STREAMS = 6


def both(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Return the gradient by the logits, `[tokens, vocabulary]`."""
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def ways(logits: Tensor, labels: Tensor) -> dict[str, Callable[[], Any]]:
    """Return every way to get loss and gradient, by name."""
    from magi_train.fusion.kernels.cross_entropy import cross_entropy

    compiled = torch.compile(lambda x: F.cross_entropy(x.float(), labels))
    found: dict[str, Callable[[], Any]] = {
        f"ours {tile}": (lambda t=tile: cross_entropy(logits, labels, -100, tile=t))  # type: ignore[misc]
        for tile in TILES
    }
    found["Inductor"] = lambda: both(compiled, logits)
    found["eager"] = lambda: both(lambda x: F.cross_entropy(x.float(), labels), logits)
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return found
    own = F.pad(logits, (0, -logits.shape[1] % 64))[:, : logits.shape[1]]  # it writes over them
    found["Liger"] = lambda: both(lambda x: liger_cross_entropy(x, labels), own)
    return found


def measure(shape: tuple[int, int], copy: float) -> list[dict[str, Any]]:
    """Time every way on logits of `shape`."""
    from magi_train.fusion.kernels.cross_entropy import (
        cross_entropy,
        cross_entropy_reference,
        padded,
    )

    torch.manual_seed(0)
    rows = torch.randn((shape[0], padded(shape[1])), device="cuda", dtype=torch.bfloat16) * 3
    logits = rows[:, : shape[1]]
    labels = torch.randint(0, shape[1], shape[:1], device="cuda")
    some = slice(0, 64)
    got = cross_entropy(logits[some], labels[some], -100)
    want = cross_entropy_reference(logits[some].double(), labels[some], -100)
    off = [float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]
    moved = STREAMS * logits.numel()
    calls = {name: (function, moved) for name, function in ways(logits, labels).items()}
    errors = {"loss_off_float64": off[0], "gradient_off_float64": off[1]}
    return [r | errors if r["what"].startswith("ours") else r for r in rates(calls, shape, copy)]


def main() -> None:
    """Measure all shapes, print them, write JSON."""
    options = records.parser_of(__doc__).parse_args()
    copy = copy_bandwidth()
    rows = [row for shape in SHAPES for row in measure(shape, copy)]
    records.save("cross_entropy", options, copy_gb_per_second=copy, rows=rows)
    show(rows, copy)


if __name__ == "__main__":
    main()
