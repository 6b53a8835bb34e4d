"""GB/s of the fp8 cast-and-transpose kernel, and TFLOP/s of bf16 and fp8 matrix products.

    python -m benchmarks.fp8_cast --commit HASH --output benchmarks/results/NAME.json

A cast's bytes are what it must move once: 2 read and 2 written for an element of bfloat16. The last
column is the share of what a copy from device to device moves. Every call takes the next of so
many tensors that together they are larger than four L2 caches (60 MB each). Beside ours: what
Inductor makes of the same three lines, and the maximum that gives the scale. The products calibrate
the model that decides which linears run in fp8 (`FP8_H200` in magi_train/core/hardware.py).
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.bandwidth import copy_bandwidth, median_ms, rates, show

BEYOND_L2 = 4 * 60 * 10**6
SHAPES = ((8192, 2048), (8192, 8192), (8192, 16384), (2048, 8192), (16384, 768))
TILES = ((128, 128, 8), (64, 128, 4), (128, 64, 4), (64, 64, 4), (128, 128, 4), (64, 256, 8))
PRODUCTS = (
    (8192, 2048, 3072), (8192, 2048, 2048), (8192, 2048, 16384), (8192, 8192, 2048),
    (16384, 768, 2304), (16384, 768, 3072), (16384, 3072, 768), (8192, 2048, 512),
)  # fmt: skip


def in_turns(tensors: list[Tensor], function: Callable[[Tensor], Any]) -> Callable[[], Any]:
    """Return a call of `function` on the next tensor."""
    turn = itertools.cycle(tensors)
    return lambda: function(next(turn))


def casts(shape: tuple[int, int], copy: float) -> list[dict[str, Any]]:
    """Time every way to cast a tensor of `shape`."""
    from magi_train.fusion.kernels.fp8_cast import fp8_cast, fp8_cast_reference

    numel = shape[0] * shape[1]
    count = -(-BEYOND_L2 // (2 * numel)) + 1
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    dtype = torch.float8_e4m3fn
    scale = (tensors[0].abs().max().float() / torch.finfo(dtype).max).reshape(())
    compiled = torch.compile(fp8_cast_reference)
    maximum = torch.compile(lambda x: x.abs().amax(1).amax(0).float())
    ways: dict[str, tuple[Callable[[Tensor], Any], int]] = {
        f"ours {tile}": (lambda x, t=tile: fp8_cast(x, scale, dtype, t), 4)  # type: ignore[misc]
        for tile in TILES
    }
    ways["Inductor"] = (lambda x: compiled(x, scale, dtype), 4)
    ways["maximum, Inductor"] = (maximum, 2)
    calls = {n: (in_turns(tensors, way), each * float(numel)) for n, (way, each) in ways.items()}
    return list(rates(calls, shape, copy))


def products(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return TFLOP/s of `[m, k] @ [k, n]` in bf16 and in fp8 with both kinds of accumulation."""
    m, k, n = shape
    wide = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((m, k), (n, k))]
    a, b = (t.to(torch.float8_e4m3fn) for t in wide)
    gradient = wide[0].to(torch.float8_e5m2)
    one = torch.ones((), device="cuda")

    def scaled(left: Tensor, fast: bool) -> Tensor:
        return torch._scaled_mm(
            left, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    ways: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: wide[0] @ wide[1].t(),
        "fp8, fast": lambda: scaled(a, True),
        "fp8, e5m2, exact": lambda: scaled(gradient, False),
    }
    row: dict[str, Any] = {"product": shape}
    row |= {name: 2 * m * k * n / median_ms(way) / 1e9 for name, way in ways.items()}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Measure casts and products, print them, write JSON."""
    options = records.parser_of(__doc__).parse_args()
    copy = copy_bandwidth()
    rows = [row for shape in SHAPES for row in casts(shape, copy)]
    rates = [products(shape) for shape in PRODUCTS]
    records.save("fp8_cast", options, copy_gb_per_second=copy, rows=rows, tflops=rates)
    show(rows, copy)


if __name__ == "__main__":
    main()
