"""The Triton kernels compile for an H100, on a machine without one, and access memory widely."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
WIDE = (
    "cross_entropy", "cross_entropy, all", "column_sums", "adamw", "sgd", "fp8_cast",
    "max_pool_backward",
)  # fmt: skip


def test_kernels_compile_with_16_byte_accesses():
    without = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fusion.compile_kernels"],
        capture_output=True, text=True, cwd=ROOT, env={**without, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [name for name in WIDE if not found[name]["loads"]] == []
    assert [n for n in WIDE if not found[n]["stores"]] == ["column_sums"], "a number a thread"
