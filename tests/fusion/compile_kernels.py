"""Compile the Triton kernels for an H100 or H200, without one; print what came out as JSON.

    python -m tests.fusion.compile_kernels    # without TRITON_INTERPRET

For each kernel: 16-byte loads and stores in its PTX, and registers of a thread.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from magi_train.fusion.kernels import (
    adamw,
    column_sums,
    cross_entropy,
    dropout_bits,
    flash_decoding,
    fp8_cast,
    max_pool_backward,
    sgd,
)

TARGET = GPUTarget("cuda", 90, 32)
LOSS = {"UNIT": cross_entropy.UNIT, "ALIGNMENT": cross_entropy.ROW_ALIGNMENT,
        "BLOCK": cross_entropy.BLOCK}  # fmt: skip
NARROW = {"GRAD_DTYPE": tl.float32, "SHADOW_DTYPE": tl.bfloat16, "MAXIMIZE": False}
HEAD = {"SCALE": 0.125, "HIDES": True, "ADDS": False, "QUERIES": 16, "SIZE": 64, "BLOCK": 64,
        "EXACT": False, "WIDENED": False}  # fmt: skip
KERNELS: dict[str, tuple[Any, str, dict[str, Any], int]] = {
    # kernel; the types of its arguments but for int32 and constants; constants; warps
    "cross_entropy": (
        cross_entropy._cross_entropy,
        "logits *bf16, labels *i64, losses *fp32, gradients *bf16, smoothing fp32, inner fp32, "
        "outer fp32",
        {**LOSS, "CAPPED": False, "SMOOTHED": False},
        cross_entropy.WARPS,
    ),
    "cross_entropy, all": (
        cross_entropy._cross_entropy,
        "logits *bf16, labels *i64, losses *fp32, gradients *bf16, smoothing fp32, inner fp32, "
        "outer fp32",
        {**LOSS, "CAPPED": True, "SMOOTHED": True},
        cross_entropy.WARPS,
    ),
    "column_sums": (
        column_sums._column_sums,
        "x *fp32, sums *fp32, columns i32:16",
        {"ROWS": column_sums.ROWS, "COLUMNS": column_sums.COLUMNS},
        column_sums.WARPS,
    ),
    "adamw": (
        adamw._adamw,
        "table *i64, blocks *i32, scalars *fp32, beta1 fp32, beta2 fp32, rest1 fp32, rest2 fp32, "
        "eps fp32, weight_decay fp32, drift *i32",
        {**NARROW, "DECOUPLED": True, "AMSGRAD": False, "grad_scale": None, "clip": None,
         "found_inf": None},
        4,
    ),
    "sgd": (
        sgd._sgd,
        "table *i64, blocks *i32, lr fp32, momentum fp32, rest fp32, weight_decay fp32, drift *i32",
        {**NARROW, "MOMENTUM": True, "NESTEROV": False, "LR_TENSOR": False, "grad_scale": None,
         "clip": None, "found_inf": None},
        4,
    ),
    "fp8_cast": (
        fp8_cast._fp8_cast,
        "source *bf16, scale *fp32, rows *u8, columns *u8, width i32:16, "
        "row_stride i32:16, column_stride i32:1",
        {"LARGEST": 448.0, "SMALLEST": 2.0**-6, "MANTISSA": 3, "FP8": tl.float8e4nv,
         "TILE_ROWS": 64, "TILE_COLUMNS": 64, "SPELLED_OUT": False},
        4,
    ),
    "dropout_bits": (
        dropout_bits._dropout_bits,
        "seeds *i64, bits *u8",
        {"BLOCK": dropout_bits.BLOCK, "ROUNDS": dropout_bits.ROUNDS},
        dropout_bits.WARPS,
    ),
    "max_pool_backward": (
        max_pool_backward._max_pool_backward,
        "dy *bf16, offsets *i8, dx *bf16, C i32:16",
        {"KH": 3, "KW": 3, "SH": 2, "SW": 2, "PH": 1, "PW": 1, "TILES": 16, "CHANNELS": 64},
        max_pool_backward.WARPS,
    ),
    "flash_decoding parts": (
        flash_decoding._parts,
        "query *bf16, key *bf16, value *bf16, mask *i1, parts *fp32, query_column i32:1, "
        "key_row i32:16, key_column i32:1, value_row i32:16, value_column i32:1",
        HEAD,
        4,
    ),
    "flash_decoding together": (
        flash_decoding._together,
        "parts *fp32, result *bf16",
        {"SIZE": 64, "COUNT": 16},
        4,
    ),
}  # fmt: skip


def compile_kernel(kernel: Any, types: str, constants: dict[str, Any], warps: int) -> Any:
    """Compile one kernel, its pointers at multiples of 16 bytes."""
    given = dict(each.split(" ") for each in types.split(", "))
    signature, values, known = {}, dict(constants), {}
    for i, name in enumerate(kernel.arg_names):
        kind, _, factor = given.pop(name, "i32").partition(":")
        if factor == "1":
            values[name] = 1
        elif factor or kind.startswith("*"):
            known[(i,)] = [["tt.divisibility", 16]]
        signature[name] = "constexpr" if name in values else kind
    assert not given, f"no arguments: {given}"
    places = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    source = ASTSource(kernel, signature, places, known)
    return triton.compile(source, target=TARGET, options={"num_warps": warps})


def registers(cubin: bytes) -> int:
    """Return how many registers a thread takes."""
    (tool,) = Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"REG:(\d+)", said)[0])


def main() -> None:
    """Compile all."""
    found = {}
    for name, each in KERNELS.items():
        made = compile_kernel(*each)
        ptx = made.asm["ptx"]
        found[name] = {
            "loads": len(re.findall(r"ld\.global\S*\.v4", ptx)),
            "stores": len(re.findall(r"st\.global\S*\.v4", ptx)),
            "registers": registers(made.asm["cubin"]),
        }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
