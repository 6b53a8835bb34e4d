"""Milliseconds of attention over packed sequences and windows: the op beside a dense mask.

    python -m benchmarks.varlen_attention --commit HASH --output benchmarks/results/NAME.json

Forward and backward of 2 x 8192 tokens in bfloat16, 32 heads of 64 over 8 of keys. "packed" holds
8 sequences a row, "window" 1024 keys back, "whole rows" a causal row. A graph is compiled for at
most so many sequences, the bound: the empty ones cost a little each, which the column shows.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import records
from benchmarks.bandwidth import median_ms
from magi_train.fusion import varlen

ROWS, LENGTH, HEADS, KEY_HEADS, SIZE, SEQUENCES, WINDOW = 2, 8192, 32, 8, 64, 8, 1024
BOUNDS = (16, 64, 256, 1024)


def inputs() -> list[Tensor]:
    """Return query, key and value, `[rows, heads, length, size]`."""
    counts = (HEADS, KEY_HEADS, KEY_HEADS)
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    return [torch.randn(ROWS, count, LENGTH, SIZE, **options) for count in counts]  # type: ignore[call-overload]


def offsets(sequences: int, bound: int) -> Tensor:
    """Return where the sequences of all rows begin, `[bound + 1]`, the rest empty."""
    begins = torch.arange(0, ROWS * LENGTH + 1, LENGTH // sequences, dtype=torch.int32)
    return F.pad(begins, (0, bound + 1 - len(begins)), value=ROWS * LENGTH).cuda()


def mask(sequences: int, back: int) -> Tensor:
    """Return the same as a boolean mask, `[length, length]`."""
    number = torch.arange(LENGTH, device="cuda")
    row = number // (LENGTH // sequences)
    distance = number[:, None] - number
    return (row[:, None] == row) & (distance >= 0) & (distance <= (back if back >= 0 else LENGTH))


def train(function: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """Run forward and backward; gradients are thrown away."""
    out = function(*tensors)
    torch.autograd.grad(out, tensors, torch.ones_like(out))


def main() -> None:
    """Measure each kind, with each bound that it fits, and print the rows."""
    options = records.parser_of(__doc__).parse_args()
    tensors, shape = inputs(), (ROWS, HEADS, LENGTH, SIZE)
    rows: list[dict[str, Any]] = []
    for kind, sequences, back in (
        ("packed", SEQUENCES, -1),
        ("window", 1, WINDOW),
        ("whole rows", 1, -1),
    ):
        dense = partial(
            F.scaled_dot_product_attention, attn_mask=mask(sequences, back), enable_gqa=True
        )
        dense_ms = median_ms(lambda f=dense: train(f, tensors))  # type: ignore[misc]
        for bound in (ROWS * sequences, *(b for b in BOUNDS if b > ROWS * sequences)):
            begins = offsets(sequences, bound)

            def ours(q: Tensor, k: Tensor, v: Tensor, b: Tensor = begins, w: int = back) -> Tensor:
                return varlen.attend(q, k, v, b, w, 0, None, shape)

            ms = median_ms(lambda f=ours: train(f, tensors))  # type: ignore[misc]
            rows.append(
                {"kind": kind, "dense_mask_ms": round(dense_ms, 2), "bound_sequences": bound,
                 "varlen_ms": round(ms, 2)}
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    records.save("varlen_attention", options, rows=rows, shape=list(shape))


if __name__ == "__main__":
    main()
