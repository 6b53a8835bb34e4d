"""Milliseconds and bandwidth of one optimizer step: ours beside torch's fused and foreach AdamW.

    python -m benchmarks.optimizer_step --commit HASH --output benchmarks/results/NAME.json

Parameters have the shapes of Llama 3.2 1B (1.24 B in 146 tensors). A step's bytes are what it must
read and write once: float32 parameter and two moments each way, 24 bytes, the gradient 4 or 2, a
shadow 2, its check 2 in every CHECK_STRIDE-th tile. The last column is the share of what a copy
from device to device moves. Times are medians of device events around steps that run back to back.
"""

import json

import torch
from torch import Tensor, nn

from benchmarks import records
from benchmarks.bandwidth import copy_bandwidth, median_ms

LAYERS, HIDDEN, NARROW, WIDE, VOCABULARY = 16, 2048, 512, 8192, 128256

VARIANTS = {
    "torch foreach": {"foreach": True},
    "torch fused": {"fused": True},
    "ours": {},
    "ours, shadow": {"shadow": True},
    "ours, shadow, check": {"shadow": True, "check": True},
    "ours, bf16 gradients": {"narrow": True},
    "ours, bf16 gradients, shadow": {"narrow": True, "shadow": True},
    "ours, bf16 gradients, shadow, check": {"narrow": True, "shadow": True, "check": True},
}


def shapes() -> list[tuple[int, ...]]:
    """Return the shapes of Llama 3.2 1B's parameters, the head tied to the embedding."""
    layer = [
        (HIDDEN, HIDDEN), (NARROW, HIDDEN), (NARROW, HIDDEN), (HIDDEN, HIDDEN),
        (WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE), (HIDDEN,), (HIDDEN,),
    ]  # fmt: skip
    return [(VOCABULARY, HIDDEN), *layer * LAYERS, (HIDDEN,)]


def measure(variant: str, parameters: list[nn.Parameter]) -> dict[str, float]:
    """Time one variant on parameters whose optimizer state is made anew."""
    from magi_train.core.report import Report
    from magi_train.fusion.kernels.multi_tensor import CHECK_STRIDE
    from magi_train.fusion.optimizer import TakenOver, take_over

    options = VARIANTS[variant]
    dtype = torch.bfloat16 if options.get("narrow") else torch.float32
    for p in parameters:
        p.grad_dtype = None  # type: ignore[attr-defined]
        p.grad = torch.full_like(p, 1e-3, dtype=dtype)
    if variant.startswith("torch"):
        step = torch.optim.AdamW(parameters, lr=1e-6, **options).step
    else:
        shadows: dict[Tensor, Tensor] = {}
        if options.get("shadow"):
            shadows = {p: p.detach().bfloat16() for p in parameters}
        drift = torch.zeros((), dtype=torch.int32, device="cuda") if options.get("check") else None
        optimizer = torch.optim.AdamW(parameters, lr=1e-6)
        take_over(optimizer, Report(), shadows.get, drift=drift)
        assert isinstance(optimizer, TakenOver), "the optimizer was not taken over"
        step = optimizer.step
    ms = median_ms(step)
    each = 24 + dtype.itemsize + 2 * bool(options.get("shadow"))
    each += 2 / CHECK_STRIDE * bool(options.get("check"))
    moved = each * sum(p.numel() for p in parameters)
    return {"step_ms": ms, "gb_per_second": moved / ms / 1e6}


def main() -> None:
    """Measure all variants, print the table, write JSON."""
    options = records.parser_of(__doc__).parse_args()
    copy = copy_bandwidth()
    parameters = [nn.Parameter(torch.randn(s, device="cuda") * 0.02) for s in shapes()]
    rows = []
    for variant in VARIANTS:
        try:
            row = measure(variant, parameters)
            row["share_of_copy"] = row["gb_per_second"] / copy
            rows.append({"variant": variant, **row})
        except Exception as error:
            rows.append({"variant": variant, "failed": repr(error)[-600:]})
        print(json.dumps(rows[-1]), flush=True)
    records.save(
        "optimizer_step",
        options,
        parameters=sum(p.numel() for p in parameters),
        tensors=len(parameters),
        copy_gb_per_second=copy,
        rows=rows,
    )
    print(f"\n{'copy, device to device':38} {'':>9} {copy:9.0f} GB/s")
    for row in rows:
        if "failed" in row:
            print(f"{row['variant']:38} failed: {row['failed']}")
        else:
            print(f"{row['variant']:38} {row['step_ms']:6.2f} ms {row['gb_per_second']:9.0f} GB/s "
                  f"{row['share_of_copy']:7.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
